"""`onebase migrate openai`: train again here what was fine-tuned at OpenAI, from the same rows."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from onebase_protocol.command_line import add_validation

from .._core.config import openai_key
from .._core.rows import HeldOutRow, held_out_rows
from .._sync.client import Client
from .._sync.jobs import TrainingJob
from .._terminal.ui import ProgressDisplay, console, line, note, size
from ..adapter_types import READY, Progress
from ..errors import ConflictError, OneBaseError, TrainingStoppedError
from ..training_types import TrainingMethod, TrainingReport, TrainingSettings
from .command import (
    FAILED,
    INTERRUPTED,
    OK,
    action_parser,
    count,
    dollars,
    money,
    perform,
    price,
    print_json,
    report,
    run_action,
)
from .jobs.create import parse_grader, parse_settings
from .jobs.show import settings_line, short, time_taken
from .jobs.watch import follow
from .openai_answers import (
    HELD_OUT,
    OPENAI_URL,
    TRAIN,
    Old,
    OpenAIError,
    QualityGate,
    Recorded,
    check_tools,
    estimated_tokens,
    graders_of,
    is_json,
    key_of,
    metric_of,
    read_gate,
    record,
    write_sets,
)

HELP: Final = """\
usage: onebase migrate openai --record prompts.jsonl --job job.json
       onebase migrate openai --recorded FOLDER [options]
       onebase migrate openai --file rows.jsonl [options]

Train again, on the base that a server has in memory, what was fine-tuned elsewhere.

  openai     from the file, and the settings, of a fine-tuning job at OpenAI

`onebase migrate openai --help` explains it.
"""
ACTIONS: Final[Mapping[str, str]] = {"openai": "migrate"}

_DESCRIPTION = """\
Train an adapter from the rows of a fine-tuning job at OpenAI, which are read as they are. With
--job, its method, hyperparameters, seed, metadata and suffix are taken over: the JSON that
`client.fine_tuning.jobs.retrieve(ID).to_json()` gives. The server checks every row and says what
the job will take, in time and memory, before anything is trained. In the end it compares the base
with the adapter on held-out rows, activates what is better, and prints what changes in the client.

While the old model can still be asked, --record keeps its answers: each prompt of a file is sent to
OpenAI's API with the key in OPENAI_API_KEY, once, and its answer is stored as it arrives; the
same command goes on where it was interrupted. How much that is, and with --price what it costs,
is shown and confirmed before. The folder then holds rows to train on (the old model's answers),
held-out rows, and the figures that the old model reached on them. --recorded trains from that
folder, and activates the adapter only if it is at least as good as the old model was.
"""
_EXAMPLES = """\
  onebase migrate openai --file rows.jsonl --job job.json
  onebase migrate openai --record prompts.jsonl --job job.json --price 3.75/15
  onebase migrate openai --recorded prompts-openai --job job.json
  onebase migrate openai --file rows.jsonl --validation held-out.jsonl --name support --yes
"""

MOST_JOB_BYTES: Final = 1 << 20
_MOST_ROW_BYTES: Final = 4 << 20
_LOOK_SECONDS: Final = 0.5
_MOST_NAME: Final = 64
_NO_NAME: Final = re.compile(r"[^A-Za-z0-9._-]+")
_TAKEN: Final = ("n_epochs", "batch_size", "learning_rate_multiplier", "beta")
"""OpenAI's hyperparameters."""
_TAKEN_BY_REWARDS: Final = ("eval_interval", "eval_samples", "compute_multiplier")
"""OpenAI's hyperparameters of reinforcement fine-tuning besides."""
_OURS: Final = {"n_epochs": "epochs", "eval_interval": "eval_every"}
_METRICS: Final = ("exact_match", "word_f1")
"""Measured on replies, unless --set metrics says otherwise."""
_NOT_COMPUTED: Final = ("cosine", "meteor")
"""OpenAI's measures of similarity that no grader here has."""
_FINE_TUNED = "ft:"
_REWARDS: Final = "reinforcement"


@dataclass(frozen=True)
class Wanted:
    """A job to be created here. grader: of reinforcement alone. lost: what does not carry over, a sentence
    each. was: the model at OpenAI."""

    name: str
    method: TrainingMethod
    settings: Mapping[str, Any]
    seed: int | None
    metadata: Mapping[str, str]
    was: str
    grader: Mapping[str, Any] | None = None
    lost: tuple[str, ...] = field(default=())


def run(command: str, argv: list[str]) -> int:
    """Run the command. Gives its exit status."""
    if argv[:1] != ["openai"]:
        return run_action(command, HELP, ACTIONS, argv)
    made = _parser()
    args = made.parse_args(argv[1:])
    if args.record:
        return _record(made, args)
    try:
        gate = _use_recorded(args)
        wanted = read_wanted(args, gate)
    except (OSError, ValueError) as error:
        made.error(str(error))
    if not args.yes and not sys.stdin.isatty():
        made.error("there is no terminal to ask on: pass --yes to go ahead")
    return perform(made, args, lambda client: _migrate(client, args, wanted, gate))


def _parser() -> argparse.ArgumentParser:
    made = action_parser("migrate openai", _DESCRIPTION, _EXAMPLES)
    rows = made.add_mutually_exclusive_group(required=True)
    rows.add_argument("--file", metavar="FILE", help="the rows that were trained on (.jsonl)")
    rows.add_argument(
        "--record",
        metavar="FILE",
        help="ask the old model for its answers to these prompts (.jsonl; default: none)",
    )
    rows.add_argument(
        "--recorded",
        metavar="FOLDER",
        help="train from the answers that --record has written here (default: none)",
    )
    add_validation(made, "rows to measure on (default: some are held out)")
    made.add_argument("--job", metavar="FILE", help="the job at OpenAI, as JSON (default: default settings)")
    made.add_argument("--name", help="the adapter's name (default: the job's suffix, or the file's name)")
    made.add_argument(
        "--grader",
        metavar="GRADER",
        help="for reinforcement: a file with the grader as JSON, or the JSON itself (default: that of --job)",
    )
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting as in `onebase jobs create`, instead of the job's; may be repeated",
    )
    made.add_argument(
        "--activate",
        choices=("always", "if_better", "if_better_than_base", "never"),
        default="if_better",
        help="activate the adapter once it is proven (default: if it is better, on held-out rows, than the "
        "base and than the version that is active then)",
    )
    made.add_argument("--yes", action="store_true", help="do not ask before training, or before recording")
    recording = made.add_argument_group("recording")
    recording.add_argument("--model", metavar="NAME", help="the old model (default: that of --job)")
    recording.add_argument(
        "--out", metavar="FOLDER", help="where answers are kept (default: FILE's name with -openai)"
    )
    recording.add_argument(
        "--price",
        metavar="IN/OUT",
        type=price,
        help="dollars for a million tokens, sent and answered (default: unknown)",
    )
    recording.add_argument(
        "--answer-tokens", type=count, default=1024, metavar="N", help="longest answer (default: 1024)"
    )
    recording.add_argument(
        "--evals",
        metavar="FILE",
        help="graders at OpenAI, as JSON, measured here where they can be (default: those of --job)",
    )
    recording.add_argument(
        "--openai-url", default=OPENAI_URL, metavar="URL", help=f"OpenAI's API (default: {OPENAI_URL})"
    )
    return made


# ---- the old model's answers -------------------------------------------------------------------------


def _record(made: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Record the old model's answers. Gives the exit status."""
    try:
        job = read_job(Path(args.job).expanduser()) if args.job else {}
        model = args.model or _text(job.get("fine_tuned_model"))
        if model is None:
            raise ValueError("--model: name the old model, or give its job with --job")
        key = openai_key()
        if key is None:
            raise ValueError("OPENAI_API_KEY is not set: the old model is asked with your key")
        rows = held_out_rows(args.record)
        held_out = held_out_rows(args.validation) if args.validation else ()
        check_tools([*rows, *held_out])
        folder = Path(args.out or f"{Path(args.record).stem}-openai").expanduser()
        recorded = Recorded.open(folder, model)
        metrics, notes = _graders(job, args.evals)
    except (OSError, ValueError) as error:
        made.error(str(error))
    old = Old(model, key, args.openai_url.rstrip("/"), args.answer_tokens)
    every = [*rows, *held_out]
    for sentence in notes:
        note(sentence)
    if left := recorded.left(every, old.max_tokens):
        note(_cost(old, left, recorded, args.price))
        if not args.yes and not _confirmed("Ask for them?"):
            note("Nothing was asked.")
            return FAILED
    try:
        with ProgressDisplay() as display:
            exact = record(old, every, recorded, lambda share: display(Progress("asking", share)))
            display(Progress(READY))
        if not exact:
            note(f"{model} takes no temperature: its answers are sampled, and another time it says others.")
        gate = write_sets(recorded, rows, held_out, metrics or _metrics_for(every), model)
    except OpenAIError as error:
        note(f"onebase: {error}")
        note(f"{len(recorded.answers)} answers are in {recorded.file}: the same command goes on from there.")
        return FAILED
    except KeyboardInterrupt:
        note(f"{len(recorded.answers)} answers are in {recorded.file}: the same command goes on from there.")
        return INTERRUPTED
    except (OSError, ValueError) as error:
        note(f"onebase: {error}")
        return FAILED
    return _say_recorded(folder, recorded, gate, args)


def _say_recorded(folder: Path, recorded: Recorded, gate: QualityGate, args: argparse.Namespace) -> int:
    used = [answer["usage"] for answer in recorded.answers.values()]
    sent, answered = (sum(one[name] for one in used) for name in ("prompt_tokens", "completion_tokens"))
    if args.json:
        print_json({"folder": str(folder), "answers": len(used), "gate": gate, "tokens": [sent, answered]})
        return OK
    billed = f", {money(dollars(args.price, sent, answered))} by --price" if args.price else ""
    print(f"{len(used)} answers of {gate.model} are in {folder} ({sent:,} and {answered:,} tokens{billed}).")
    reached = ", ".join(f"{name} {value:.1%}" for name, value in gate.metrics.items())
    print(
        f"{gate.rows} rows are held out; "
        + (f"the old model reached {reached}." if reached else "their replies are the old model's own.")
    )
    if cut := sum(answer["finish_reason"] == "length" for answer in recorded.answers.values()):
        note(f"{cut} answers were cut off: a higher --answer-tokens asks for them again.")
    job = f" --job {args.job}" if args.job else ""
    note(f"Train on them: onebase migrate openai --recorded {folder}{job}")
    return OK


def _cost(old: Old, rows: Sequence[HeldOutRow], recorded: Recorded, price: tuple[float, float] | None) -> str:
    sent, answered = estimated_tokens(rows, recorded)
    about = f", about {money(dollars(price, sent, answered))}" if price else ""
    kept = len(recorded.answers.keys() - set(map(key_of, rows)))
    rest = f" ({kept} are recorded already)" if kept else ""
    unpriced = "" if price else " --price IN/OUT says what that costs."
    return (
        f"{old.model} at {old.url} is asked {len(rows)} prompts{rest}, billed to your key: about {sent:,} "
        f"tokens sent and {answered:,} answered{about}.{unpriced}"
    )


def _confirmed(question: str) -> bool:
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        return False


def _graders(job: Mapping[str, Any], file: str | None) -> tuple[list[str], list[str]]:
    """Return the metrics that the graders of a job and of a file are measured by, and what is said of the
    others. Raises ValueError, OSError."""
    found: list[Any] = [job]
    if file:
        content = Path(file).expanduser().read_text(encoding="utf-8")
        try:
            found.append(json.loads(content))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"--evals: {file} is not JSON: {error}") from error
    read = [metric_of(grader) for grader in graders_of(found)]
    if file and not read:
        raise ValueError(f"--evals: {file} holds no graders: give an eval, or its testing_criteria")
    metrics = list(dict.fromkeys(metric for metric, _ in read if metric))
    return metrics, [sentence for _, sentence in read if sentence]


def _metrics_for(rows: Sequence[HeldOutRow]) -> tuple[str, ...]:
    """Return the metrics of rows without graders: JSON is to be valid, all is to be exact."""
    known = [row.reference for row in rows if row.reference is not None]
    is_object = bool(known) and all(text.lstrip()[:1] in ("{", "[") and is_json(text) for text in known)
    return ("json_valid", "exact_match") if is_object else _METRICS


def _use_recorded(args: argparse.Namespace) -> QualityGate | None:
    """Point the options at a folder of recorded answers, and return its gate. Raises ValueError."""
    if not args.recorded:
        return None
    folder = Path(args.recorded).expanduser()
    gate = read_gate(folder)
    args.file, args.validation = str(folder / TRAIN), args.validation or str(folder / HELD_OUT)
    return gate


# ---- what was there ----------------------------------------------------------------------------------


def read_wanted(args: argparse.Namespace, gate: QualityGate | None = None) -> Wanted:
    """Return the job that the options, the rows and the job at OpenAI describe.

    gate: the old model's figures, if its answers are trained on; the same metrics are measured, besides those
        of --set.

    Raises:
        ValueError: a file is not what it should be, or the job is of a kind that is not trained here.
        OSError: a file cannot be read.
    """
    rows = Path(args.file).expanduser()
    if not rows.is_file():
        raise ValueError(f"--file: {rows} is not there: give the .jsonl file that was trained on")
    job = read_job(Path(args.job).expanduser()) if args.job else {}
    kind: TrainingMethod
    kind = "supervised" if gate else _method(job) or (_REWARDS if args.grader else method_of_rows(rows))
    given = parse_settings(args.set)
    settings: dict[str, Any] = {
        **({} if kind == _REWARDS else {"metrics": list(_METRICS)}),
        **(_measured_as(gate) if gate else {}),
        **{_OURS.get(key, key): value for key, value in _hyperparameters(job, kind).items()},
        **given,
    }
    if gate and gate.metrics:
        if given.get("metric_rows") == 0:
            raise ValueError(f"--set metric_rows=0: replies are compared with those of {gate.model}")
        settings["metrics"] = list(dict.fromkeys([*gate.metrics, *given.get("metrics", ())]))
    elif settings.get("metric_rows") == 0 and "metrics" not in given:
        settings.pop("metrics", None)
    return Wanted(
        name=args.name or _name(job) or _named(Path(args.recorded).name if gate else rows.stem) or "migrated",
        method=kind,
        settings=settings,
        seed=job["seed"] if _is_whole(job.get("seed")) else None,
        metadata=_metadata(job),
        was=gate.model if gate else _text(job.get("fine_tuned_model")) or _text(job.get("model")) or "ft:...",
        grader=_grader(job, kind, args.grader),
        lost=tuple(
            _lost(
                job,
                given,
                kind,
                has_validation=args.validation is not None,
                has_grader=args.grader is not None,
            )
        ),
    )


def _measured_as(gate: QualityGate) -> dict[str, Any]:
    """Return settings by which an adapter is measured on the rows that the old model was measured on."""
    longest = min(8192, max(32, gate.longest * 2))
    metrics = list(gate.metrics) or ["exact_match", "word_f1"]
    return {"metrics": metrics, "metric_rows": gate.rows, "metric_tokens": longest}


def read_job(path: Path) -> dict[str, Any]:
    """Return a job as OpenAI's API gives it. Raises ValueError, OSError."""
    with path.open("rb") as file:
        content = file.read(MOST_JOB_BYTES + 1)
    if len(content) > MOST_JOB_BYTES:
        raise ValueError(f"--job: {path} has over {MOST_JOB_BYTES} bytes: give the JSON of one job")
    try:
        job = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--job: {path} is not JSON: {error}") from error
    if not isinstance(job, dict) or job.get("object") != "fine_tuning.job":
        wanted = "client.fine_tuning.jobs.retrieve(ID).to_json()"
        raise ValueError(f"--job: {path} is no fine-tuning job: write {wanted} into it")
    return job


def method_of_rows(path: Path) -> TrainingMethod:
    """Return the method that the first row is for; `supervised` if it says nothing."""
    with path.open("rb") as file:
        for _ in range(100):
            text = file.readline(_MOST_ROW_BYTES).strip()
            if text:
                break
    with suppress(ValueError, RecursionError):
        row = json.loads(text)
        if isinstance(row, dict) and "preferred_output" in row:
            return "dpo"
    return "supervised"


def _method(job: Mapping[str, Any]) -> TrainingMethod | None:
    method = job.get("method")
    kind = method.get("type") if isinstance(method, dict) else None
    if kind is None:
        return None
    if kind not in ("supervised", "dpo", _REWARDS):
        raise ValueError(
            f"--job: its method is {str(kind)[:40]!r}, which is not run here. Leave --job out to train on "
            "the rows with default settings"
        )
    return cast(TrainingMethod, kind)


def _grader(job: Mapping[str, Any], kind: str, given: str | None) -> Mapping[str, Any] | None:
    """Return the grader of a job that learns from rewards: `given`, or else the job's own without images.

    Raises:
        ValueError: there is none, it is for another method, or it asks a judge that only OpenAI has or
            computes what this server does not.
    """
    if kind != _REWARDS:
        if given is not None:
            raise ValueError(f"--grader: it is for reinforcement, and the method is {kind}. Leave it out")
        return None
    if given is not None:
        return parse_grader(given)
    grader = _chosen(job, kind).get("grader")
    if not isinstance(grader, dict):
        raise ValueError("--job: its method is reinforcement, and it has no grader. Give one with --grader")
    for one in graders_of(grader):
        if one.get("type") in ("score_model", "label_model"):
            raise ValueError(
                f"--job: its grader asks {str(one.get('model'))[:80]!r}, which this server does not have. "
                "Write the grader with a judge of this server, and give it with --grader"
            )
        if one.get("type") == "text_similarity" and one.get("evaluation_metric") in _NOT_COMPUTED:
            raise ValueError(
                f"--job: its grader computes {one['evaluation_metric']}, which this server does not. Write "
                "the grader with rouge_l or gleu, and give it with --grader"
            )
    return cast(Mapping[str, Any], _without_images(grader))


def _without_images(grader: Any) -> Any:
    """Return a grader, or those inside of one, without the `image_tag` of Python graders."""
    if not isinstance(grader, dict):
        return grader
    kept = {name: value for name, value in grader.items() if name != "image_tag"}
    if isinstance(inside := kept.get("graders"), dict):
        kept["graders"] = {name: _without_images(one) for name, one in inside.items()}
    return kept


def _images(grader: Any) -> list[str]:
    return sorted({str(one["image_tag"]) for one in graders_of(grader) if one.get("image_tag") is not None})


def _chosen(job: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """Return what the job says of its method; nothing if it is an older job."""
    method = job.get("method")
    inside = method.get(kind) if isinstance(method, dict) else None
    return inside if isinstance(inside, dict) else {}


def _taken(kind: str) -> tuple[str, ...]:
    """Return the names of OpenAI's hyperparameters that a method here has too."""
    return (*_TAKEN, *_TAKEN_BY_REWARDS) if kind == _REWARDS else _TAKEN


def _hyperparameters(job: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return OpenAI's, of both places that they have been in; "auto" is left to this server."""
    found: dict[str, Any] = {}
    for place in (job, _chosen(job, kind)):
        given = place.get("hyperparameters")
        if isinstance(given, dict):
            found |= {name: given[name] for name in _taken(kind) if _is_number(given.get(name))}
    return found


def _lost(
    job: Mapping[str, Any], given: TrainingSettings, kind: str, *, has_validation: bool, has_grader: bool
) -> Iterator[str]:
    """Yield sentences on what does not carry over, and what to do about it."""
    if not job:
        return
    yield "The weights stay at OpenAI: the adapter is trained again, on this server's base, from the rows."
    model = _text(job.get("model")) or ""
    if model.startswith(_FINE_TUNED):
        yield (
            f"It went on from {model}. Migrate that job first, then train these rows further: "
            "onebase jobs create FILE --model NAME"
        )
    if _text(job.get("validation_file")) and not has_validation:
        yield (
            f"Its validation file {job['validation_file']} is not here. Save it by client.files.content(ID) "
            "and give --validation. Without it some rows are held out."
        )
    if job.get("integrations"):
        yield "Its integrations are not called: `onebase jobs events` and the result file have all figures."
    if _is_number(_hyperparameters(job, kind).get("learning_rate_multiplier")) and (
        "learning_rate_multiplier" not in given
    ):
        yield (
            "learning_rate_multiplier is a factor on this server's own rate, not on OpenAI's. If the loss "
            "rises: --set learning_rate_multiplier=1"
        )
    unknown = sorted(set(_all_hyperparameters(job)) - set(_taken(kind)))
    if unknown:
        yield f"These hyperparameters have no meaning here: {', '.join(unknown)[:200]}."
    if _chosen(job, kind).get("response_format"):
        yield "Its response_format is not applied: replies are sampled freely. A grader can reward the form."
    if not has_grader and (images := _images(_chosen(job, kind).get("grader"))):
        yield (
            f"Its grader's image_tag ({', '.join(images)[:200]}) is left out: Python graders run with this "
            "server's Python and its standard library alone."
        )
    if job.get("status") not in (None, "succeeded"):
        yield f"The job there is {str(job['status'])[:40]}: there is nothing to compare with."


def _all_hyperparameters(job: Mapping[str, Any]) -> Iterator[str]:
    method = job.get("method")
    parts = method.values() if isinstance(method, dict) else ()
    for place in (job, *parts):
        given = place.get("hyperparameters") if isinstance(place, dict) else None
        if isinstance(given, dict):
            yield from (str(name) for name, value in given.items() if value is not None)


def _name(job: Mapping[str, Any]) -> str:
    """Return the suffix that the job was given, as an adapter's name; "" if it had none."""
    given = _text(job.get("user_provided_suffix")) or _text(job.get("suffix"))
    parts = (_text(job.get("fine_tuned_model")) or "").split(":")
    if not given and len(parts) > 3 and parts[0] == "ft":
        given = parts[3]
    return _named(given or "")


def _named(text: str) -> str:
    return _NO_NAME.sub("-", text).strip("-._")[:_MOST_NAME]


def _metadata(job: Mapping[str, Any]) -> dict[str, str]:
    given = job.get("metadata")
    kept = given.items() if isinstance(given, dict) else ()
    found = {key: value for key, value in kept if isinstance(value, str)}
    if (job_id := _text(job.get("id"))) and len(found) < 16:
        found.setdefault("openai_job", job_id[:512])
    return found


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ---- training it here --------------------------------------------------------------------------------


def _migrate(client: Client, args: argparse.Namespace, wanted: Wanted, gate: QualityGate | None) -> int:
    say = console(stderr=True)
    say.print(line(f"{wanted.was} becomes the adapter {wanted.name} of {client.url}"), soft_wrap=True)
    for sentence in wanted.lost:
        say.print(line(f"  {sentence}", "yellow"), soft_wrap=True)
    # A file that the server has is not sent again, and is others' too.
    kept = set() if args.yes else {file.id for file in client.files.list(purpose="fine-tune")}
    with ProgressDisplay() as display:
        job = client.training.create(
            args.file,
            name=wanted.name,
            validation_file=args.validation,
            activate="never" if _decides(gate, args) else args.activate,
            method=wanted.method,
            seed=wanted.seed,
            metadata=dict(wanted.metadata) or None,
            grader=wanted.grader,
            progress=display,
            **cast(TrainingSettings, dict(wanted.settings)),
        )
    note(f"{job.id}: the rows are being checked.")
    try:
        if not _checked(job, stop=not args.yes):
            return follow(client, job, args.json)  # it has failed, and says so
    except KeyboardInterrupt:
        if args.yes:
            raise
        return _taken_back(client, job, kept)
    say.print(line(_estimate(job)), soft_wrap=True)
    if job.status == "paused" and not args.yes and not _agreed(job):
        return _taken_back(client, job, kept)
    return _train(client, job, args, wanted, gate)


def _decides(gate: QualityGate | None, args: argparse.Namespace) -> bool:
    """Return True if the old model's figures decide on the activation."""
    return gate is not None and bool(gate.metrics) and args.activate == "if_better"


def _passed(gate: QualityGate, report: TrainingReport) -> bool:
    """Return True if the adapter reaches the old model's figures, all measured, and is better than the active
    version."""
    reached = all(report.metrics_after[name] >= value for name, value in gate.metrics.items())
    return reached and report.better_than.get("active", True) is True


def _judge(client: Client, job: TrainingJob, gate: QualityGate, args: argparse.Namespace) -> bool:
    """Show the old model's figures next to the adapter's, and activate the adapter if it reaches them. Return
    True if it is active."""
    found = job.info.report
    if found is None or not gate.metrics:
        return bool(job.activated)
    say = console(stderr=True)
    if missing := [name for name in gate.metrics if name not in found.metrics_after]:
        note(f"{', '.join(missing)}: not measured here, so that nothing is compared with {gate.model}.")
        return bool(job.activated)
    for name, value in gate.metrics.items():
        own, base = found.metrics_after[name], found.metrics_before.get(name, 0.0)
        style = "green" if own >= value else "red"
        text = f"{name}: {gate.model} {value:.1%}, base {base:.1%}, adapter "
        say.print(line(text) + line(f"{own:.1%}", style), soft_wrap=True)
    if not _decides(gate, args):
        return bool(job.activated)
    if not _passed(gate, found) or job.info.version is None:
        note(
            f"It is not activated: it does not reach what {gate.model} reached, or is no better than the "
            "version that is active."
        )
        return False
    client.adapters.activate(job.name, job.info.version, expected=found.active)
    note(f"It is at least as good as {gate.model}, and active: requests for {job.name} get it.")
    return True


def _checked(job: TrainingJob, *, stop: bool) -> bool:
    """Wait for the check of the rows; with `stop`, pause the job after it. False: it has ended."""
    while job.refresh().status == "validating_files":
        time.sleep(_LOOK_SECONDS)
    if stop and not job.info.ended:
        with suppress(ConflictError):  # it is so small that it has been trained by now
            job.pause()
    return job.status not in ("failed", "cancelled")


def _estimate(job: TrainingJob) -> str:
    """Return a sentence on what the job will need."""
    found = job.info.estimate or {}
    parts = []
    if found.get("total_tokens"):
        parts.append(f"{found['total_tokens']:,} tokens")
    if time := time_taken(found):
        parts.append(time)
    if found.get("total"):
        parts.append(f"{size(found['total'])} of memory next to the base")
    if found.get("parameters"):
        parts.append(f"{found['parameters']:,} parameters")
    takes = ", ".join(parts) or "an unknown time"
    return f"The rows are sound. Training takes {takes}; {settings_line(job.info)}."


def _agreed(job: TrainingJob) -> bool:
    """Ask, and let the job go on if it is wanted."""
    try:
        answer = input("Train it? [y/N] ")
    except (EOFError, KeyboardInterrupt):
        answer = ""
    if answer.strip().lower() in ("y", "yes"):
        job.resume()
        return True
    return False


def _taken_back(client: Client, job: TrainingJob, kept: Set[str]) -> int:
    """Cancel a job that is not wanted, and delete its files but for those that are kept. Gives the status."""
    job.cancel()
    for file_id in (job.info.training_file, job.info.validation_file):
        if file_id is not None and file_id not in kept:
            with suppress(OneBaseError):
                client.files.delete(file_id)
    note("Nothing was trained, and what was sent for it was deleted from the server.")
    return FAILED


def _train(
    client: Client, job: TrainingJob, args: argparse.Namespace, wanted: Wanted, gate: QualityGate | None
) -> int:
    if args.json:
        status = _silent(client, job)
        if status == OK:
            active = _judge(client, job, gate, args) if gate else job.activated
            model = job.name if active else job.fine_tuned_model
            changes = {"base_url": f"{client.url}/v1", "model": model, "was": wanted.was}
            told = {"job": job.info, "not_carried_over": list(wanted.lost), "client": changes}
            print_json(told | ({"gate": gate, "active": active} if gate else {}))
        return status
    note(f"Ctrl-C leaves it running: onebase jobs watch {short(job.id)} shows it again.")
    status = follow(client, job, as_json=False)
    if status == OK:
        active = _judge(client, job, gate, args) if gate else bool(job.activated)
        _print_changes(client.url, job, wanted, active=active)
    return status


def _silent(client: Client, job: TrainingJob) -> int:
    """Wait with the progress on stderr alone."""
    try:
        job.wait()
    except TrainingStoppedError as error:
        return report(error, client.url)
    return OK


def _print_changes(url: str, job: TrainingJob, wanted: Wanted, *, active: bool) -> None:
    """Print the lines of client code that change."""
    model = job.name if active else job.fine_tuned_model
    base_url, key = json.dumps(f"{url}/v1"), 'os.getenv("ONEBASE_API_KEY", "none")'
    out = console()
    out.print()
    out.print(line("What changes in the client:"))
    for text in (
        "- client = OpenAI()",
        f"+ client = OpenAI(base_url={base_url}, api_key={key})",
        f"- model={json.dumps(wanted.was)}",
        f"+ model={json.dumps(model)}",
    ):
        out.print(line(text, "red" if text.startswith("-") else "green"), soft_wrap=True)
    said = f"OPENAI_BASE_URL={url}/v1 and OPENAI_API_KEY in the environment do for the first two lines."
    out.print(line(said), soft_wrap=True)
