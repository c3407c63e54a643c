"""Write a run's curves for TensorBoard and trackio: both are local files, both optional."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from onebase_training import events

if TYPE_CHECKING:
    from onebase_training.run import TrainingRequest

_INSTALL = "pip install 'onebase[track]' installs it"


class CurveError(Exception):
    """A requested tool is not installed, or does not work."""


Write = Callable[[Mapping[str, float], int], None]
"""Function that writes the values of a step."""


@contextmanager
def open_curves(names: Sequence[str], job: TrainingRequest) -> Iterator[events.Listen]:
    """Yield a listener that writes events to the named tools (`tensorboard`, `trackio`). Raises
    CurveError."""
    openers = {"tensorboard": _tensorboard, "trackio": _trackio}
    with ExitStack() as stack:
        writers = [stack.enter_context(openers[name](job)) for name in dict.fromkeys(names)]

        def listen(event: events.Event) -> None:
            step, values = values_of(event)
            for write in writers if values else ():
                write(values, step)

        yield listen


def values_of(event: events.Event) -> tuple[int, dict[str, float]]:
    """Return the step of an event, and its values by the name of their curve."""
    if isinstance(event, events.StepDone):
        figures = {f"train/{name}": value for name, value in _figures(event).items()}
        return event.step, {
            "train/loss": event.loss,
            "train/learning_rate": event.learning_rate,
            "train/grad_norm": event.grad_norm,
            "train/tokens_per_second": event.tokens_per_second,
            "train/epoch": event.epoch,
            "memory/peak_bytes": float(event.memory_bytes),
            **figures,
        }
    if isinstance(event, events.Evaluated):
        if event.parent:
            return event.step, {"eval/parent_loss": event.loss}
        if event.active:
            return event.step, {"eval/active_loss": event.loss}
        figures = {f"eval/{name}": value for name, value in _figures(event).items()}
        return event.step, {"eval/loss": event.loss, **figures}
    return 0, {}


def _figures(event: events.StepDone | events.Evaluated) -> dict[str, float]:
    return event.rewards if event.accuracy is None else {"accuracy": event.accuracy}


@contextmanager
def _tensorboard(job: TrainingRequest) -> Iterator[Write]:
    """Write event files into the run's folder: `tensorboard --logdir runs`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise CurveError(f"--report-to tensorboard: tensorboard is not installed; {_INSTALL}") from error
    writer: Any = SummaryWriter(str(job.folder / "tensorboard"))

    def write(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    try:
        yield write
    finally:
        writer.close()


@contextmanager
def _trackio(job: TrainingRequest) -> Iterator[Write]:
    """Write a local database that `trackio show --project onebase` draws; nothing leaves the machine."""
    try:
        import trackio
    except ImportError as error:
        raise CurveError(f"--report-to trackio: trackio is not installed; {_INSTALL}") from error
    tool: Any = trackio
    off = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
    with contextlib.redirect_stdout(io.StringIO()):
        tool.init(project="onebase", name=job.name, config=job.recipe.to_json(), resume="allow", **off)
    try:
        yield lambda values, step: tool.log(dict(values), step=step)
    finally:
        with contextlib.redirect_stdout(io.StringIO()):
            tool.finish()
