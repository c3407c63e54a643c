"""Thoughts before answers: their format, splitting, grammars, and what each route answers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import anthropic
import llguidance
import numpy as np
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from onebase_engine.engine.grammar_process import Matchers, load_tokenizer
from onebase_engine.engine.messages import Grammar, ScoredToken, SequenceOutput, ThoughtBudget
from onebase_server.inference.detokenizer import BytePieces
from onebase_server.inference.stream import ChoiceDecoder, OutputPiece
from onebase_server.inference.thoughts import (
    BLOCKS,
    Switch,
    Thinking,
    ThoughtFormat,
    ThoughtReader,
    without_thought,
)
from onebase_server.inference.tokenization import BaseTokenizer, TemplateInput

from .support import Server, Starter
from .test_resumption import cut, events_of, plain, tell

SPECIAL = [
    "[THINK]", "[/THINK]", "<|channel>", "<channel|>", "<|START_THINKING|>", "<|END_THINKING|>", "<|turn>",
    "<turn|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<seed:bos>", "<seed:eos>",
]  # fmt: skip
PLAIN = ["<think>", "</think>", "<seed:think>", "</seed:think>", "<tool_call>", "</tool_call>"]
TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
ENDS = "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
BEGINS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
KIMI = "{% if m.role == 'assistant' %}<think>{{ m.reasoning_content }}</think>{% endif %}"
TEMPLATES = {
    "glm-4.7": TURNS
    + "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    + ENDS
    + BEGINS
    + "{{ '</think>' if enable_thinking is defined and not enable_thinking else '<think>' }}{% endif %}",
    "kimi": TURNS + KIMI + ENDS + BEGINS + "{% endif %}",
    "minimax-m2": TURNS + KIMI.replace("think>", "think>\n", 1) + ENDS + BEGINS + "<think>\n{% endif %}",
    "seed": "{% for m in messages %}{{ '<seed:bos>' + m.role }}{% if m.reasoning_content %}"
    + "{{ '\\n<seed:think>' + m.reasoning_content | trim + '</seed:think>' }}{% endif %}"
    + "{{ '\\n' + m.content + '<seed:eos>' }}{% endfor %}{% if add_generation_prompt %}"
    + "<seed:bos>assistant\n{% if thinking_budget is defined and thinking_budget == 0 %}"
    + "<seed:think>\nThe current thinking budget is 0.\n</seed:think>{% endif %}{% endif %}",
    "deepseek-r1": TURNS
    + "{% set content = m.content.split('</think>')[-1] %}{{ content + '<|im_end|>\\n' }}{% endfor %}"
    + BEGINS
    + "<think>\n{% endif %}",
    "deepseek-v3.1": "{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
    + TURNS
    + ENDS
    + BEGINS
    + "{{ '<think>' if thinking else '</think>' }}{% endif %}",
    "smollm3": "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
    + TURNS
    + ENDS
    + BEGINS
    + "{% if not enable_thinking %}<think>\n\n</think>\n{% endif %}{% endif %}",
    "granite-3.3": "{% if thinking %}Write your thoughts between <think></think>.{% endif %}"
    + TURNS
    + ENDS
    + BEGINS
    + "{% endif %}",
    "magistral": "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}"
    + "{% if m.content is string %}{{ m.content }}{% else %}{% for b in m.content %}"
    + "{{ '[THINK]' + b.thinking + '[/THINK]' if b.type == 'thinking' else b.text }}{% endfor %}{% endif %}"
    + "</s>{% endif %}{% endfor %}",
    "cohere": "{% for m in messages %}<|turn>{{ m.role }}<|START_THINKING|>{{ m.thinking }}<|END_THINKING|>"
    + "{{ m.content }}<turn|>{% endfor %}{% if add_generation_prompt %}<|turn>assistant<|START_THINKING|>"
    + "{% if reasoning is defined and not reasoning %}<|END_THINKING|>{% endif %}{% endif %}",
    "gemma-4": "{% for m in messages %}<|turn>{{ m.role }}\n{% if m.reasoning and m.tool_calls %}"
    + "{{ '<|channel>thought\\n' + m.reasoning + '\\n<channel|>' }}{% endif %}{{ m.content }}<turn|>\n"
    + "{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% if not enable_thinking | default(false) %}"
    + "{{ '<|channel>thought\\n<channel|>' }}{% endif %}{% endif %}",
}
THINK = ("<think>", "</think>")
GEMMA = ("<|channel>thought", "<channel|>")
TOGGLE = ("enable_thinking", True, False)


class Case:
    """What a template says of thoughts. opened: by its prompt as it is, switched on, and switched off."""

    def __init__(
        self,
        name: str,
        marks: tuple[str, str],
        key: str | None,
        switch: tuple[str, Any, Any] | None,
        opened: tuple[bool | None, ...],
        *,
        default: bool = True,
    ) -> None:
        self.name, self.marks, self.key = name, marks, key
        self.switch = None if switch is None else Switch(*switch, default=default)
        self.opened = opened


KEY = "reasoning_content"
CASES = [
    Case("glm-4.7", THINK, KEY, TOGGLE, (True, True, False)),
    Case("kimi", THINK, KEY, None, (None,)),
    Case("minimax-m2", THINK, KEY, None, (True,)),
    Case("seed", ("<seed:think>", "</seed:think>"), KEY, ("thinking_budget", -1, 0), (None, None, False)),
    Case("deepseek-r1", THINK, None, None, (True,)),
    Case("deepseek-v3.1", THINK, None, ("thinking", True, False), (False, True, False), default=False),
    Case("smollm3", THINK, None, TOGGLE, (None, None, False)),
    Case("granite-3.3", THINK, None, ("thinking", True, False), (None, None, None), default=False),
    Case("magistral", ("[THINK]", "[/THINK]"), BLOCKS, None, (None,)),
    Case(
        "cohere", ("<|START_THINKING|>", "<|END_THINKING|>"), KEY, ("reasoning", True, False),
        (True, True, False),
    ),
    Case("gemma-4", GEMMA, "reasoning", TOGGLE, (False, None, False), default=False),
]  # fmt: skip
OF_MODELS = [
    Case("qwen3", THINK, KEY, TOGGLE, (None, None, False)),
    Case("qwen3_5_think", THINK, KEY, TOGGLE, (True, True, False)),
    Case("qwen3_5_nothink", THINK, KEY, TOGGLE, (False, True, False), default=False),
    Case("qwen3_6", THINK, KEY, TOGGLE, (True, True, False)),
    Case("qwen3_8", THINK, KEY, TOGGLE, (True, True, False)),
    Case("glm4moe", THINK, KEY, TOGGLE, (None, None, False)),
    Case("deepseek_r1_distill", THINK, None, None, (True,)),
    Case("deepseekv3", THINK, None, None, (True,)),
    Case("nemotron_3_nano", THINK, KEY, TOGGLE, (True, True, False)),
    Case("nemotron_3_ultra", THINK, KEY, TOGGLE, (True, True, False)),
    Case("lfm2_2_5_v2", THINK, KEY, None, (None,)),
    *(
        Case(name, GEMMA, KEY if name != "gemma4_v2" else None, TOGGLE, (None, None, None), default=False)
        for name in ("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5")
    ),
]
WITHOUT = ["muse_glimmer", "qwen2_5", "qwen3_instruct_2507", "llama3_2", "gemma3", "phi3_5", "lfm2"]
"""Templates that write no thoughts, or as messages of their own (muse_glimmer)."""


def templates_of_models() -> dict[str, str]:
    """Chat templates as the models have them, from the TRL package."""
    package = find_spec("trl")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "chat_templates"
    names = [*(case.name for case in OF_MODELS), *WITHOUT]
    return {name: (folder / f"{name}.jinja").read_text() for name in names}


@pytest.fixture(scope="module")
def folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base's tokenizer with the marks of all families, some of them special."""
    made = tmp_path_factory.mktemp("tokens")
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL}, replace_extra_special_tokens=False)
    tokenizer.add_tokens(PLAIN)
    tokenizer.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def with_template(folder: Path) -> Callable[[str], BaseTokenizer]:
    templates = TEMPLATES | templates_of_models()

    def make(name: str) -> BaseTokenizer:
        one = BaseTokenizer(str(folder))
        one._tokenizer.chat_template = templates[name]
        return one

    return make


QUESTION = {"role": "user", "content": "What does <think> mean? </think>"}


@pytest.mark.parametrize("case", [*CASES, *OF_MODELS], ids=lambda case: case.name)
def test_a_template_says_how_thoughts_are_written_and_when_they_are_begun(
    with_template: Callable[[str], BaseTokenizer], case: Case
) -> None:
    tokenizer = with_template(case.name)
    found = tokenizer.thought_format
    assert found is not None
    assert ((found.opening, found.closing), found.key, found.switch) == (case.marks, case.key, case.switch)
    variables: list[dict[str, Any]] = [{}]
    if case.switch is not None:
        variables += [{case.switch.name: case.switch.on}, {case.switch.name: case.switch.off}]
        assert [found.is_on(options) for options in variables] == [case.switch.default, True, False]
    prompts = [tokenizer.encode_chat(TemplateInput([QUESTION], None, options)) for options in variables]
    assert tuple(map(tokenizer.opens_thought, prompts)) == case.opened


@pytest.mark.parametrize("name", WITHOUT)
def test_a_template_without_thoughts_that_can_be_separated_has_no_format(
    with_template: Callable[[str], BaseTokenizer], name: str
) -> None:
    assert with_template(name).thought_format is None


def test_a_thought_that_is_a_message_of_its_own_is_not_read(folder: Path) -> None:
    tokenizer = BaseTokenizer(str(folder))
    tokenizer._tokenizer.chat_template = (
        "{% for m in messages %}{% if m.thinking %}<|start|>assistant<|channel|>thinking<|message|>"
        "{{ m.thinking }}<|end|>{% endif %}<|start|>{{ m.role }}<|channel|>answer<|message|>{{ m.content }}"
        "<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    )
    assert tokenizer.thought_format is None


# ---- an earlier answer's thought -----------------------------------------------------------------


@pytest.mark.parametrize("case", [*CASES, *OF_MODELS], ids=lambda case: case.name)
def test_an_earlier_thought_is_given_to_a_template_by_its_name(
    with_template: Callable[[str], BaseTokenizer], case: Case
) -> None:
    tokenizer = with_template(case.name)
    found = tokenizer.thought_format
    assert found is not None
    message = {"role": "assistant", "content": "So it is.", KEY: "Hidden reasons."}
    if case.marks == GEMMA:  # which write it before a call alone
        message |= {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}  # type: ignore[dict-item]
    given = found.with_thoughts(message)
    text = tokenizer._render([QUESTION, given], tools=None, generation=False)
    assert ("Hidden reasons." in text) == (case.key is not None)
    assert "So it is." in text
    if case.key is None:
        assert given == without_thought(message)


# ---- splitting -----------------------------------------------------------------------------------


def split(thinking: Thinking, pieces: list[str]) -> tuple[str, str]:
    reader = ThoughtReader(thinking)
    parts = [reader.feed(piece) for piece in pieces]
    parts.append(reader.feed("", end=True))
    return "".join(thought for thought, _ in parts), "".join(answer for _, answer in parts)


texts = st.text(st.sampled_from("<>/think[]THINK|chanel \n\tabc\u00e9\U0001f600"), max_size=30)
FORMATS = [ThoughtFormat(*case.marks, {}) for case in CASES]


@given(
    format=st.sampled_from(FORMATS),
    opened=st.booleans(),
    thought=texts,
    answer=texts,
    space=st.sampled_from(["", "\n", "\n\n"]),
    data=st.data(),
)
def test_a_text_is_split_in_the_same_way_however_it_comes(
    format: ThoughtFormat, opened: bool, thought: str, answer: str, space: str, data: st.DataObject
) -> None:
    written = f"{'' if opened else format.opening}{space}{thought}{space}{format.closing}{space}{answer}"
    text = data.draw(st.sampled_from([written, answer, thought, f"{format.opening}{thought}"]))
    places = sorted({*data.draw(st.lists(st.integers(0, len(text)), max_size=10)), 0, len(text)})
    pieces = [text[start:stop] for start, stop in pairwise(places)]
    thinking = Thinking(format, opened)
    whole = split(thinking, [text])
    assert split(thinking, pieces) == split(thinking, list(text)) == whole
    if text is written and format.closing not in thought + space + format.closing[:-1]:
        assert whole == (thought.strip(), answer.lstrip())
    if not opened and not text.lstrip().startswith(format.opening):
        assert whole == ("", text), "what has no thought stays as it is"


def decoded(
    text: str, *, opened: bool = True, stops: tuple[str, ...] = (), ids: bool = False, finish: Any = "length"
) -> tuple[OutputPiece, ChoiceDecoder]:
    """The whole answer of which each byte is a token, with logprobs."""
    thought = ThoughtReader(Thinking(ThoughtFormat(*THINK, {}), opened))
    decoder = ChoiceDecoder(0, BytePieces(lambda token: bytes([token])), stops, with_ids=ids, thought=thought)
    whole, raw = OutputPiece(0, ""), text.encode()
    for place, byte in enumerate(raw):
        last = place == len(raw) - 1
        output = SequenceOutput(
            id="r", tokens=[byte], logprobs=[ScoredToken(byte, -0.5, [])], finish=finish if last else None
        )
        piece = decoder.feed(output)
        if piece is not None:
            whole.text += piece.text
            whole.reasoning += piece.reasoning
            whole.tokens += piece.tokens
            whole.ids += piece.ids
            whole.finish_reason = piece.finish_reason
        if decoder.finish_reason is not None:
            break
    return whole, decoder


@pytest.mark.parametrize("answer", ["Yes.", "\u00e9\U0001f600 so", ""])
def test_log_probabilities_are_those_of_the_answer_and_its_thought_is_counted(answer: str) -> None:
    thought = "I see,\n</thin k.\n</think>\n\n"
    piece, decoder = decoded(thought + answer)
    assert (piece.reasoning, piece.text) == ("I see,\n</thin k.", answer)
    assert bytes(info.token for info in piece.tokens) == answer.encode()
    assert [info.offset for info in piece.tokens] == [
        at for at, letter in enumerate(answer) for _ in letter.encode()
    ]
    assert decoder.reasoning_tokens == len(thought)
    assert decoder.completion_tokens == len((thought + answer).encode())


def test_all_tokens_have_log_probabilities_where_token_ids_are_asked_for() -> None:
    text = "I see.</think>Yes."
    piece, _ = decoded(text, ids=True)
    assert bytes(piece.ids) == bytes(info.token for info in piece.tokens) == text.encode()


def test_a_thought_that_is_cut_is_no_answer() -> None:
    for text, thought in (
        ("I see. </th", "I see. </th"),
        ("I see.\n", "I see."),
        ("I see.</think>\n", "I see."),
    ):
        piece, decoder = decoded(text)
        assert (piece.reasoning, piece.text, piece.finish_reason) == (thought, "", "length")
        assert (piece.tokens, decoder.reasoning_tokens) == ([], len(text))


def test_a_text_without_a_thought_stays_as_it_is() -> None:
    for text in (" \n<thin", "Well, <think>no</think>", "<", ""):
        if text:
            piece, decoder = decoded(text, opened=False)
            assert (piece.reasoning, piece.text, decoder.reasoning_tokens) == ("", text, 0)
            assert bytes(info.token for info in piece.tokens) == text.encode()


def test_a_stop_string_ends_the_answer_and_not_the_thought() -> None:
    piece, _ = decoded("Stop? No.</think>Go. Stop there.", stops=("Stop",), finish=None)
    assert (piece.reasoning, piece.text, piece.finish_reason) == ("Stop? No.", "Go. ", "stop")


@pytest.mark.parametrize("byte_level", [True, False])
@pytest.mark.parametrize("name", ["magistral", "cohere", "gemma-4", "kimi"])
def test_marks_that_decoding_drops_are_told_by_their_ids(
    with_template: Callable[[str], BaseTokenizer], name: str, byte_level: bool
) -> None:
    tokenizer = with_template(name)
    tokenizer._byte_level = byte_level
    found = tokenizer.thought_format
    assert found is not None
    text = f"{found.opening}\nI see: an answer.\n{found.closing}It is so."
    ids = tokenizer._tokenizer.encode(text, add_special_tokens=False)
    pieces = tokenizer.pieces(found.shown)
    made = [*(pieces.push(token) for token in ids), pieces.flush()]
    assert split(Thinking(found, False), made) == ("I see: an answer.", "It is so.")


# ---- grammars ------------------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
GRAMMARS = {
    "schema": (Grammar("json_schema", json.dumps(SCHEMA | {"additionalProperties": False})), '{"a": 12}'),
    "regex": (Grammar("regex", "a/b+"), "a/bb"),
    "lark": (Grammar("grammar", 'start: "x" other\nother: /y+/ "z"'), "xyyz"),
    "gbnf": (Grammar("grammar", 'root ::= "x" other\nother ::= "y" "z"'), "xyz"),
}


@pytest.fixture(scope="module")
def follows(folder: Path) -> Callable[..., bool]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    compiler = load_tokenizer(folder, len(tokenizer), [tokenizer.eos_token_id])
    matchers = Matchers(compiler, np.zeros((1, 1), dtype=np.int32), 0)

    def check(grammar: Grammar, text: str, *, letters: bool = False) -> bool:
        """Return True if a text keeps to a grammar. letters: whether its marks are no tokens."""
        matcher = llguidance.LLMatcher(compiler, matchers._source(grammar), log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        parts = re.split("(?<=[<\\[])", text) if letters else [text]
        ids = [token for part in parts for token in tokenizer.encode(part, add_special_tokens=False)]
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return check


@pytest.mark.parametrize("kind", GRAMMARS)
@pytest.mark.parametrize("name", ["qwen3", "kimi", "magistral", "cohere", "gemma-4", "seed"])
def test_a_grammar_begins_after_the_thought(
    with_template: Callable[[str], BaseTokenizer], follows: Callable[..., bool], name: str, kind: str
) -> None:
    found = with_template(name).thought_format
    assert found is not None
    grammar, answer = GRAMMARS[kind]
    for opened in (True, False):
        made = Thinking(found, opened).before(grammar)
        opening = "" if opened else found.opening
        thought = f"{opening}\nWhat {{ is < [that]?\n{found.closing}"
        for space in ("", "\n\n"):
            assert follows(made, f"{thought}{space}{answer}")
        assert not follows(made, f"{thought}\n\nWell")
        assert not follows(made, thought)
        assert follows(made, answer) != opened
        assert follows(made, thought + answer, letters=True)
    assert Thinking(found, False, on=False).before(grammar) == grammar
    assert Thinking(found, True).before(None) is None


@pytest.mark.parametrize("name", ["qwen3", "kimi", "magistral", "cohere", "gemma-4", "seed"])
def test_a_thought_is_bounded_by_the_tokens_that_begin_and_end_it(
    with_template: Callable[[str], BaseTokenizer], name: str
) -> None:
    tokenizer = with_template(name)
    found = tokenizer.thought_format
    assert found is not None
    (end,) = tokenizer.encode(found.closing, special=False)
    begin = tokenizer.encode(found.opening, special=False)[0]
    assert found.bounded(9, opened=True) == ThoughtBudget(9, end)
    assert found.bounded(9, opened=False) == ThoughtBudget(9, end, begin)
    letters = ThoughtFormat(found.opening, found.closing, {})
    assert letters.bounded(9, opened=True) is letters.bounded(9, opened=False) is None


# ---- the routes ----------------------------------------------------------------------------------

BASE = "smollm2-135m-instruct"
ECHOED = (
    "{% for m in messages %}{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}"
    "{% endif %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt and (enable_thinking is not defined or enable_thinking) %}"
    "<think>\n{% endif %}{# </think> #}"
)
"""The engine of these tests says the prompt again and again, here with a thought in it."""
SAID = {"role": "user", "content": " I see: one two.\n</think>\n\nIt is so."}
ASK: Any = {"messages": [SAID], "stop": ["<think>"], "max_tokens": 200}
CHAT: Any = {"model": BASE, **ASK}
THOUGHT, ANSWER = "I see: one two.", "It is so."


@pytest.fixture(scope="module")
def server(
    serve_scripted: Starter, small_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = shutil.copytree(small_base, tmp_path_factory.mktemp("thinking") / BASE)
    (folder / "chat_template.jinja").write_text(ECHOED)
    with serve_scripted("words", "--base", str(folder)) as server:
        yield server


def test_chat_completions_have_the_thought_whole_and_streamed(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        whole = client.chat.completions.create(**CHAT, logprobs=True)
        message: Any = whole.choices[0].message
        assert (message.reasoning_content, message.reasoning, message.content) == (THOUGHT, THOUGHT, ANSWER)
        logprobs = whole.choices[0].logprobs
        assert logprobs is not None
        assert "".join(one.token for one in logprobs.content or ()).startswith(ANSWER)
        assert whole.usage is not None
        details = whole.usage.completion_tokens_details
        assert details is not None
        assert 0 < (details.reasoning_tokens or 0) < whole.usage.completion_tokens
        chunks = list(
            client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True})
        )
        deltas: list[Any] = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
        parts = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
        assert ("".join(parts), "".join(delta.content or "" for delta in deltas)) == (THOUGHT, ANSWER)
        assert sum(map(bool, parts)) > 2, "it comes piece by piece"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens_details == details
        cut = client.chat.completions.create(**CHAT | {"max_tokens": 3}).choices[0]
        assert (cut.message.content, cut.finish_reason) == ("", "length")
        said: Any = cut.message
        assert THOUGHT.startswith(said.reasoning_content)
        off = client.chat.completions.create(**CHAT, reasoning_effort="none").choices[0].message
        assert (off.content or "").startswith(" I see"), "switched off there is no thought"


def test_a_thought_goes_back_with_its_answer(server: Server) -> None:
    earlier = {"role": "assistant", "content": ANSWER}
    with server.client() as http:

        def count(*messages: dict[str, Any]) -> int:
            body = {"model": BASE, "messages": [SAID, *messages, SAID], "max_tokens": 1}
            answer = http.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            tokens: int = answer.json()["usage"]["prompt_tokens"]
            return tokens

        plain_count = count(earlier)
        for name in ("reasoning_content", "reasoning"):
            assert count(earlier | {name: THOUGHT}) > plain_count
        assert count(earlier | {"reasoning_content": "", "reasoning": None}) == plain_count
        wrong = http.post(
            "/v1/chat/completions", json={"model": BASE, "messages": [SAID | {"reasoning": "x"}]}
        )
        assert wrong.json()["error"]["param"] == "messages[0].reasoning_content"

        items = [
            {
                "type": "reasoning",
                "id": "rs_1",
                "summary": [],
                "content": [{"type": "reasoning_text", "text": THOUGHT}],
            },
            {"type": "message", "role": "assistant", "content": ANSWER},
            {
                "type": "reasoning",
                "summary": [{"type": "summary_text", "text": "s"}],
                "encrypted_content": "x",
            },
            {"role": "user", "content": "And?"},
        ]
        sent = [
            http.post("/v1/responses", json={"model": BASE, "input": one, "max_output_tokens": 16})
            for one in (items, items[1:])
        ]
        used = [one.json()["usage"]["input_tokens"] for one in sent]
        assert used[0] > used[1]


def test_a_response_has_the_thought_as_an_item_whole_and_streamed(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        ask: Any = {"model": BASE, "input": SAID["content"], "max_output_tokens": 200}
        extra = {"stop": ["<think>"]}
        whole = client.responses.create(**ask, extra_body=extra)
        thought, _ = whole.output
        assert thought.type == "reasoning"
        assert thought.content is not None
        assert (thought.content[0].text, thought.summary, whole.output_text) == (THOUGHT, [], ANSWER)
        assert whole.usage is not None
        assert 0 < whole.usage.output_tokens_details.reasoning_tokens < whole.usage.output_tokens
        events: list[Any] = list(client.responses.create(**ask, stream=True, extra_body=extra))
        kinds = [event.type.removeprefix("response.") for event in events]
        assert kinds[2:5] == ["output_item.added", "content_part.added", "reasoning_text.delta"]
        done = kinds.index("reasoning_text.done")
        assert kinds[done : done + 5] == [
            "reasoning_text.done", "content_part.done", "output_item.done", "output_item.added",
            "content_part.added",
        ]  # fmt: skip
        said = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
        assert said == THOUGHT
        last = events[-1].response
        assert [item.type for item in last.output] == ["reasoning", "message"]
        assert last.usage == whole.usage
        follow = client.responses.create(
            model=BASE, input="And?", previous_response_id=whole.id, max_output_tokens=16
        )
        assert follow.usage is not None
        assert follow.usage.input_tokens > whole.usage.input_tokens
        kept = client.responses.input_items.list(follow.id, order="asc").data
        assert [item.type for item in kept] == ["message", "reasoning", "message", "message"]
        cut = client.responses.create(model=BASE, input=SAID["content"] * 9, max_output_tokens=16)
        assert (cut.status, cut.output[0].type, cut.output_text) in (
            ("incomplete", "reasoning", ""),
            ("incomplete", "reasoning", cut.output_text),
        )


def test_a_message_has_the_thought_as_a_block_whole_and_streamed(server: Server) -> None:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        ask: Any = {"model": BASE, "messages": [SAID], "max_tokens": 200, "stop_sequences": ["<think>"]}
        on: Any = {"type": "adaptive"}
        whole = client.messages.create(**ask, thinking=on)
        thought, text = whole.content
        assert thought.type == "thinking"
        assert text.type == "text"
        assert (thought.thinking, text.text, whole.stop_reason) == (THOUGHT, ANSWER, "stop_sequence")
        assert whole.usage.output_tokens_details is not None
        assert 0 < whole.usage.output_tokens_details.thinking_tokens < whole.usage.output_tokens
        with client.messages.stream(**ask, thinking=on) as stream:
            kinds = [event.type for event in stream]
            made = stream.get_final_message()
        assert [block.to_dict() for block in made.content] == [block.to_dict() for block in whole.content]
        assert {"thinking", "signature"} <= set(kinds)
        hidden = client.messages.create(**ask, thinking={"type": "adaptive", "display": "omitted"}).content
        assert hidden[0].type == "thinking"
        assert (hidden[0].thinking, hidden[0].signature) == ("", thought.signature)
        off: Any
        for off in ({}, {"thinking": {"type": "disabled"}}):
            (plain_text,) = client.messages.create(**ask | {"max_tokens": 5}, **off).content
            assert plain_text.type == "text", "without thinking, as Anthropic's clients expect it"
        again = {"role": "assistant", "content": [block.to_dict() for block in whole.content]}
        redacted = {
            "role": "assistant",
            "content": [{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "y"}],
        }
        edits = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
        followed = client.messages.create(
            **ask | {"messages": [SAID, again, SAID, redacted, SAID]},
            thinking={"type": "enabled", "budget_tokens": 1024},
            extra_body={"context_management": edits},
        )
        assert followed.usage.input_tokens > whole.usage.input_tokens
        other = {"edits": [{"type": "clear_tool_uses_20250919"}]}
        with pytest.raises(anthropic.BadRequestError, match=re.escape("context_management.edits[0].type")):
            client.messages.create(**ask, extra_body={"context_management": other})


def test_generate_has_the_thought_in_a_field_of_its_own_and_a_plain_prompt_is_not_split(
    server: Server,
) -> None:
    with server.client() as http:
        (choice,) = (answer := http.post("/generate", json=ASK).json())["choices"]
        assert (choice["reasoning"], choice["text"]) == (THOUGHT, ANSWER)
        assert 0 < answer["usage"]["reasoning_tokens"] < answer["usage"]["completion_tokens"]
        for path, body in (("/generate", ASK), ("/generate/many", {"requests": [ASK, ASK]})):
            lines = http.post(path, json=body if "requests" in body else {**body, "stream": True}).text
            events = [json.loads(line[6:]) for line in lines.split("\n\n") if line.startswith("data: {")]
            mine = [event for event in events if event.get("request", 0) == 0 and "text" in event]
            assert "".join(event.get("reasoning", "") for event in mine) == THOUGHT
            assert "".join(event["text"] for event in mine) == ANSWER
        raw = http.post("/generate", json={"prompt": "a </think> b", "max_tokens": 6}).json()["choices"][0]
        assert "reasoning" not in raw
        assert raw["text"].startswith("a </think> b"[:5])
        echoed = http.post("/generate", json={**ASK, "echo": True}).json()["choices"][0]
        assert "reasoning" not in echoed


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_a_stream_that_is_cut_in_its_thought_goes_on_at_another_server(server: Server, path: str) -> None:
    body: dict[str, Any] = {"messages": [SAID], "max_tokens": 40}
    if path != "/generate":
        body["model"] = BASE
    if path == "/v1/responses":
        body = {"model": BASE, "input": SAID["content"], "max_output_tokens": 40}
    if path == "/v1/messages":
        body["thinking"] = {"type": "adaptive"}
    with server.client() as http:
        told = tell(http, path, body)
        for part in (0.05, 0.2, 0.5, 0.9):
            transcript, events = cut(told, part)
            resumed = events_of(tell(http, path, body, transcript))
            assert resumed.startswith(events)
            assert plain(resumed.decode()) == plain(events_of(told).decode())


def test_a_budget_is_refused_where_a_thought_ends_in_letters_and_not_where_there_is_none(
    server: Server,
) -> None:
    with server.client() as http:
        for path, body in (
            ("/generate", ASK),
            ("/v1/chat/completions", CHAT),
            ("/v1/responses", {"model": BASE, "input": SAID["content"]}),
        ):
            answer = http.post(path, json=body | {"thinking_token_budget": 5})
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert error["code"] == "thinking_budget_not_supported"
            assert "max_tokens ends thoughts" in error["message"]
        off = CHAT | {"thinking_token_budget": 5, "reasoning_effort": "none"}
        assert http.post("/v1/chat/completions", json=off).status_code == 200
        wrong = http.post("/generate", json={"prompt": "x", "thinking_token_budget": 5})
        assert wrong.json()["error"]["param"] == "thinking_token_budget"


def test_a_decision_is_an_answer_and_not_a_thought(server: Server) -> None:
    body = {"messages": [SAID], "choices": ["yes", "no"], "ends": False}
    with server.client() as http:
        answers = [
            http.post("/v1/decide", json=body | {"chat_template_kwargs": options}).json()
            for options in ({}, {"enable_thinking": False}, {"enable_thinking": True})
        ]
    default, off, on = (answer["usage"]["prompt_tokens"] for answer in answers)
    assert default == off < on


def test_the_server_says_at_start_that_thoughts_cannot_be_separated(folder: Path) -> None:
    tokenizer = BaseTokenizer(str(folder))
    tokenizer._tokenizer.chat_template = TURNS + "{{ m.thinking }}" + ENDS + BEGINS + "{% endif %}"
    assert "in a way that cannot be read" in tokenizer.unserved["thinking"]
