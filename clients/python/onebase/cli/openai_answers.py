"""Record the answers of a fine-tuned model at OpenAI while it can be asked: rows to train on, held-out rows,
and the figures that a new adapter has to reach."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import Any, Final

import httpx2

from onebase_protocol.common import Json

from .._core.rows import HeldOutRow, calls_text, function_calls

OPENAI_URL: Final = "https://api.openai.com/v1"
ANSWERS, TRAIN, HELD_OUT, GATE = "answers.jsonl", "train.jsonl", "heldout.jsonl", "gate.json"
"""Files of a folder of recorded answers."""
MOST_HELD_OUT: Final = 200
_HELD_OUT_SHARE: Final = 5
"""One in so many rows is held out, where no file of held-out rows is given."""
_TRIES: Final = 6
_LONGEST_WAIT_S: Final = 60.0
_CHARACTERS_A_TOKEN: Final = 4
"""Characters of English text in a token, for a first estimate of what will be billed."""
_USAGE: Final = ("prompt_tokens", "completion_tokens")
_WHOLE: Final = ("stop", "tool_calls", "function_call")
"""Ends of an answer that is not cut off."""


class OpenAIError(Exception):
    """OpenAI did not answer a request; what is recorded stays. The message has its own words."""


@dataclass(frozen=True)
class Old:
    """A model at OpenAI, and how to ask it."""

    model: str
    key: str
    url: str = OPENAI_URL
    max_tokens: int = 1024


@dataclass(frozen=True)
class Recorded:
    """Answers by the key of their prompt, in a file to which each is appended as it arrives."""

    file: Path
    answers: dict[str, Json]

    @classmethod
    def open(cls, folder: Path, model: str) -> Recorded:
        """Return the answers in a folder. A line that was cut off is asked again.

        Raises ValueError if they are another model's, or a line is JSON and no answer; OSError.
        """
        folder.mkdir(parents=True, exist_ok=True)
        file, found = folder / ANSWERS, {}
        whole = bytearray()
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else ()
        for number, line in enumerate(lines, 1):
            try:
                answer = json.loads(line)
            except ValueError:
                continue
            if not _is_answer(answer):
                raise ValueError(
                    f"{file}, line {number} is no recorded answer: remove it, or give another folder with "
                    "--out"
                )
            found[answer["key"]] = answer
            whole += line if line.endswith(b"\n") else line + b"\n"
        others = {answer["asked"] for answer in found.values()} - {model}
        if others:
            raise ValueError(f"{file} has answers of {min(others)}: give another folder with --out")
        if file.exists() and len(whole) != file.stat().st_size:
            part = file.with_suffix(".part")
            part.write_bytes(whole)
            part.replace(file)
        return cls(file, found)

    def add(self, answer: Json) -> None:
        """Append an answer; it is on the disk when this returns."""
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(answer, ensure_ascii=False) + "\n")
            out.flush()
            os.fsync(out.fileno())
        self.answers[answer["key"]] = answer

    def left(self, rows: Sequence[HeldOutRow], max_tokens: int) -> list[HeldOutRow]:
        """Return the rows that have no answer yet, or one cut off below `max_tokens`, each prompt once."""
        wanted = {key_of(row): row for row in rows}
        return [row for key, row in wanted.items() if not self._has(key, max_tokens)]

    def _has(self, key: str, max_tokens: int) -> bool:
        answer = self.answers.get(key)
        if answer is None or answer["finish_reason"] != "length":
            return answer is not None
        return bool(answer.get("max_tokens", answer["usage"]["completion_tokens"]) >= max_tokens)


def _is_answer(found: Any) -> bool:
    kinds = {"key": str, "asked": str, "messages": list, "answer": dict, "usage": dict}
    return (
        isinstance(found, dict)
        and "finish_reason" in found
        and all(isinstance(found.get(name), kind) for name, kind in kinds.items())
        and all(isinstance(found["usage"].get(name), int) for name in _USAGE)
    )


def key_of(row: HeldOutRow) -> str:
    """Return the SHA-256 of what is asked."""
    return hashlib.sha256(json.dumps(_asked(row), sort_keys=True).encode()).hexdigest()


def _asked(row: HeldOutRow) -> Json:
    if "prompt" in row.asked:
        return {"messages": [{"role": "user", "content": row.asked["prompt"]}]}
    return dict(row.asked)


# ---- asking ------------------------------------------------------------------------------------------


def estimated_tokens(rows: Sequence[HeldOutRow], recorded: Recorded) -> tuple[int, int]:
    """Return about how many tokens the prompts and the answers will have.

    Answers are taken to be as long as those that are recorded, or as the rows' own.
    """
    sent = sum(len(json.dumps(_asked(row), ensure_ascii=False)) for row in rows) // _CHARACTERS_A_TOKEN
    known = [answer["usage"]["completion_tokens"] for answer in recorded.answers.values()]
    own = [len(row.reference) // _CHARACTERS_A_TOKEN + 1 for row in rows if row.reference]
    lengths = known or own
    each = sum(lengths) / len(lengths) if lengths else 100
    return sent, round(each * len(rows))


def record(
    old: Old, rows: Sequence[HeldOutRow], recorded: Recorded, progress: Callable[[float], object]
) -> bool:
    """Ask for the answers that are not recorded yet. Return True if the model was asked at temperature 0.

    Raises:
        OpenAIError: a request was refused. The answers before it are kept, and the same call goes on.
    """
    left = recorded.left(rows, old.max_tokens)
    sampling: Json = {"temperature": 0}
    with httpx2.Client(timeout=120.0) as http:
        for number, row in enumerate(left, 1):
            recorded.add(_answer(old, row, _ask(http, old, row, sampling)))
            progress(number / len(left))
    return bool(sampling)


def check_tools(rows: Sequence[HeldOutRow]) -> None:
    """Raise ValueError for a row with a tool that is no function: it cannot be trained on."""
    for row in rows:
        for tool in row.asked.get("tools", ()):
            if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
                raise ValueError(
                    f"line {row.line}: a tool is no function, but {json.dumps(tool)[:80]}: leave the row out"
                )


def _answer(old: Old, row: HeldOutRow, body: Json) -> Json:
    try:
        choice = body["choices"][0]
        message = {name: value for name, value in choice["message"].items() if name in _KEPT and value}
        usage = {name: int(body["usage"][name]) for name in _USAGE}
        finish = choice["finish_reason"]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise OpenAIError(f"its answer has another form than chat.completion: {error!r}") from error
    return {
        "key": key_of(row), "asked": old.model, "line": row.line, **_asked(row), "answer": message,
        "finish_reason": finish, "usage": usage, "max_tokens": old.max_tokens,
        "model": str(body.get("model", "")),
    }  # fmt: skip


_KEPT: Final = ("role", "content", "tool_calls", "refusal")


def _ask(http: httpx2.Client, old: Old, row: HeldOutRow, sampling: Json) -> Json:
    """Return OpenAI's answer; asks again after an overload or a broken connection. Raises OpenAIError.

    sampling: emptied once the model refuses a temperature, as reasoning models do.
    """
    said = ""
    for attempt in range(_TRIES):
        body = {"model": old.model, **sampling, "max_completion_tokens": old.max_tokens, **_asked(row)}
        wait = min(_LONGEST_WAIT_S, 2.0**attempt)
        try:
            reply = http.post(
                f"{old.url}/chat/completions", json=body, headers={"Authorization": f"Bearer {old.key}"}
            )
        except httpx2.TransportError as error:
            said = str(error) or type(error).__name__
        else:
            if reply.status_code == 200:
                return dict(reply.json())
            code, said = _refusal(reply)
            if sampling and reply.status_code == 400 and "'temperature'" in said:
                sampling.clear()
                continue
            if code == "insufficient_quota" or (
                reply.status_code < 500 and reply.status_code not in (408, 409, 429)
            ):
                raise OpenAIError(f"line {row.line}: HTTP {reply.status_code}: {said}")
            wait = _asked_wait(reply) or wait
        if attempt + 1 < _TRIES:
            sleep(wait)
    raise OpenAIError(f"line {row.line}: {said} (asked {_TRIES} times)")


def _refusal(reply: httpx2.Response) -> tuple[str, str]:
    try:
        error = reply.json()["error"]
        return str(error.get("code")), str(error["message"])[:500]
    except (ValueError, LookupError, TypeError, AttributeError):
        return "", reply.text[:200]


def _asked_wait(reply: httpx2.Response) -> float:
    try:
        return min(_LONGEST_WAIT_S, max(0.0, float(reply.headers.get("retry-after", 0))))
    except ValueError:
        return 0.0


# ---- what is made of the answers ---------------------------------------------------------------------


@dataclass(frozen=True)
class QualityGate:
    """Figures of the old model on the held-out rows, against the rows' own replies.

    metrics: empty if the rows had no replies: then the held-out replies are the old model's.
    """

    model: str
    rows: int
    metrics: Mapping[str, float]
    longest: int
    """Tokens of the longest answer, by OpenAI's count."""


def write_sets(
    recorded: Recorded,
    rows: Sequence[HeldOutRow],
    held_out: Sequence[HeldOutRow],
    metrics: Sequence[str],
    model: str,
) -> QualityGate:
    """Write rows to train on, held-out rows and the gate next to the answers.

    Args:
        rows: prompts to train on; without `held_out` a part of them is held out.
        metrics: measured on the held-out rows.

    Answers that were cut off or refused are not trained on. Raises OSError, ValueError.
    """
    if not held_out:
        rows, held_out = _parted(rows)
    known = [row for row in held_out if row.reference is not None]
    measured = known or held_out
    taken = {key_of(row) for row in measured}
    folder = recorded.file.parent
    train = [row for row in [*rows, *held_out] if key_of(row) not in taken]
    answers = [answer for answer in _answers(recorded, train) if answer["finish_reason"] in _WHOLE]
    _write(folder / TRAIN, (_with_reply(answer, answer["answer"]) for answer in answers))
    pairs = [(recorded.answers[key_of(row)], row.reference) for row in measured]
    _write(folder / HELD_OUT, (_with_reply(one, _reference(one, own)) for one, own in pairs))
    texts = [(text_of(answer["answer"]), own) for answer, own in pairs if own is not None]
    gate = QualityGate(
        model,
        len(measured),
        {name: sum(score(name, *pair) for pair in texts) / len(texts) for name in metrics} if texts else {},
        max(answer["usage"]["completion_tokens"] for answer, _ in pairs),
    )
    facts = {"model": model, "rows": gate.rows, "metrics": gate.metrics, "longest": gate.longest}
    (folder / GATE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return gate


def read_gate(folder: Path) -> QualityGate:
    """Return the gate in a folder. Raises ValueError."""
    try:
        found = json.loads((folder / GATE).read_text(encoding="utf-8"))
        return QualityGate(found["model"], found["rows"], found["metrics"], found["longest"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{folder} holds no recorded answers ({error}): make some with --record") from error


def _parted(rows: Sequence[HeldOutRow]) -> tuple[list[HeldOutRow], list[HeldOutRow]]:
    """Return rows to train on and rows to hold out: the same ones each time, equal prompts on one side."""
    ordered = sorted({key_of(row): row for row in rows}.items())
    count = min(MOST_HELD_OUT, len(ordered) // _HELD_OUT_SHARE)
    if not count:
        raise ValueError(
            f"{len(ordered)} prompts are too few to hold some out: give {_HELD_OUT_SHARE} or more"
        )
    chosen = {key for key, _ in ordered[:count]}
    unique = dict(ordered)
    held_out = [row for key, row in unique.items() if key in chosen]
    return [row for row in rows if key_of(row) not in chosen], held_out


def _answers(recorded: Recorded, rows: Sequence[HeldOutRow]) -> Iterator[Json]:
    keys = dict.fromkeys(map(key_of, rows))
    return (recorded.answers[key] for key in keys)


def _with_reply(answer: Mapping[str, Any], reply: Mapping[str, Any]) -> Json:
    tools = {"tools": answer["tools"]} if "tools" in answer else {}
    return {"messages": [*answer["messages"], dict(reply)], **tools}


def _reference(answer: Mapping[str, Any], own: str | None) -> Json:
    return dict(answer["answer"]) if own is None else {"role": "assistant", "content": own}


def _write(file: Path, rows: Iterator[Json]) -> None:
    part = file.with_suffix(".part")
    with part.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    part.replace(file)


def text_of(message: Mapping[str, Any]) -> str:
    """Return an answer as text; calls of tools as JSON. Raises ValueError for a call of no function."""
    calls = message.get("tool_calls")
    if calls:
        return calls_text(function_calls(calls))
    return str(message.get("content") or message.get("refusal") or "")


# ---- metrics and graders -----------------------------------------------------------------------------


def score(name: str, reply: str, reference: str) -> float:
    """Return a reply's score, 0 to 1, as the server's metric of this name has it.

    Raises ValueError for a name that is not measured here.
    """
    reply, reference = reply.strip(), reference.strip()
    kind, _, argument = name.partition(":")
    if kind == "exact_match":
        return float(reply == reference)
    if kind == "json_valid":
        return float(is_json(reply))
    if kind == "word_f1":
        return _word_f1(reply.lower().split(), reference.lower().split())
    if kind == "contains":
        return float(argument in reply)
    if kind == "lacks":
        return float(argument not in reply)
    raise ValueError(f"{name} is not measured on recorded answers")


def _word_f1(ours: list[str], theirs: list[str]) -> float:
    from collections import Counter

    both = (Counter(ours) & Counter(theirs)).total()
    return 2 * both / (len(ours) + len(theirs)) if both else float(ours == theirs)


def is_json(text: str) -> bool:
    """Return True for strict JSON: no key twice, no NaN."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(found)) < len(found):
            raise ValueError("a key twice")
        return dict(found)

    def constant(name: str) -> None:
        raise ValueError(name)

    try:
        json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError):
        return False
    return True


def graders_of(found: Any) -> list[Mapping[str, Any]]:
    """Return the graders in a job, an eval (`testing_criteria`), a grader, or a list of these."""
    if isinstance(found, list):
        return [grader for one in found for grader in graders_of(one)]
    if not isinstance(found, dict):
        return []
    if "testing_criteria" in found:
        return graders_of(found["testing_criteria"])
    if found.get("object") == "fine_tuning.job":
        method = found.get("method") or {}
        return graders_of((method.get("reinforcement") or {}).get("grader"))
    if found.get("type") == "multi":
        inside = found.get("graders")
        return graders_of(list(inside.values()) if isinstance(inside, dict) else inside)
    return [found] if isinstance(found.get("type"), str) else []


_OUTPUT: Final = "{{sample.output_text}}"


def metric_of(grader: Mapping[str, Any]) -> tuple[str | None, str]:
    """Return the metric that a grader of OpenAI's is measured by here, if there is one, and a sentence on
    what is different; "" if nothing is."""
    kind, name = str(grader["type"]), str(grader.get("name") or grader["type"])[:60]
    given = "".join(str(grader.get("input", "")).split())
    reference = str(grader.get("reference", ""))
    if kind == "string_check" and given == _OUTPUT:
        operation = grader.get("operation")
        if operation == "eq" and "{{" in reference:
            return "exact_match", ""
        if operation == "like" and "{{" not in reference and reference:
            return f"contains:{reference}", ""
        if operation == "ne" and "{{" not in reference and reference:
            return (
                f"lacks:{reference}",
                f"The grader {name} (ne) is read as: {reference!r} is not in the reply.",
            )
    if kind == "text_similarity" and given == _OUTPUT:
        how = str(grader.get("evaluation_metric", ""))[:40]
        return "word_f1", f"The grader {name} ({how}) is measured by word_f1 here, whose numbers are others."
    return None, f"The grader {name} ({kind}) has no counterpart here: it is not measured."
