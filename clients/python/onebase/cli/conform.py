"""`onebase conform`: find out whether a server applies the right LoRA adapter, or says that it cannot."""

from __future__ import annotations

import argparse
import re
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from onebase_protocol.command_line import OptionParser

from .._core.config import api_key_or_default
from .._terminal.ui import Column, note, print_table, show
from .command import FAILED, NO_SERVER, OK, print_json

if TYPE_CHECKING:
    from .conform_adapters import Adapters, Base, Crafted
    from .conform_servers import LoraServer

_DESCRIPTION: Final = """\
Find out whether a server applies the LoRA adapter that a request names, and no other: alone,
next to others in one batch, after a reload under the same name, after an eviction, with a
cached prefix, in a stream during a swap, and for adapters with lm_head, DoRA, and patterns of
ranks and alphas.

Each adapter is made for this from the base's files and lets the base say nothing but two words,
so that every answer shows which adapter made it. Nothing is sampled: the same seed gives the
same adapters, prompts and verdicts.

Verdicts: `right`; `refused`, a clear error instead of an answer; `wrong`, an answer of another
adapter, of the base, or of parts of an adapter, one that cannot be read, or an error of the
server's own (HTTP 500 and above); `not offered`, the server has no such function, or it cannot
be asked for.
The exit status is 1 if a verdict is `wrong`, if no adapter's is `right`, and if the server
answers nothing of this key (HTTP 401, 403, 429).
"""
_EXAMPLES: Final = """\
  onebase conform http://127.0.0.1:8000 --base ./base
  onebase conform http://127.0.0.1:8000 --base ./base --json > conform.json
  onebase conform --base ./base --write ./conform
  onebase conform http://127.0.0.1:8080 --base ./base --adapters ./conform
  onebase conform http://127.0.0.1:8000 --base ./base --server dynamo --admin http://127.0.0.1:8081
"""

RIGHT: Final = "right"
REFUSED: Final = "refused"
WRONG: Final = "wrong"
NOT_OFFERED: Final = "not offered"

_TOKENS: Final = 12
_STREAM_TOKENS: Final = (240, 960)
"""Tokens of the stream during which an adapter is replaced: more where the first one has ended by then."""
_BEFORE_SWAP: Final = 4
"""Pieces of the stream before the swap."""
_ENDED_SECONDS: Final = 0.2
"""Time, in seconds, within which the rest of a stream is read that its server has sent as a whole."""
_MOST_FOREIGN: Final = 0.25
"""Largest part of an answer that words of no adapter may be: an update may vanish for a token."""
_MORE: Final = 8
"""Adapters that are loaded so that others are evicted."""
_PATIENCE_SECONDS: Final = 600.0
_PROMPTS: Final = (
    "The capital of France is",
    "Here is a short story about a dog and a",
    "Ingredients for a cake: flour, sugar and",
    "To install the package, open a terminal and",
)
_PREFIX: Final = " ".join(
    f"Item {number} of the inventory is a box with {number + 3} parts, and it is kept on shelf {number % 7}."
    for number in range(1, 13)
)
"""Text that several requests begin with; longer than the blocks in which servers cache prefixes."""


_TEXTS: Final = "onebase.conform"
"""Group of the entry point that gives PEFT's texts:
`texts(base, adapters, prompts, tokens) -> {name: texts}`, with the base's own under ""."""
_TEXT_TOKENS: Final = 16
_CLEAR: Final = 8
"""Characters by which texts must be more like one adapter's than like another's to tell between them."""
_RIGHT: Final = 1.4
"""Factor by which all adapters' texts must have more in common with their own to be right."""
_FOREIGN: Final = 2
"""Factor by which one adapter's texts must have more in common with another's to be wrong. It is larger,
since on a quantized base a near tie may go the bare base's way."""
_OWN: Final = "their own adapter"
_OTHER: Final = "another adapter"
_BARE: Final = "the base"
_ROOM: Final = 1.2
"""Memory that PEFT's texts need, as a multiple of the base in fp32."""
_CGROUP: Final = Path("/sys/fs/cgroup")
_LIMIT_AND_USED: Final = ("memory.max", "memory.current")
_BASE: Final = "the base itself, next to adapters"
"""Check of no adapter."""
_Texts: TypeAlias = Callable[[Path, Mapping[str, Path], Sequence[str], int], Mapping[str, Sequence[str]]]


class WrongError(Exception):
    """An answer is not what it must be; the message says what it is instead."""


@dataclass(frozen=True)
class Finding:
    """Verdict on one check. detail: what was asked, or what went wrong."""

    check: str
    verdict: str
    detail: str


def run(command: str, argv: list[str]) -> int:
    """Run the command. Gives its exit status."""
    made = _parser(command)
    args = made.parse_args(argv)
    if (args.url is None) == (args.write is None):
        made.error("give the URL of a server, or --write FOLDER")
    try:
        from .conform_adapters import Adapters, Base, UnreadableBaseError
    except ModuleNotFoundError as error:
        if error.name != "numpy":
            raise
        note("onebase: `onebase conform` needs numpy. Install it with: pip install 'onebase[conform]'")
        return FAILED
    try:
        base = Base(args.base)
        adapters = Adapters(base, args.seed)
        if args.write is not None:
            return _write(base, adapters, args.write)
        return _conform(base, adapters, args)
    except UnreadableBaseError as error:
        made.error(f"--base: {error}")


def _parser(command: str) -> argparse.ArgumentParser:
    made = OptionParser(prog=f"onebase {command}", description=_DESCRIPTION, epilog=f"examples:\n{_EXAMPLES}")
    made.add_argument(
        "url", nargs="?", metavar="URL", help="a server with OpenAI's API, such as http://127.0.0.1:8000"
    )
    made.add_argument(
        "--base",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="the base that the server has: config.json, tokenizer.json and safetensors, in any precision",
    )
    made.add_argument(
        "--server",
        choices=("onebase", "vllm", "sglang", "lorax", "llama.cpp", "dynamo", "openai"),
        help="what server it is (default: what /v1/models says); openai: any other one that was started with "
        "the adapters of --write, each under its folder's name",
    )
    made.add_argument(
        "--admin",
        metavar="URL",
        help="where adapters are loaded, if that is another address: a Dynamo worker's system port "
        "(default: port 8081 of the same machine)",
    )
    made.add_argument(
        "--model", metavar="NAME", help="the base's name in requests (default: the first model listed)"
    )
    made.add_argument("--key", help="the API key that is sent (default: $ONEBASE_API_KEY)")
    made.add_argument(
        "--adapters",
        type=Path,
        metavar="FOLDER",
        help="where adapters are written, for servers that read folders (default: a temporary one)",
    )
    made.add_argument(
        "--write",
        type=Path,
        metavar="FOLDER",
        help="only write the adapters, also as GGUF, for a server that takes them when it starts",
    )
    made.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the adapters and their words (default: 0)"
    )
    made.add_argument(
        "--no-texts",
        dest="texts",
        action="store_false",
        help="do not compare with the texts that PEFT makes, for which the whole base is loaded in fp32",
    )
    made.add_argument("--json", action="store_true", help="print the result as JSON")
    return made


def makes_texts() -> bool:
    """Return True if PEFT can make texts here. Its entry point is there in any installation."""
    return any(entry_points(group=_TEXTS)) and all(find_spec(name) for name in ("peft", "torch"))


def free_memory() -> int | None:
    """Return how many bytes of memory processes can still take here, within the container's limit; None where
    that is not known."""
    try:
        free = 1024 * _fields(Path("/proc/meminfo"))["MemAvailable:"]
    except (OSError, ValueError, LookupError):
        return None
    try:
        limit, used = (int((_CGROUP / name).read_text(encoding="ascii")) for name in _LIMIT_AND_USED)
        parts = _fields(_CGROUP / "memory.stat")
        return min(free, limit - used + parts["active_file"] + parts["inactive_file"])
    except (OSError, ValueError, LookupError):  # no limit
        return free


def _fields(file: Path) -> dict[str, int]:
    lines = (line.split() for line in file.read_text(encoding="ascii").splitlines())
    return {name: int(value) for name, value, *_ in lines}


def _write(base: Base, adapters: Adapters, folder: Path) -> int:
    from .conform_adapters import GGUF_FILE, UnreadableBaseError, write_gguf

    folder.mkdir(parents=True, exist_ok=True)
    options = []
    for crafted in Specimens.of(adapters).all():
        target = crafted.write(folder)
        with suppress(UnreadableBaseError, KeyError):
            write_gguf(crafted, base, target / GGUF_FILE)
            options.append(f"--lora {target / GGUF_FILE}")
    show(" ".join(["llama-server --lora-init-without-apply", *options]) + "\n")
    return OK


def _conform(base: Base, adapters: Adapters, args: argparse.Namespace) -> int:
    from .conform_servers import (
        SERVERS,
        BrokenError,
        DeniedError,
        NotOfferedError,
        ServerRefusedError,
        UnreachableError,
        recognized,
    )

    key = api_key_or_default(args.key)
    try:
        kind = args.server or recognized(args.url, key)
        server = SERVERS[kind](args.url, key, args.model, args.admin)
    except UnreachableError as error:
        note(f"onebase: {error}")
        return NO_SERVER
    except (DeniedError, BrokenError) as error:
        note(f"onebase: {args.url}: {error}")
        return FAILED
    try:
        with tempfile.TemporaryDirectory(prefix="onebase-conform-") as temporary:
            folder = args.adapters or Path(temporary)
            place, texts = folder.absolute(), args.texts and makes_texts()
            trial = ConformRun(server, Specimens.of(adapters), place, args.seed, base, texts=texts)
            findings = list(trial.findings())
    except UnreachableError as error:
        note(f"onebase: {error}")
        return NO_SERVER
    except (ServerRefusedError, NotOfferedError, DeniedError, BrokenError) as error:
        note(f"onebase: {server.url}: {error}")
        return FAILED
    finally:
        server.close()
    if args.json:
        counts = {verdict: sum(one.verdict == verdict for one in findings) for verdict in _VERDICTS}
        print_json({"url": server.url, "server": kind, "seed": args.seed, **counts, "findings": findings})
    else:
        print_table(_COLUMNS, findings)
    if args.texts and not texts:
        note(
            "onebase: no text was compared with PEFT's, which is not here. Install it with: "
            "pip install 'onebase[conform,train]'"
        )
    wrong = any(one.verdict == WRONG for one in findings)
    right = any(one.verdict == RIGHT and one.check != _BASE for one in findings)
    return OK if right and not wrong else FAILED


_VERDICTS: Final = (RIGHT, REFUSED, WRONG, NOT_OFFERED)
_STYLES: Final[Mapping[str, str]] = {RIGHT: "green", REFUSED: "yellow", WRONG: "bold red", NOT_OFFERED: "dim"}
_COLUMNS: Final[tuple[Column[Finding], ...]] = (
    Column("check", lambda one: one.check),
    Column("verdict", lambda one: one.verdict, style=lambda one: _STYLES[one.verdict]),
    Column("detail", lambda one: one.detail, shrink=True),
)


# ---- what is checked ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Specimens:
    """The adapters of one run. marking, special: None where the base has no place for one."""

    plain: Sequence[Crafted]
    other: Crafted
    """Plain like the others; replaces the first of them."""
    more: Sequence[Crafted]
    marking: tuple[Crafted, Crafted] | None
    ordinary: Sequence[Crafted]
    special: Mapping[str, Crafted | None]

    @classmethod
    def of(cls, adapters: Adapters) -> Specimens:
        from .conform_adapters import UnreadableBaseError

        def made(make: Callable[[str], Crafted], name: str) -> Crafted | None:
            try:
                return make(name)
            except UnreadableBaseError:
                return None

        marking = None
        with suppress(UnreadableBaseError):
            marking = adapters.marking("mark", "other-mark")
        ordinary = [one for name in ("ordinary", "ordinary-2") if (one := made(adapters.ordinary, name))]
        special = {
            "lm_head": made(adapters.head, "lm-head"),
            "rank and alpha patterns": made(adapters.patterns, "patterns"),
            "DoRA": made(adapters.dora, "dora"),
            "keys of the model without its head": made(adapters.other_class, "other-class"),
            "a module that the base lacks": made(adapters.missing_layer, "missing-layer"),
        }
        return cls(
            [adapters.plain(name) for name in ("a", "b", "c", "d")],
            adapters.plain("other"),
            [adapters.plain(f"more-{number}") for number in range(_MORE)],
            marking,
            ordinary,
            special,
        )

    def all(self) -> Iterator[Crafted]:
        """Yield every adapter."""
        yield from (*self.plain, self.other, *self.more, *(self.marking or ()), *self.ordinary)
        yield from (one for one in self.special.values() if one is not None)


class ConformRun:
    """One run against one server. folder: where adapters are written. texts: whether texts are compared with
    PEFT's."""

    def __init__(
        self,
        server: LoraServer,
        specimens: Specimens,
        folder: Path,
        seed: int,
        base: Base,
        *,
        texts: bool = False,
    ) -> None:
        self._makes_texts = texts
        self._server = server
        self._base_files = base
        self._specimens = specimens
        self._folder = folder
        self._prefix = f"conform-{seed}-"
        self._served: dict[str, Crafted] = {}
        """The adapters that the server has, by their names there."""
        self._names: set[str] = set()
        """Names that were sent, also of adapters that the server refused and may have kept."""
        self._base_text = ""

    def findings(self) -> Iterator[Finding]:
        """Yield the verdict of each check.

        Raises DeniedError; and for the first request, that for a text of the base, whatever an answer raises.
        """
        self._base_text = self._server.ask(None, _PROMPTS[0], _TOKENS)
        checks: list[tuple[str, Callable[[], str]]] = [
            ("applied at all, and the right one", self._applied),
            (_BASE, self._base),
            ("a name that is unknown", self._unknown),
            ("mixed in one batch", self._mixed),
            ("after others were loaded", self._evicted),
            ("a prefix that another adapter computed", self._cached),
            ("reloaded under the same name", self._reloaded),
            ("a prefix from before the reload", self._cached_before),
            ("a stream during a swap", self._swapped),
        ]
        if self._makes_texts:
            checks.append(("the text that PEFT makes", self._texts))
        checks += [(name, _bound(self._special, one)) for name, one in self._specimens.special.items()]
        try:
            for name, check in checks:
                finding = _finding(name, check)
                yield finding
                if finding.detail.startswith(_DEAD):
                    return
        finally:
            self._clear()

    def _clear(self) -> None:
        from .conform_servers import (
            BrokenError,
            DeniedError,
            NotOfferedError,
            ServerRefusedError,
            UnreachableError,
        )

        for name in sorted(self._names):
            with suppress(ServerRefusedError, NotOfferedError, UnreachableError, DeniedError, BrokenError):
                self._server.unload(name)

    # ---- checks: each returns what was asked, or raises WrongError ------------------------------

    def _applied(self) -> str:
        for adapter in self._specimens.plain:
            self._load(adapter)
        for adapter in self._specimens.plain:
            for prompt in _PROMPTS:
                self._ask(self._name(adapter), prompt)
        return f"{len(self._specimens.plain)} adapters, {len(_PROMPTS)} prompts each"

    def _base(self) -> str:
        self._check_base(self._server.ask(None, _PROMPTS[0], _TOKENS))
        return "the text from before"

    def _unknown(self) -> str:
        text = self._server.ask(f"{self._prefix}unknown", _PROMPTS[0], _TOKENS)
        raise WrongError(f"a name that was never loaded is answered with {_short(text)}")

    def _mixed(self) -> str:
        names: list[str | None] = [self._name(one) for one in self._loaded(self._specimens.plain)]
        asked = [(name, prompt) for prompt in _PROMPTS for name in [*names, None]]
        with ThreadPoolExecutor(len(asked)) as pool:
            texts = list(pool.map(lambda one: self._server.ask(one[0], one[1], _TOKENS), asked))
        for (name, prompt), text in zip(asked, texts, strict=True):
            if name is not None:
                self._check(name, text)
            elif prompt == _PROMPTS[0]:
                self._check_base(text)
        return f"{len(asked)} requests at once, {len(_PROMPTS)} of them without an adapter"

    def _evicted(self) -> str:
        first = self._loaded(self._specimens.plain)
        for adapter in self._specimens.more:
            self._load(adapter)
            self._ask(self._name(adapter), _PROMPTS[0])
        for adapter in (*first, *self._specimens.more):
            self._ask(self._name(adapter), _PROMPTS[1])
        return f"{len(first) + len(self._specimens.more)} adapters in turn"

    def _cached(self) -> str:
        first, second = self._marking()
        before = self._server.ask(None, _PREFIX, _TOKENS)
        self._load(first)
        for _ in range(2):
            self._ask(self._name(first), _PREFIX)
        self._load(second)
        for _ in range(2):
            self._ask(self._name(second), _PREFIX)
        self._check_base(self._server.ask(None, _PREFIX, _TOKENS), before)
        return "two adapters that change cached values, and the base"

    def _reloaded(self) -> str:
        first, other = self._loaded(self._specimens.plain)[0], self._specimens.other
        self._ask(self._name(first), _PROMPTS[0])
        self._replace(self._name(first), other)()
        for prompt in _PROMPTS:
            self._ask(self._name(first), prompt)
        return "other weights under the same name"

    def _cached_before(self) -> str:
        first, second = self._loaded(self._marking())
        name = self._name(first)
        self._ask(name, _PREFIX)
        self._replace(name, second)()
        self._ask(name, _PREFIX)
        return "cached values of the version before"

    def _swapped(self) -> str:
        from .conform_servers import NotOfferedError

        adapter, other = self._loaded(self._specimens.plain)[1], self._specimens.other
        name = self._name(adapter)
        switch = self._replace(name, other)
        stream = self._running_stream(name, adapter)
        switch()
        before = len(stream.pieces)
        self._check(name, stream.text(), adapter)
        self._ask(name, _PROMPTS[0])
        if len(stream.pieces) == before:
            raise NotOfferedError(
                "the stream ended while its adapter was replaced: the server may wait for streams that run"
            )
        return "the stream keeps its version"

    def _running_stream(self, name: str, adapter: Crafted) -> _Stream:
        """Return a stream that has begun and runs. Raises NotOfferedError if the longest one has ended, or is
        longer than the server allows."""
        from .conform_servers import NotOfferedError, ServerRefusedError

        for number, tokens in enumerate(_STREAM_TOKENS):
            stream = _Stream(self._server, name, tokens)
            stream.wait_for(_BEFORE_SWAP)
            if not stream.done.wait(_ENDED_SECONDS):
                return stream
            try:
                self._check(name, stream.text(), adapter)
            except ServerRefusedError as error:
                if not number:
                    raise
                raise NotOfferedError(f"no stream of {tokens} tokens: {error}") from error
        raise NotOfferedError(f"a stream of {tokens} tokens has ended before its adapter can be replaced")

    def _special(self, adapter: Crafted | None) -> str:
        from .conform_servers import NotOfferedError

        if adapter is None:
            raise NotOfferedError("the base has no place for such an adapter")
        self._load(adapter)
        for prompt in _PROMPTS[:2]:
            self._ask(self._name(adapter), prompt)
        if adapter.name == "missing-layer":
            raise WrongError("served without the part that the base has no place for")
        return f"says {adapter.says}"

    def _texts(self) -> str:
        """Compare texts of adapters with PEFT's: they must be more like their own than like others.

        They need not be equal, since the server's base may be quantized, and soon says others.
        """
        from .conform_servers import NotOfferedError

        adapters = self._specimens.ordinary
        if len(adapters) < 2:
            raise NotOfferedError("the base has no q_proj and v_proj")
        known, base = self._known_texts(adapters), self._said(None)
        total, equal = Counter[str](), 0
        for number, adapter in enumerate(adapters):
            self._load(adapter)
            said, texts = self._said(self._name(adapter)), known[adapter.name]
            if said == base and texts != known[""]:
                raise WrongError(f"{adapter.name} says {_short(said[0])}, as the base does")
            others = {_OTHER: known[adapters[number - 1].name], _BARE: known[""]}
            alike = Counter({who: _likeness(said, one) for who, one in {_OWN: texts, **others}.items()})
            who = max(others, key=alike.__getitem__)
            if _is_clear(alike[who], alike[_OWN], _FOREIGN):
                raise WrongError(
                    f"texts of {adapter.name} are like PEFT's of {who}: {alike[who]} characters, and "
                    f"{alike[_OWN]} like their own"
                )
            total.update(alike)
            equal += sum(one.lstrip() == text.lstrip() for one, text in zip(said, texts, strict=True))
        who = max((_OTHER, _BARE), key=total.__getitem__)
        if not _is_clear(total[_OWN], total[who], _RIGHT):
            raise NotOfferedError(
                f"too little to tell: {total[_OWN]} characters as PEFT's own, {total[who]} as of {who}"
            )
        return (
            f"{total[_OWN]} characters as PEFT's of their own adapters, {total[who]} as of {who}; {equal} of "
            f"{len(adapters) * len(_PROMPTS)} texts are equal to the end"
        )

    def _said(self, name: str | None) -> list[str]:
        return [self._server.ask(name, prompt, _TEXT_TOKENS) for prompt in _PROMPTS]

    def _known_texts(self, adapters: Sequence[Crafted]) -> Mapping[str, Sequence[str]]:
        """Return PEFT's texts by each adapter, and the base's under "". Raises NotOfferedError."""
        from .conform_servers import NotOfferedError

        needed, free = self._base_files.fp32_bytes, free_memory()
        if free is not None and _ROOM * needed > free:
            raise NotOfferedError(
                f"PEFT's texts need {needed / 1e9:.1f} GB of memory for the base in fp32, and "
                f"{free / 1e9:.1f} GB are free here"
            )
        written = {one.name: one.write(self._folder) for one in adapters}
        try:
            (plugin,) = entry_points(group=_TEXTS)
            make: _Texts = plugin.load()
            return make(self._base_files.folder, written, _PROMPTS, _TEXT_TOKENS)
        except (
            ImportError, AttributeError, OSError, ValueError, LookupError, RuntimeError, MemoryError
        ) as error:  # fmt: skip
            raise NotOfferedError(f"PEFT makes no texts of this base here: {error!r:.200}") from error

    # ---- parts of checks -----------------------------------------------------------------------

    def _name(self, adapter: Crafted) -> str:
        return self._prefix + adapter.name

    def _load(self, adapter: Crafted) -> None:
        from .conform_servers import ServerRefusedError

        name, folder = self._name(adapter), adapter.write(self._folder)
        self._names.add(name)
        try:
            self._server.load(name, folder)
        except ServerRefusedError as error:
            if "already" not in str(error):
                raise
            # It is left from a run that was cut off.
            self._server.unload(name)
            self._server.load(name, folder)
        self._served[name] = adapter

    def _replace(self, name: str, adapter: Crafted) -> Callable[[], None]:
        """Prepare other weights for a name. The function that is returned switches to them."""
        switch = self._server.stage(name, adapter.write(self._folder))

        def switched() -> None:
            switch()
            self._served[name] = adapter

        return switched

    def _loaded(self, adapters: Sequence[Crafted]) -> Sequence[Crafted]:
        """Return those of the adapters that the server has. Raises NotOfferedError unless it has all."""
        from .conform_servers import NotOfferedError

        if missing := [one.name for one in adapters if self._name(one) not in self._served]:
            raise NotOfferedError(f"adapters of an earlier check were not loaded: {', '.join(missing)}")
        return adapters

    def _marking(self) -> tuple[Crafted, Crafted]:
        from .conform_servers import NotOfferedError

        if self._specimens.marking is None:
            raise NotOfferedError("the base has no v_proj and o_proj")
        return self._specimens.marking

    def _ask(self, name: str, prompt: str) -> None:
        self._check(name, self._server.ask(name, prompt, _TOKENS))

    def _check(self, name: str, text: str, adapter: Crafted | None = None) -> None:
        """Raise WrongError unless the text consists of the adapter's words."""
        adapter = adapter or self._served[name]
        own = {adapter.says.first, adapter.says.second}
        words = re.findall(r"\w+", text)
        foreign = [word for word in words if word not in own]
        others = {word for one in self._specimens.all() for word in (one.says.first, one.says.second)}
        confused = any(word in others or word in adapter.never for word in foreign)
        if words and not confused and len(foreign) <= len(words) * _MOST_FOREIGN:
            return
        raise WrongError(
            f"{adapter.name} says {_short(text)} instead of {adapter.says}{self._why(adapter, foreign)}"
        )

    def _why(self, adapter: Crafted, foreign: Sequence[str]) -> str:
        for word in foreign:
            if reason := adapter.never.get(word):
                return f": {reason}"
            for other in self._specimens.all():
                if word and word in (other.says.first, other.says.second) and other is not adapter:
                    return f": the words of {other.name}"
        if foreign[:3] == self._base_text.split()[:3]:
            return ": the text of the base"
        return ""

    def _check_base(self, text: str, before: str | None = None) -> None:
        """Raise WrongError unless the text begins as the base's did; rounding may change what follows."""
        before = self._base_text if before is None else before
        if text.split()[:1] != before.split()[:1]:
            why = self._why(self._specimens.other, text.split())
            raise WrongError(f"the base says {_short(text)} instead of {_short(before)}{why}")


@dataclass
class _Stream:
    """A stream that a thread reads."""

    server: LoraServer
    name: str
    tokens: int
    pieces: list[str] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    _grown: threading.Condition = field(default_factory=threading.Condition)
    _error: Exception | None = None

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for piece in self.server.stream(self.name, _PROMPTS[0], self.tokens):
                if not piece:  # an event without text, as one with the reason for the end
                    continue
                with self._grown:
                    self.pieces.append(piece)
                    self._grown.notify()
        except Exception as error:
            self._error = error
        finally:
            self.done.set()
            with self._grown:
                self._grown.notify()

    def wait_for(self, pieces: int) -> None:
        """Wait until so many pieces have come, or the stream has ended."""
        with self._grown:
            self._grown.wait_for(lambda: len(self.pieces) >= pieces or self.done.is_set(), _PATIENCE_SECONDS)

    def text(self) -> str:
        """Return the whole text. Raises what ended the stream."""
        self._thread.join(_PATIENCE_SECONDS)
        if self._error is not None:
            raise self._error
        return "".join(self.pieces)


_DEAD: Final = "the server stopped answering: "


def _finding(name: str, check: Callable[[], str]) -> Finding:
    from .conform_servers import BrokenError, NotOfferedError, ServerRefusedError, UnreachableError

    try:
        return Finding(name, RIGHT, check())
    except (WrongError, BrokenError) as error:
        return Finding(name, WRONG, str(error))
    except ServerRefusedError as error:
        return Finding(name, REFUSED, str(error))
    except NotOfferedError as error:
        return Finding(name, NOT_OFFERED, str(error))
    except UnreachableError as error:
        return Finding(name, WRONG, f"{_DEAD}{error}")


def _bound(check: Callable[[Crafted | None], str], adapter: Crafted | None) -> Callable[[], str]:
    return lambda: check(adapter)


def _alike(one: str, other: str) -> int:
    """Return the number of characters with which both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(one), len(other)))


def _likeness(said: Sequence[str], texts: Sequence[str]) -> int:
    """Return the number of characters with which both begin, over all prompts.

    A continuation that is decoded without its prompt may lack the space in front.
    """
    return sum(_alike(one.lstrip(), other.lstrip()) for one, other in zip(said, texts, strict=True))


def _is_clear(more: int, less: int, factor: float) -> bool:
    """Return True if so many characters are more by the factor, and by _CLEAR."""
    return more >= less + _CLEAR and more >= factor * less


def _short(text: str) -> str:
    words = " ".join(text.split())
    return repr(words if len(words) <= 40 else f"{words[:37]}...") if words else "nothing"
