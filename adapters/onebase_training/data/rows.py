"""Parse the shapes of a row into a chat, a text, or a choice between two of them.

Messages and tools are as chat templates take them, checked one by one. Every function raises RowError with
the field, as in `messages[2].content`.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from onebase_protocol.training import MEANT
from onebase_training.data.dataset import (
    KNOWN_FIELDS,
    LONGEST_LABEL,
    NO_REGRESSION,
    Chat,
    Labelled,
    Message,
    Parsed,
    PreferencePair,
    RowError,
    Task,
    Text,
    misspelled,
)
from onebase_training.data.files import parse_strict
from onebase_training.recipe import Method

_LONGEST_ITEM = 256 << 10
_REMEDIES = {
    "system": "put it into the prompt, or give the row as messages",
    "tools": "give the row as messages",
    "functions": "give the row as messages",
}


class RowFields:
    """Fields of one row that are not null. Records which ones were read.

    Every method raises RowError with the field. inside: prefix of the field's name there.
    """

    def __init__(self, row: Mapping[str, Any], inside: str = "") -> None:
        self.given = {key: value for key, value in row.items() if value is not None}
        self._inside = inside
        self._read: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self.given

    def is_text(self, key: str) -> bool:
        """Return True if a field exists and is a text."""
        return isinstance(self.given.get(key), str)

    def says(self, key: str) -> bool:
        """Return True if a field exists and is more than a blank text."""
        return key in self.given and not (self.is_text(key) and not self.given[key].strip())

    def read(self, key: str) -> Any:
        """Return a field as it is. It must exist."""
        if key not in self.given:
            meant = next((name for name in MEANT.get(key, ()) if name in self.given), "")
            hint = f"; did you mean {key} for {meant}?" if meant else ""
            raise RowError(f"{self._inside}{key}", f"missing{hint}")
        self._read.append(key)
        return self.given[key]

    def text(self, key: str, *, empty: bool = False) -> str:
        """Return a text; a blank one only if it may be `empty`."""
        value = self.read(key)
        if not isinstance(value, str):
            raise RowError(f"{self._inside}{key}", f"must be a text, not {type(value).__name__}")
        if not empty and not value.strip():
            raise RowError(f"{self._inside}{key}", "the text is empty")
        return value

    def messages(self, key: str) -> list[Message]:
        """Return a list of messages, each of them checked."""
        return check_messages(self.read(key), f"{self._inside}{key}")

    def tools(self) -> list[dict[str, Any]] | None:
        """Return the tools, or None; `functions` is OpenAI's older name for them."""
        if "functions" not in self:
            return check_tools(self.read("tools"), f"{self._inside}tools") if "tools" in self else None
        functions = self.read("functions")
        if "tools" in self and self.given["tools"]:
            raise RowError(f"{self._inside}functions", "the row has tools as well: leave one of the two out")
        if not isinstance(functions, list):
            raise RowError(f"{self._inside}functions", "must be a list of functions")
        for index, function in enumerate(functions):
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                where = f"{self._inside}functions[{index}]"
                raise RowError(where, 'a function is written {"name": ..., "parameters": ...}')
        return [plain_tool({"type": "function", "function": function}) for function in functions] or None

    def after_system(self, messages: list[Message]) -> list[Message]:
        """Return the messages after that of `system`, if the row has that field too."""
        if not self.says("system"):
            return messages
        system = self.text("system")
        if messages and _says_the_same(messages[0], system):
            return messages
        if any(message["role"] in ("system", "developer") for message in messages):
            raise RowError("system", "the messages have a system message already: leave one of the two out")
        return [{"role": "system", "content": system}, *messages]

    def check_spelling(self, names: Sequence[str]) -> None:
        """Raise RowError for an unknown field that looks like one of `names`."""
        for key in self.given:
            near = misspelled(key, names) if key not in KNOWN_FIELDS else None
            if near is not None and near not in self:
                raise RowError(key[:60], f"an unknown field: did you mean {near}?")

    def check_nothing_lost(self, parsed: Parsed) -> None:
        """Raise RowError for a system message or tools that were not read, unless they are part of what was
        read."""
        texts = _texts(parsed)
        for key, remedy in _REMEDIES.items():
            if key not in self or key in self._read or _is_part_of(self.given[key], texts):
                continue
            if key in ("tools", "functions") and self.is_text(key):
                continue  # a column of that name: tools are a list
            others = " and ".join(dict.fromkeys(self._read))
            raise RowError(key, f"would be lost next to {others}: {remedy}")


def _says_the_same(message: Message, system: str) -> bool:
    text: str = message["content"]
    return message["role"] in ("system", "developer") and text.strip() == system.strip()


def _texts(parsed: Parsed) -> list[str]:
    if isinstance(parsed, PreferencePair):
        return [*_texts(parsed.chosen), *_texts(parsed.rejected)]
    if isinstance(parsed, Labelled | Task):
        return _texts(parsed.row)
    if isinstance(parsed, Chat):
        return [message["content"] for message in parsed.messages]
    return [parsed.prompt or "", parsed.reply]


def _is_part_of(value: Any, texts: Sequence[str]) -> bool:
    """Return True if a field is empty, or a text that is part of what was read: a template may have put it
    there."""
    if isinstance(value, str):
        return any(value.strip() in text for text in texts)
    return not value


_SUPERVISED_SHAPES = "messages, prompt and completion, instruction and output, or text"
_LABELLED_SHAPES = "text (or prompt, or messages) and label"
_DPO_SHAPES = "chosen and rejected (with prompt), or input, preferred_output and non_preferred_output"


def parse_row(row: Mapping[str, Any], method: Method) -> Parsed:
    """Parse a row by its keys.

    If a row has several shapes, the first counts: messages, prompt and completion, instruction, text. Other
    keys are ignored; misspelled ones are refused, and so is a system message that would be lost, or tools.
    """
    fields = RowFields(row)
    parsers = {
        "dpo": parse_preference,
        "classification": _labelled,
        "supervised": _supervised,
        "reinforcement": _task,
    }
    parsed = parsers[method](fields)
    if parsed is None:
        raise RowError("", _unknown_shape(fields.given, method))
    fields.check_nothing_lost(parsed)
    return parsed


def _supervised(row: RowFields) -> Parsed | None:
    if "messages" in row:
        row.check_spelling(("messages", "tools", "system"))
        return make_chat(row.after_system(row.messages("messages")), row.tools(), "messages")
    if "completion" in row or ("prompt" in row and "chosen" not in row):
        return _completion(row)
    if "instruction" in row:
        return _instruction(row)
    if "text" in row:
        return Text(None, row.text("text"))
    return None


def _completion(row: RowFields) -> Chat | Text:
    row.check_spelling(("prompt", "completion", "tools", "system"))
    prompt, completion = row.read("prompt"), row.read("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        before = row.after_system(row.messages("prompt"))
        messages = [*before, *row.messages("completion")]
        return make_chat(messages, row.tools(), "completion", first=len(before))
    if isinstance(prompt, list) != isinstance(completion, list):
        raise RowError("completion", "prompt and completion are both texts or both lists of messages")
    return Text(row.text("prompt", empty=True), row.text("completion"))


def _instruction(row: RowFields) -> Chat:
    row.check_spelling(("instruction", "input", "output", "system", "tools"))
    question, output = row.text("instruction"), row.text("output")
    if "input" in row and (more := row.text("input", empty=True)).strip():
        question = f"{question}\n\n{more}"
    messages: list[Message] = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": output},
    ]
    return make_chat(row.after_system(messages), row.tools(), "output")


LABEL_FIELDS = ("label", "labels", "text_pair")
"""Fields of a row with a label besides KNOWN_FIELDS; the last two are refused."""
_SEVERAL = "several labels of one row (multi-label) are not learned: give one"


def _labelled(row: RowFields) -> Labelled | None:
    if "text_pair" in row:
        raise RowError("text_pair", "pairs of texts are not read: write both into text, as will be asked")
    if "label" not in row and "labels" in row:
        raise RowError("labels", f"{_SEVERAL}, as label")
    if "messages" in row:
        row.check_spelling(("messages", "system", "label"))
        messages = row.after_system(row.messages("messages"))
        return Labelled(
            Chat([{k: v for k, v in one.items() if k != "weight"} for one in messages], None, ()), _label(row)
        )
    for name in ("text", "prompt"):
        if name in row:
            row.check_spelling((name, "label"))
            return Labelled(Text(None, row.text(name)), _label(row))
    return None


_TASK_SHAPES = "messages that end with the user's, or prompt, with fields for the grader"


def _task(row: RowFields) -> Task | None:
    if "messages" in row:
        row.check_spelling(("messages", "tools", "system"))
        messages = row.after_system(row.messages("messages"))
        if not messages or messages[-1]["role"] == "assistant":
            reason = "the model is to write the last reply: leave it out, and give what is right as a field"
            raise RowError(f"messages[{max(0, len(messages) - 1)}]", reason)
        plain = [{key: value for key, value in one.items() if key != "weight"} for one in messages]
        return Task(Chat(plain, row.tools(), ()), _item(row))
    if "prompt" not in row:
        return None
    row.check_spelling(("prompt", "tools", "system"))
    if isinstance(row.given["prompt"], list):
        return Task(Chat(row.after_system(row.messages("prompt")), row.tools(), ()), _item(row))
    return Task(Text(row.text("prompt"), ""), _item(row))


def _item(row: RowFields) -> str:
    """Return the row as JSON on one line, as a grader reads it. Raises RowError."""
    try:
        text = json.dumps(row.given, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError("", f"the grader cannot read the row: {error}") from error
    if len(text) > _LONGEST_ITEM:
        raise RowError("", f"the row has {len(text)} characters: a grader reads {_LONGEST_ITEM} at most")
    return text


def _label(row: RowFields) -> str:
    """Return the row's label as a text. Raises RowError."""
    value = row.read("label")
    if isinstance(value, list | dict):
        raise RowError("label", _SEVERAL)
    if isinstance(value, float):
        raise RowError("label", f"{value:g} is no whole number: {NO_REGRESSION}")
    label = str(value).lower() if isinstance(value, bool) else str(value).strip()
    if not label:
        raise RowError("label", "the text is empty")
    if len(label) > LONGEST_LABEL:
        raise RowError("label", f"it has {len(label)} characters: write {LONGEST_LABEL} at most")
    if not label.isprintable():
        raise RowError("label", "it has characters that cannot be printed: write a name on one line")
    return label


def _unknown_shape(row: Mapping[str, Any], method: Method) -> str:
    keys = ", ".join(str(key)[:40] for key in list(row)[:8]) or "nothing"
    if method == "supervised" and ("chosen" in row or "preferred_output" in row):
        return "a preference row, but the method is supervised: set method to dpo, or give messages"
    if method == "dpo" and any(key in row for key in ("messages", "completion", "instruction", "text")):
        return f"the method is dpo, which takes {_DPO_SHAPES}; for this row set method to supervised"
    if "conversations" in row:
        return "conversations is not read: write it as messages, each with role and content"
    shapes = {
        "dpo": _DPO_SHAPES,
        "classification": _LABELLED_SHAPES,
        "supervised": _SUPERVISED_SHAPES,
        "reinforcement": _TASK_SHAPES,
    }
    wanted = shapes[method]
    return f"the row has {keys}; give {wanted}"


_NO_PROMPT = "begin differently, and there is no prompt: name it prompt, or question if it is a chat's"
_NO_SPACES = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
"""Scripts without spaces between words."""


def parse_preference(row: RowFields) -> PreferencePair | None:
    """Return the row as a choice; None if it does not have two replies."""
    if "preferred_output" in row or "non_preferred_output" in row:
        return _openai_choice(row)
    if "chosen" not in row and "rejected" not in row:
        return None
    asked = () if "prompt" in row else ("question",)
    row.check_spelling(("prompt", *asked, "system", "chosen", "rejected", "tools"))
    row.read("chosen")
    row.read("rejected")
    if not (row.is_text("chosen") and row.is_text("rejected")):
        return _chat_choice(row, row.messages("chosen"), row.messages("rejected"))
    asked_apart = "question" in row and "prompt" not in row
    if asked_apart or ("prompt" in row and row.says("system")):
        sides = [[{"role": "assistant", "content": row.text(name)}] for name in ("chosen", "rejected")]
        return _chat_choice(row, *sides)
    return _text_choice(row)


def _openai_choice(row: RowFields) -> PreferencePair:
    row.check_spelling(("input", "preferred_output", "non_preferred_output"))
    given = row.read("input")
    names = ("preferred_output", "non_preferred_output")
    for name in names:
        row.read(name)
    if not isinstance(given, dict):
        raise RowError("input", "must be an object with messages")
    fields = RowFields(given, "input.")
    prompt, tools = fields.messages("messages"), fields.tools()
    return _choice(prompt, [row.messages(name) for name in names], tools, names)


def _chat_choice(row: RowFields, chosen: list[Message], rejected: list[Message]) -> PreferencePair:
    shared = _shared_prefix(chosen, rejected)
    given = _given_prompt(row, shared)
    prompt = shared if given is None or _ends_in(shared, given) else given
    sides = [_reply("chosen", chosen, prompt), _reply("rejected", rejected, prompt)]
    return _choice(row.after_system(prompt) if prompt else [], sides, row.tools(), ("chosen", "rejected"))


def _reply(name: str, messages: list[Message], prompt: list[Message]) -> list[Message]:
    """Return the messages after the prompt, which some data sets repeat in both conversations."""
    reply = messages[len(prompt) :] if _same(messages[: len(prompt)], prompt) else messages
    asked = bool(prompt) and prompt[-1]["role"] == "user"
    if asked and reply and reply[0]["role"] in ("system", "developer", "user"):
        raise RowError("prompt", f"{name} begins with another one: leave prompt out, or make both the same")
    return reply


def _given_prompt(row: RowFields, shared: Sequence[Message]) -> list[Message] | None:
    """Return the prompt given with the replies; a question only if the replies begin with none."""
    if row.is_text("prompt"):
        return [{"role": "user", "content": row.text("prompt")}]
    if "prompt" in row:
        return row.messages("prompt")
    if "question" in row and not shared:
        return [{"role": "user", "content": row.text("question")}]
    return None


def _choice(
    prompt: list[Message],
    sides: Sequence[list[Message]],
    tools: list[dict[str, Any]] | None,
    names: tuple[str, str],
) -> PreferencePair:
    if not prompt:
        raise RowError("prompt", f"{names[0]} and {names[1]} {_NO_PROMPT}")
    if sides[0] == sides[1]:
        raise RowError(names[1], f"the same as {names[0]}: there is nothing to prefer")
    made = []
    for name, reply in zip(names, sides, strict=True):
        if not reply or reply[-1]["role"] != "assistant":
            raise RowError(name, "the last message must be the assistant's reply to the prompt")
        made.append(make_chat([*prompt, *reply], tools, name, first=len(prompt)))
    return PreferencePair(*made)


def _text_choice(row: RowFields) -> PreferencePair:
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if chosen == rejected:
        raise RowError("rejected", "the same as chosen: there is nothing to prefer")
    if "prompt" in row:
        prompt = row.text("prompt")
        if _begins_with(chosen, prompt) and _begins_with(rejected, prompt):
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    else:
        for name in ("input", "instruction"):
            if row.says(name):
                raise RowError(name, "would be lost: name it prompt, or question if it is a chat's")
        cut = _shared_text(chosen, rejected)
        prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
        if not prompt:
            raise RowError("prompt", f"chosen and rejected {_NO_PROMPT}")
    for name, reply in (("chosen", chosen), ("rejected", rejected)):
        if not reply.strip():
            raise RowError(name, "no reply is left after the prompt")
    return PreferencePair(Text(prompt, chosen), Text(prompt, rejected))


def _shared_prefix(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    count = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        count += 1
    # A conversation that continues the other still needs a reply of its own.
    return chosen[: min(count, len(chosen) - 1, len(rejected) - 1)]


def _ends_in(messages: Sequence[Message], last: Sequence[Message]) -> bool:
    return len(last) <= len(messages) and _same(messages[len(messages) - len(last) :], last)


def _same(some: Sequence[Message], others: Sequence[Message]) -> bool:
    """Return True if messages are equal up to white space at their ends."""

    def stripped(message: Message) -> Message:
        return {**message, "content": message["content"].strip()}

    return list(map(stripped, some)) == list(map(stripped, others))


def _begins_with(text: str, prompt: str) -> bool:
    """Return True if a text repeats the prompt: "A" is not the beginning of "Apples"."""
    if not text.startswith(prompt):
        return False
    last, following = prompt[-1:], text[len(prompt) : len(prompt) + 1]
    return not (last.isalnum() and following.isalnum()) or bool(_NO_SPACES.match(last))


def _shared_text(one: str, other: str) -> int:
    """Return the end of the shared beginning: before the first word that differs, and its space."""
    pairs = zip(one, other, strict=False)
    cut = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
    while cut and not one[cut - 1].isspace():
        cut -= 1
    return cut - 1 if cut and one[cut - 1] == " " else cut


_NEVER_PROSE = ("messages", "tools", "functions", "preferred_output", "non_preferred_output")
_PROSE_OR_MESSAGES = (("prompt", "completion"), ("chosen", "rejected"))


def unfold(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row, with JSON texts that mean messages or tools replaced by the lists.

    A text to learn may be JSON as well: prompt and completion are messages only if both of them are, as are
    chosen and rejected, and then the prompt that belongs to these. A text that is not JSON stays.
    """
    made = dict(row)
    for key in _NEVER_PROSE:
        if not isinstance(text := made.get(key), str):
            continue
        if not text.strip():
            made[key] = None
        elif (found := _json(text)) is not None:
            made[key] = found
    for pair in _PROSE_OR_MESSAGES:
        both = {key: _messages(made.get(key)) for key in pair}
        if all(both.values()):
            made |= both
    if isinstance(made.get("chosen"), list) and (prompt := _messages(made.get("prompt"))):
        made["prompt"] = prompt
    if "preferred_output" in made and isinstance(given := _json(made.get("input")), dict):
        made["input"] = unfold(given)
    return made


def _messages(value: Any) -> list[Any] | None:
    """Return the messages in a field; None if it holds anything else."""
    found = _json(value)
    if not isinstance(found, list):
        return None
    return found if all(map(_is_message, found)) else None


def _is_message(value: Any) -> bool:
    """Return True if it is meant as a message; its role is checked later."""
    known = isinstance(value, dict) and isinstance(value.get("role"), str)
    return known and ("content" in value or "tool_calls" in value)


def _json(value: Any) -> Any:
    """Return the value of a JSON text; None for other text; anything else as it is."""
    if not isinstance(value, str):
        return value
    if not value.lstrip().startswith(("[", "{")):
        return None
    try:
        return parse_strict(value)
    except RowError:
        return None


ROLES = ("system", "developer", "user", "assistant", "tool")
MOST_MESSAGES = 4096

_KEYS = (
    "role",
    "content",
    "weight",
    "name",
    "tool_calls",
    "tool_call_id",
    "function_call",
    "refusal",
    "reasoning_content",
    "reasoning",
    "thinking",
)
_MEDIA = {
    "image_url": "an image", "input_image": "an image", "input_audio": "sound", "file": "a file",
    "video_url": "a video",
}  # fmt: skip
"""Names of a content's parts that are not text, for messages."""


def check_messages(value: Any, field: str) -> list[Message]:
    """Return messages with texts as content, without unknown keys. Raises RowError, also for a misspelled
    key."""
    if not isinstance(value, list):
        raise RowError(field, "must be a list of messages, each with role and content")
    if not value:
        raise RowError(field, "the list of messages is empty")
    if len(value) > MOST_MESSAGES:
        raise RowError(field, f"{len(value)} messages are too many: at most {MOST_MESSAGES}")
    made: list[Message] = []
    calls = 0
    for index, message in enumerate(value):
        checked = _message(message, f"{field}[{index}]")
        if "function_call" in checked:
            calls += 1
            call = {"id": _call_id(calls), "type": "function", **checked.pop("function_call")}
            checked["tool_calls"] = [call]
        elif checked["role"] == "function":
            checked |= {"role": "tool", "tool_call_id": _call_id(max(1, calls))}
        made.append(checked)
    return made


def _call_id(number: int) -> str:
    """Return an id for a call of an older row, which has none, of the length that Mistral's templates
    require."""
    return f"call{number:05d}"


def check_tools(value: Any, field: str) -> list[dict[str, Any]] | None:
    """Return tools as OpenAI writes them: each {"type": "function", "function": {"name": ...}}; None for
    none.

    Raises RowError.
    """
    if not isinstance(value, list):
        raise RowError(field, "must be a list of tools")
    for index, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            wanted = '{"type": "function", "function": {"name": ...}}'
            raise RowError(f"{field}[{index}]", f"a tool is written {wanted}")
    return [plain_tool(tool) for tool in value] or None


def _message(message: Any, field: str) -> Message:
    if not isinstance(message, dict):
        raise RowError(field, "a message is an object with role and content")
    given = {key: value for key, value in message.items() if value is not None}
    if given.get("tool_calls") == []:
        # Tables write this, and clients that fill in what a message lacks.
        del given["tool_calls"]
    _check_keys(given, field)
    role = given.get("role")
    if role is None:
        raise RowError(f"{field}.role", "missing")
    if role not in ROLES and role != "function":
        raise RowError(f"{field}.role", f"{str(role)[:40]!r} is not a role: use {', '.join(ROLES)}")
    role = "system" if role == "developer" else role  # the newer word, which templates do not know
    made: Message = {"role": role, "content": _content(given, field)}
    _take_weight(given, made, field)
    for key in ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking"):
        if key in given:
            if not isinstance(given[key], str):
                raise RowError(f"{field}.{key}", "must be a text")
            made[key] = given[key]
    if "tool_calls" in given:
        made["tool_calls"] = _tool_calls(given["tool_calls"], f"{field}.tool_calls", role)
    if "function_call" in given:
        made["function_call"] = _function_call(given, f"{field}.function_call", role)
    called = made.get("tool_calls") or made.get("function_call")
    if role == "assistant" and not made["content"].strip() and not called:
        raise RowError(f"{field}.content", "the reply is empty")
    return made


def _check_keys(given: Message, field: str) -> None:
    for key in given:
        near = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.75) if key not in _KEYS else []
        if near and near[0] not in given:
            raise RowError(f"{field}.{key[:60]}", f"an unknown field: did you mean {near[0]}?")


def _content(given: Message, field: str) -> str:
    content = given.get("content")
    if content is None:
        if isinstance(given.get("refusal"), str) and given["role"] == "assistant":
            return str(given["refusal"])
        if given.get("tool_calls") or given.get("function_call"):
            return ""
        raise RowError(f"{field}.content", "missing")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError(f"{field}.content", f"must be a text, not {type(content).__name__}")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(kind) if kind in ("text", "refusal") else None
        if isinstance(kind, str) and kind in _MEDIA:
            raise RowError(
                f"{field}.content[{index}]",
                f"{_MEDIA[kind]} ({kind}) cannot be learned, only text: leave the row out, or say in words "
                "what it shows",
            )
        if not isinstance(text, str):
            raise RowError(
                f"{field}.content[{index}]", "only parts of type text, each with a text, can be learned"
            )
        texts.append(text)
    return "".join(texts)


def _take_weight(given: Message, made: Message, field: str) -> None:
    if "weight" not in given:
        return
    weight = given["weight"]
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(f"{field}.weight", "the weight is 0 (not learned) or 1")
    if weight and given["role"] != "assistant":
        raise RowError(f"{field}.weight", "only the assistant's messages can have weight 1")
    made["weight"] = int(weight)


def _tool_calls(value: Any, field: str, role: str) -> list[dict[str, Any]]:
    if role != "assistant":
        raise RowError(field, "only the assistant's messages have tool_calls")
    if not isinstance(value, list):
        raise RowError(field, "must be a list of calls")
    return [_tool_call(call, f"{field}[{index}]") for index, call in enumerate(value)]


def _function_call(given: Message, field: str, role: str) -> dict[str, Any]:
    """Convert a call in OpenAI's format before tool_calls into one of those. Raises RowError."""
    if role != "assistant":
        raise RowError(field, "only the assistant's messages have a function_call")
    if given.get("tool_calls"):
        raise RowError(field, "the message has tool_calls as well: leave one of the two out")
    if not isinstance(given["function_call"], dict):
        raise RowError(field, 'a call is written {"name": ..., "arguments": ...}')
    try:
        return _tool_call({"function": given["function_call"]}, field)
    except RowError as error:
        if error.field == field:
            raise RowError(field, 'a call is written {"name": ..., "arguments": ...}') from None
        raise RowError(error.field.replace(".function.arguments", ".arguments"), error.reason) from None


def _tool_call(call: Any, field: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(field, 'a call is written {"function": {"name": ..., "arguments": ...}}')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        # OpenAI writes the arguments as JSON text; templates write them as JSON themselves.
        try:
            arguments = parse_strict(arguments or "{}")
        except RowError as error:
            raise RowError(f"{field}.function.arguments", error.reason) from None
    if not isinstance(arguments, dict):
        raise RowError(f"{field}.function.arguments", "must be an object")
    return {**_without_nulls(call), "function": {**_without_nulls(function), "arguments": arguments}}


def plain_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool as chat templates receive it, in training and in serving: without nulls, which tables
    fill in, and without `strict`, which concerns how calls are sampled."""
    function = {key: value for key, value in tool["function"].items() if key != "strict"}
    made: dict[str, Any] = _without_nulls({**tool, "function": function})
    return made


def _without_nulls(value: Any) -> Any:
    """Remove nulls, which tables fill in for what a row lacks and templates would write out."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    return value


_NO_REPLY = (
    "there is no message of the assistant. Add the reply to learn; prompts for graders (reinforcement "
    "fine-tuning), which have none, are not trained on here"
)


def make_chat(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, field: str, *, first: int = 0
) -> Chat:
    """Return a chat in which the replies from message `first` on are learned, except those of weight 0.

    Raises RowError for `field` if that leaves nothing.
    """
    plain, supervised = [], []
    for index, message in enumerate(messages):
        weight = message.get("weight", 1)
        plain.append({key: value for key, value in message.items() if key != "weight"})
        if message["role"] == "assistant" and index >= first and weight:
            supervised.append(index)
    if not supervised:
        replies = any(message["role"] == "assistant" for message in messages)
        why = "every reply has weight 0" if replies else _NO_REPLY
        raise RowError(field, f"nothing to learn: {why}")
    return Chat(plain, tools, supervised)
