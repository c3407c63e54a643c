"""Judges of one conversation, and their answers."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import APIStatusError
from .types import AdapterSpec, Generation, SamplingFields

__all__ = ["Judge", "Judgement"]


class Judge(SamplingFields, total=False):
    """One of several requests about one conversation: who answers, what it is asked, and how."""

    name: str
    """Name of its answer (default: the adapter's, or `base`)."""
    adapter: AdapterSpec
    """Adapter that answers, as in `Client.generate` (default: None, the base)."""


@dataclass(frozen=True)
class Judgement:
    """The answer of one judge, or the error that it alone had."""

    name: str
    index: int
    """Position of the judge among those that were asked."""
    answer: Generation | None
    error: APIStatusError | None = None

    @property
    def result(self) -> Generation:
        """The answer.

        Raises:
            APIStatusError: the judge has none.
        """
        if self.answer is None:
            raise self.error or RuntimeError("a judgement without an answer has an error")
        return self.answer

    @property
    def text(self) -> str:
        """The text of the answer. Raises as `result`."""
        return self.result.text
