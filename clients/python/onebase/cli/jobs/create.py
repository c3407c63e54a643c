"""`onebase jobs create`: send examples and begin to train."""

from __future__ import annotations

import argparse
import difflib
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast, get_type_hints

from onebase_protocol.command_line import add_validation

from ..._core.rows import MOST_PROBLEMS, shape_problems
from ..._sync.client import Client
from ..._terminal.ui import ProgressDisplay, note
from ...training_types import TrainingSettings
from ..command import FAILED, OK, perform, print_json
from .show import job_parser, short
from .watch import follow

_LISTS: Final = frozenset({"targets", "metrics", "sample_prompts"})
_ONE_EACH: Final = frozenset({"sample_prompts"})
"""Lists whose items may hold commas: each --set adds one."""
_ONE: Final = {"metrics": "metric", "sample_prompts": "sample_prompt"}
_PATTERNS: Final = frozenset({"rank_pattern", "alpha_pattern"})

_SETTINGS: Final = textwrap.fill(
    ", ".join(TrainingSettings.__annotations__), 100, initial_indent="  ", subsequent_indent="  "
)
_DESCRIPTION = f"""\
Send a file of examples (.jsonl, .json, .csv or .parquet) and begin to train an adapter on them.
The server checks every line first. With --watch, the command stays and shows the job. With --hold,
it stays until the files are checked and shows what is in them, what training will take, and how to
begin: nothing is trained before.

settings for --set (those left out have the server's defaults):
{_SETTINGS}
"""
_EXAMPLES = """\
  onebase jobs create train.jsonl --name acme-support --watch
  onebase jobs create train.jsonl --name acme --set r=8 --set targets=q_proj,v_proj
  onebase jobs create train.jsonl --name acme --validation eval.jsonl --hold
  onebase jobs create pairs.jsonl --name acme --method dpo --set beta=0.2 --activate never
  onebase jobs create texts.jsonl --name topics --method classification --set best_by=f1
  onebase jobs create tasks.jsonl --name sums --method reinforcement --grader grader.json
  onebase jobs create more.jsonl --model acme@3f2a9c41 --max-regression 0.02
"""


def run(action: str, argv: list[str]) -> int:
    """Run the action. Gives its exit status."""
    made = _parser(action)
    args = made.parse_args(argv)
    try:
        args.settings, args.labels = parse_settings(args.set), parse_labels(args.metadata)
        args.grader = None if args.grader is None else parse_grader(args.grader)
        for name in ("max_regression", "slice_by"):
            if getattr(args, name) is not None:
                args.settings[name] = getattr(args, name)
    except ValueError as error:
        made.error(str(error))
    return perform(made, args, lambda client: _create(client, args))


def _parser(action: str) -> argparse.ArgumentParser:
    made = job_parser(action, _DESCRIPTION, _EXAMPLES, one=False)
    made.add_argument("file", metavar="FILE", help="examples, or the id of an uploaded file (file-...)")
    made.add_argument(
        "--name", help="the adapter's name (default: that of --model's adapter, or the server makes one up)"
    )
    made.add_argument(
        "--model",
        metavar="NAME@VERSION",
        help="go on from this version's weights, or from NAME's active one (default: begin with the base)",
    )
    add_validation(made, "examples to measure on (default: some are held out)")
    made.add_argument(
        "--activate",
        choices=("always", "if_better", "if_better_than_base", "never"),
        default="if_better",
        help="activate the version once it is proven (default: if it is better, on held-out rows, than the "
        "base and than the version that is active then)",
    )
    made.add_argument(
        "--method",
        choices=("supervised", "dpo", "classification", "reinforcement"),
        default="supervised",
        help="supervised: learn the replies; dpo: prefer `chosen` to `rejected`; classification: learn "
        "`label`; reinforcement: learn from what --grader gives the model's own replies (default: "
        "supervised)",
    )
    made.add_argument(
        "--grader",
        metavar="GRADER",
        help="for reinforcement: a file with the grader as JSON, or the JSON itself",
    )
    made.add_argument(
        "--max-regression",
        type=float,
        metavar="X",
        help="do not activate it if a slice of the held-out rows gets worse by more, than with the base or "
        "with the active version (default: no limit)",
    )
    made.add_argument(
        "--slice-by", metavar="FIELD", help="the field of the rows that names their slice (default: slice)"
    )
    made.add_argument("--seed", type=int, metavar="N", help="seed of everything random (default: 0)")
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting, such as r=8; may be repeated; --r 8 says the same",
    )
    _add_settings(made)
    made.add_argument(
        "--metadata",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a label of the job; may be repeated",
    )
    stay = made.add_mutually_exclusive_group()
    stay.add_argument("--watch", action="store_true", help="stay until the job ends, and show it meanwhile")
    stay.add_argument(
        "--hold", action="store_true", help="check the files and make the estimate, and wait for `resume`"
    )
    return made


class _Setting(argparse.Action):
    """Writes `--NAME VALUE` as `--set NAME=VALUE`."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        value = str((option_string or "")[:5] != "--no-").lower() if self.nargs == 0 else values
        namespace.set = [*namespace.set, f"{self.metavar}={value}"]


def _add_settings(made: argparse.ArgumentParser) -> None:
    """Add an option for each setting, by the name that `onebase train` has; the help lists them for --set."""
    hints = get_type_hints(TrainingSettings)
    for name in TrainingSettings.__annotations__:
        option = "--" + name.replace("_", "-")
        names = {option, "--" + _ONE.get(name, name).replace("_", "-")} - set(made._option_string_actions)
        flag: dict[str, Any] = {"nargs": 0} if hints[name] is bool else {}
        if flag:
            names.add("--no-" + name.replace("_", "-"))
        if names:
            made.add_argument(
                *sorted(names), action=_Setting, dest="set", metavar=name, help=argparse.SUPPRESS, **flag
            )


def _create(client: Client, args: argparse.Namespace) -> int:
    if shape_is_wrong((args.file, args.validation), args.method, as_json=args.json):
        return FAILED
    with ProgressDisplay() as display:
        job = client.training.create(
            args.file,
            name=args.name,
            model=args.model,
            validation_file=args.validation,
            activate=args.activate,
            method=args.method,
            seed=args.seed,
            metadata=args.labels,
            hold=args.hold,
            grader=args.grader,
            progress=display,
            **args.settings,
        )
    if args.watch or args.hold:
        return follow(client, job, args.json)
    if args.json:
        print_json(job.info)
        return OK
    print(f"{job.id}  {job.name}: {Path(args.file).name} is being checked.")
    note(f"Watch it: onebase jobs watch {short(job.id)}")
    return OK


def shape_is_wrong(files: Sequence[str | None], method: str, *, as_json: bool) -> bool:
    """Print the problems of files whose rows have no shape that the method reads. Return True if there are
    some."""
    found = {}
    for file in files:
        path = Path(file or "").expanduser()
        if file and path.is_file() and (problems := shape_problems(path, method)):
            found[file] = problems
    for file, problems in found.items():
        more = " or more" if len(problems) == MOST_PROBLEMS else ""
        word = "problem" if len(problems) == 1 else "problems"
        note(f"onebase: {len(problems)}{more} {word} in {file}; nothing was sent and nothing is trained")
        for problem in problems:
            note(f"  {problem}")
    if found and as_json:
        print_json({"problems": {file: [vars(one) for one in problems] for file, problems in found.items()}})
    return bool(found)


# ---- settings -----------------------------------------------------------------------------------------


def parse_settings(given: Sequence[str]) -> TrainingSettings:
    """Return the settings in `--set NAME=VALUE`, with the types that the server expects.

    Raises:
        ValueError: one is not NAME=VALUE, or its name is no setting.
    """
    settings: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise ValueError(f"--set: write NAME=VALUE, such as r=8, not {text!r}")
        _check(name)
        if name in _LISTS:
            settings[name] = [*settings.get(name, []), *_items(name, value)]
        elif name in _PATTERNS:
            settings[name] = settings.get(name, {}) | _pattern(name, value)
        else:
            settings[name] = _scalar(value)
    return cast(TrainingSettings, settings)


def parse_grader(given: str) -> Mapping[str, Any]:
    """Return the grader of a file, or of JSON.

    Raises:
        ValueError: it is neither.
    """
    text = given if given.lstrip().startswith("{") else _file_text(given)
    try:
        grader = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--grader: it is not JSON: {error}") from error
    if not isinstance(grader, dict):
        raise ValueError('--grader: write a JSON object, as in {"type": "string_check", ...}')
    return grader


def _file_text(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--grader: {path} cannot be read: {error}") from error


def parse_labels(given: Sequence[str]) -> Mapping[str, str] | None:
    """Return the labels in `--metadata KEY=VALUE`.

    Raises:
        ValueError: one is not KEY=VALUE.
    """
    labels = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"--metadata: write KEY=VALUE, such as team=support, not {text!r}")
        labels[key] = value
    return labels or None


def _check(name: str) -> None:
    known = list(TrainingSettings.__annotations__)
    if name in ("seed", "method"):
        raise ValueError(f"--set {name}: use the option --{name} instead")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"--set {name}: there is no such setting; {hint}")


def _items(name: str, value: str) -> list[str]:
    if value.startswith("["):
        items = _json(name, value)
        return [str(item) for item in items]
    if name in _ONE_EACH:
        return [value]
    return [part.strip() for part in value.split(",") if part.strip()]


def _pattern(name: str, value: str) -> dict[str, Any]:
    if value.startswith("{"):
        return dict(_json(name, value))
    pairs = [part.partition("=") for part in value.split(",")]
    if not all(equals for _, equals, _ in pairs):
        raise ValueError(f"--set {name}: write LAYER=NUMBER, such as {name}=down_proj=32, not {value!r}")
    return {layer.strip(): _scalar(number) for layer, _, number in pairs}


def _json(name: str, value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"--set {name}: {value!r} is not JSON: {error}") from error


def _scalar(value: str) -> Any:
    """Return a number, true or false as such. Everything else is text."""
    try:
        parsed = json.loads(value)
    except ValueError:
        return value
    return parsed if isinstance(parsed, bool | int | float) else value
