"""`onebase migrate openai`: train again here what was fine-tuned at OpenAI, from the same rows."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from .._sync.client import Client
from .._sync.jobs import TrainingJob
from .._terminal.ui import ProgressDisplay, console, duration, line, note, size
from ..errors import ConflictError, OneBaseError, TrainingStoppedError
from ..training_types import TrainingMethod, TrainingSettings
from .command import FAILED, OK, action_parser, perform, print_json, report, run_action
from .jobs.create import parse_settings
from .jobs.show import settings_line, short
from .jobs.watch import follow

HELP: Final = """\
usage: onebase migrate openai --file rows.jsonl [options]

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
"""
_EXAMPLES = """\
  onebase migrate openai --file rows.jsonl --job job.json
  onebase migrate openai --file rows.jsonl --validation-file held-out.jsonl --name support --yes
"""

MOST_JOB_BYTES: Final = 1 << 20
_MOST_ROW_BYTES: Final = 4 << 20
_LOOK_SECONDS: Final = 0.5
_MOST_NAME: Final = 64
_NO_NAME: Final = re.compile(r"[^A-Za-z0-9._-]+")
_TAKEN: Final = ("n_epochs", "batch_size", "learning_rate_multiplier", "beta")
"""OpenAI's hyperparameters."""
_OURS: Final = {"n_epochs": "epochs"}
_METRICS: Final = ("exact_match", "word_f1")
"""Measured on replies, unless --set metrics says otherwise."""
_FINE_TUNED = "ft:"


@dataclass(frozen=True)
class Wanted:
    """A job to be created here. lost: what does not carry over, a sentence each. was: the model at OpenAI."""

    name: str
    method: TrainingMethod
    settings: Mapping[str, Any]
    seed: int | None
    metadata: Mapping[str, str]
    was: str
    lost: tuple[str, ...] = field(default=())


def run(command: str, argv: list[str]) -> int:
    """Run the command. Gives its exit status."""
    if argv[:1] != ["openai"]:
        return run_action(command, HELP, ACTIONS, argv)
    made = _parser()
    args = made.parse_args(argv[1:])
    try:
        wanted = read_wanted(args)
    except (OSError, ValueError) as error:
        made.error(str(error))
    if not args.yes and not sys.stdin.isatty():
        made.error("--yes: give it where nobody can be asked")
    return perform(made, args, lambda client: _migrate(client, args, wanted))


def _parser() -> argparse.ArgumentParser:
    made = action_parser("migrate openai", _DESCRIPTION, _EXAMPLES)
    made.add_argument("--file", required=True, metavar="FILE", help="the rows that were trained on (.jsonl)")
    made.add_argument(
        "--validation-file", metavar="FILE", help="rows to measure on (default: some are held out)"
    )
    made.add_argument("--job", metavar="FILE", help="the job at OpenAI, as JSON (default: default settings)")
    made.add_argument("--name", help="the adapter's name (default: the job's suffix, or the file's name)")
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
    made.add_argument("--yes", action="store_true", help="do not ask before training")
    return made


# ---- what was there ----------------------------------------------------------------------------------


def read_wanted(args: argparse.Namespace) -> Wanted:
    """Return the job that the options, the rows and the job at OpenAI describe.

    Raises:
        ValueError: a file is not what it should be, or the job is of a kind that is not trained here.
        OSError: a file cannot be read.
    """
    rows = Path(args.file).expanduser()
    if not rows.is_file():
        raise ValueError(f"--file: {rows} is not there: give the .jsonl file that was trained on")
    job = read_job(Path(args.job).expanduser()) if args.job else {}
    kind = _method(job) or method_of_rows(rows)
    given = parse_settings(args.set)
    settings: dict[str, Any] = {
        "metrics": list(_METRICS),
        **{_OURS.get(key, key): value for key, value in _hyperparameters(job, kind).items()},
        **given,
    }
    return Wanted(
        name=args.name or _name(job) or _named(rows.stem) or "migrated",
        method=kind,
        settings=settings,
        seed=job["seed"] if _is_whole(job.get("seed")) else None,
        metadata=_metadata(job),
        was=_text(job.get("fine_tuned_model")) or _text(job.get("model")) or "ft:...",
        lost=tuple(_lost(job, given, has_validation=args.validation_file is not None)),
    )


def read_job(path: Path) -> dict[str, Any]:
    """A job as OpenAI's API gives it. Raises ValueError, OSError."""
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
    """The method that the first row is for; `supervised` if it says nothing."""
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
    if kind not in ("supervised", "dpo"):
        raise ValueError(
            f"--job: its method is {str(kind)[:40]!r}, which is not run here. Train on the replies that the "
            "grader liked best (supervised), or on pairs of them (dpo), without --job"
        )
    return cast(TrainingMethod, kind)


def _hyperparameters(job: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """OpenAI's, of both places that they have been in; "auto" is left to this server."""
    found: dict[str, Any] = {}
    method = job.get("method")
    inside = method.get(kind) if isinstance(method, dict) else None
    for place in (job, inside):
        given = place.get("hyperparameters") if isinstance(place, dict) else None
        if isinstance(given, dict):
            found |= {name: given[name] for name in _TAKEN if _is_number(given.get(name))}
    return found


def _lost(job: Mapping[str, Any], given: TrainingSettings, *, has_validation: bool) -> Iterator[str]:
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
            "and give --validation-file. Without it some rows are held out."
        )
    if job.get("integrations"):
        yield "Its integrations are not called: `onebase jobs events` and the result file have all figures."
    if _is_number(_hyperparameters(job, _method(job) or "supervised").get("learning_rate_multiplier")) and (
        "learning_rate_multiplier" not in given
    ):
        yield (
            "learning_rate_multiplier is a factor on this server's own rate, not on OpenAI's. If the loss "
            "rises: --set learning_rate_multiplier=1"
        )
    unknown = sorted(set(_all_hyperparameters(job)) - set(_TAKEN))
    if unknown:
        yield f"These hyperparameters have no meaning here: {', '.join(unknown)[:200]}."
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
    """The suffix that the job was given, as an adapter's name; "" if it had none."""
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


def _migrate(client: Client, args: argparse.Namespace, wanted: Wanted) -> int:
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
            validation_file=args.validation_file,
            activate=args.activate,
            method=wanted.method,
            seed=wanted.seed,
            metadata=dict(wanted.metadata) or None,
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
    return _train(client, job, args, wanted)


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
    if found.get("seconds"):
        parts.append(f"about {duration(found['seconds'])} if nothing else runs")
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


def _train(client: Client, job: TrainingJob, args: argparse.Namespace, wanted: Wanted) -> int:
    if args.json:
        status = _silent(client, job)
        model = job.name if job.activated else job.fine_tuned_model
        if status == OK:
            changes = {"base_url": f"{client.url}/v1", "model": model, "was": wanted.was}
            print_json({"job": job.info, "not_carried_over": list(wanted.lost), "client": changes})
        return status
    note(f"Ctrl-C leaves it running: onebase jobs watch {short(job.id)} shows it again.")
    status = follow(client, job, as_json=False)
    if status == OK:
        _print_changes(client.url, job, wanted)
    return status


def _silent(client: Client, job: TrainingJob) -> int:
    """Wait with the progress on stderr alone."""
    try:
        job.wait()
    except TrainingStoppedError as error:
        return report(error, client.url)
    return OK


def _print_changes(url: str, job: TrainingJob, wanted: Wanted) -> None:
    """The lines of client code that change."""
    model = job.name if job.activated else job.fine_tuned_model
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
