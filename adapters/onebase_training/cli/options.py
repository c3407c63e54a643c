"""Shared parts of the training commands: options for base and recipe, text for a terminal, and Ctrl-C."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import signal
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as Bar

from onebase_adapters.names import NAME_RULE, is_adapter_name
from onebase_engine.base.default_base import (
    DEFAULT_BASE,
    DEFAULT_REPO,
    BaseFetchError,
    BaseSpecError,
    Progress,
    ResolvedBase,
    resolve_base,
)
from onebase_engine.imports import quick_imports
from onebase_training.events import Interrupted
from onebase_training.recipe import Recipe, RecipeError, parse_recipe, recipe_fields, recipe_fields_by_name

if TYPE_CHECKING:
    from onebase_engine.base.load import BaseSettings

_GROUPS = {
    "method": "what is learned",
    "lora": "adapter (LoRA)",
    "training": "training",
    "data": "data",
    "memory": "memory",
    "evaluation": "evaluation and checkpoints",
}
_SHORT = {"rank_pattern": "LAYER=R,...", "alpha_pattern": "LAYER=ALPHA,..."}
_PIPE_WIDTH = 200
_REPEATED = ("sample_prompts", "metrics")


STOPPED, FAILED, WRONG_OPTIONS = 130, 1, 2
"""Exit statuses of the training commands; 0 is success."""


class UsageError(Exception):
    """An option that cannot be used; the message names it."""


def option_name(name: str) -> str:
    """Return the command-line flag of a recipe's field."""
    return "--" + {"sample_prompts": "sample_prompt", "metrics": "metric"}.get(name, name).replace("_", "-")


def add_base_options(parser: argparse.ArgumentParser) -> None:
    """Add --base, --quantization, --dtype and --device."""
    group = parser.add_argument_group("the base model")
    group.add_argument(
        "--base",
        default=DEFAULT_BASE,
        help="the base model: the default's name, org/repo[@revision] on the Hub, or a folder "
        f"(default: {DEFAULT_BASE})",
    )
    group.add_argument(
        "--quantization",
        default="nf4",
        choices=("nf4", "int8", "none"),
        help="how the base's linear layers are stored (default: nf4)",
    )
    group.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float16", "float32"),
        help="type of what is not quantized, and of activations (default: bfloat16)",
    )
    group.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cuda", "cpu"),
        help="auto takes a GPU if there is one (default: auto)",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add --recipe, --memory-limit and --threads, which one run and a sweep of many have in common."""
    parser.add_argument(
        "--recipe",
        metavar="FILE",
        type=Path,
        help="JSON file of settings; options go first (default: none)",
    )
    parser.add_argument(
        "--memory-limit",
        type=size,
        metavar="SIZE",
        help="most memory to use, as in 8GB (default: what is free)",
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: every core)")


def check_adapter_name(name: str) -> None:
    """Raise UsageError, before hours of training, unless an adapter may have this name."""
    if not is_adapter_name(name):
        raise UsageError(f"--name: {name[:80]!r} cannot be an adapter's name. Use {NAME_RULE}")


def find_base(options: argparse.Namespace, progress: Progress | None = None) -> ResolvedBase:
    """Return the base's folder; downloads it if necessary. Raises UsageError, BaseFetchError."""
    try:
        return resolve_base(options.base, progress)
    except BaseSpecError as error:
        raise UsageError(f"--base: {error}") from error


def base_repo(options: argparse.Namespace, resolved: ResolvedBase) -> str | None:
    """Return the base's name on the Hub; None if it is a folder."""
    if resolved.revision is not None:
        repo: str = options.base.partition("@")[0]
        return repo
    return DEFAULT_REPO if options.base == DEFAULT_BASE else None


def base_settings(options: argparse.Namespace, folder: Path) -> BaseSettings:
    """Return the settings for loading the base, from the options of `add_base_options`. Raises UsageError."""
    import torch

    from onebase_engine.base.load import BaseSettings

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this machine has no GPU that torch can use")
    dtype: torch.dtype = getattr(torch, options.dtype)
    return BaseSettings(
        folder=folder,
        quantization=options.quantization,
        compute_dtype=dtype,
        dtype=dtype,
        device=torch.device(device),
    )


def add_recipe_options(
    parser: argparse.ArgumentParser, groups: Collection[str] = tuple(_GROUPS), leave_out: Collection[str] = ()
) -> None:
    """Add one option for each field of Recipe in `groups`."""
    made = {name: parser.add_argument_group(_GROUPS[name]) for name in groups}
    for item, kind in recipe_fields():
        group = item.metadata["group"]
        if group in made and item.name not in leave_out:
            made[group].add_argument(option_name(item.name), **_argument(item, kind))
    parser.add_argument(
        "--set",
        action=_Set,
        metavar="NAME=VALUE",
        help="a setting by its name, as for `onebase jobs create`: --set r=8 is --r 8; may be repeated "
        "(default: none)",
    )


class _Set(argparse.Action):
    """Gives a value to the option of a setting's name."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options | {"dest": argparse.SUPPRESS, "default": argparse.SUPPRESS})

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        name, equals, value = values.partition("=")
        if not equals:
            raise argparse.ArgumentError(self, f"write NAME=VALUE, such as r=8, not {values!r}")
        actions = {action.dest: action for action in parser._actions}
        setting = dict(recipe_fields_by_name())
        name = name.strip().replace("-", "_")
        if name not in setting or name not in actions:
            near = difflib.get_close_matches(name, [one for one in setting if one in actions], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise argparse.ArgumentError(self, f"{name}: there is no such setting{hint}")
        action = actions[name]
        if isinstance(action, argparse.BooleanOptionalAction):
            if value not in ("true", "false"):
                raise argparse.ArgumentError(self, f"{name}: write true or false, not {value!r}")
            setattr(namespace, name, value == "true")
            return
        found = parser._get_values(action, [value])
        action(parser, namespace, found, option_name(name))


def recipe_from(options: argparse.Namespace, given: Mapping[str, Any] | None = None) -> Recipe:
    """Return the recipe of the options; missing ones come from `given`. Raises UsageError."""
    with usage_errors():
        return parse_recipe(given_settings(options, given))


def given_settings(options: argparse.Namespace, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the settings that were chosen, by options or in `given`."""
    names = [item.name for item, _ in recipe_fields()]
    chosen = {name: getattr(options, name) for name in names if getattr(options, name, None) is not None}
    return {**(given or {}), **chosen}


@contextmanager
def usage_errors() -> Iterator[None]:
    """Raise a RecipeError as a UsageError that names the option."""
    try:
        yield
    except RecipeError as error:
        names = [item.name for item, _ in recipe_fields()]
        flag = f"{option_name(error.field)}: " if error.field in names else ""
        raise UsageError(f"{flag}{error}") from error


def recipe_file(path: Path | None) -> dict[str, Any]:
    """Return the settings in a JSON file; none without a file. Raises UsageError."""
    if path is None:
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--recipe {path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise UsageError(f'--recipe {path}: write an object of settings, as in {{"r": 8}}')
    return settings


def quiet_libraries() -> None:
    """Keep the libraries' advice to programmers off the terminal."""
    # Processes that share cores, such as a server and a run, would otherwise spin while they wait.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    with quick_imports():
        import peft  # noqa: F401  (not used here, but by every run)
        import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def size(text: str) -> int:
    """Return the bytes of a size such as 20GB, 512MiB or a plain number."""
    units = {"gib": 1 << 30, "mib": 1 << 20, "gb": 10**9, "mb": 10**6, "": 1}
    lowered = text.lower().strip()
    unit = next(unit for unit in units if lowered.endswith(unit))
    try:
        value = float(lowered.removesuffix(unit))
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write it as in 20GB or 512MiB")
    return int(value * units[unit])


def positive(text: str) -> int:
    """Parse a whole number above 0."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return value


def open_console(*, stderr: bool = False) -> Console:
    """Return a console as wide as the terminal; through a pipe it is so wide that no line is broken."""
    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _PIPE_WIDTH
    return console


def run_command(command: Callable[[Console], int], continues: str) -> int:
    """Return the exit status of a command, which gets a console for messages; print what stopped it.

    continues: where the same command continues after Ctrl-C.
    """
    console = open_console(stderr=True)
    try:
        return command(console)
    except UsageError as error:
        print_error(console, str(error))
        return WRONG_OPTIONS
    except BaseFetchError as error:
        print_error(console, str(error))
        return FAILED
    except KeyboardInterrupt:
        console.print(f"Stopped. The same command continues {continues}.")
        return STOPPED


def print_error(console: Console, message: str) -> None:
    """Print an error as every command of `onebase` does."""
    console.print(f"[bold red]onebase:[/] {shown(message)}", highlight=False, soft_wrap=True)


def _argument(item: Any, kind: Any) -> dict[str, Any]:
    text = item.metadata["help"].replace("%", "%%").replace("(auto: ", "(default: auto, ")
    repeated = "; may be repeated" if item.name in _REPEATED else ""
    argument: dict[str, Any] = {
        "dest": item.name,
        "default": None,
        "help": f"{text}{repeated}{_default(item)}",
    }
    if item.name in _REPEATED:
        return argument | {"action": "append", "metavar": "METRIC" if item.name == "metrics" else "TEXT"}
    if kind is bool:
        return argument | {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        return argument | {"choices": get_args(kind)}
    if get_origin(kind) is Mapping:
        return argument | {"type": _pairs(get_args(kind)[1]), "metavar": _SHORT[item.name]}
    return argument | {"type": _value(kind), "metavar": _metavar(kind)}


def _default(item: Any) -> str:
    if item.name == "targets":
        return " (default: all-linear)"
    if isinstance(item.default, bool):
        return f" (default: {'on' if item.default else 'off'})"
    if isinstance(item.default, int | float):
        return f" (default: {item.default:g})"
    if isinstance(item.default, str):
        return "" if item.default == "auto" else f" (default: {item.default or 'none'})"
    return " (default: none)"


def _metavar(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return "A,B,..."
    plain = [kind] if isinstance(kind, type) else [part for part in get_args(kind) if isinstance(part, type)]
    return {int: "N", float: "X", bool: "true|false"}.get(plain[0], "TEXT") if plain else "TEXT"


def _value(kind: Any) -> Callable[[str], Any]:
    kinds = [kind] if not get_args(kind) or get_origin(kind) is tuple else list(get_args(kind))

    def convert(text: str) -> Any:
        for one in kinds:
            if get_origin(one) is Literal and text in get_args(one):
                return text
            if one is bool and text in ("true", "false"):
                return text == "true"
            if one in (int, float):
                try:
                    return one(text)
                except ValueError:
                    continue
        if any(one in (int, float, bool) for one in kinds):
            raise argparse.ArgumentTypeError(f"{text!r} is not {_words(kinds)}")
        return text

    return convert


def _words(kinds: Iterable[Any]) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false"}
    return " or ".join(words.get(kind) or " or ".join(get_args(kind)) for kind in kinds)


def _pairs(number: type) -> Callable[[str], dict[str, Any]]:
    def convert(text: str) -> dict[str, Any]:
        pairs = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            try:
                pairs[name.strip()] = number(value)
            except ValueError:
                raise argparse.ArgumentTypeError(f"{part!r}: write LAYER=NUMBER") from None
        return pairs

    return convert


_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and newline: they steer the terminal
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that turn the direction of writing
    r"\u2028\u2029\ufff9-\ufffb\U000e0000-\U000e007f"  # line separators, annotations and invisible tags
    r"\ud800-\udfff]"  # halves of surrogate pairs: bytes of a name that are not UTF-8
)


def printable(text: str) -> str:
    """Return `text` with U+FFFD in the place of each character that a terminal would act on or cannot show.

    Tabs and newlines stay, as do letters, spaces and emoji of any script. A caller that must keep a line one
    line replaces newlines itself.
    """
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def shown(text: str) -> str:
    """Return `printable(text)` for a console that reads rich's markup, with anything like markup escaped."""
    return escape(printable(text))


def run_progress(console: Console) -> Bar:
    """Return a bar with the run's stage and, in the field `facts`, its figures; it is disabled in a pipe."""
    return Bar(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[facts]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


class CtrlC:
    """A gate that Ctrl-C closes: the run writes a checkpoint and ends. The second Ctrl-C ends it at once."""

    def __init__(self, *, alone: bool) -> None:
        self._alone = alone
        self._pressed = self._at_once = False
        self._before: Any = None

    def __enter__(self) -> CtrlC:
        # A launcher ends its processes itself.
        if self._alone and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def wait(self) -> None:
        """Return when the run may compute. Raises Interrupted."""
        if self._pressed:
            raise Interrupted("pause")

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let the first Ctrl-C end the run at once while there is nothing to save. Raises Interrupted."""
        self._at_once = True
        try:
            self.wait()
            yield
        finally:
            self._at_once = False

    def _press(self, number: int, frame: object) -> None:
        if self._pressed or self._at_once:
            raise KeyboardInterrupt
        self._pressed = True
