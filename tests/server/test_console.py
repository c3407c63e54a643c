"""What serves the console's files: the page, and what it loads. What the page does: tests/console."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from onebase_edge.cross_site import CrossSiteMiddleware
from onebase_edge.settings import Settings
from onebase_server.http.app import create_app
from onebase_server.http.routes import console
from onebase_server.telemetry.traces import Tracing

from .support import Server

SCRIPT = "assets/index-AbC_-123.js"
Ask = Callable[..., httpx2.Response]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files as Vite builds them."""
    made = tmp_path / "web"
    (made / "assets").mkdir(parents=True)
    (made / "index.html").write_text("<!doctype html><title>console</title>")
    (made / SCRIPT).write_text("start()")
    (made / f"{SCRIPT}.gz").write_bytes(gzip.compress(b"start()"))
    (made / f"{SCRIPT}.br").write_bytes(b"as brotli")
    monkeypatch.setattr(console, "FOLDER", made)
    return made


@pytest.fixture
def ask() -> Ask:
    return asking(Settings())


def asking(settings: Settings) -> Ask:
    """A request to the whole app, behind its door."""
    services: Any = SimpleNamespace(
        settings=settings, tracing=Tracing(settings.otlp_endpoint), catalog=SimpleNamespace(counter=0)
    )
    app = CrossSiteMiddleware(create_app(services), settings)

    def asked(path: str, method: str = "GET", **headers: str) -> httpx2.Response:
        async def sent() -> httpx2.Response:
            transport = httpx2.ASGITransport(app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as http:
                named = {name.replace("_", "-"): value for name, value in headers.items()}
                return await http.request(method, path, headers={"accept-encoding": "", **named})

        return asyncio.run(sent())

    return asked


@pytest.mark.usefixtures("folder")
def test_the_page_runs_its_own_scripts_alone_and_is_asked_for_again_each_time(ask: Ask) -> None:
    page = ask("/console")

    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["form-action"] == policy["base-uri"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"
    assert page.headers["cross-origin-opener-policy"] == "same-origin"
    assert page.headers["cache-control"] == "no-cache"


def test_a_browser_that_has_the_page_is_told_so_until_another_one_was_built(ask: Ask, folder: Path) -> None:
    tag = ask("/console").headers["etag"]
    known = ask("/console", if_none_match=tag)
    # As long, and as old: packages from the same sources have the same times.
    before = (folder / "index.html").stat()
    (folder / "index.html").write_text("<!doctype html><title>CONSOLE</title>")
    os.utime(folder / "index.html", ns=(before.st_atime_ns, before.st_mtime_ns))
    other = ask("/console", if_none_match=tag)

    assert (known.status_code, known.content) == (304, b"")
    assert "content-security-policy" in known.headers
    assert (other.status_code, other.headers["etag"] != tag) == (200, True)


@pytest.mark.usefixtures("folder")
def test_what_the_page_loads_never_changes_under_its_name(ask: Ask) -> None:
    script = ask(f"/console/{SCRIPT}")

    assert (script.status_code, script.text) == (200, "start()")
    assert script.headers["content-type"] == "text/javascript; charset=utf-8"
    assert script.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert script.headers["x-content-type-options"] == "nosniff"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        ("gzip, deflate, br, zstd", "br"),
        ("GZIP", "gzip"),
        ("gzip;q=0.5, br;q=0", "gzip"),
        ("gzip;q=0.0", None),
        ("identity", None),
        ("", None),
        ("brotli, xgzip, ;,q=1", None),
    ],
)
def test_it_comes_compressed_as_the_browser_takes_it(ask: Ask, accepted: str, coding: str | None) -> None:
    answer = ask(f"/console/{SCRIPT}", method="HEAD", accept_encoding=accepted)

    lengths = {"br": len(b"as brotli"), "gzip": len(gzip.compress(b"start()")), None: len(b"start()")}
    assert answer.headers.get("content-encoding") == coding
    assert answer.headers["vary"] == "Accept-Encoding"
    assert int(answer.headers["content-length"]) == lengths[coding]


def test_files_that_were_not_compressed_are_served_as_they_are(ask: Ask, folder: Path) -> None:
    for suffix in (".gz", ".br"):
        (folder / f"{SCRIPT}{suffix}").unlink()
    answer = ask(f"/console/{SCRIPT}", accept_encoding="gzip, br")

    assert (answer.text, answer.headers.get("content-encoding")) == ("start()", None)


@pytest.mark.parametrize(
    "path",
    [
        "assets/../../errors.py",
        "assets/%2e%2e/%2e%2e/errors.py",
        "assets/..%2f..%2ferrors.py",
        "assets/..%5c..%5cerrors.py",
        "assets/../index.html",
        "assets/%2fetc%2fpasswd",
        "assets//etc/passwd",
        "assets/index-00000000.js",
        "assets/index-00000000.js%00",
        "assets/index-00000000.js%0a",
        "assets/" + "a" * 5000 + "-00000000.js",
        "assets/",
        "assets",
        "index.html",
        "../errors.py",
    ],
)
def test_nothing_but_what_was_built_is_handed_out(scripted: Server, path: str) -> None:
    connection = HTTPConnection("127.0.0.1", scripted.port, timeout=60)  # it sends a path as it is
    connection.request("GET", f"/console/{path}")
    answer = connection.getresponse()

    assert answer.status == 404
    assert json.load(answer)["error"]["code"] == "http_404"
    connection.close()


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("suffix", [".gz", ".br", ".map", "%00", "%0a"])
def test_what_lies_next_to_a_script_has_no_address(ask: Ask, suffix: str) -> None:
    assert ask(f"/console/{SCRIPT}{suffix}").status_code == 404


def test_without_a_build_the_answer_says_how_to_make_one(ask: Ask, folder: Path) -> None:
    (folder / "index.html").unlink()
    answer = ask("/console")

    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "console_missing"
    assert "make console" in answer.json()["error"]["message"]


@pytest.mark.usefixtures("folder")
def test_a_slash_at_the_end_leads_to_the_page_behind_any_proxy(ask: Ask) -> None:
    answer = ask("/console/")

    assert (answer.status_code, answer.headers["location"]) == (307, "../console")


@pytest.mark.usefixtures("folder")
def test_the_head_of_the_page_is_answered_and_nothing_else_is_possible_there(ask: Ask) -> None:
    head, whole = ask("/console", method="HEAD"), ask("/console")

    assert head.status_code == 200
    assert {**head.headers, "x-request-id": ""} == {**whole.headers, "x-request-id": ""}


@pytest.mark.usefixtures("folder")
def test_a_link_on_another_site_opens_the_page_and_no_frame_does(ask: Ask) -> None:
    link = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}

    assert ask("/console", **link, sec_fetch_dest="document").status_code == 200
    assert ask("/console", **link, sec_fetch_dest="iframe").status_code == 403
    assert ask(f"/console/{SCRIPT}", sec_fetch_site="cross-site").status_code == 403


@pytest.mark.usefixtures("folder")
def test_the_page_knows_where_the_documents_are_if_the_server_does(ask: Ask) -> None:
    url = 'https://docs.example.com/?a=1&b="><script>'
    page = asking(Settings(docs_url=url))("/console")

    assert b"help" not in ask("/console").content
    link = '<link rel="help" href="https://docs.example.com/?a=1&amp;b=&quot;&gt;&lt;script&gt;">'
    assert page.text == f"<!doctype html><title>console</title>{link}"
    assert page.headers["etag"] != ask("/console").headers["etag"]


def test_a_server_names_the_page_in_its_root_and_when_it_starts(scripted: Server) -> None:
    with scripted.client() as http:
        assert http.get("/").json()["console"] == "/console"
        told = http.get("/console").status_code == 200
        assert http.post("/console").status_code == 405
    scripted.wait_for(lambda: scripted.url in scripted.log)
    assert (f"{scripted.url}/console" in scripted.log) == told
