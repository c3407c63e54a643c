"""A run's curves for tools that draw them: TensorBoard and trackio, both local files, both optional."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from onebase_adapters.training import events

if TYPE_CHECKING:
    from onebase_adapters.training.plan import Job

_INSTALL = "pip install 'onebase[track]' installs it"


class CurveError(Exception):
    """A tool that was asked for is not installed, or does not work."""


class _Writer(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


@contextmanager
def open_curves(names: Sequence[str], job: Job) -> Iterator[Callable[[events.Event], None]]:
    """A listener that writes events to the named tools (`tensorboard`, `trackio`). Raises CurveError."""
    kinds: dict[str, Callable[[Job], _Writer]] = {"tensorboard": _TensorBoard, "trackio": _Trackio}
    with ExitStack() as stack:
        writers = []
        for name in dict.fromkeys(names):
            writers.append(kinds[name](job))
            stack.callback(writers[-1].close)

        def listen(event: events.Event) -> None:
            step, values = values_of(event)
            for writer in writers if values else ():
                writer.write(step, values)

        yield listen


def values_of(event: events.Event) -> tuple[int, dict[str, float]]:
    """The step of an event, and what it adds to which curves."""
    if isinstance(event, events.StepDone):
        rewards = {f"train/{name}": value for name, value in event.rewards.items()}
        return event.step, {
            "train/loss": event.loss,
            "train/learning_rate": event.learning_rate,
            "train/grad_norm": event.grad_norm,
            "train/tokens_per_second": event.tokens_per_second,
            "train/epoch": event.epoch,
            "memory/peak_bytes": float(event.memory_bytes),
            **rewards,
        }
    if isinstance(event, events.Evaluated):
        rewards = {f"eval/{name}": value for name, value in event.rewards.items()}
        return event.step, {"eval/loss": event.loss, **rewards}
    return 0, {}


class _TensorBoard:
    """Event files in the run's folder: `tensorboard --logdir runs`."""

    def __init__(self, job: Job) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise CurveError(f"--report-to tensorboard: tensorboard is not installed; {_INSTALL}") from error
        self._writer: Any = SummaryWriter(str(job.folder / "tensorboard"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    """A local database that `trackio show --project onebase` draws; nothing leaves the machine."""

    def __init__(self, job: Job) -> None:
        try:
            import trackio
        except ImportError as error:
            raise CurveError(f"--report-to trackio: trackio is not installed; {_INSTALL}") from error
        self._trackio: Any = trackio
        with contextlib.redirect_stdout(io.StringIO()):
            trackio.init(
                project="onebase",
                name=job.name,
                config=job.recipe.to_json(),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._trackio.log(dict(values), step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._trackio.finish()
