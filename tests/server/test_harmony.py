"""Harmony, gpt-oss's format: its channels in answers, its grammars, its conversations, and what each route
answers. The template is the one that gpt-oss has."""

from __future__ import annotations

import json
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
from onebase_engine.engine.messages import Grammar, ScoredToken, SequenceOutput
from onebase_server.inference.detokenizer import BytePieces
from onebase_server.inference.harmony import HarmonyFormat, HarmonyReader, HarmonyTools
from onebase_server.inference.stream import ChoiceDecoder
from onebase_server.inference.thoughts import Thinking
from onebase_server.inference.tokenization import BaseTokenizer, TemplateInput
from onebase_server.inference.tool_call_parser import CallFormat, CallReader
from onebase_server.inference.tool_format import ToolDefinition

from .support import Server, Starter

MARKS = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>", "<|return|>"]
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = {"weather": ToolDefinition("weather", WEATHER), "weather_now": ToolDefinition("weather_now", WEATHER)}
OFFERED: Any = [
    {"type": "function", "function": {"name": name, "description": "?", "parameters": WEATHER}}
    for name in TOOLS
]


def template() -> str:
    package = find_spec("trl")
    assert package is not None
    assert package.origin is not None
    return (Path(package.origin).parent / "chat_templates" / "gptoss.jinja").read_text()


@pytest.fixture(scope="module")
def tokenizer(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseTokenizer:
    made = tmp_path_factory.mktemp("tokens")
    tokens = AutoTokenizer.from_pretrained(base_folder)
    tokens.add_special_tokens({"additional_special_tokens": MARKS}, replace_extra_special_tokens=False)
    tokens.eos_token = "<|return|>"
    tokens.chat_template = template()
    tokens.save_pretrained(made)
    return BaseTokenizer(str(made))


@pytest.fixture(scope="module")
def formats(tokenizer: BaseTokenizer) -> tuple[HarmonyFormat, HarmonyTools]:
    thoughts, tools = tokenizer.thought_format, tokenizer.tool_format
    assert isinstance(thoughts, HarmonyFormat)
    assert isinstance(tools, HarmonyTools)
    return thoughts, tools


def test_the_template_of_gpt_oss_says_how_it_thinks_and_calls(
    tokenizer: BaseTokenizer, formats: tuple[HarmonyFormat, HarmonyTools]
) -> None:
    thoughts, tools = formats
    assert (thoughts.switch, tools.parallel, tokenizer.unserved) == (None, False, {})
    assert [tokenizer.token_text(token) for token in thoughts.ends] == ["<|call|>", "<|return|>"]
    efforts = [thoughts.effort(one) for one in ("none", "minimal", "low", "medium", "high", "xhigh", "max")]
    assert efforts == ["low", "low", "low", "medium", "high", "high", "high"]
    assert "reasoning_effort" in tokenizer.template_options
    asked = TemplateInput([{"role": "user", "content": "?"}], None, {"reasoning_effort": "high"})
    prompt = tokenizer.decode(tokenizer.encode_chat(asked), special=True)
    assert "Reasoning: high" in prompt
    assert prompt.endswith("<|start|>assistant")


# ---- reading -------------------------------------------------------------------------------------

ANALYSIS = "<|channel|>analysis<|message|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>"
ASKS = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Oslo"}'
OSLO = [("weather", {"city": "Oslo"})]
ANSWERS: list[tuple[str, str, str, list[Any]]] = [
    (f"{ANALYSIS}Hm.<|end|>{FINAL}Yes.<|return|>", "Hm.", "Yes.", []),
    (f"{ANALYSIS}Hm.\n<|end|>{FINAL} Yes.", "Hm.\n", " Yes.", []),
    ("<|channel|>final<|message|>Yes.<|return|>", "", "Yes.", []),
    (f"{ANALYSIS}Hm.<|end|><|start|>assistant{ASKS}<|call|>", "Hm.", "", OSLO),
    (f"<|start|>assistant{ASKS}<|call|>", "", "", OSLO),
    (ASKS, "", "", OSLO),
    (' to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>', "", "", OSLO),
    (
        f"{ANALYSIS}Hm.<|end|><|start|>assistant to=functions.weather<|channel|>commentary "
        '<|constrain|>json<|message|>{"city": "Oslo"}<|call|>x',
        "Hm.", "", OSLO,
    ),
    (
        f"{ANALYSIS}A.<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        f"<|start|>assistant{ANALYSIS}B.<|end|><|start|>assistant{ASKS}<|call|>",
        "A.\n\nB.", "I look.", OSLO,
    ),
    (f"{ANALYSIS}A.<|end|><|start|>assistant{ANALYSIS}B.<|end|>{FINAL}Yes.", "A.\n\nB.", "Yes.", []),
    (f"{ANALYSIS}It is cut", "It is cut", "", []),
    (f"{ANALYSIS}Hm.<|end|><|start|>assistant<|channel|>fin", "Hm.", "", []),
    ("<|channel|>anal", "", "", []),
    (f"{ANALYSIS}P<|end|><|start|>assistant<|channel|>commentary to=python<|message|>1", "P", "1", []),
    ("No channels: <a> and to=b.", "", "No channels: <a> and to=b.", []),
    ("to", "", "to", []),
    ("", "", "", []),
]  # fmt: skip


def read(format: HarmonyTools, pieces: list[str]) -> tuple[str, str, list[Any]]:
    """Return the thoughts, the text and the calls of an answer that comes in pieces."""
    channels = HarmonyReader(calls=True)
    calls = CallReader(CallFormat(format, TOOLS, Grammar("lark", "")), "a.0")
    thought, content, made = "", "", list[list[str]]()
    for place, piece in enumerate([*pieces, ""]):
        end = place == len(pieces)
        inner, text = channels.feed(piece, end=end)
        said = calls.feed(text, end=end)
        thought, content = thought + inner, content + said.content
        for delta in said.calls:
            if delta.id is not None:
                made.append([delta.name or "", ""])
            made[delta.index][1] += delta.arguments
    return thought, content, [(name, json.loads(values)) for name, values in made]


@pytest.mark.parametrize("answer", ANSWERS, ids=range(len(ANSWERS)))
def test_an_answer_is_separated_into_its_channels(
    formats: tuple[HarmonyFormat, HarmonyTools], answer: tuple[str, str, str, list[Any]]
) -> None:
    text, *expected = answer
    for pieces in ([text], list(text)):
        assert list(read(formats[1], pieces)) == expected


@given(data=st.data())
def test_an_answer_is_read_in_the_same_way_however_it_comes(
    formats: tuple[HarmonyFormat, HarmonyTools], data: st.DataObject
) -> None:
    parts = st.sampled_from([*MARKS, ANALYSIS, FINAL, ASKS, "to=", " analysis", "a", "\n", "\u00e9<|", "{}"])
    text = "".join(data.draw(st.lists(parts, max_size=8)))
    places = sorted({*data.draw(st.lists(st.integers(0, len(text)), max_size=10)), 0, len(text)})
    channels = [HarmonyReader(calls=True) for _ in range(2)]
    whole = channels[0].feed(text, end=True)
    parts_read = [channels[1].feed(text[start:stop]) for start, stop in pairwise(places)]
    parts_read.append(channels[1].feed("", end=True))
    assert tuple(map("".join, zip(*parts_read, strict=True))) == whole


def test_log_probabilities_are_those_of_the_answer_and_its_thoughts_are_counted() -> None:
    text = f"{ANALYSIS}Hm.<|end|>{FINAL}Oui \u00e9."
    decoder = ChoiceDecoder(
        0, BytePieces(lambda token: bytes([token])), (), thought=HarmonyReader(calls=False)
    )
    infos, raw = [], text.encode()
    for place, byte in enumerate(raw):
        finish: Any = "stop" if place == len(raw) - 1 else None
        scored = [ScoredToken(byte, -0.5, [])]
        piece = decoder.feed(SequenceOutput(id="r", tokens=[byte], logprobs=scored, finish=finish))
        infos += [] if piece is None else piece.tokens
    assert bytes(info.token for info in infos) == "Oui \u00e9.".encode()
    assert [info.offset for info in infos] == [0, 1, 2, 3, 4, 4, 5]
    assert decoder.reasoning_tokens == len(text.encode()) - len("Oui \u00e9.".encode())


# ---- grammars ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def follows(tokenizer: BaseTokenizer) -> Callable[[Grammar | None, str], bool]:
    tokens = tokenizer._tokenizer
    compiler = load_tokenizer(Path(tokenizer._folder), len(tokens), [tokens.eos_token_id])
    matchers = Matchers(compiler, np.zeros((1, 1), dtype=np.int32), 0)

    def check(grammar: Grammar | None, text: str) -> bool:
        assert grammar is not None
        matcher = llguidance.LLMatcher(compiler, matchers._source(grammar), log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        ids = tokens.encode(text, add_special_tokens=False)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return check


def test_a_schema_begins_in_the_final_channel(
    formats: tuple[HarmonyFormat, HarmonyTools], follows: Callable[..., bool]
) -> None:
    made = Thinking(formats[0], opened=False).before(Grammar("json_schema", json.dumps(WEATHER)))
    for before in ("<|channel|>final<|message|>", f"{ANALYSIS}What {{ is?<|end|>{FINAL}"):
        assert follows(made, before + '{"city": "Oslo"}')
        assert not follows(made, f"{before}Oslo")
    assert follows(made, f'{ANALYSIS}A<|end|><|start|>assistant{ANALYSIS}B<|end|>{FINAL}{{"city": "Oslo"}}')
    for wrong in ('{"city": "Oslo"}', ASKS, f'{ANALYSIS}{{"city": "Oslo"}}'):
        assert not follows(made, wrong)


def test_a_call_follows_its_schema_behind_any_thought(
    formats: tuple[HarmonyFormat, HarmonyTools], follows: Callable[..., bool]
) -> None:
    thoughts, tools = formats

    def made(**how: Any) -> Grammar | None:
        return Thinking(thoughts, opened=False).before(
            tools.grammar(TOOLS, how.pop("choice", "auto"), parallel=True, **how), calls=True
        )

    auto, required, schema = made(), made(choice="required"), made(content=WEATHER)
    thought = f"{ANALYSIS}Hm.<|end|>"
    said = "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
    wrong = ASKS.replace("city", "town")
    for begun in ("", f"{thought}<|start|>assistant", f"{thought}{said}<|start|>assistant"):
        for call in (ASKS, ASKS.replace("weather", "weather_now"), ASKS.replace("<|constrain|>", "")):
            assert all(follows(one, begun + call) for one in (auto, required, schema))
        assert follows(
            auto, begun + ' to=functions.weather<|channel|>commentary json<|message|>{"city": "a"}'
        )
        assert not any(follows(one, begun + wrong) for one in (auto, required, schema))
        assert not follows(auto, begun + ASKS.replace("weather", "storm"))
        final = f"{begun}<|channel|>final<|message|>"
        assert follows(auto, f"{final}Any text.")
        assert not follows(required, f"{final}Any text.")
        assert not follows(schema, f"{final}Any text.")
        assert follows(schema, final + '{"city": "a"}')


# ---- conversations -------------------------------------------------------------------------------


def call(number: int) -> dict[str, Any]:
    function = {"name": f"tool{number}", "arguments": {"n": number}}
    return {"id": f"call{number}", "type": "function", "function": function}


def test_calls_of_one_message_become_messages_each_with_its_result(
    tokenizer: BaseTokenizer, formats: tuple[HarmonyFormat, HarmonyTools]
) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "Hm.",
         "tool_calls": [call(1), call(2)]},
        {"role": "tool", "tool_call_id": "call2", "content": "second"},
        {"role": "tool", "tool_call_id": "call1", "content": "first"},
    ]  # fmt: skip
    made = formats[0].conversation(messages)
    text = tokenizer.decode(tokenizer.encode_chat(TemplateInput(made, OFFERED)), special=True)
    assert "# Instructions\n\nBe brief.\n\nBe kind." in text
    assert text.endswith(
        "<|start|>user<|message|>Q<|end|>"
        f"<|start|>assistant{ANALYSIS}Hm.\n\nI look.<|end|>"
        '<|start|>assistant to=functions.tool1<|channel|>commentary json<|message|>{"n": 1}<|call|>'
        '<|start|>functions.tool1 to=assistant<|channel|>commentary<|message|>"first"<|end|>'
        '<|start|>assistant to=functions.tool2<|channel|>commentary json<|message|>{"n": 2}<|call|>'
        '<|start|>functions.tool2 to=assistant<|channel|>commentary<|message|>"second"<|end|>'
        "<|start|>assistant"
    )
    with pytest.raises(ValueError, match="behind others"):
        formats[0].conversation([*messages[2:], {"role": "system", "content": "Late."}])


# ---- the routes ----------------------------------------------------------------------------------

BASE = "smollm2-135m-instruct"
ECHOED = (
    "{% for m in messages %}{% if m.thinking is defined %}"
    + f"{{{{ '<|start|>assistant{ANALYSIS}' + m.thinking + '<|end|>{FINAL}' + m.content + '<|end|>' }}}}"
    + "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    + "{# tools tool_calls #}{% if reasoning_effort is defined %}{{ reasoning_effort }}{% endif %}"
)
RENAMED = dict(
    zip(
        ("<repo_name>", "<reponame>", "<file_sep>", "<filename>", "<gh_stars>", "<issue_start>",
         "<issue_closed>"),
        MARKS, strict=True,
    )
)  # fmt: skip
THOUGHT, ANSWER = "I see: one two.", "It is so."
SAID: Any = {"role": "user", "content": f"{ANALYSIS}{THOUGHT}<|end|>{FINAL}{ANSWER}<|return|>"}
CALLS: Any = {"role": "user", "content": f"{ANALYSIS}{THOUGHT}<|end|><|start|>assistant{ASKS}<|call|>"}


@pytest.fixture(scope="module")
def server(
    serve_scripted: Starter, small_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The engine of this server says the prompt again and again."""
    folder = shutil.copytree(small_base, tmp_path_factory.mktemp("harmony") / BASE)
    for file in folder.glob("*token*.json"):
        text = file.read_text()
        for old, new in RENAMED.items():
            text = text.replace(f'"{old}"', f'"{new}"')
        file.write_text(text)
    (folder / "chat_template.jinja").write_text(ECHOED)
    with serve_scripted("flood", "--base", str(folder)) as server:
        yield server


def test_chat_completions_have_the_channels_whole_and_streamed(server: Server) -> None:
    ask: Any = {"model": BASE, "max_tokens": 300}
    chunks: list[Any]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        whole = client.chat.completions.create(messages=[SAID], **ask)
        message: Any = whole.choices[0].message
        assert (message.reasoning_content, message.content) == (THOUGHT, ANSWER)
        chunks = list(client.chat.completions.create(messages=[SAID], stream=True, **ask))
        deltas: list[Any] = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
        thoughts = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
        assert ("".join(thoughts), "".join(delta.content or "" for delta in deltas)) == (THOUGHT, ANSWER)
        called = client.chat.completions.create(messages=[CALLS], tools=OFFERED, **ask).choices[0]
        thinking: Any = called.message
        assert (thinking.reasoning_content, thinking.content) == (THOUGHT, None)
        assert called.message.tool_calls is not None
        (made,) = called.message.tool_calls
        assert (made.function.name, json.loads(made.function.arguments)) == OSLO[0]
        chunks = list(client.chat.completions.create(messages=[CALLS], tools=OFFERED, stream=True, **ask))
        parts = [
            part for chunk in chunks for choice in chunk.choices for part in choice.delta.tool_calls or ()
        ]
        arguments = "".join(part.function.arguments or "" for part in parts if part.function)
        assert json.loads(arguments) == OSLO[0][1]


def test_responses_and_messages_have_the_channels_whole_and_streamed(server: Server) -> None:
    flat: Any = [{"type": "function", **tool["function"]} for tool in OFFERED]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        ask: Any = {"model": BASE, "max_output_tokens": 300}
        whole = client.responses.create(input=SAID["content"], reasoning={"effort": "high"}, **ask)
        assert [item.type for item in whole.output] == ["reasoning", "message"]
        assert whole.output_text == ANSWER
        called = client.responses.create(input=CALLS["content"], tools=flat, **ask)
        assert [item.type for item in called.output] == ["reasoning", "function_call"]
        events = list(client.responses.create(input=CALLS["content"], tools=flat, stream=True, **ask))
        last: Any = events[-1]
        assert [item.type for item in last.response.output] == ["reasoning", "function_call"]
        assert last.response.output[1].arguments == '{"city": "Oslo"}'
    tools: Any = [{"name": name, "input_schema": WEATHER} for name in TOOLS]
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client_:
        asked: Any = {"model": BASE, "max_tokens": 300, "thinking": {"type": "adaptive"}}
        said = client_.messages.create(messages=[SAID], **asked)
        assert [block.type for block in said.content] == ["thinking", "text"]
        with client_.messages.stream(messages=[CALLS], tools=tools, **asked) as stream:
            final = stream.get_final_message()
        assert [block.type for block in final.content] == ["thinking", "tool_use"]


def test_a_decision_is_read_in_the_final_channel(server: Server) -> None:
    body = {"messages": [SAID], "choices": ["yes", "no"], "ends": False}
    with server.client() as http:
        decided = http.post("/v1/decide", json=body).json()["usage"]["prompt_tokens"]
        answered = http.post(
            "/v1/chat/completions", json={"model": BASE, "messages": [SAID], "max_tokens": 1}
        )
        assert (
            decided
            == answered.json()["usage"]["prompt_tokens"] + len(["<|channel|>", "final", "<|message|>"]) + 2
        )
