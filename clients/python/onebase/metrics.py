"""Prometheus metrics of a server: parsed from its text, read by name and label."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from ._core.requests import Call
from .errors import InvalidResponseError

METRICS: Final = Call("GET", "/metrics")
_SAMPLE: Final = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)")
_LABEL: Final = re.compile(r'(\w+)="([^"\\]*(?:\\.[^"\\]*)*)",?')
_ESCAPED: Final = re.compile(r"\\(.)")


@dataclass(frozen=True)
class Metrics:
    """The figures of one moment. `docs/observability.md` lists the names.

    Args:
        samples: By name, the labels and the value of each.
    """

    samples: Mapping[str, tuple[tuple[Mapping[str, str], float], ...]]

    def of(self, name: str, **labels: str) -> Iterator[tuple[Mapping[str, str], float]]:
        """Yield the samples with these labels, whatever others they have."""
        samples = self.samples.get(name, ())
        return ((found, value) for found, value in samples if labels.items() <= found.items())

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of the samples with these labels; 0 if there is none."""
        return sum(value for _, value in self.of(name, **labels))

    def by(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """Return the sums of the samples with these labels, by the value of `label`."""
        sums: defaultdict[str, float] = defaultdict(float)
        for found, value in self.of(name, **labels):
            sums[found.get(label, "")] += value
        return dict(sums)

    def quantile(self, name: str, share: float, since: Metrics | None = None, **labels: str) -> float | None:
        """Return the quantile at `share` (0 to 1) of a histogram with these labels, estimated from its
        buckets.

        Between two bounds values are taken to be spread evenly, as Prometheus' histogram_quantile does. Above
        the highest bound it is that bound. None: there are no values.

        since: an earlier moment; what came before it does not count.
        """
        counts = self.by(f"{name}_bucket", "le", **labels)
        before = {} if since is None else since.by(f"{name}_bucket", "le", **labels)
        bounds = sorted((float(bound), count - before.get(bound, 0.0)) for bound, count in counts.items())
        if not bounds or bounds[-1][1] <= 0:
            return None
        rank = share * bounds[-1][1]
        low = under = 0.0
        for bound, count in bounds:
            if count >= rank:
                if bound == float("inf"):
                    break
                return low + (bound - low) * (rank - under) / (count - under) if count > under else bound
            low, under = bound, count
        return low


def parse_metrics(text: str, wanted: tuple[str, ...] = ()) -> Metrics:
    """Parse a server's answer to GET /metrics. Raises InvalidResponseError.

    Args:
        wanted: What the names begin with that are read; by default all. A server with many adapters has
            thousands of lines.
    """
    samples: defaultdict[str, list[tuple[Mapping[str, str], float]]] = defaultdict(list)
    for number, line in enumerate(text.split("\n"), 1):
        if not line or line.startswith("#") or (wanted and not line.startswith(wanted)):
            continue
        found = _SAMPLE.match(line)
        try:
            if found is None:
                raise ValueError
            name, inside, value = found.groups()
            labels = dict(_LABEL.findall(inside)) if inside else {}
            if inside and "\\" in inside:
                labels = {label: _unescaped(text) for label, text in labels.items()}
            samples[name].append((labels, float(value)))
        except ValueError as error:
            raise InvalidResponseError(f"line {number} of /metrics is no sample: {line[:80]!r}") from error
    return Metrics({name: tuple(some) for name, some in samples.items()})


def _unescaped(text: str) -> str:
    return _ESCAPED.sub(lambda found: "\n" if found[1] == "n" else found[1], text)
