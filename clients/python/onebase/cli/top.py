"""`onebase top`: what the server is doing, live."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .._sync.client import Client
from .._terminal.ui import Column, bar, can_move, console, line, note, printable, size, sparkline, table
from ..errors import APIStatusError, OneBaseError
from ..metrics import Metrics
from .command import OK, explain, parser, perform, print_json, seconds

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_DESCRIPTION: Final = """\
Watch the server: sequences, tokens a second, the KV cache, adapters by tier, jobs and tenants.
Tokens of an adapter and of a tenant are those of requests that ended. A tenant's wait is that in
the engine's queue (p50 / p95) of its requests that ended in the last minute, as far as this has
looked. q or Ctrl-C ends it. Where the server has API keys, yours needs the scope admin.
"""
_EXAMPLES: Final = """\
  onebase top
  onebase top --once
  onebase top --json --interval 10 >> load.jsonl
"""
_HISTORY: Final = 60
"""Points of the curve of tokens a second."""
_WAITS: Final = "onebase_tenant_queue_seconds"
_WAIT_SECONDS: Final = 60.0
"""Time, in seconds, of which tenants' waits are shown: in one interval most have no request."""
_QUIT: Final = (b"q", b"Q")
_GONE: Final = "no answer"


@dataclass(frozen=True)
class Latency:
    """Seconds that half and 95% of the values are at most; None where nothing ended in this time."""

    p50: float | None
    p95: float | None


@dataclass(frozen=True)
class AdapterLoad:
    """Use of one adapter by one tenant, per second."""

    adapter: str
    tenant: str
    tier: str
    """`slot`, `host`, `disk`; "" for the base."""
    requests: float
    tokens: float


@dataclass(frozen=True)
class JobLoad:
    """A job that trains now."""

    id: str
    step: int
    steps: int
    loss: float | None
    tokens: float | None
    """Tokens per second."""


@dataclass(frozen=True)
class TenantRates:
    """A tenant's sequences now, and its tokens a second and waits in requests that ended."""

    tenant: str
    sequences: int
    tokens: float
    wait: Latency
    """Wait in the engine's queue, of requests that ended in the last minute."""


@dataclass(frozen=True)
class Frame:
    """The server in the time from one look to the next; rates are by second."""

    at: float
    """Time of the later look, in Unix seconds."""
    base: str
    state: str
    running: int
    waiting: int
    batch_requests: int
    max_slots: int
    generated: float
    prompted: float
    cached: float
    """The part of the prompts' tokens that the prefix cache had, 0 to 1."""
    kv: float
    """The part of the KV cache that sequences hold, 0 to 1."""
    first_token: Latency
    between_tokens: Latency
    whole: Latency
    tiers: dict[str, int]
    host_used: float
    host_limit: float
    proving: int
    errors: float
    """Answers with 5xx, in a second."""
    refused: float
    """Answers with 4xx, in a second."""
    jobs_by_state: dict[str, int]
    adapters: tuple[AdapterLoad, ...]
    jobs: tuple[JobLoad, ...]
    tenants: tuple[TenantRates, ...]


def run(command: str, argv: list[str]) -> int:
    """Run the command. Gives its exit status."""
    made = parser(command, _DESCRIPTION, _EXAMPLES)
    help_text = "from one look to the next (default: 2)"
    made.add_argument("--interval", type=seconds, default=2.0, metavar="SECONDS", help=help_text)
    made.add_argument("--once", action="store_true", help="show one interval, and end")
    made.add_argument("--json", action="store_true", help="print a line of JSON for each interval")
    args = made.parse_args(argv)

    def work(client: Client) -> int:
        watched = Watch(client.with_options(max_retries=0), args.interval)
        out = console()
        if args.once or not (args.json or can_move(out)):
            frame = watched.first()
            print_json(frame) if args.json else out.print(picture(frame, (), client.url, out, whole=True))
        elif args.json:
            _follow(watched)
        else:
            _live(watched, client.url, out)
        return OK

    return perform(made, args, work)


class Watch:
    """Looks at a server time and again."""

    def __init__(self, client: Client, interval: float) -> None:
        self._client = client
        self.interval = interval
        self._before: Metrics | None = None
        self._looked = 0.0
        self._waits: deque[tuple[float, Metrics]] = deque()
        """Tenants' waits at earlier looks, by their times: the first is a minute old."""

    def first(self) -> Frame:
        """Return the frame after one interval. Raises what Client.metrics raises."""
        self.look()
        time.sleep(self.interval)
        frame = self.look()
        if frame is None:
            raise RuntimeError("a second look has nothing to compare with")
        return frame

    def look(self) -> Frame | None:
        """Return the time since the last look; None at the first one. Raises what Client.metrics raises."""
        now = self._client.metrics()
        moment, before = time.monotonic(), self._before
        passed = moment - self._looked
        self._before, self._looked = now, moment
        while len(self._waits) > 1 and self._waits[1][0] <= moment - _WAIT_SECONDS:
            self._waits.popleft()
        waited = self._waits[0][1] if self._waits else None
        found = {name: samples for name, samples in now.samples.items() if name.startswith(_WAITS)}
        self._waits.append((moment, Metrics(found)))
        return None if before is None else _frame(before, now, max(passed, 1e-3), waited or before)


def _follow(watched: Watch) -> None:
    """Print lines of JSON, for ever. Raises what the first look raises; later, a server may go and come
    back."""
    frame: Frame | None = watched.first()
    while True:
        if frame is not None:
            print_json(frame)
            sys.stdout.flush()
        time.sleep(watched.interval)
        try:
            frame = watched.look()
        except OneBaseError as error:
            frame = None
            note(f"onebase: {explain(error, '')[0].splitlines()[0]}")


def _live(watched: Watch, url: str, out: Console) -> None:
    from rich.live import Live

    watched.look()  # what is wrong with the address or the key ends the command
    speeds: deque[float] = deque(maxlen=_HISTORY)
    frame: Frame | None = None
    trouble, since = "", 0.0
    with (
        contextlib.suppress(KeyboardInterrupt),
        _keys() as pressed,
        Live(console=out, screen=True, auto_refresh=False) as live,
    ):
        pause = min(1.0, watched.interval)
        while True:
            said = f"{trouble} for {time.monotonic() - since:.0f} s" if trouble else ""
            live.update(picture(frame, speeds, url, out, trouble=said), refresh=True)
            if pressed(pause):
                return
            pause = watched.interval
            try:
                frame, trouble = watched.look() or frame, ""
            except OneBaseError as error:
                since = since if trouble else time.monotonic()
                trouble = str(error) if isinstance(error, APIStatusError) else _GONE
            else:
                if frame is not None:
                    speeds.append(frame.generated)


@contextlib.contextmanager
def _keys() -> Iterator[Pressed]:
    """Have keys come at once, and not be shown; the terminal is as it was in the end."""
    if not sys.stdin.isatty():
        yield Pressed(False)
        return
    try:
        import termios
        import tty
    except ImportError:  # Windows, where Ctrl-C ends it
        yield Pressed(False)
        return
    kept = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield Pressed(True)
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, kept)


class Pressed:
    """Waits for so many seconds, and says whether somebody wants to leave."""

    def __init__(self, terminal: bool) -> None:
        self._terminal = terminal

    def __call__(self, pause: float) -> bool:
        end = time.monotonic() + pause
        while (left := end - time.monotonic()) > 0:
            if not self._terminal:
                time.sleep(left)
            elif select.select([sys.stdin], [], [], left)[0]:
                typed = os.read(sys.stdin.fileno(), 64)
                if not typed or any(key in typed for key in _QUIT):
                    return True
        return False


# ---- figures ------------------------------------------------------------------------------------------


def _frame(before: Metrics, now: Metrics, passed: float, waits_before: Metrics) -> Frame:
    def rate(name: str, **labels: str) -> float:
        return _grown(before.total(name, **labels), now.total(name, **labels)) / passed

    prompted = rate("vllm:prompt_tokens_total")
    (labels, _), *_ = [*now.of("vllm:num_requests_running"), ({}, 0.0)]
    states = now.by("onebase_engine_state", "state")
    answers = {
        status: _grown(before.total("onebase_http_answers_total", status=status), count) / passed
        for status, count in now.by("onebase_http_answers_total", "status").items()
    }
    return Frame(
        at=time.time(),
        base=labels.get("model_name", ""),
        state=next((state for state, value in states.items() if value), ""),
        running=int(now.total("vllm:num_requests_running")),
        waiting=int(now.total("vllm:num_requests_waiting")),
        batch_requests=int(now.total("onebase_batch_requests_running")),
        max_slots=int(now.total("vllm:max_gpu_lora_adapters")),
        generated=rate("vllm:generation_tokens_total"),
        prompted=prompted,
        cached=rate("vllm:prefix_cache_hits_total") / prompted if prompted else 0.0,
        kv=now.total("vllm:kv_cache_usage_perc"),
        first_token=_latency("vllm:time_to_first_token_seconds", before, now),
        between_tokens=_latency("vllm:inter_token_latency_seconds", before, now),
        whole=_latency("vllm:e2e_request_latency_seconds", before, now),
        tiers=_counts(now.by("onebase_adapters", "tier")),
        host_used=now.total("onebase_host_memory_bytes", part="used"),
        host_limit=now.total("onebase_host_memory_bytes", part="limit"),
        proving=int(now.total("onebase_versions_unfinished")),
        errors=sum(count for status, count in answers.items() if status.startswith("5")),
        refused=sum(count for status, count in answers.items() if status.startswith("4")),
        jobs_by_state=_counts(now.by("onebase_training_jobs", "state")),
        adapters=tuple(_adapters(before, now, passed)),
        jobs=tuple(_jobs(now)),
        tenants=tuple(_tenants(before, now, passed, waits_before)),
    )


def _grown(before: float, now: float) -> float:
    """Return the growth of a counter; one that is smaller than before has begun again."""
    return now - before if now >= before else now


def _latency(name: str, before: Metrics, now: Metrics, **labels: str) -> Latency:
    fresh = now.total(f"{name}_count", **labels) >= before.total(f"{name}_count", **labels)
    since = before if fresh else None
    return Latency(now.quantile(name, 0.5, since, **labels), now.quantile(name, 0.95, since, **labels))


def _counts(values: dict[str, float]) -> dict[str, int]:
    return {name: int(value) for name, value in values.items()}


def _adapters(before: Metrics, now: Metrics, passed: float) -> list[AdapterLoad]:
    tiers = now.by("vllm:lora_adapter_loaded", "adapter_name", level="gpu")
    loaded = now.by("vllm:lora_adapter_loaded", "adapter_name")
    base = next((labels["model_name"] for labels, _ in now.of("vllm:num_requests_running")), "")
    found = []
    for labels, total in now.of("onebase_adapter_requests_total"):
        adapter, tenant = labels["adapter"], labels["tenant"]

        def grown(name: str, adapter: str = adapter, tenant: str = tenant) -> float:
            known = {"adapter": adapter, "tenant": tenant}
            return _grown(before.total(name, **known), now.total(name, **known)) / passed

        tier = "slot" if adapter in tiers else "host" if adapter in loaded else "disk"
        load = AdapterLoad(
            adapter,
            tenant,
            "" if adapter == base else tier,
            grown("onebase_adapter_requests_total"),
            grown("onebase_adapter_generation_tokens_total"),
        )
        found.append((load, total))
    found.sort(key=lambda one: (-one[0].tokens, -one[0].requests, -one[1], one[0].adapter))
    return [load for load, _ in found]


def _jobs(now: Metrics) -> list[JobLoad]:
    steps = now.by("onebase_training_steps", "job_id")
    losses = now.by("onebase_training_loss", "job_id")
    speeds = now.by("onebase_training_tokens_per_second", "job_id")
    return [
        JobLoad(job, int(step), int(steps.get(job, 0)), losses.get(job), speeds.get(job))
        for job, step in now.by("onebase_training_step", "job_id").items()
    ]


def _tenants(before: Metrics, now: Metrics, passed: float, waits_before: Metrics) -> list[TenantRates]:
    sequences = now.by("onebase_tenant_sequences", "tenant")
    earlier = before.by("onebase_adapter_generation_tokens_total", "tenant")
    tokens = now.by("onebase_adapter_generation_tokens_total", "tenant")
    found = [
        TenantRates(
            tenant,
            int(sequences.get(tenant, 0)),
            _grown(earlier.get(tenant, 0.0), tokens.get(tenant, 0.0)) / passed,
            _latency(_WAITS, waits_before, now, tenant=tenant),
        )
        for tenant in sequences.keys() | tokens.keys()
    ]
    return sorted(found, key=lambda one: (-one.sequences, -one.tokens, one.tenant))


# ---- the picture ---------------------------------------------------------------------------------------


def picture(
    frame: Frame | None,
    speeds: deque[float] | tuple[float, ...],
    url: str,
    out: Console,
    *,
    trouble: str = "",
    whole: bool = False,
) -> RenderableType:
    """Return a screen for the terminal `out`; tables are cut to its height unless `whole`."""
    from rich.console import Group

    if frame is None:
        return line(trouble or f"looking at {url} ...")
    width, height = out.width, 10_000 if whole else out.height
    ascii_only = out.options.ascii_only
    head = _head(frame, url, trouble, width)
    head += _figures(frame, speeds, width, ascii_only)
    left = height - len(head)
    parts: list[RenderableType] = [*head]
    for made, count in _tables(frame, width, left):
        parts += [line(""), made]
        left -= count
    return Group(*parts)


def _head(frame: Frame, url: str, trouble: str, width: int) -> list[RenderableType]:
    state = trouble or frame.state
    style = "green" if state == "ready" else "bold red"
    clock = time.strftime("%H:%M:%S", time.localtime(frame.at))
    title = line(f"onebase top   {frame.base}   ", "bold")
    title.append(printable(state), style)
    title.append(f"   {printable(url)}", "dim")
    title.truncate(max(width - len(clock) - 2, 1), overflow="ellipsis", pad=True)
    title.append(f"  {clock}", "dim")
    title.truncate(width)
    return [title, line("")]


def _figures(
    frame: Frame, speeds: deque[float] | tuple[float, ...], width: int, ascii_only: bool
) -> list[RenderableType]:
    requests = f"{frame.running} running   {frame.waiting} waiting   {frame.batch_requests} of batches"
    if frame.refused or frame.errors:
        requests += f"   {frame.refused:.1f} refused/s   {frame.errors:.1f} failed/s"
    tokens = f"{frame.generated:,.0f}/s generated   {frame.prompted:,.0f}/s of prompts"
    tokens += f" ({frame.cached:.0%} from the cache)" if frame.prompted else ""
    room = max(min(_HISTORY, width - 10 - len(tokens) - 3), 0)
    curve = sparkline(list(speeds)[-room:], room, ascii_only=ascii_only) if speeds and room > 3 else ""
    tiers = "   ".join(
        [
            f"{frame.tiers.get('slot', 0)} in slots (of {frame.max_slots})",
            f"{frame.tiers.get('host', 0)} in memory",
            f"{frame.tiers.get('disk', 0)} on disk",
            *([f"{frame.proving} being proved"] if frame.proving else []),
        ]
    )
    states = frame.jobs_by_state.items()
    jobs = "   ".join(f"{count} {state.replace('_', ' ')}" for state, count in states if count)
    kept = f"{size(frame.host_used)} of {size(frame.host_limit)}"
    held = bar(frame.kv, 1, min(40, width - 17), ascii_only=ascii_only)
    lines = {
        "sequences": requests,
        "tokens": f"{tokens}   {curve}".rstrip(),
        "KV cache": f"{frame.kv:.0%}  {held}".rstrip(),
        "p50 / p95": _latencies(frame),
        "adapters": tiers,
        "memory": f"{kept} of host memory for adapters",
        "jobs": jobs or "none",
    }
    made: list[RenderableType] = []
    for title, text in lines.items():
        one = line(f"{title:<10}", "dim")
        one.append_text(line(text))
        one.truncate(width, overflow="ellipsis")
        made.append(one)
    return made


def _latencies(frame: Frame) -> str:
    named = (("first", frame.first_token), ("next", frame.between_tokens), ("whole", frame.whole))
    return "   ".join(f"{name} {_time(one.p50)} / {_time(one.p95)}" for name, one in named)


def _time(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def _tables(frame: Frame, width: int, height: int) -> Iterator[tuple[RenderableType, int]]:
    """Yield the tables that have rows, each with its lines; adapters get the space that the others leave."""
    jobs, tenants = frame.jobs[:4], frame.tenants[:6] if len(frame.tenants) > 1 else ()
    others = sum(len(some) + 2 for some in (jobs, tenants) if some)
    room = max(height - others - 2, 1)
    if frame.adapters:
        shown = frame.adapters[:room]
        yield table(_ADAPTERS, shown, width), len(shown) + 2
        height -= len(shown) + 2
    if tenants and height > 2:
        yield table(_TENANTS, tenants[: height - 2], width), len(tenants) + 2
        height -= len(tenants) + 2
    if jobs and height > 2:
        yield table(_JOBS, jobs[: height - 2], width), len(jobs) + 2


_ADAPTERS: Final[tuple[Column[AdapterLoad], ...]] = (
    Column("adapter", lambda one: one.adapter, shrink=True),
    Column("tenant", lambda one: one.tenant, shrink=True, spare=1),
    Column("where", lambda one: one.tier),
    Column("requests/s", lambda one: f"{one.requests:.1f}", right=True),
    Column("tokens/s", lambda one: f"{one.tokens:,.0f}", right=True),
)
_TENANTS: Final[tuple[Column[TenantRates], ...]] = (
    Column("tenant", lambda one: one.tenant, shrink=True),
    Column("sequences", lambda one: str(one.sequences), right=True),
    Column("tokens/s", lambda one: f"{one.tokens:,.0f}", right=True),
    Column("wait p50 / p95", lambda one: f"{_time(one.wait.p50)} / {_time(one.wait.p95)}", right=True),
)
_JOBS: Final[tuple[Column[JobLoad], ...]] = (
    Column("job", lambda one: one.id, shrink=True),
    Column("step", lambda one: f"{one.step} of {one.steps}", right=True),
    Column("loss", lambda one: "" if one.loss is None else f"{one.loss:.3f}", right=True),
    Column("tokens/s", lambda one: "" if one.tokens is None else f"{one.tokens:,.0f}", right=True),
)
