"""Everything a user can set about the server, once: its default, its help text, its limits.

A value comes from the command line, else from `ONEBASE_<NAME>`, else from the default here. No
other file reads these variables.
"""

# ruff: noqa: RUF009 - `setting` is dataclasses.field with a help text

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from onebase_engine.engine.messages import MAX_SLOTS

PREFIX_PART = 4
"""On a GPU, one part in this many of `--host-memory` is for prefixes that leave the KV cache."""
LISTENER = "ONEBASE_LISTEN_FD"
"""See `inherited_listener`."""
READY = "ONEBASE_READY_FD"
"""See `report_ready`."""
ENVIRONMENT_PREFIX = "ONEBASE_"
Quantization = Literal["nf4", "int8", "none"]
FloatType = Literal["bfloat16", "float16", "float32"]
Device = Literal["auto", "cuda", "cpu"]
CpuWeights = Literal["quantized", "bf16"]
KvDtype = Literal["auto", "int8"]
RawControlTokens = Literal["allow", "letters"]
PythonGraders = Literal["confined", "unconfined", "off"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
RequestLogMode = Literal["off", "hashes", "text"]
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_ORIGIN = re.compile(r"https?://[^/?#@\s]+", re.IGNORECASE)
_PAGE = re.compile(r"https?://[^/?#@\s]+(/\S*)?", re.IGNORECASE)
_DURATION = re.compile(r"(\d{1,6})([dhms])")
_SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


OTEL_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""OpenTelemetry's own variables. The setting is the name of one where that says where traces go."""


class SettingsError(ValueError):
    """A setting that cannot be used; the message names it and says what would be right."""


def parse_size(text: str) -> int:
    """Return bytes from text such as `2GB`, `512MiB` or `1000000`.

    Decimal suffixes (kB, MB, GB, TB) are powers of 1000 and binary ones (KiB, MiB, ...) of 1024.
    Raises SettingsError for anything else.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise SettingsError(f"{text!r} is not a size: write bytes or a suffix, as in 2GB or 512MiB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[prefix.lower()])


def parse_duration(text: str) -> float:
    """Return seconds from text such as `90d`, `12h`, `30m` or `45s`. Raises SettingsError for anything
    else."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise SettingsError(f"{text!r} is not a time: write days, hours or minutes, as in 90d, 12h or 30m")
    return int(match[1]) * _SECONDS[match[2]]


def parse_quotas(text: str) -> dict[str, int | None]:
    """`{"requests": 60, "sequences": None}` from `requests=60,sequences=none`.

    Bytes may have a suffix (10GB), training_seconds be a time (20h). Raises SettingsError for anything else;
    which names there are, the registry knows.
    """
    quotas: dict[str, int | None] = {}
    for part in text.split(","):
        name, _, limit = (piece.strip() for piece in part.partition("="))
        if name in quotas:
            raise SettingsError(f"{name} is given twice")
        try:
            quotas[name] = _quota(name, limit)
        except (ValueError, SettingsError):
            raise SettingsError(
                f"{part.strip()!r} is no quota: write NAME=LIMIT, a whole number or none, as in requests=60, "
                "bytes=10GB or training_seconds=20h"
            ) from None
    return quotas


def _quota(name: str, limit: str) -> int | None:
    if limit == "none":
        return None
    if name == "bytes":
        return parse_size(limit)
    if name == "training_seconds" and not limit.isdecimal():
        return int(parse_duration(limit))
    return int(limit)


def parse_bool(text: str) -> bool:
    """True for 1, true, yes, on; False for 0, false, no, off and the empty text."""
    lowered = text.strip().lower()
    if lowered in {"1", "true", "yes", "on"}:
        return True
    if lowered in {"0", "false", "no", "off", ""}:
        return False
    raise SettingsError(f"{text!r} is neither true nor false: write 1 or 0")


def parse_adapter(text: str) -> tuple[str, str]:
    """`(name, folder)` from `name=folder`."""
    name, separator, folder = text.partition("=")
    if not separator or not name or not folder:
        raise SettingsError(f"{text!r} is not NAME=FOLDER, as in --adapter support=./adapters/support")
    return name, folder


def parse_adapters(text: str) -> tuple[tuple[str, str], ...]:
    """Several `name=folder`, separated by commas (the environment's form)."""
    return tuple(parse_adapter(part.strip()) for part in text.split(",") if part.strip())


def parse_patterns(text: str) -> tuple[str, ...]:
    """Return patterns of `org/repo`, separated by commas."""
    patterns = tuple(part.strip() for part in text.split(",") if part.strip())
    for pattern in patterns:
        if pattern.count("/") != 1 or pattern.startswith("/") or pattern.endswith("/"):
            raise SettingsError(f"{pattern!r} is not ORG/REPO, as in --hub-allow 'acme/*'")
    return patterns


def parse_names(text: str) -> tuple[str, ...]:
    """Return names or addresses, separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_origins(text: str) -> tuple[str, ...]:
    """Return origins of web pages, separated by commas."""
    origins = parse_names(text)
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise SettingsError(f"{origin!r} is not SCHEME://HOST[:PORT], as in https://tools.example.com")
    return origins


def parse_page(text: str) -> str:
    """Address of a web page, or nothing."""
    if text and not _PAGE.fullmatch(text):
        raise SettingsError(f"{text!r} is not the address of a page, as in https://docs.example.com/onebase/")
    return text


def parse_addresses(text: str) -> tuple[str, ...]:
    """Return addresses or networks, separated by commas."""
    addresses = parse_names(text)
    for address in addresses:
        try:
            ipaddress.ip_network(address, strict=False)
        except ValueError as error:
            raise SettingsError(f"{address!r} is not an address, as in 10.0.0.7 or 10.0.0.0/24") from error
    return addresses


def is_loopback(host: str) -> bool:
    """Return True if only this machine reaches what listens on `host`."""
    address = ip_address(host)
    return host == "localhost" if address is None else address.is_loopback


def ip_address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the address, or None if the name is not one. What cannot be one is not parsed, since that is
    slow."""
    if ":" not in name and not name[-1:].isdigit():
        return None
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def default_data_dir(environ: Mapping[str, str]) -> Path:
    """onebase in $XDG_DATA_HOME, else in ~/.local/share; the XDG specification: ignore relative paths."""
    chosen = Path(environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser()
    return (chosen if chosen.is_absolute() else Path("~/.local/share").expanduser()) / "onebase"


def setting(
    default: Any,
    group: str,
    text: str,
    *,
    parse: Callable[[str], Any] | None = None,
    metavar: str | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """Return a field of Settings with its help on the command line, in its group, and its limits."""
    about = {"group": group, "help": text, "parse": parse, "metavar": metavar, "low": low, "high": high}
    return field(default=default, metadata=about)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One server's settings, checked. Sizes are bytes, times are seconds, lengths are tokens."""

    base: str = setting(
        "smollm2-135m-instruct",
        "base",
        "the base model: the default's name, org/repo[@revision] on the Hub, or a folder",
    )
    quantization: Quantization = setting("nf4", "base", "how the base's linear layers are stored")
    blocksize: int = setting(64, "base", "weights that share one scale (nf4)", low=32, high=4096)
    double_quant: bool = setting(True, "base", "quantize the scales as well (nf4): saves 0.4 bits a weight")
    compute_dtype: FloatType = setting("bfloat16", "base", "type in which 4-bit products are computed")
    dtype: FloatType = setting("bfloat16", "base", "type of what is not quantized, and of activations")
    device: Device = setting("auto", "base", "where the base lives; auto takes a GPU if there is one")

    host: str = setting(
        "127.0.0.1",
        "server",
        "address to listen on; 0.0.0.0 serves the whole network, to those who have an API key",
    )
    insecure: bool = setting(
        False,
        "server",
        "listen on another --host though there is no API key: whoever reaches it may do everything",
    )
    port: int = setting(8000, "server", "port to listen on; 0 takes any free one", low=0, high=65535)
    open_metrics: bool = setting(
        False,
        "server",
        "answer GET /metrics without an API key, for gateways and scrapers without one: whoever reaches "
        "the server reads the names of tenants and adapters there, and how much they are used",
    )
    log_level: LogLevel = setting("info", "server", "least important messages that are logged")
    log_format: LogFormat = setting(
        "text", "server", "how it logs: lines for people, or one JSON object a line"
    )
    otlp_endpoint: str = setting(
        "",
        "server",
        "send traces there by OTLP over HTTP, as in http://localhost:4318; by default where "
        "OTEL_EXPORTER_OTLP_ENDPOINT says, else nowhere",
        metavar="URL",
    )
    access_log: bool = setting(False, "server", "log one line per request")
    request_log: RequestLogMode = setting(
        "off",
        "server",
        "keep a log of requests for text: who asked which version, with hashes of prompts and answers, or "
        "with their text",
    )
    request_log_days: float = setting(
        30.0,
        "server",
        "days for which the log of requests is kept, unless a tenant's quota log_days is less",
        low=0.01,
        high=3650,
    )
    request_log_size: int = setting(
        256_000_000,
        "server",
        "largest log of requests of one tenant on this server, as in 1GB; the oldest are deleted first",
        parse=parse_size,
        metavar="SIZE",
        low=1_000_000,
    )
    docs_url: str = setting(
        "",
        "server",
        "where your users find these documents (`make docs` builds the site): the console links to it",
        parse=parse_page,
        metavar="URL",
    )
    drain_timeout: float = setting(
        120.0, "server", "seconds that running requests get to finish after SIGTERM", low=0, high=86400
    )
    stop_with_stdin: bool = setting(
        False, "server", "stop when standard input ends: for a program that starts the server through a pipe"
    )

    allowed_host: tuple[str, ...] = setting(
        (),
        "connections",
        "a name by which clients call this server (the Host header), besides localhost; may be repeated; "
        "'*' takes any, for a gateway that checks them",
        parse=parse_names,
        metavar="NAME",
    )
    allowed_origin: tuple[str, ...] = setting(
        (),
        "connections",
        "another site whose pages may use this server from a browser, as in https://tools.example.com; "
        "may be repeated",
        parse=parse_origins,
        metavar="ORIGIN",
    )
    trusted_proxy: tuple[str, ...] = setting(
        (),
        "connections",
        "address or network of a reverse proxy, besides loopback: its X-Forwarded-For is believed, and "
        "it may open any number of connections; may be repeated",
        parse=parse_addresses,
        metavar="ADDRESS",
    )
    max_connections: int = setting(
        4096,
        "connections",
        "connections at once; fewer where fewer files may be open (ulimit -n)",
        low=1,
        high=1_000_000,
    )
    max_connections_per_host: int = setting(
        256,
        "connections",
        "connections at once from one address (IPv6: one /64), but for loopback and --trusted-proxy",
        low=1,
        high=1_000_000,
    )
    max_header: int = setting(
        64 << 10,
        "connections",
        "size of a request's address and headers, as in 64KiB",
        parse=parse_size,
        metavar="SIZE",
        low=1000,
        high=16 << 20,
    )
    max_header_lines: int = setting(200, "connections", "headers of one request", low=10, high=10_000)
    header_timeout: float = setting(
        20.0, "connections", "seconds that a request's headers may take to arrive", low=0.1, high=3600
    )
    body_timeout: float = setting(
        30.0,
        "connections",
        "seconds in which a body must bring its share of --min-body-rate",
        low=0.1,
        high=3600,
    )
    min_body_rate: int = setting(
        1000,
        "connections",
        "bytes a second that a body must bring while it is read, over each --body-timeout",
        parse=parse_size,
        metavar="SIZE",
        low=1,
    )
    keep_alive_timeout: float = setting(
        20.0, "connections", "seconds that a connection may wait for its next request", low=0.1, high=86400
    )
    write_timeout: float = setting(
        30.0,
        "connections",
        "seconds in which a client must read something of what waits for it, or it is cut off",
        low=0.1,
        high=86400,
    )

    adapter: tuple[tuple[str, str], ...] = setting(
        (),
        "adapters",
        "serve the PEFT folder under this name; may be repeated",
        parse=parse_adapters,
        metavar="NAME=FOLDER",
    )
    adapters_dir: str = setting(
        "",
        "adapters",
        "serve each subfolder that holds an adapter_config.json, under the subfolder's name",
        metavar="DIR",
    )
    max_slots: int = setting(
        0,
        "adapters",
        f"adapters in slots, which one step can use; 0: as many as --max-sequences, up to {MAX_SLOTS:,}, "
        "on a GPU within --slot-memory, else at least 16",
        low=0,
        high=MAX_SLOTS,
    )
    slot_memory: int = setting(
        0,
        "adapters",
        "bytes of adapters in slots, as in 2GB; 0: on a GPU a quarter of what is free, else no limit",
        parse=parse_size,
        metavar="SIZE",
        low=0,
    )
    max_rank: int = setting(256, "adapters", "highest rank of an adapter", low=1, high=1024)
    host_memory: int = setting(
        0,
        "adapters",
        "host memory for adapters, as in 8GB, and on a GPU a quarter of it for prefixes that leave the "
        "KV cache; 0 takes a quarter of the machine's memory",
        parse=parse_size,
        metavar="SIZE",
        low=0,
    )
    hub_allow: tuple[str, ...] = setting(
        (),
        "adapters",
        "Hub repositories that requests may name (hub:org/repo) to be pulled on first use, as in "
        "'org/*'; may be repeated",
        parse=parse_patterns,
        metavar="PATTERN",
    )
    max_upload: int = setting(
        2_000_000_000,
        "adapters",
        "largest adapter that is taken, as in 2GB",
        parse=parse_size,
        metavar="SIZE",
        low=1000,
    )
    signatures: str = setting(
        "",
        "adapters",
        "JSON file that says who may sign which adapters, and where a signature is required",
        metavar="FILE",
    )
    sigstore_root: str = setting(
        "",
        "adapters",
        "Sigstore's trusted root (JSON), by which signatures without a key are verified; nothing is fetched",
        metavar="FILE",
    )
    signing_key: str = setting(
        "",
        "adapters",
        "private key (PEM, P-256) to sign trained versions with, made if it is not there; its public key is "
        "FILE.pub",
        metavar="FILE",
    )
    proof_timeout: float = setting(
        600.0, "adapters", "seconds that proving one adapter may take", low=1, high=86400, metavar="SECONDS"
    )
    data_dir: str = setting(
        "",
        "adapters",
        "where adapters are kept; by default onebase in $XDG_DATA_HOME or ~/.local/share",
        metavar="DIR",
    )
    store: str = setting(
        "",
        "adapters",
        "place of the adapters' files: a folder or an fsspec URL, as in s3://bucket/path; by default "
        "store in the data folder",
        metavar="URL",
    )
    registry: str = setting(
        "",
        "adapters",
        "database of names and versions, as in postgresql://host/name; by default a SQLite file "
        "in the data folder",
        metavar="URL",
    )
    sync_seconds: float = setting(
        1.0,
        "adapters",
        "seconds between two looks at what other servers changed in the registry, if it does not tell",
        low=0.05,
        high=3600,
    )

    max_sequences: int = setting(64, "engine", "sequences that are decoded in one step", low=1, high=4096)
    max_length: int = setting(
        0, "engine", "longest prompt plus completion, in tokens; 0 takes the base's own", low=0
    )
    step_tokens: int = setting(0, "engine", "tokens in one step; 0 chooses by device", low=0)
    cpu_weights: CpuWeights = setting(
        "quantized",
        "engine",
        "on a CPU, 4-bit weights are unpacked in each step (quantized), or once (bf16), which takes four "
        "times their memory more; answers stay the same",
    )
    draft_tokens: int = setting(
        7,
        "engine",
        "draft tokens of one sequence in one step, from its own earlier text, where that is "
        "faster; answers stay the same; 0: none",
        low=0,
        high=64,
    )
    kv_memory: int = setting(
        0,
        "engine",
        "size of the KV cache, as in 2GB; 0 takes what is free",
        parse=parse_size,
        metavar="SIZE",
        low=0,
    )
    kv_dtype: KvDtype = setting(
        "auto",
        "engine",
        "type of keys and values in the KV cache: --dtype (auto), or int8, which holds nearly twice the "
        "tokens in the same memory and changes answers a little",
    )
    train_memory: int = setting(
        0,
        "engine",
        "memory that training jobs may take and the KV cache leaves free, as in 8GB; 0: on a CPU half of "
        "what is free when a job begins, on a GPU what the default recipe takes with rows of 1,024 tokens",
        parse=parse_size,
        metavar="SIZE",
        low=0,
    )
    threads: int = setting(0, "engine", "CPU threads of the engine; 0 takes every core", low=0, high=1024)
    deterministic: bool = setting(False, "engine", "on CUDA, the same bits whatever else is in the batch")

    train_jobs: int = setting(
        1, "training", "jobs that run at once; 0: this server trains nothing", low=0, high=64
    )
    train_share: float = setting(
        0.2,
        "training",
        "part of the time in which a job computes while sequences run, 0 to 1 (on a CPU of each core, and at "
        "most a half); 0: only when there are none. When the server is idle, it takes all",
        low=0,
        high=1,
        metavar="PART",
    )
    python_graders: PythonGraders = setting(
        "confined",
        "training",
        "graders in Python, which tenants send: confined: run where the kernel can confine them; unconfined: "
        "also where it cannot; off: refused",
    )
    max_train_file: int = setting(
        512_000_000,
        "training",
        "largest file of a job or a batch that is taken, as in 512MB",
        parse=parse_size,
        metavar="SIZE",
        low=1000,
    )

    batch_requests: int = setting(
        0,
        "limits",
        "requests of batches that are answered at once, where nothing else needs the place; 0: as many "
        "as there are places (--max-sequences)",
        low=0,
        high=4096,
    )
    queue_limit: int = setting(
        256,
        "limits",
        "sequences that may wait for their turn; beyond that requests get status 429",
        low=0,
        high=1_000_000,
    )
    stall_timeout: float = setting(
        60.0, "limits", "seconds without progress after which the engine is restarted", low=0.1, high=86400
    )
    max_body: int = setting(
        2_000_000,
        "limits",
        "largest JSON body, as in 2MB; files have their own",
        parse=parse_size,
        metavar="SIZE",
        low=1000,
    )
    max_choices: int = setting(
        128, "limits", "most completions of one request (n times its prompts)", low=1, high=4096
    )
    max_timeout: float = setting(
        3600.0, "limits", "seconds after which any request is ended", low=1, high=7 * 86400
    )
    response_memory: int = setting(
        64_000_000,
        "limits",
        "responses of /v1/responses that are kept in memory to be gone on from, of all tenants together, "
        "as in 64MB; 0 keeps none",
        parse=parse_size,
        metavar="SIZE",
        low=0,
    )
    raw_control_tokens: RawControlTokens = setting(
        "allow",
        "limits",
        "what <|im_end|> and the like are in the text of a plain prompt: control tokens (allow), or text "
        "(letters). In messages they are always text",
    )
    stream_buffer: int = setting(
        1024,
        "limits",
        "outputs per choice kept for a slow reader before it is cut off",
        low=1,
        high=1_000_000,
    )

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):
            _check(item, getattr(self, item.name), hints[item.name])


def _check(item: Field[Any], value: Any, kind: Any) -> None:
    flag = option_name(item.name)
    choices = get_args(kind) if getattr(kind, "__origin__", None) is Literal else ()
    if choices and value not in choices:
        raise SettingsError(f"{flag} is {value!r}: choose one of {', '.join(choices)}")
    low, high = item.metadata["low"], item.metadata["high"]
    if low is not None and not value >= low:
        raise SettingsError(f"{flag} is {value}: the lowest value is {low}")
    if high is not None and not value <= high:
        raise SettingsError(f"{flag} is {value}: the highest value is {high}")


def option_name(name: str) -> str:
    """Return the command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def inherited_listener() -> int | None:
    """Return the descriptor of a socket that listens on `host` and `port` already, which whoever has started
    this process holds, so that nobody else can be there before it. Given once: no child of this process has
    it."""
    given = os.environ.pop(LISTENER, "")
    return int(given) if given.isdecimal() else None


def report_ready() -> None:
    """Report to whoever has started this process, on the descriptor that it gave, if any, that it serves now.
    Others may answer at the same address, so that asking there would not show it."""
    given = os.environ.pop(READY, "")
    if given.isdecimal():
        with os.fdopen(int(given), "wb") as started_by:
            started_by.write(b"1")


def environment_name(name: str) -> str:
    """Return the environment variable of a setting."""
    return ENVIRONMENT_PREFIX + name.upper()


def in_environment(name: str) -> bool:
    """Return True if the environment has a value for the setting."""
    return environment_name(name) in os.environ


def setting_fields() -> Iterator[tuple[Field[Any], Any]]:
    """Yield each field of Settings with its type, in the order of the help text."""
    hints = get_type_hints(Settings)
    for item in fields(Settings):
        yield item, hints[item.name]


def load_settings(options: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Settings:
    """Return the settings from command-line options (by field name; None is "not given") and the environment.

    Raises SettingsError naming the option or variable that cannot be used.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    for item, kind in setting_fields():
        given = options.get(item.name)
        if given is not None:
            values[item.name] = given
            continue
        text = environ.get(environment_name(item.name))
        if text is not None:
            values[item.name] = _parse(item, kind, text)
    if not values.get("otlp_endpoint") and environ.get("OTEL_SDK_DISABLED", "").lower() != "true":
        values["otlp_endpoint"] = next((name for name in OTEL_ENDPOINTS if environ.get(name)), "")
    if not values.get("data_dir"):
        values["data_dir"] = str(default_data_dir(environ))
    return Settings(**values)


def _parse(item: Field[Any], kind: Any, text: str) -> Any:
    plain: dict[Any, Callable[[str], Any]] = {bool: parse_bool, int: int, float: float}
    parse = item.metadata["parse"] or plain.get(kind, str)
    try:
        return parse(text)
    except ValueError as error:
        raise SettingsError(f"{environment_name(item.name)}: {error}") from error
