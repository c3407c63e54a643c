"""What is around the views: key, theme, palette, and a server that goes away and comes back."""

from __future__ import annotations

import gzip
import signal

import pytest
from playwright.sync_api import expect
from tests.server.access import Keys, bearer
from tests.server.support import Server, Starter

from .conftest import EACH_SIZE, ROOT, Look

BUILT = ROOT / "server/onebase_server/web"
PALETTE = "Find a view, an adapter or an action"
FIRST_LOAD = 150_000
"""Bytes at most, compressed."""


def known(server: Server, key: str, status: int = 200) -> str:
    """The key, once the server knows of it."""
    with server.client() as http:
        server.wait_for(lambda: http.get("/v1/key", headers=bearer(key)).status_code == status)
    return key


def test_the_first_load_is_small_and_comes_from_the_server_alone(words: Server, look: Look) -> None:
    with look(words) as visit:
        visit.open()
        expect(visit.page.get_by_role("link", name="Compare")).to_be_visible()
        loaded = [one for one in visit.requests if "/console" in one.url]

    names = [one.url.rpartition("/")[2] for one in loaded if "/assets/" in one.url]
    assert len(names) >= 2
    sizes = [len(gzip.compress((BUILT / "assets" / name).read_bytes())) for name in names]
    assert sum(sizes) < FIRST_LOAD


@pytest.mark.parametrize("size", EACH_SIZE)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_as_it_opens_is_accessible(words: Server, look: Look, size: str, scheme: str) -> None:
    with look(words, size, color_scheme=scheme) as visit:
        visit.open()
        expect(visit.page.locator(".column")).to_have_count(1)
        assert visit.violations() == []
        visit.page.keyboard.press("Control+k")
        expect(visit.page.get_by_role("combobox", name=PALETTE)).to_be_focused()
        assert visit.violations() == []


def test_the_palette_finds_views_adapters_and_actions(words: Server, look: Look) -> None:
    with look(words) as visit:
        page = visit.page
        visit.open()
        expect(page.locator(".column")).to_have_count(1)
        page.keyboard.press("Control+k")
        shown = page.get_by_role("listbox", name=PALETTE).get_by_role("option").all_inner_texts()
        assert any("Compare" in one for one in shown)
        page.get_by_role("combobox", name=PALETTE).press_sequentially("pirate")
        expect(page.get_by_role("listbox", name=PALETTE).get_by_role("option")).to_have_count(3)
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name="pirate")).to_be_visible()
        expect(page).to_have_title("Adapters · OneBase")
        page.keyboard.press("Control+k")
        page.get_by_role("combobox", name=PALETTE).press_sequentially("pirate column")
        page.keyboard.press("Enter")  # goes where it is seen
        expect(page.locator(".column")).to_have_count(2)
        page.keyboard.press("Control+k")
        page.get_by_role("combobox", name=PALETTE).press_sequentially("nothing is called so")
        expect(page.get_by_text("Nothing found.")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.get_by_role("combobox", name=PALETTE)).to_have_count(0)


@pytest.mark.parametrize("size", EACH_SIZE)
def test_the_documents_are_a_click_away_where_the_server_knows_them(
    serve_scripted: Starter, words: Server, look: Look, size: str
) -> None:
    url = "https://docs.example.com/onebase/"
    with serve_scripted("words", "--docs-url", url) as server, look(server, size) as visit:
        visit.open()
        expect(visit.page.get_by_role("link", name="Docs")).to_have_attribute("href", url)
        assert visit.too_wide() == []
        assert visit.violations() == []
        visit.page.keyboard.press("Control+k")
        visit.page.get_by_role("combobox", name=PALETTE).press_sequentially("docs")
        expect(visit.page.get_by_role("option", name="Docs")).to_be_visible()
    with look(words, size) as visit:
        visit.open()
        expect(visit.page.get_by_role("link", name="Compare")).to_be_visible()
        expect(visit.page.get_by_role("link", name="Docs")).to_have_count(0)


def test_the_palette_pins_what_is_looked_at_and_a_question_mark_lists_the_keys(
    words: Server, look: Look
) -> None:
    with look(words) as visit:
        page = visit.page
        visit.open("#/adapters?name=pirate")
        expect(page.get_by_role("button", name="New version")).to_be_visible()
        for verb, pinned in (("Pin", True), ("Unpin", False)):
            page.keyboard.press("Control+k")
            page.get_by_role("combobox", name=PALETTE).press_sequentially(f"{verb} pirate")
            page.keyboard.press("Enter")
            said = "is pinned." if pinned else "is unpinned."
            expect(page.get_by_role("group", name="What was just done")).to_contain_text(said)
            with words.client() as http:
                assert http.get("/v1/adapters/pirate").json()["pinned"] is pinned
        page.get_by_label("Search adapters").press("?")
        expect(page.get_by_role("dialog")).to_have_count(0)  # it is written there
        page.get_by_role("heading", name="Versions").click()
        page.keyboard.press("?")
        expect(page.get_by_role("dialog", name="Shortcuts")).to_contain_text("Ask all columns")
        assert visit.violations() == []


def test_the_theme_is_the_systems_until_another_is_chosen_which_stays(words: Server, look: Look) -> None:
    with look(words, color_scheme="dark") as visit:
        page = visit.page
        visit.open()
        background = "getComputedStyle(document.body).backgroundColor"
        dark = page.evaluate(background)
        page.get_by_role("button", name="Colours: as the system").click()
        light = page.evaluate(background)
        page.reload()
        expect(page.get_by_role("button", name="Colours: light")).to_be_visible()
        assert page.evaluate(background) == light != dark


def test_the_key_is_asked_for_once_and_stays_in_the_tab(keyed: Server, keys: Keys, look: Look) -> None:
    key = known(keyed, keys.make("generate"))
    with look(keyed, errors=("401",)) as visit:
        page = visit.page
        visit.open("#/compare?c=b&n=4")
        field = page.get_by_label("API key", exact=True)
        expect(field).to_be_focused()
        assert visit.violations() == []
        page.keyboard.press("Escape")
        field.fill("ob-wrong")
        field.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("Unknown key.")
        field.fill("ключ")
        field.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("letters, digits and signs of ASCII")
        field.fill(f" {key} ")
        field.press("Enter")
        expect(page.get_by_role("dialog")).to_have_count(0)
        visit.ask("hello")
        page.reload()
        visit.ask("hello again")
        assert page.evaluate("[localStorage, document.cookie].map(JSON.stringify).join()").find("ob-") < 0
        page.get_by_role("button", name="Use another key").click()
        expect(field).to_be_focused()
        assert page.evaluate("sessionStorage.length") == 0

    assert not [one.url for one in visit.requests if key in one.url]


def test_what_a_keys_scopes_do_not_allow_is_not_shown(keyed: Server, keys: Keys, look: Look) -> None:
    key = known(keyed, keys.make("train"))
    with look(keyed, errors=("401",)) as visit:
        visit.open("#/compare")
        visit.page.get_by_label("API key", exact=True).fill(key)
        visit.page.keyboard.press("Enter")
        expect(visit.page.get_by_role("link", name="Training")).to_be_visible()
        for name in ("Compare", "Adapters", "Server"):
            expect(visit.page.get_by_role("link", name=name)).to_have_count(0)
        expect(visit.page.get_by_label("Message to all columns")).to_have_count(0)
        assert visit.violations() == []


def test_a_key_that_is_revoked_while_the_page_is_open_is_asked_for_again(
    keyed: Server, keys: Keys, look: Look
) -> None:
    key, other = known(keyed, keys.make("generate")), known(keyed, keys.make("generate"))
    with look(keyed, errors=("401",)) as visit:
        page = visit.page
        visit.open("#/compare?c=b&n=4&m=kept")
        page.get_by_label("API key", exact=True).fill(key)
        page.keyboard.press("Enter")
        visit.ask("hello")
        keys.revoke(key)
        known(keyed, key, status=401)
        page.get_by_label("Message to all columns").fill("what I had written")
        page.keyboard.press("Enter")
        expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text("was revoked")
        page.get_by_label("API key", exact=True).fill(other)
        page.keyboard.press("Enter")
        expect(page.get_by_label("Message to all columns")).to_have_value("what I had written")


def test_a_server_that_goes_away_and_comes_back_is_shown_and_gone_on_with(
    serve_scripted: Starter, look: Look
) -> None:
    with serve_scripted("words") as first, look(first, errors=("ERR_", "503")) as visit:
        page = visit.page
        visit.open("#/compare?c=b&n=40")
        visit.ask("hello")
        first.signal(signal.SIGKILL)
        first.exit_status()
        page.get_by_label("Message to all columns").fill("are you there?")
        page.keyboard.press("Enter")
        expect(page.locator(".answer")).to_contain_text("The connection was lost.")
        expect(page.locator(".answer").get_by_role("alert")).to_have_count(0)  # the banner says it once
        banner = page.get_by_text("This page goes on by itself once it can.")
        expect(banner).to_be_visible()
        assert visit.violations() == []
        with serve_scripted("words", "--port", str(first.port), ready=False):
            expect(banner).to_have_count(0)
            expect(page.get_by_label("Message to all columns")).to_have_value("are you there?")
            page.get_by_role("button", name="Ask again").click()
            expect(page.locator(".answer .text").last).to_contain_text("helpful")
            expect(page.locator(".answer")).not_to_contain_text("The connection was lost.")
            expect(page.get_by_label("Message to all columns")).to_have_value("")
