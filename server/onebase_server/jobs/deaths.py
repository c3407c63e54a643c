"""What follows from a trainer that died: another one, unless too many have died without a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from onebase_adapters.registry import TrainingJob
from onebase_server.jobs.outcomes import place_of

MOST_DEATHS = 3
"""So often a job is taken up again whose trainer dies without a checkpoint in between."""
PAUSES = (0.5, 1.0, 2.0)
"""Seconds before it is taken up, by the number of deaths."""


@dataclass(frozen=True)
class Death:
    """A death of a job's trainer. `how`: `signal SIGKILL`; `count`: with this one, since a checkpoint."""

    job: TrainingJob
    how: str
    count: int

    @classmethod
    def of(cls, job: TrainingJob, how: str) -> Death:
        """The newest one of a job, as its row is now."""
        return cls(job, how, job.deaths + 1 if job.saved_step <= job.death_step else 1)

    @property
    def last(self) -> bool:
        """Whether the job has failed by it."""
        return self.count > MOST_DEATHS

    @property
    def pause(self) -> float:
        """Seconds before the job is taken up."""
        return PAUSES[min(self.count, len(PAUSES)) - 1]

    @property
    def facts(self) -> dict[str, Any]:
        """For the job's row."""
        return {"deaths": self.count, "death_step": self.job.saved_step}

    @property
    def message(self) -> str:
        """For the one who made the job."""
        killed = " SIGKILL is also what the kernel ends a process with when memory is short."
        hint = killed if "SIGKILL" in self.how else ""
        if self.last:
            return (
                f"The trainer's process ended {self.count} times without coming as far as a checkpoint, the "
                f"last time by {self.how}.{hint} The server's log may say more. The job can be resumed."
            )
        return f"The trainer's process ended by {self.how}.{hint} The job goes on {place_of(self.job)}."
