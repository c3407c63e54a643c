"""Graders of replies, with OpenAI's fields (https://platform.openai.com/docs/guides/graders).

A grader gives a reply its reward. `parse_grader` checks one as a caller wrote it; `grade` runs it. Nothing of
a grader is evaluated here but a formula of numbers: a grader in Python runs in a process of its own, and a
judge is asked, through what `grade` is given for that.

A grader that cannot give a reply a finite number gives it its floor: 0, or the low end of a judge's range.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import msgspec

from onebase_adapters.format.strict_json import parse_json

MOST_GRADER_BYTES = 256 << 10
"""Largest size of a grader, as JSON."""
MOST_GRADERS = 32
"""Largest number of graders in a multi grader."""
LONGEST_COMPARED = 20_000
"""Largest number of characters that a similarity is computed of; a longer text is cut."""
LONGEST_FORMULA = 1000
DEEPEST_FORMULA = 100
"""Largest number of operations in a formula that are inside of one another."""
LONGEST_TEMPLATE = 64 << 10
"""Largest number of characters of a template."""
LONGEST_RENDERED = 1 << 20
"""Largest number of characters that a template, or a judge's messages together, may become."""
LARGEST_REWARD = 1e6
"""Largest size of a reward: squares of larger ones are no use to a step, and may have no finite sum."""
LONGEST_DETAIL = 2000

Metric = Literal[
    "fuzzy_match", "bleu", "gleu", "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l",
    "cosine", "meteor",
]  # fmt: skip
_REFUSED_METRICS = {
    "cosine": "it compares embeddings of another model, which this server does not have: use rouge_l or gleu",
    "meteor": "it needs WordNet's synonyms, which are not part of this server: use rouge_l or gleu",
}
Operation = Literal["eq", "ne", "like", "ilike"]


class GraderError(ValueError):
    """A grader that cannot be used. `field`: as in `graders.style.reference`, "" for the grader itself."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}" if field else reason)
        self.field = field
        self.reason = reason


class GradingError(Exception):
    """A reply that a grader gave no reward. `flag`: OpenAI's name of the error."""

    def __init__(self, flag: str, detail: str) -> None:
        super().__init__(detail)
        self.flag = flag
        self.detail = encodable(detail[:LONGEST_DETAIL])


def encodable(text: str) -> str:
    """Return a text with question marks for lone surrogates, which have no place in a message."""
    return text.encode("utf-8", "replace").decode()


# ---- graders as they are written -----------------------------------------------------------------


class StringCheck(msgspec.Struct, frozen=True, tag="string_check", forbid_unknown_fields=True):
    """1 if `input` equals, does not equal or contains `reference`, else 0. `ilike` ignores case."""

    name: str
    input: str
    reference: str
    operation: Operation


class TextSimilarity(msgspec.Struct, frozen=True, tag="text_similarity", forbid_unknown_fields=True):
    """Similarity of `input` and `reference`, from 0 to 1."""

    name: str
    input: str
    reference: str
    evaluation_metric: Metric


class JudgeMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Message to a judge; its text may have templates."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | dict[str, Any] | list[str | dict[str, Any]]
    type: Literal["message"] = "message"

    @property
    def text(self) -> str:
        """Return the text of its parts. Raises GraderError for a part that is no text."""
        parts = self.content if isinstance(self.content, list) else [self.content]
        found = []
        for part in parts:
            if isinstance(part, dict) and part.get("type") not in ("input_text", "output_text", "text"):
                raise GraderError("input", "only text is read here: leave images and sound out")
            text = part.get("text") if isinstance(part, dict) else part
            if not isinstance(text, str):
                raise GraderError("input", "a part of a message has no text")
            found.append(text)
        return "\n".join(found)


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of a judge's reply."""

    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    max_completions_tokens: int | None = None
    reasoning_effort: str | None = None


class ScoreModel(msgspec.Struct, frozen=True, tag="score_model", forbid_unknown_fields=True):
    """Number that a judge gives: the base of this server, or any adapter of the tenant."""

    name: str
    model: str
    input: list[JudgeMessage]
    range: tuple[float, float] | None = None
    sampling_params: SamplingParams | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        """Return the range, which is from 0 to 1 unless it is set."""
        return self.range or (0.0, 1.0)


class PythonGrader(msgspec.Struct, frozen=True, tag="python", forbid_unknown_fields=True):
    """Number that `grade(sample, item)` returns, a function of the source."""

    name: str
    source: str
    image_tag: str | None = None


Single = StringCheck | TextSimilarity | ScoreModel | PythonGrader


class Multi(msgspec.Struct, frozen=True, tag="multi", forbid_unknown_fields=True):
    """Number that a formula makes of other graders' rewards, by their names in `graders`."""

    name: str
    graders: dict[str, Single]
    calculate_output: str


Grader = Single | Multi
_GRADER: msgspec.json.Decoder[Grader] = msgspec.json.Decoder(Grader)
_NO_LABELS = "label_model graders are not run here: use a score_model with a range"


def parse_grader(value: str | bytes | Mapping[str, Any]) -> Grader:
    """Return a checked grader, from JSON or from its value. Raises GraderError."""
    if isinstance(value, Mapping):
        if value.get("type") == "label_model":
            raise GraderError("type", _NO_LABELS)
        if value.get("type") == "multi" and isinstance(value.get("graders"), Mapping):
            if isinstance(value["graders"].get("type"), str):  # one grader, as OpenAI's schema has it
                value = {**value, "graders": {str(value["graders"].get("name")): value["graders"]}}
            for name, one in value["graders"].items():
                if isinstance(one, Mapping) and one.get("type") in ("label_model", "multi"):
                    reason = _NO_LABELS if one["type"] == "label_model" else "a multi grader holds no other"
                    raise GraderError(f"graders.{name}.type", reason)
        try:
            value = msgspec.json.encode(value)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise GraderError("", f"the grader is no JSON: {error}") from error
    if len(value) > MOST_GRADER_BYTES:
        raise GraderError("", f"the grader has {len(value)} bytes: write {MOST_GRADER_BYTES} at most")
    try:
        grader = _GRADER.decode(value)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        reason, _, place = str(error).partition(" - at `$")
        raise GraderError(place.rstrip("`").lstrip("."), reason.replace("`", "'")) from error
    _check(grader, "")
    return grader


def to_json(grader: Grader) -> dict[str, Any]:
    """Return the grader as it is written, without what is not set."""
    found: dict[str, Any] = msgspec.to_builtins(grader)
    plain = {name: value for name, value in found.items() if value is not None}
    if isinstance(grader, Multi):
        plain["graders"] = {name: to_json(one) for name, one in grader.graders.items()}
    return plain


def floor_of(grader: Grader) -> float:
    """Return the reward of a reply that the grader cannot grade."""
    return grader.bounds[0] if isinstance(grader, ScoreModel) else 0.0


def python_graders(grader: Grader) -> list[PythonGrader]:
    """Return the graders in it that run Python."""
    parts = grader.graders.values() if isinstance(grader, Multi) else [grader]
    return [one for one in parts if isinstance(one, PythonGrader)]


def judges(grader: Grader) -> list[ScoreModel]:
    """Return the graders in it that ask a judge."""
    parts = grader.graders.values() if isinstance(grader, Multi) else [grader]
    return [one for one in parts if isinstance(one, ScoreModel)]


def _check(grader: Grader, place: str) -> None:
    def at(name: str) -> str:
        return f"{place}.{name}".lstrip(".")

    if not grader.name.strip() or len(grader.name) > 100:
        raise GraderError(at("name"), "write a name of 1 to 100 characters")
    if isinstance(grader, StringCheck | TextSimilarity):
        for name in ("input", "reference"):
            _check_template(getattr(grader, name), at(name))
    if isinstance(grader, TextSimilarity) and grader.evaluation_metric in _REFUSED_METRICS:
        reason = (
            f"{grader.evaluation_metric} is not computed here: {_REFUSED_METRICS[grader.evaluation_metric]}"
        )
        raise GraderError(at("evaluation_metric"), reason)
    if isinstance(grader, ScoreModel):
        low, high = grader.bounds
        if not -LARGEST_REWARD <= low < high <= LARGEST_REWARD:
            reason = f"write two numbers, the lower one first, from {-LARGEST_REWARD:g} to {LARGEST_REWARD:g}"
            raise GraderError(at("range"), reason)
        if not grader.input or len(grader.input) > 100:
            raise GraderError(at("input"), "write 1 to 100 messages")
        for number, message in enumerate(grader.input):
            _check_template(message.text, at(f"input[{number}].content"))
        if grader.sampling_params is not None and grader.sampling_params.reasoning_effort not in (
            None,
            "none",
        ):
            reason = "a judge's effort is not set here: leave it out, or ask a judge that does not think"
            raise GraderError(at("sampling_params.reasoning_effort"), reason)
    if isinstance(grader, PythonGrader):
        _check_source(grader, at)
    if isinstance(grader, Multi):
        if not 1 <= len(grader.graders) <= MOST_GRADERS:
            raise GraderError(at("graders"), f"write 1 to {MOST_GRADERS} graders")
        for name, one in grader.graders.items():
            if not name.isidentifier() or name in _FUNCTIONS:
                raise GraderError(at("graders"), f"{name[:80]!r} cannot be a name in a formula")
            _check(one, at(f"graders.{name}"))
        formula = parse_formula(grader.calculate_output, at("calculate_output"))
        for name in formula.names:
            if name not in grader.graders:
                known = ", ".join(grader.graders)
                raise GraderError(at("calculate_output"), f"{name!r} is no grader of it; there are {known}")


def _check_source(grader: PythonGrader, at: Callable[[str], str]) -> None:
    if grader.image_tag is not None:
        reason = (
            "there are no images here: the grader runs with this server's Python and its standard library"
        )
        raise GraderError(at("image_tag"), f"{reason}. Leave it out")
    try:
        # Parsed, not run: what is wrong is said before a job begins.
        tree = ast.parse(grader.source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise GraderError(at("source"), f"it is no Python: {error}") from error
    if not any(_defines_grade(node) for node in tree.body):
        raise GraderError(at("source"), "it defines no function grade(sample, item)")


def _defines_grade(node: ast.stmt) -> bool:
    """Return True for a definition of `grade`, or an assignment to that name: `grade = lambda ...`."""
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return any(isinstance(target, ast.Name) and target.id == "grade" for target in targets)
    return isinstance(node, ast.FunctionDef) and node.name == "grade"


# ---- templates -----------------------------------------------------------------------------------

_FIELD = re.compile(r"\{\{([^{}]*)\}\}")  # one way to match: time is linear in a template
_STEP = re.compile(r"\.([A-Za-z_][\w-]*)|\[(\d{1,6})\]")
_SAMPLE_FIELDS = ("output_text", "output_json")


@dataclass(frozen=True)
class Graded:
    """Reply that is graded, and the row that it answers."""

    text: str
    item: Mapping[str, Any]

    def value(self, path: str) -> Any:
        """Return the value of a template's path. Raises GradingError."""
        root, steps = _parsed_path(path)
        if root == "item":
            value: Any = self.item
        elif steps[0] == "output_text":
            value, steps = self.text, steps[1:]
        else:
            value, steps = self._json(), steps[1:]
        for step in steps:
            try:
                value = value[step] if isinstance(step, int) == isinstance(value, list) else _missing(path)
            except (KeyError, IndexError, TypeError):
                _missing(path)
        return value

    def _json(self) -> Any:
        if not self._parsed:
            raise GradingError("sample_parse_error", "the reply is no JSON")
        return self._parsed[0]

    @cached_property
    def _parsed(self) -> tuple[Any, ...]:
        """The reply's JSON, parsed once for all templates; empty if it is none."""
        try:
            return (parse_json(self.text.strip().encode()),)
        except (ValueError, RecursionError):
            return ()

    def as_sample(self) -> dict[str, Any]:
        """Return the reply as a grader in Python gets it."""
        try:
            parsed = self._json()
        except GradingError:
            parsed = None
        return {"output_text": self.text, "output_json": parsed}


def render(template: str, graded: Graded, most: int = LONGEST_RENDERED) -> str:
    """Return the text of a template, of at most so many characters. Values that are no texts are written as
    JSON. Raises GradingError."""
    parts, length, place = list[str](), 0, 0
    for match in (*_FIELD.finditer(template), None):
        parts.append(template[place : match.start() if match else None])
        if match:
            parts.append(_written(graded.value(match[1].strip())))
            place = match.end()
        length += sum(map(len, parts[-2 if match else -1 :]))
        if length > most:
            detail = f"the templates become longer than {LONGEST_RENDERED} characters"
            raise GradingError("other_error", detail)
    return encodable("".join(parts))


def render_messages(grader: ScoreModel, graded: Graded) -> list[tuple[str, str]]:
    """Return a judge's messages as (role, text). Raises GradingError."""
    found, left = list[tuple[str, str]](), LONGEST_RENDERED
    for message in grader.input:
        text = render(message.text, graded, left)
        left -= len(text)
        found.append((message.role, text))
    return found


def _written(value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits
        raise GradingError("other_error", f"a value cannot be written: {error}") from error


def _missing(path: str) -> Any:
    raise GradingError("invalid_variable_error", f"there is no {path[:200]}")


def _parsed_path(path: str) -> tuple[str, list[str | int]]:
    """Return the root and the steps of a path. Raises ValueError."""
    root = re.match(r"sample|item", path)
    if root is None:
        raise ValueError("a template names sample.output_text, sample.output_json or item with a field")
    steps: list[str | int] = []
    place = root.end()
    while place < len(path):
        step = _STEP.match(path, place)
        if step is None:
            raise ValueError(f"{path[:80]!r} is no path: write names after dots, and numbers in brackets")
        steps.append(step[1] if step[1] is not None else int(step[2]))
        place = step.end()
    if not steps:
        raise ValueError(f"{path!r} names no field")
    if root[0] == "sample" and steps[0] not in _SAMPLE_FIELDS:
        raise ValueError(f"there is sample.output_text and sample.output_json, no sample.{steps[0]}")
    return root[0], steps


def _check_template(template: str, place: str) -> None:
    if len(template) > LONGEST_TEMPLATE:
        reason = f"it has {len(template)} characters: write {LONGEST_TEMPLATE} at most"
        raise GraderError(place, reason)
    for match in _FIELD.finditer(template):
        try:
            _parsed_path(match[1].strip())
        except ValueError as error:
            raise GraderError(place, str(error)) from error
    if "{{" in _FIELD.sub("", template):
        raise GraderError(place, "a {{ has no }}")


# ---- formulas ------------------------------------------------------------------------------------

_FUNCTIONS: dict[str, Callable[..., float]] = {
    "min": min,
    "max": max,
    "abs": abs,
    "floor": lambda one: float(math.floor(one)),
    "ceil": lambda one: float(math.ceil(one)),
    "exp": math.exp,
    "sqrt": math.sqrt,
    "log": math.log,
}
_SEVERAL = ("min", "max")
_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: lambda one, other: one + other,
    ast.Sub: lambda one, other: one - other,
    ast.Mult: lambda one, other: one * other,
    ast.Div: lambda one, other: one / other,
    ast.Pow: math.pow,
}


@dataclass(frozen=True)
class Formula:
    """Checked formula: numbers, names, + - * / ^, brackets and eight functions. names: those it reads."""

    tree: ast.expr
    names: frozenset[str]

    def value(self, values: Mapping[str, float]) -> float:
        """Return its value. Raises GradingError unless that is a finite number."""
        try:
            found = _value(self.tree, values)
            return finite(found)
        except (ArithmeticError, ValueError, RecursionError, GradingError) as error:
            raise GradingError("formula_parse_error", f"the formula has no value: {error}") from error


def parse_formula(text: str, place: str = "calculate_output") -> Formula:
    """Return a formula. Raises GraderError."""
    if len(text) > LONGEST_FORMULA:
        raise GraderError(place, f"it has {len(text)} characters: write {LONGEST_FORMULA} at most")
    try:
        tree = ast.parse(text.strip().replace("^", "**"), mode="eval").body
        names = frozenset(_names(tree))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = str(error) if type(error) is ValueError else "it is no formula"
        raise GraderError(
            place, f"{reason}: write graders' names with + - * / ^ and {', '.join(_FUNCTIONS)}"
        ) from error
    return Formula(tree, names)


def _names(node: ast.expr, depth: int = 1) -> list[str]:
    """Return the names in a formula. Raises ValueError for what has no place in one."""
    if depth > DEEPEST_FORMULA:
        raise ValueError(f"more than {DEEPEST_FORMULA} operations are inside of one another")
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return []
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        return _names(node.operand, depth + 1)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return [*_names(node.left, depth + 1), *_names(node.right, depth + 1)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        name, count = node.func.id, len(node.args)
        if name not in _FUNCTIONS:
            raise ValueError(f"there is no function {name[:80]!r}")
        if count != 1 and not (name in _SEVERAL and count > 1):
            raise ValueError(f"{name} takes another number of values")
        return [name for one in node.args for name in _names(one, depth + 1)]
    raise ValueError("it has more than numbers, names, operators and functions")


def _value(node: ast.expr, values: Mapping[str, float]) -> float:
    if isinstance(node, ast.Constant):
        return float(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.Name):
        return values[node.id]
    if isinstance(node, ast.UnaryOp):
        found = _value(node.operand, values)
        return -found if isinstance(node.op, ast.USub) else found
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left, values), _value(node.right, values))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        given = [_value(one, values) for one in node.args]
        return (
            _FUNCTIONS[node.func.id](*given) if len(given) > 1 or node.func.id not in _SEVERAL else given[0]
        )
    raise ValueError("it is no formula")


def finite(value: float) -> float:
    """Return a reward as a number. Raises GradingError unless it is finite and at most LARGEST_REWARD."""
    if not math.isfinite(value):
        raise GradingError("other_error", f"the reward is {value}, which is no finite number")
    if abs(value) > LARGEST_REWARD:
        detail = f"the reward is {value:.3g}: give numbers from {-LARGEST_REWARD:g} to {LARGEST_REWARD:g}"
        raise GradingError("other_error", detail)
    return float(value)


def number_of(value: Any) -> float:
    """Return a value of JSON as a number; an integer of any size. Raises ValueError: it is none."""
    if type(value) not in (int, float):
        raise ValueError("it is no number")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


# ---- texts ---------------------------------------------------------------------------------------


def similarity(metric: Metric, text: str, reference: str) -> float:
    """Return the similarity of two texts, from 0 to 1. Words are runs of letters and digits, in lower case.

    fuzzy_match: twice the longest common subsequence of characters over both lengths. bleu: of 1 to 4 words,
    smoothed by one from 2 words on (Lin and Och 2004). gleu: the lesser of precision and recall of 1 to 4
    words (Wu et al. 2016). rouge_N, rouge_l: F1 of N words, or of the longest common subsequence (Lin 2004).
    """
    text, reference = text[:LONGEST_COMPARED], reference[:LONGEST_COMPARED]
    if metric == "fuzzy_match":
        return _f1(_common(text, reference), len(text), len(reference))
    ours, theirs = _words(text), _words(reference)
    if metric == "rouge_l":
        return _f1(_common(ours, theirs), len(ours), len(theirs))
    if metric == "bleu":
        return _bleu(ours, theirs)
    if metric == "gleu":
        counts = [_shared(ours, theirs, size) for size in range(1, 5)]
        common, own, other = (sum(column) for column in zip(*counts, strict=True))
        return common / max(own, other) if max(own, other) else 1.0
    common, own, other = _shared(ours, theirs, int(metric.removeprefix("rouge_")))
    return _f1(common, own, other) if own + other else float(ours == theirs)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _f1(common: int, own: int, other: int) -> float:
    return 2 * common / (own + other) if own + other else 1.0


def _shared(ours: Sequence[str], theirs: Sequence[str], size: int) -> tuple[int, int, int]:
    """Return the number of n-grams in both, and in each."""
    one, other = (
        Counter(tuple(words[place : place + size]) for place in range(len(words) - size + 1))
        for words in (ours, theirs)
    )
    return (one & other).total(), one.total(), other.total()


def _bleu(ours: Sequence[str], theirs: Sequence[str]) -> float:
    if not ours or not theirs:
        return float(list(ours) == list(theirs))
    total = 0.0
    for size in range(1, 5):
        common, own, _ = _shared(ours, theirs, size)
        more = int(size > 1)
        if common + more == 0:
            return 0.0
        total += math.log((common + more) / (own + more)) / 4
    return math.exp(total + min(0.0, 1 - len(theirs) / len(ours)))


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, by rows of bits (Hyyro 2004)."""
    places: dict[str, int] = {}
    for place, part in enumerate(one):
        places[part] = places.get(part, 0) | 1 << place
    whole = (1 << len(one)) - 1
    row = whole
    for part in other:
        both = row & places.get(part, 0)
        row = (row + both) | (row - both)
        row &= whole
    return len(one) - row.bit_count()


def check_string(operation: Operation, text: str, reference: str) -> float:
    """Return 1.0 or 0.0."""
    if operation == "eq":
        return float(text == reference)
    if operation == "ne":
        return float(text != reference)
    if operation == "like":
        return float(reference in text)
    return float(reference.casefold() in text.casefold())


# ---- grading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JudgedScore:
    """A judge's number, the tokens that it took, and the model that gave it."""

    reward: float
    tokens: int = 0
    model: str = ""


class AskJudge(Protocol):
    """Function that asks a judge with rendered messages, as (role, text). Raises GradingError."""

    async def __call__(self, grader: ScoreModel, messages: Sequence[tuple[str, str]], /) -> JudgedScore: ...


RunPython = Callable[[PythonGrader, Graded], Awaitable[float]]
"""Function that runs a grader's source. Raises GradingError."""
RunText = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Function that computes something of texts in a thread, since it may take a moment."""


@dataclass
class Grade:
    """Outcome of grading. errors: details by OpenAI's flags. parts: rewards of a multi grader's graders.
    tokens: of judges, by model."""

    reward: float
    parts: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    tokens: Counter[str] = field(default_factory=Counter)


async def grade(
    grader: Grader, graded: Graded, *, judge: AskJudge, python: RunPython, text: RunText
) -> Grade:
    """Return a reply's reward, whatever its graders do."""
    if not isinstance(grader, Multi):
        return await _graded(grader, graded, judge, python, text)
    found = Grade(0.0)
    for name, part in grader.graders.items():
        one = await _graded(part, graded, judge, python, text)
        found.parts[name] = one.reward
        found.errors |= {flag: f"{name}: {detail}" for flag, detail in one.errors.items()}
        found.tokens += one.tokens
    try:
        found.reward = parse_formula(grader.calculate_output).value(found.parts)
    except GraderError as error:
        found.errors["formula_parse_error"] = error.reason
    except GradingError as error:
        found.errors[error.flag] = error.detail
    return found


async def _graded(grader: Single, graded: Graded, judge: AskJudge, python: RunPython, text: RunText) -> Grade:
    found = Grade(floor_of(grader))
    try:
        if isinstance(grader, ScoreModel):
            judged = await judge(grader, await text(lambda: render_messages(grader, graded)))
            low, high = grader.bounds
            found.tokens[judged.model] += judged.tokens
            if not low <= judged.reward <= high:
                detail = f"the judge gave {judged.reward:g}, which is not in the range {low:g} to {high:g}"
                raise GradingError("model_grader_parse_error", detail)
            found.reward = judged.reward
        elif isinstance(grader, PythonGrader):
            found.reward = finite(await python(grader, graded))
        else:
            found.reward = finite(await text(lambda: _of_texts(grader, graded)))
    except GradingError as error:
        found.errors[error.flag] = error.detail
    return found


def _of_texts(grader: StringCheck | TextSimilarity, graded: Graded) -> float:
    """Return the reward of a grader that compares two texts. Raises GradingError."""
    given = render(grader.input, graded)
    reference = render(grader.reference, graded, LONGEST_RENDERED - len(given))
    if isinstance(grader, StringCheck):
        return check_string(grader.operation, given, reference)
    return similarity(grader.evaluation_metric, given, reference)
