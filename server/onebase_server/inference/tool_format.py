"""Formats in which bases write tool calls, and the grammar of such an answer; `tool_call_parser.py` reads
them.

The base's own chat template says how a call is written: one with marks in it is rendered, and what stands
around the marks is the format. So there is no list of model families, and a template of one's own is served
like any other; so are adapters that were trained on rows with tools, which the same template writes.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import Any, Literal

from onebase_engine.engine.grammar_link import WHITESPACE
from onebase_engine.engine.messages import Grammar
from onebase_server.inference.json_schema import closed

Render = Callable[..., str]
"""A template: messages, tools (keyword) and generation (keyword) to text."""
Schema = Mapping[str, Any]

MOST_CHARACTERS = 512 * 1024
"""Largest length of a grammar, in characters."""
HOLE = "\0"
"""Stands for a call's id where a template writes it."""
COUNT = "\1"
"""Stands for a call's number where a template counts the calls."""
ID_CHARACTERS = 9
"""Length of a call's id, in characters: Mistral's templates accept no other."""
_NAMES = ("alphaprobe", "betaprobe", "deltaprobe")
_IDS = ("probeid01", "probeid02", "probeid03")
_NAMING = ("functions.", ":")
"""Text before and after the name in an id that names its call and counts it, as Kimi K2's do."""
_NAMING_IDS = tuple(f"{_NAMING[0]}{name}{_NAMING[1]}{number}" for number, name in enumerate(_NAMES))
_KEYS = ("probekey", "probenumber")
_CONTENT, _QUESTION, _VALUE = "probecontent", "probequestion", "probevalue"
_NUMBER = 7
_THOUGHT = re.compile("think|thought|reason|channel", re.IGNORECASE)
"""Pattern of the names of control tokens that may be in a text that calls no tool."""
ToolChoice = Literal["auto", "required"]


@dataclass(frozen=True)
class ArgumentFormat:
    """Arguments one by one: opening KEY middle VALUE closing. A text is written as it is, others as JSON."""

    opening: str
    middle: str
    closing: str
    other: str = ""
    """Stands in the place of `middle` before a value that is no text; empty if the two are the same."""


@dataclass(frozen=True)
class Bare:
    """Arguments as an object without quotes around its keys, and with such a mark around texts."""

    mark: str


@dataclass(frozen=True)
class Pythonic:
    """Arguments as a call in Python has them: KEY=VALUE, ...). Values are Python's, or JSON's."""


@dataclass(frozen=True)
class ToolFormat:
    """An answer with calls: opening NAME middle ARGUMENTS [between NAME middle ARGUMENTS]* closing.

    Control tokens are written by their own texts.
    """

    opening: str
    middle: str
    between: str | None
    """Text between two calls; None if the template writes one call in an answer at most."""
    closing: str
    trigger: str
    """Beginning of `opening` that no other text has; empty if calls begin the answer or there are none."""
    arguments: ArgumentFormat | Bare | Pythonic | None
    """Format of arguments; None if they are one JSON object."""
    controls: Mapping[str, int]
    """Control tokens that the format has in it, and those of thinking, by their texts."""

    @property
    def shown(self) -> frozenset[int]:
        """Control tokens without which calls cannot be read."""
        parts = [self.opening, self.middle, self.between or "", self.closing]
        if self.arguments is not None:
            parts += vars(self.arguments).values()
        return frozenset(
            token for name, token in self.controls.items() if any(name in part for part in parts)
        )

    @property
    def parallel(self) -> bool:
        return self.between is not None

    @property
    def ids_name_calls(self) -> bool:
        """Return True if an answer writes each call's name and number as its id, by which the call's result
        is known in the next prompt."""
        return self.opening.endswith(_NAMING[0]) and self.middle.startswith(_NAMING[1] + COUNT)

    def naming_id(self, name: str, number: str) -> str:
        return f"{_NAMING[0]}{name}{_NAMING[1]}{number}"

    def id_of(self, call: str) -> str:
        """Return the id of a call by its place in the answer, so that a resumed stream has the same id."""
        digest = blake2b(call.encode(), digest_size=12)
        if any(HOLE in part for part in (self.opening, self.middle, self.between or "", self.closing)):
            letters, left = string.ascii_letters + string.digits, int(digest.hexdigest(), 16)
            size = len(letters)
            return "".join(letters[left // size**place % size] for place in range(ID_CHARACTERS))
        return f"call_{digest.hexdigest()}"

    # ---- the grammar ------------------------------------------------------------------------

    def grammar(
        self,
        tools: Mapping[str, ToolDefinition],
        choice: ToolChoice,
        *,
        parallel: bool,
        content: Schema | None = None,
    ) -> Grammar:
        """Keep an answer to calls of these tools, by their schemas, or under `auto` to text without calls.

        content: what an answer without calls must be; None is any text. Raises ValueError for what a strict
        tool asks for and this format cannot keep to, for names of arguments that it cannot write, for tools
        that are too large, and for content where calls begin like it.
        """
        if content is not None and not self.trigger and choice == "auto":
            raise ValueError("response_format goes without tools here: this base's calls begin like JSON")
        again = f"({self._literal(self.between)} call)*" if parallel and self.between is not None else ""
        rules = [
            f"calls: call {again} {self._literal(self.closing)} /[ \\n]{{0,2}}/",
            f"call: {' | '.join(f'call_{index}' for index in range(len(tools)))}",
        ]
        for index, (name, tool) in enumerate(tools.items()):
            rules.append(f"call_{index}: {_quoted(name)} {self._literal(self.middle)} args_{index}")
            rules += self._arguments(f"args_{index}", tool)
        return self._checked([*self._start(choice, content), *rules])

    @staticmethod
    def _checked(rules: Sequence[str]) -> Grammar:
        """Return the grammar of these rules. Raises ValueError if it is too large."""
        text = "\n".join(["%llguidance {}", *rules])
        if len(text) > MOST_CHARACTERS:
            raise ValueError(
                f"they make a grammar of {len(text)} characters; at most {MOST_CHARACTERS} are taken"
            )
        return Grammar("lark", text)

    def _start(self, choice: ToolChoice, content: Schema | None) -> list[str]:
        opening = self._literal(self.opening)
        if choice == "required":
            return [f"start: {opening} calls"]
        if content is not None:
            return [f"start: content | {opening} calls", f"content: %json {compact(content)}"]
        if not self.trigger:
            # What begins otherwise is text. The lexer would go on with text behind a piece of the opening.
            if not any(name in self.opening for name in self.controls):
                opening = f"/{_pattern(self.opening)}/"
            return [
                f"start: TEXT | {opening} calls",
                f"TEXT: /(?s:.*)/ & ~(/{_pattern(self.opening)}(?s:.*)/)",
            ]
        thoughts = [f"<[{token}]>" for name, token in self.controls.items() if _THOUGHT.search(name)]
        before = f"(TEXT ({' | '.join(thoughts)}))*" if thoughts else ""
        rest = self._literal(self.opening.removeprefix(self.trigger))
        # Written letter by letter, what triggers a call is one as well: the reader sees no difference.
        ways = ["TEXT", f"head {rest} calls"]
        if self.trigger in self.controls:
            ways.append(f"TEXT <[{self.controls[self.trigger]}]> {rest} calls")
        return [
            f"start: {before} ({' | '.join(ways)})",
            f"head[lazy]: TEXT {_quoted(self.trigger)}",
            "TEXT: /(?s:.*)/",
        ]

    def _arguments(self, rule: str, tool: ToolDefinition) -> list[str]:
        made = self.arguments
        if made is None:
            return [f"{rule}: %json {compact(tool.schema, lenient=not tool.strict)}"]
        if tool.strict and (over := tool.schema.keys() & (_NOT_BARE | {"anyOf", "oneOf", "$ref"})):
            raise ValueError(_cannot_keep(min(over)))
        if isinstance(made, Bare):
            return _BareGrammar(rule, self._literal(made.mark), tool).rules()
        if isinstance(made, Pythonic):
            return _PythonGrammar(rule, "", tool).rules()
        rules, written = [], []
        for number, (key, schema) in enumerate(tool.properties.items()):
            _check_name(key)
            if tool.strict and "string" in kinds(schema) and (over := schema.keys() & _NOT_AS_IT_IS):
                raise ValueError(_cannot_keep(min(over)))
            value = f"{rule}_{number}"
            rules += self._value(value, made, {**schema, **tool.definitions}, lenient=not tool.strict)
            one = f"{self._literal(made.opening)} {_quoted(key)} {value}"
            written.append(one if key in tool.required else f"({one})?")
        return [f"{rule}: {' '.join(written) or _quoted('')}", *rules]

    def _value(self, rule: str, made: ArgumentFormat, schema: Schema, *, lenient: bool) -> list[str]:
        """Return rules for what follows the name of an argument, up to its end."""
        middle, other = self._literal(made.middle), self._literal(made.other or made.middle)
        closing = self._literal(made.closing)
        as_json = [
            f"{rule}_json: {other} {rule}_value {closing}",
            f"{rule}_value: %json {compact(schema, lenient=lenient)}",
        ]
        if "string" not in kinds(schema):
            return [f"{rule}: {rule}_json", *as_json]
        if choices := schema.get("enum"):
            written = (
                f"{middle} {_quoted(one)}" if isinstance(one, str) else f"{other} {_quoted(json.dumps(one))}"
                for one in choices
            )
            return [f"{rule}: ({' | '.join(written)}) {closing}"]
        rules = [f"{rule}_text[lazy]: /(?s:.*)/ {_quoted(made.closing)}"]
        ways = [f"{middle} {rule}_text"]
        control = min(
            (name for name in self.controls if name in made.closing), key=made.closing.find, default=""
        )
        if control:  # it also ends letter by letter, for the reader sees no difference
            before, _, after = made.closing.partition(control)
            rest = self._literal(control + after)
            ways.append(f"{middle} /(?s:.*){_pattern(before)}/ {rest}")
        if made.other and kinds(schema) > {"string"}:
            ways.append(f"{rule}_json")
            rules += as_json
        return [f"{rule}: {' | '.join(ways)}", *rules]

    def _literal(self, text: str | None) -> str:
        """Return the text as a grammar writes it, with control tokens by id."""
        names = sorted((name for name in self.controls if name), key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, [*names, *_HOLES]))})", text or "")
        return " ".join(
            f"<[{self.controls[part]}]>"
            if part in self.controls
            else f"/{_HOLES[part]}/"
            if part in _HOLES
            else _quoted(part)
            for part in parts
            if part
        )


@dataclass(frozen=True)
class ToolDefinition:
    """A function that may be called. schema: of its arguments, which are an object."""

    name: str
    schema: Schema
    strict: bool = False

    @property
    def properties(self) -> Mapping[str, Schema]:
        """Schemas of the arguments, by name."""
        return {key: self.resolved(value) for key, value in (self.schema.get("properties") or {}).items()}

    @property
    def required(self) -> Sequence[str]:
        return self.schema.get("required") or ()

    @property
    def definitions(self) -> Schema:
        return {key: self.schema[key] for key in ("$defs", "definitions") if key in self.schema}

    def resolved(self, schema: Any) -> Schema:
        """Return the schema that a reference stands for; one that says nothing where that is not found."""
        for _ in range(_MOST_REFERENCES):
            if not isinstance(schema, Mapping) or "$ref" not in schema:
                break
            target: Any = self.schema
            for step in str(schema["$ref"]).removeprefix("#").split("/")[1:]:
                target = target.get(step) if isinstance(target, Mapping) else None
            schema = target
        return schema if isinstance(schema, Mapping) else {}


_MOST_REFERENCES = 32


def kinds(schema: Schema) -> frozenset[str]:
    """Return JSON's names of the types that a value may have; all where the schema does not say."""
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return frozenset("string" if isinstance(value, str) else "other" for value in values)
    if ways := schema.get("anyOf") or schema.get("oneOf"):
        return frozenset().union(*(kinds(way) for way in ways if isinstance(way, Mapping)))
    found = schema.get("type", ("string", "other"))
    return frozenset([found] if isinstance(found, str) else found)


NO_ARGUMENTS: Schema = {"type": "object", "properties": {}, "additionalProperties": False}
"""The schema of a function that names no parameters."""


def compact(schema: Schema, *, lenient: bool = False) -> str:
    options = {"whitespace_pattern": WHITESPACE} | ({"lenient": True} if lenient else {})
    return json.dumps({**closed(schema), "x-guidance": options})


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _pattern(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_ ]", lambda found: _HOLES.get(found[0]) or f"\\x{{{ord(found[0]):x}}}", text)


_HOLES = {HOLE: f"[a-zA-Z0-9]{{{ID_CHARACTERS}}}", COUNT: "[0-9]{1,6}"}
"""Patterns of what is written in the place of a hole."""


class _BareGrammar:
    """Rules for arguments with bare keys, in the order of the alphabet, as templates write them."""

    comma = '","'
    true, false, null = '"true"', '"false"', '"null"'

    def __init__(self, rule: str, mark: str, tool: ToolDefinition) -> None:
        self._rule = rule
        self._mark = mark
        self._tool = tool
        self._names: dict[str, str] = {}
        self._rules: dict[str, str] = {}

    def rules(self) -> list[str]:
        """Raises ValueError for what a strict tool asks for and this cannot keep to."""
        rule = self._rule
        text = "/(?s:.*)/"
        if self._mark.startswith("<["):
            self._rules[f"{rule}_text"] = f"{self._mark} {text} {self._mark}"
        else:
            self._rules[f"{rule}_text"] = f"{self._mark} {rule}_rest"
            self._rules[f"{rule}_rest[lazy]"] = f"{text} {self._mark}"
        self._rules[f"{rule}_any"] = " | ".join(
            (
                f"{rule}_text",
                _NUMBER_RULE,
                '"true" | "false" | "null"',
                f"{rule}_object",
                self._list(f"{rule}_any"),
            )
        )
        pair = f'/[^:,{{}}\\[\\]\\s]+/ ":" {rule}_any'
        self._rules[f"{rule}_object"] = f'"{{" ({pair} ("," {pair})*)? "}}"'
        self._rules[rule] = self._value({**self._tool.schema, "type": "object"})
        return [f"{name}: {made}" for name, made in self._rules.items()]

    def _value(self, schema: Any) -> str:
        if not isinstance(schema, Mapping):
            return f"{self._rule}_any"
        if self._tool.strict and (over := schema.keys() & _NOT_BARE):
            raise ValueError(_cannot_keep(min(over)))
        if "$ref" in schema:
            return self._reference(str(schema["$ref"]))
        if "enum" in schema or "const" in schema:
            return self._either(map(self._constant, schema.get("enum", [schema.get("const")])))
        if ways := schema.get("anyOf") or schema.get("oneOf"):
            return self._either(map(self._value, ways))
        kinds = schema.get("type", [])
        return self._either(
            self._kind(kind, schema) for kind in ([kinds] if isinstance(kinds, str) else kinds)
        )

    def _either(self, ways: Iterable[str]) -> str:
        return f"({' | '.join(ways) or f'{self._rule}_any'})"

    def _kind(self, kind: str, schema: Schema) -> str:
        if kind == "object":
            return self._object(schema) if schema.get("properties") else f"{self._rule}_object"
        if kind == "array":
            return self._list(self._value(schema.get("items")))
        known = {
            "string": f"{self._rule}_text",
            "integer": "/-?(0|[1-9][0-9]*)/",
            "number": _NUMBER_RULE,
            "boolean": f"({self.true} | {self.false})",
            "null": f"({self.null})",
        }
        return known.get(kind, f"{self._rule}_any")

    def _list(self, item: str) -> str:
        if " " in item:  # written once: lists of lists would double it at each level
            name = f"{self._rule}_{len(self._rules)}"
            self._rules[name], item = item, name
        return f'"[" ({item} ({self.comma} {item})*)? "]"'

    def _object(self, schema: Schema) -> str:
        in_order = sorted(schema["properties"].items(), key=lambda item: item[0].lower())
        pairs = {key: f"{_quoted(_check_name(key) + ':')} {self._value(value)}" for key, value in in_order}
        return f'"{{" {self._members(pairs, schema, _BRACE)}'

    def _members(self, pairs: dict[str, str], schema: Schema, end: str) -> str:
        """Return the pairs of keys and values that there may be, each once and in this order, and the end."""
        required = schema.get("required") or ()
        # After each key, and whether one is written already: what may follow.
        follows = {False: end, True: end}
        for key, pair in reversed(pairs.items()):
            made = {}
            for written, comma in ((False, ""), (True, f"{self.comma} ")):
                name = f"{self._rule}_{len(self._rules)}"
                with_it = f"{comma}{pair} {follows[True]}"
                self._rules[name] = with_it if key in required else f"{with_it} | {follows[written]}"
                made[written] = name
            follows = made
        return follows[False]

    def _reference(self, path: str) -> str:
        if path not in self._names:
            self._names[path] = name = f"{self._rule}_ref_{len(self._names)}"
            self._rules[name] = self._value(self._tool.resolved({"$ref": path}))
        return self._names[path]

    def _constant(self, value: Any) -> str:
        if isinstance(value, str):
            return f"{self._mark} {_quoted(value)} {self._mark}" if value else f"{self._mark} {self._mark}"
        return _quoted(json.dumps(value)) if not isinstance(value, list | dict) else f"{self._rule}_any"


_BRACE = '"}"'


class _PythonGrammar(_BareGrammar):
    """Rules for arguments as Python has them, in the order of the schema. Words and quotes may be JSON's."""

    comma = "/, ?/"
    true, false, null = '"True" | "true"', '"False" | "false"', '"None" | "null"'

    def rules(self) -> list[str]:
        """Raises ValueError for what a strict tool asks for and this cannot keep to."""
        rule, schema = self._rule, self._tool.resolved(self._tool.schema)
        text, anything, free = f"{rule}_text", f"{rule}_any", f"{rule}_object"
        self._rules[text] = _PYTHON_TEXT
        words = f"{self.true} | {self.false} | {self.null}"
        self._rules[anything] = f"{text} | {_NUMBER_RULE} | {words} | {free} | {self._list(anything)}"
        pair = f"{text} {_COLON} {anything}"
        self._rules[free] = f'"{{" ({pair} ({self.comma} {pair})*)? "}}"'
        if schema.keys().isdisjoint({"properties", "additionalProperties"}):
            pair = f'/{_PYTHON_NAME.pattern}/ "=" {anything}'
            self._rules[rule] = f'({pair} ({self.comma} {pair})*)? ")"'
        else:
            properties = schema.get("properties") or {}
            pairs = {
                key: f"{_quoted(_check_name(key, _PYTHON_NAME) + '=')} {self._value(value)}"
                for key, value in properties.items()
            }
            self._rules[rule] = self._members(pairs, schema, '")"')
        return [f"{name}: {made}" for name, made in self._rules.items()]

    def _object(self, schema: Schema) -> str:
        pairs = {
            key: f"({_either_quotes(key)}) {_COLON} {self._value(value)}"
            for key, value in schema["properties"].items()
        }
        return f'"{{" {self._members(pairs, schema, _BRACE)}'

    def _constant(self, value: Any) -> str:
        if isinstance(value, str):
            return _either_quotes(value)
        if isinstance(value, bool):
            return self.true if value else self.false
        return self.null if value is None else super()._constant(value)


def _either_quotes(text: str) -> str:
    inner = _quoted(text)[1:-1].replace('\\"', '"').replace("'", "\\'")
    return " | ".join(map(_quoted, (_quoted(text), f"'{inner}'")))


_PYTHON_NAME = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")
_COLON = "/: ?/"
_PYTHON_TEXT = (
    "/"
    + "|".join(
        rf"{mark}([^{mark}\\]|\\([{mark}\\nrtbf]|x[0-9a-fA-F]{{2}}|u[0-9a-fA-F]{{4}}))*{mark}"
        for mark in ("'", '"')
    )
    + "/"
)


def _check_name(key: str, taken: re.Pattern[str] | None = None) -> str:
    """Return the name of an argument that is written without quotes. Raises ValueError."""
    if not (taken or _BARE_NAME).fullmatch(key):
        raise ValueError(f"this base cannot write an argument of the name {key[:40]!r}")
    return key


def _cannot_keep(keyword: str) -> str:
    return f"strict is not possible with {keyword!r} here, since this base does not write arguments as JSON"


_BARE_NAME = re.compile(r"[^\s<>:,{}\[\]\"\x00-\x1f\x7f]+")
_NUMBER_RULE = r"/-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/"
_NOT_BARE = frozenset(
    ("pattern", "format", "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum",
     "exclusiveMaximum", "multipleOf", "minItems", "maxItems", "uniqueItems", "prefixItems", "contains",
     "allOf", "not", "if", "patternProperties", "propertyNames", "minProperties", "maxProperties",
     "dependentRequired")
)  # fmt: skip


_NOT_AS_IT_IS = frozenset({"pattern", "format", "minLength", "maxLength", "anyOf", "oneOf", "const"})
"""Keywords that an argument written without quotes cannot have in its schema."""


# ---- how a template writes a call ----------------------------------------------------------------


class UnreadableCallsError(ValueError):
    """The template writes no calls, or none that can be read; the message says which."""


def read_format(render: Render, controls: Mapping[str, int]) -> ToolFormat:
    """Return a template's format of calls. Raises UnreadableCallsError.

    controls: ids of the base's added tokens, by their texts.
    """
    failure = None
    for ids, as_text in ((_IDS, False), (_IDS, True), (_NAMING_IDS, False)):
        if as_text and failure is None:
            continue  # the template takes arguments as they are, and they are given so
        shown = False
        for content in (_CONTENT, ""):
            try:
                one = _rendered(render, ids[:1], as_text, content)
            except Exception as error:  # a template is a program and fails in any way
                failure = failure or error
                break
            if one is None:
                continue
            try:
                many = _rendered(render, ids, as_text, content)
            except Exception:  # Llama's says that it knows one call at a time
                many = None
            try:
                found = _format(render, one, many, controls)
            except Exception:
                found = None
            if found is not None and not (shown and found.opening[0].isalnum()):
                return found
            shown = (
                True  # where a call is a message of its own, its opening is a word without content (gpt-oss)
            )
        if shown:
            break
    else:
        if failure is not None:
            raise UnreadableCallsError(f"cannot write a call: {reason_of(failure)}")
    raise UnreadableCallsError("writes calls in a way that cannot be read")


def reason_of(error: Exception) -> str:
    """Return the first line of what a template's failure says, without what a terminal would act on."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return "".join(character if character.isprintable() else " " for character in line)


@dataclass(frozen=True)
class _Probe:
    """Text that a template made of an answer with calls, and the answer's first character in it."""

    text: str
    start: int


def _rendered(render: Render, ids: Sequence[str], as_text: bool, content: str) -> _Probe | None:
    """Return an answer with this content and a call for each id, or None if it does not show both in turn.

    Raises what the template raises.
    """
    arguments: Any = {_KEYS[0]: _VALUE, _KEYS[1]: _NUMBER}
    calls = [
        {
            "id": call_id,
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments) if as_text else arguments},
        }
        for call_id, name in zip(ids, _NAMES, strict=False)
    ]
    answer = {"role": "assistant", "content": content, "tool_calls": calls}
    text = render([_USER, answer], tools=_PROBE_TOOLS, generation=False)
    found, said = text.rfind(_NAMES[0]), text.rfind(_CONTENT)
    if content:
        return _Probe(text, said + len(_CONTENT)) if 0 <= said < found else None
    before = render([_USER], tools=_PROBE_TOOLS, generation=True)
    start = _common_prefix(before, text)
    if len(start) < len(before) and start.rfind("<") > start.rfind(">"):
        start = start[: start.rfind("<")]  # the two continue with different control tokens
    return _Probe(text, len(start)) if len(start) <= found else None


_USER = {"role": "user", "content": _QUESTION}
_PROBE_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "gammaprobe",
            "description": "A probe",
            "parameters": {
                "type": "object",
                "properties": {"other": {"type": "string", "description": "A probe"}},
                "required": ["other"],
            },
        },
    }
]


def _format(
    render: Render, one: _Probe, many: _Probe | None, controls: Mapping[str, int]
) -> ToolFormat | None:
    first = _call(one, 0)
    if first is None:
        return None
    opening = _with_holes(one.text[one.start : first.name].lstrip())
    middle: str | None = first.middle
    alone = _with_holes(one.text[first.stop : _end(render, one.text, first.stop, controls)])
    closing: str | None = alone
    between = None
    found = () if many is None else (_call(many, index) for index in range(len(_NAMES)))
    calls = [call for call in found if call is not None]
    if many is not None and len(calls) == len(_NAMES) and all(a.stop < b.name for a, b in pairwise(calls)):
        middle = _counted([first.middle, *(call.middle for call in calls)])
        between = _counted([_with_holes(many.text[a.stop : b.name]) for a, b in pairwise(calls)])
        last = _with_holes(many.text[calls[-1].stop : _end(render, many.text, calls[-1].stop, controls)])
        closing = _counted([alone, last])
    if middle is None or closing is None or middle[:1] in _HOLES or (between or "")[:1] in _HOLES:
        return None
    if between is not None and COUNT in between:
        suffix = re.escape(between.rpartition(COUNT)[2])
        opening = re.sub(rf"[0-9]+(?={suffix}\Z)", COUNT, opening)
    if between is not None and between.endswith(opening):
        alone = between.removesuffix(opening).rstrip()
        if closing.startswith(alone) and closing[len(alone) :].strip():
            closing = alone  # what follows is written for the answers of tools
    parts = [opening, middle, between or "", closing]
    if (
        not opening
        or _ends_a_turn(opening, one.text, controls)
        or any(probe in part for part in parts for probe in (*_NAMES, *_IDS, *_KEYS, _VALUE))
    ):
        return None
    trigger = next((name for name in controls if opening.startswith(name)), "")
    if not trigger:
        head = re.split(r"[{\n\0\1]", opening, maxsplit=1)[0].rstrip()
        trigger = head if len(head) > 2 and not head.isalnum() else ""
    if first.arguments is not None:
        parts += vars(first.arguments).values()
    used = {
        name: token
        for name, token in controls.items()
        if _THOUGHT.search(name) or any(name in part for part in parts)
    }
    return ToolFormat(opening, middle, between, closing, trigger, first.arguments, used)


def _ends_a_turn(opening: str, text: str, controls: Mapping[str, int]) -> bool:
    """Return True if a call begins with what ends a message, as where it is a message of its own
    (gpt-oss)."""
    after = text[text.find(_QUESTION) + len(_QUESTION) :].lstrip()
    ends = next((name for name in controls if after.startswith(name)), None)
    return ends is not None and ends in opening


def _end(render: Render, text: str, start: int, controls: Mapping[str, int]) -> int:
    """Return the end of an answer whose last call has its arguments up to `start`.

    The text after it is also found after an answer without calls, or begins with its first control token.
    """
    answer = {"role": "assistant", "content": _CONTENT}
    plain = render([_USER, answer], tools=_PROBE_TOOLS, generation=False)
    tail = plain[plain.rfind(_CONTENT) + len(_CONTENT) :]
    end = len(text) - len(_common_prefix(text[::-1], tail[::-1]))
    for name in controls:
        begins = text.rfind(name, 0, end + len(name) - 1)
        if begins >= 0 and begins < end < begins + len(name):
            end = begins
        if tail.lstrip().startswith(name) and 0 <= (begins := text.find(name, start)) < end:
            end = begins
    return end


@dataclass(frozen=True)
class _Call:
    """Offsets of a call's name and of the end of its arguments in a text, and the text between the two."""

    name: int
    stop: int
    middle: str
    arguments: ArgumentFormat | Bare | Pythonic | None


_OBJECT = re.compile(rf'\{{\s*"{_KEYS[0]}"\s*:\s*"{_VALUE}"\s*,\s*"{_KEYS[1]}"\s*:\s*{_NUMBER}\s*\}}')
_BARE = re.compile(rf"\{{{_KEYS[0]}:([^\s]+?){_VALUE}\1,{_KEYS[1]}:{_NUMBER}\}}")
_PYTHON = re.compile(rf"(\s*\(){_KEYS[0]}=(['\"]){_VALUE}\2, ?{_KEYS[1]}={_NUMBER}\)")
_ONE_BY_ONE = re.compile(rf"([^<]*)(<.*?){_KEYS[0]}(.*?){_VALUE}(.*?){_KEYS[1]}(.*?){_NUMBER}", re.DOTALL)


def _call(probe: _Probe, index: int) -> _Call | None:
    name = probe.text.rfind(_NAMES[index])
    if name < probe.start:
        return None
    after = name + len(_NAMES[index])
    if found := _OBJECT.search(probe.text, after):
        return _Call(name, found.end(), _with_holes(probe.text[after : found.start()]), None)
    if found := _BARE.search(probe.text, after):
        return _Call(name, found.end(), _with_holes(probe.text[after : found.start()]), Bare(found[1]))
    if found := _PYTHON.match(probe.text, after):
        return _Call(name, found.end(), found[1], Pythonic())
    if not (found := _ONE_BY_ONE.match(probe.text, after)):
        return None
    head, opening, middle, then, again = found.groups()
    if not then.endswith(opening):  # a mark stands between the name and the first argument
        mark = opening.rfind("<")
        head, opening = head + opening[:mark], opening[mark:]
    other = "" if middle == again else middle.replace('"true"', '"false"')
    if again != (other or middle) or not then.endswith(opening):
        return None
    closing = then.removesuffix(opening)
    if not closing.strip() or not probe.text.startswith(closing, found.end()):
        return None
    arguments = ArgumentFormat(opening, middle, closing, other)
    return _Call(name, found.end() + len(closing), _with_holes(head), arguments)


def _common_prefix(one: str, other: str) -> str:
    same = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    return one[: min(len(one), len(other)) if same is None else same]


def _with_holes(text: str) -> str:
    return re.sub("|".join(_IDS), HOLE, text)


def _counted(texts: Sequence[str]) -> str | None:
    """Return the text that all are, with holes where their numbers differ; None if they differ otherwise."""
    split = [re.split("([0-9]+)", text) for text in texts]
    if len({len(parts) for parts in split}) > 1:
        return None
    made = []
    for place, parts in enumerate(zip(*split, strict=True)):
        same = len(set(parts)) == 1
        if not same and place % 2 == 0:
            return None
        made.append(parts[0] if same else COUNT)
    return "".join(made)
