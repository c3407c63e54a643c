"""Terminal output for the person who starts the server: progress while it loads, then a summary."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

import onebase_server
from onebase_adapters.names import label
from onebase_adapters.registry import ApiKeyRecord, Quotas, TenantRecord
from onebase_edge.settings import Settings, is_loopback
from onebase_engine.engine.messages import BaseInfo, Loading
from onebase_server.adapters.catalog import Catalog

if TYPE_CHECKING:
    from onebase_engine.engine.base_check import BaseCheck
    from onebase_server.inference.tokenization import ChatSupport

_MOST_ADAPTERS = 10
_UNITS: dict[str, tuple[tuple[str, int], ...]] = {
    "bytes": (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)),
    "training_seconds": (("d", 86_400), ("h", 3_600), ("m", 60)),
}
"""Units of quotas, the largest first."""

_log = logging.getLogger(__name__)


def readable_bytes(count: float) -> str:
    """`110 MB`, `5.6 GB`, `1.2 TB`: powers of 1000, as disks and model cards count."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB" if count < 999.95 else f"{count / 1000:.1f} TB"


class LoadingDisplay:
    """Progress of the start: a bar on a terminal, a line per stage in a log. A context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._stage = ""

    def __enter__(self) -> Self:
        if self._live:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bars; may be called more than once."""
        if self._live:
            self._progress.stop()

    def update(self, stage: str, fraction: float) -> None:
        """Show that `stage` is being done, and the share (0 to 1) of the whole that is done."""
        if self._task is None:
            self._task = self._progress.add_task(stage, total=1.0)
        self._progress.update(self._task, description=stage, completed=max(0.0, min(1.0, fraction)))
        if stage != self._stage and not self._live:
            self._console.print(f"{stage} ...", highlight=False)
            if self._console.quiet:  # the log is JSON
                _log.info("%s", stage)
        self._stage = stage

    def loading(self, message: Loading) -> None:
        self.update(message.stage, message.fraction)


def console_is_built() -> bool:
    """Return True if the package has the page that /console serves."""
    return (files(onebase_server) / "web" / "index.html").is_file()


def print_summary(
    console: Console,
    settings: Settings,
    base: BaseInfo,
    catalog: Catalog,
    url: str,
    *,
    keys: bool,
    unserved: Mapping[str, str],
) -> None:
    """Print the base and its memory, the adapters, and where to send requests.

    keys: whether there are API keys. unserved: what chats, tools or thinking lack, by these names.
    """
    table = Table.grid(padding=(0, 2))
    table.add_row(
        "base", f"{catalog.base_name} ({base.architecture}, {base.parameters / 1e6:,.0f} M parameters)"
    )
    table.add_row(
        "memory", f"{readable_bytes(base.base_bytes)} for the base ({base.quantization}), {_where(base)}"
    )
    tokens = base.kv_blocks // base.kv_groups * base.block_size
    eight = " in int8" if base.kv_dtype == "int8" else ""
    long = f" in short sequences, {base.kv_tokens:,} in the longest ones" if base.kv_groups > 1 else ""
    table.add_row(
        "KV cache",
        f"{readable_bytes(base.kv_bytes)}: {tokens:,} tokens{eight}{long}, at most {base.kv_longest:,} per "
        "request",
    )
    for title, text in unserved.items():
        table.add_row(title, escape(text))
    lines = _adapter_lines(catalog)
    for title, text in zip(["adapters", *[""] * len(lines)], lines, strict=False):
        table.add_row(title, text)
    table.add_row("listening", f"{url}   (API reference: {url}/docs)")
    if console_is_built():
        table.add_row("console", f"{url}/console")
    if keys:
        table.add_row("API keys", "each request needs one: onebase keys list")
    console.print()
    console.print(f"OneBase {onebase_server.__version__} is ready", style="bold", highlight=False)
    console.print(table, highlight=False)
    if not keys and not is_loopback(settings.host):
        console.print(
            f"anyone who reaches {settings.host} may do everything here: there is no API key (--insecure)",
            style="yellow",
        )
    console.print()


def _kv_bytes(base: BaseCheck) -> str:
    if not base.kv_bytes_per_token:
        return ""
    each, old = base.kv_bytes_per_token, base.kv_bytes_per_old_token
    before = f", {readable_bytes(old)} before the windows" if old is not None and old < each else ""
    return f"{readable_bytes(each)} a token{before}"


def print_base_check(console: Console, name: str, base: BaseCheck, chat: ChatSupport) -> None:
    """Print whether a base can be served, and what it takes."""
    answer = "no" if base.refusal is not None else "yes" if base.certain else "not known before a start"
    rows = [("served", answer), ("because", base.refusal or "")]
    text = "" if base.text_type == base.model_type else f", its language model {base.text_type}"
    rows += [("class", f"{base.architecture or 'none of transformers'} ({base.model_type}{text})")]
    if base.parameters is not None:
        parts = ", ".join(f"{part} ({_billions(count)})" for part, count in base.left_out.items())
        sizes = (f"{kind} {readable_bytes(size)}" for kind, size in base.memory.items())
        rows += [("weights", _billions(base.parameters)), ("not loaded", parts), ("memory", ", ".join(sizes))]
    rows += [
        ("files", f"quantized: {base.stored}" if base.stored not in (None, "none") else ""),
        ("context", f"{base.context:,} tokens" if base.context else "no limit in the config"),
        ("KV cache", _kv_bytes(base)),
        ("state", f"{readable_bytes(base.state_bytes)} a sequence" if base.state_bytes else ""),
        ("layers", ", ".join(f"{count} {kind}" for kind, count in base.layers.items())),
        ("chat template", {True: "yes", False: "none", None: "no tokenizer here"}[chat.chat_template]),
        ("tools", "yes" if chat.tools else chat.unserved.get("tools", "")),
        ("note", " ".join(base.notes)),
    ]
    table = Table.grid(padding=(0, 2))
    for label_, value in rows:
        if value:
            table.add_row(label_, escape(value))
    console.print(f"[bold]{escape(name)}[/]")
    console.print(table)


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e7 else f"{count:,}"


def _where(base: BaseInfo) -> str:
    if base.device != "cpu":
        return f"on {base.device}"
    return "on the CPU, " + ("by PyTorch" if base.kernels == "torch" else f"by the {base.kernels} kernels")


def _adapter_lines(catalog: Catalog) -> list[str]:
    lines = []
    active = [record.active_version for record in catalog if record.active_version is not None]
    for version in active[:_MOST_ADAPTERS]:
        report = version.report or {}
        size = readable_bytes(report.get("bytes", 0))
        lines.append(f"{label(version.name, version.digest)}  (rank {report.get('rank', 0)}, {size})")
    if len(active) > _MOST_ADAPTERS:
        lines.append(f"and {len(active) - _MOST_ADAPTERS} more")
    return lines or [
        "none yet: onebase adapters push FOLDER --name NAME --activate, or start with --adapter NAME=FOLDER"
    ]


def print_keys(console: Console, keys: Sequence[ApiKeyRecord]) -> None:
    """Print a line for each key, or a block where lines would not fit, without what is secret."""
    titles = ("id", "tenant", "scopes", "state", "expires", "last used", "quotas", "name")
    table = Table(*titles, box=None, pad_edge=False, header_style="bold")
    blocks = Table.grid(padding=(0, 2, 0, 0))
    now = time.time()
    for key in keys:
        state = "valid" if key.valid_at(now) else "revoked" if key.revoked_at is not None else "expired"
        times = (_day(key.expires_at), _day(key.last_used_at))
        limits = _quotas(key.quotas) + (f" priority={key.priority}" if key.priority else "")
        cells = (key.id, key.tenant, ",".join(key.scopes), state, *times, limits, key.name)
        table.add_row(*map(escape, cells))
        if blocks.row_count:
            blocks.add_row()
        for title, cell in zip(titles, cells, strict=True):
            blocks.add_row(f"[bold]{title}[/]", escape(cell))
    fits = table.__rich_measure__(console, console.options.update(max_width=10_000)).maximum <= console.width
    console.print(table if fits else blocks, highlight=False)


def print_tenants(console: Console, tenants: Sequence[TenantRecord]) -> None:
    """Print a line for each tenant: its quotas, and what it uses."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("tenant", "quotas", "adapters", "bytes", "jobs", "trained this month"):
        table.add_column(title, overflow="fold")
    for one in tenants:
        kept = (str(one.adapters), readable_bytes(one.bytes), str(one.jobs), _spent(one.training_seconds))
        table.add_row(*map(escape, (one.tenant, _quotas(one.quotas), *kept)))
    console.print(table, highlight=False)


def _quotas(quotas: Quotas) -> str:
    return ",".join(f"{name}={_limit(name, limit)}" for name, limit in quotas.given().items()) or "none"


def _limit(name: str, limit: int) -> str:
    """Return a limit as `--quota` takes it: in the largest unit of which it is a whole number."""
    for unit, size in _UNITS.get(name, ()):
        if limit and limit % size == 0:
            return f"{limit // size}{unit}"
    return str(limit)


def _spent(seconds: float) -> str:
    """`45 s`, `7 min`, `19 h 43 min`: as long as limits are given, not as many seconds."""
    minutes = int(seconds // 60)
    if not minutes:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _day(at: float | None) -> str:
    return "never" if at is None else time.strftime("%Y-%m-%d", time.gmtime(at))
