"""A browser, pages of it that watch themselves, and servers for the console."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright
from tests.server import conftest as of_server
from tests.server.access import Keys
from tests.server.support import Server, Starter, make_folder

ROOT = Path(__file__).parents[2]
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
"""The first that is found is taken. The first one has no windows, and begins and draws pages sooner."""
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--in-process-gpu",
    "--disable-extensions",
    "--renderer-process-limit=1",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
SIZES = {"desktop": (1440, 900), "phone": (390, 844), "narrow": (360, 640)}
# Views that behave otherwise on a phone are walked through there too; `faults` checks how others look there.
EACH_SIZE = ["desktop", pytest.param("phone", marks=pytest.mark.full)]
SETTLED = """Promise.race([new Promise(requestAnimationFrame), new Promise(done => setTimeout(done, 500))])
    .then(() => document.getAnimations().filter(one => one instanceof CSSTransition)
        .forEach(one => one.finish()))"""
"""Gives a page the looks of another size or scheme: of its next frame, and of the end of its transitions. A
page that is not in front may get no frame, and what is not drawn may end no transition."""
AXE = ROOT / "clients/web/node_modules/axe-core/axe.min.js"
WAIT_MS = 60_000
"""Longest wait for anything on the page: the machine may be busy."""

base_folder, forked_servers = of_server.base_folder, of_server.forked_servers
serve_scripted = of_server.serve_scripted
small_base = of_server.small_base
serve_real, keys = of_server.serve_real, of_server.keys


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium is installed (apt-get install chromium-headless-shell)")
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield started
        started.close()


@dataclass
class Visit:
    """One reader's look at the console, and all that the browser had to say of it."""

    page: Page
    url: str
    problems: list[str] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

    def open(self, view: str = "") -> None:
        self.page.goto(f"{self.url}/console{view}")

    def ask(self, message: str) -> None:
        """Ask all columns, and wait for their answers."""
        self.page.get_by_label("Message to all columns").fill(message)
        self.page.get_by_label("Message to all columns").press("Enter")
        self.page.locator("[aria-live=polite]", has_text="complete").wait_for(state="attached")

    def tell_of_close(self) -> None:
        """Before a view is opened: note when the browser first tells that a dialog was closed."""
        self.page.add_init_script(
            "window.told = new Promise(done => addEventListener('close', done, {capture: true, once: true}))"
        )

    def wait_for_close(self) -> None:
        """Until that was told, and whoever listens has heard it."""
        late = f"new Promise((_, no) => setTimeout(no, {WAIT_MS}))"
        self.page.evaluate(f"Promise.race([told, {late}]).then(() => 0)")

    @property
    def answers(self) -> list[str]:
        return self.page.locator(".answer .text").all_inner_texts()

    def too_wide(self) -> list[str]:
        """What goes beyond the right side of the page, but for what scrolls by itself."""
        found: list[str] = self.page.evaluate(
            """[...document.querySelectorAll('main *')]
                .filter(one => one.getBoundingClientRect().right > innerWidth + 1 && !one.closest('.scroll'))
                .map(one => one.outerHTML.slice(0, 100))"""
        )
        return found

    def faults(self, *others: str, scrolls: bool = False) -> list[str]:
        """Return what is wrong with the page as it is, and as it is in the dark at other sizes.

        scrolls: whether the page has columns that lie beyond its right side.
        """

        def look() -> list[str]:
            # What the bar at the top half covers would count as too small.
            self.page.evaluate("scrollTo(0, 0)")
            return [*self.violations(), *(() if scrolls else self.too_wide())]

        page, own = self.page, self.page.viewport_size
        found = look()
        for size in others or ("phone",):
            width, height = SIZES[size]
            page.set_viewport_size({"width": width, "height": height})
            page.emulate_media(color_scheme="dark")
            page.evaluate(SETTLED)
            found += [f"{size}: {fault}" for fault in look()]
        assert own is not None
        page.set_viewport_size(own)
        page.emulate_media(color_scheme="light")
        return found

    def tree(self) -> list[dict[str, Any]]:
        """What assistive technology is told of the page: its nodes, but for those it ignores."""
        session = self.page.context.new_cdp_session(self.page)
        nodes: list[dict[str, Any]] = session.send("Accessibility.getFullAXTree")["nodes"]
        session.detach()
        return [node for node in nodes if not node["ignored"]]

    def violations(self) -> list[str]:
        """What axe-core finds wrong with the page as it is, by the rules of WCAG 2.2 A and AA."""
        session = self.page.context.new_cdp_session(self.page)
        world = session.send("Page.createIsolatedWorld", {"frameId": _frame(session)})["executionContextId"]
        for expression in (
            AXE.read_text(),
            "axe.run({runOnly: ['wcag2a', 'wcag2aa', 'wcag21aa', 'wcag22aa']})",
        ):
            found = session.send(
                "Runtime.evaluate",
                {
                    "expression": expression,
                    "contextId": world,
                    "awaitPromise": True,
                    "returnByValue": expression.startswith("axe."),
                },
            )
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        session.detach()
        return [
            f"{one['id']}: {node['html'][:200]} {node['failureSummary']}"
            for one in found["result"]["value"]["violations"]
            for node in one["nodes"]
        ]


def _frame(session: Any) -> str:
    return str(session.send("Page.getFrameTree")["frameTree"]["frame"]["id"])


Look = Callable[..., contextlib.AbstractContextManager[Visit]]


@pytest.fixture
def look(browser: Browser) -> Look:
    """`with look(server, size, **context) as visit`. In the end: no error, no violation of the page's policy,
    and no request to anything but the server."""

    @contextlib.contextmanager
    def visiting(
        server: Server, size: str = "desktop", *, errors: tuple[str, ...] = (), **how: Any
    ) -> Iterator[Visit]:
        width, height = SIZES[size]
        context = browser.new_context(viewport={"width": width, "height": height}, locale="en-GB", **how)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        context.set_default_timeout(WAIT_MS)
        visit = Visit(context.new_page(), server.url)
        visit.page.on("pageerror", lambda error: visit.problems.append(f"error: {error}"))
        visit.page.on(
            "console",
            lambda said: said.type in ("error", "warning") and visit.problems.append(said.text),
        )
        visit.page.on("request", lambda request: visit.requests.append(request))
        visit.page.add_init_script(
            "addEventListener('securitypolicyviolation', e => "
            "console.error('policy: ' + e.violatedDirective + ' ' + e.blockedURI))"
        )
        try:
            yield visit
            unexpected = [one for one in visit.problems if not any(part in one for part in errors)]
            assert unexpected == []
            elsewhere = [one.url for one in visit.requests if not one.url.startswith(server.url + "/")]
            assert [url for url in elsewhere if not url.startswith(("data:", "blob:"))] == []
        finally:
            # A handler that still awaits the server's answer would raise in whichever test comes next.
            visit.page.unroute_all(behavior="ignoreErrors")
            context.close()

    return visiting


@pytest.fixture(scope="module")
def words(serve_scripted: Starter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose engine says what it is asked, with two adapters that change nothing of that."""
    parent = tmp_path_factory.mktemp("folders")
    for name in ("orders", "pirate"):
        make_folder(parent, name)
    with serve_scripted("words", "--adapters-dir", str(parent)) as server:
        yield server


@pytest.fixture(scope="module")
def keyed(serve_scripted: Starter, keys: Keys) -> Iterator[Server]:
    """A server that wants a key."""
    keys.make("admin")
    with serve_scripted("words", data_dir=keys.file.parent) as server:
        yield server


@pytest.fixture(scope="session")
def real(serve_real: Starter, base_folder: Path) -> Iterator[Server]:
    """The default base with both example adapters."""
    examples = str(ROOT / "examples/adapters")
    with serve_real("--adapters-dir", examples, "--kv-memory", "400MB", "--threads", "1") as server:
        yield server
