"""What is around the views: key, theme, palette, and a server that goes away and comes back."""

from __future__ import annotations

import gzip
import io
import signal
import zipfile

import pytest
from playwright.sync_api import Page, expect
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


def test_all_views_fit_the_bar_of_the_smallest_phone(words: Server, look: Look) -> None:
    with look(words, "narrow") as visit:
        visit.open()
        for view in ("Compare", "Adapters", "Training", "Batches", "Tenant", "Server"):
            link = visit.page.get_by_role("navigation").get_by_role("link", name=view)
            expect(link).to_be_in_viewport(ratio=1)


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


# ---- files, dropped anywhere --------------------------------------------------------------------


def drop(page: Page, name: str, content: bytes) -> None:
    """Drop a file in the middle of the page."""
    page.evaluate(
        """([name, content]) => {
            const transfer = new DataTransfer()
            transfer.items.add(new File([new Uint8Array(content)], name))
            for (const kind of ['dragover', 'drop']) {
                const event = new DragEvent(kind, {dataTransfer: transfer, bubbles: true, cancelable: true})
                document.querySelector('main').dispatchEvent(event)
            }
        }""",
        [name, list(content)],
    )


def test_rows_that_are_dropped_anywhere_lead_to_training_and_an_adapter_to_its_upload(
    words: Server, look: Look
) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("out/zipped/adapter_config.json", "{}")
        packed.writestr("out/zipped/adapter_model.safetensors", b"weights" * 100)
    with look(words) as visit:
        page = visit.page
        visit.open("#/server")
        expect(page.get_by_role("heading", name="Machine")).to_be_visible()
        drop(page, "rows.jsonl", b'{"prompt": "a", "completion": "b"}\n')
        expect(page).to_have_title("Training · OneBase")
        dialog = page.get_by_role("dialog", name="Train an adapter")
        expect(dialog).to_contain_text("rows.jsonl")
        drop(page, "others.jsonl", b"{}\n")  # behind a dialog nothing is taken
        expect(dialog).not_to_contain_text("others.jsonl")
        page.keyboard.press("Escape")
        drop(page, "orders.zip", archive.getvalue())
        expect(page).to_have_title("Adapters · OneBase")
        dialog = page.get_by_role("dialog", name="Add an adapter")
        expect(dialog.get_by_role("listitem")).to_have_count(2)
        expect(dialog.get_by_label("Name", exact=True)).to_have_value("zipped")
        assert visit.violations() == []
        page.keyboard.press("Escape")
        drop(page, "cat.png", b"meow")
        expect(page.get_by_role("group", name="What was just done")).to_contain_text("takes cat.png")


def test_what_a_dropped_file_needs_is_said_to_a_key_that_lacks_it(
    keyed: Server, keys: Keys, look: Look
) -> None:
    key = known(keyed, keys.make("generate"))
    with look(keyed, errors=("401",)) as visit:
        visit.open("#/compare?c=b")
        visit.page.get_by_label("API key", exact=True).fill(key)
        visit.page.keyboard.press("Enter")
        expect(visit.page.locator(".column")).to_have_count(1)
        said = visit.page.get_by_role("group", name="What was just done")
        for name, scope in (("rows.csv", "train"), ("adapter_config.json", "adapters")):
            drop(visit.page, name, b"a,b\n")
            expect(said).to_contain_text(f"needs the scope {scope}")
        expect(visit.page).to_have_title("Compare · OneBase")


# ---- every view, by keyboard and for screen readers ---------------------------------------------

VIEWS = ("compare", "adapters", "adapters?name=pirate", "training", "batches", "tenant", "server")
NAMED = {"button", "link", "textbox", "searchbox", "combobox", "checkbox", "radio", "slider", "spinbutton"}
"""Roles of which each on the page must have a name, and so must those below."""
NAMED |= {"table", "region", "dialog", "img", "meter", "progressbar", "listbox", "tab", "navigation"}
WALK = """() => {
    const wrong = []
    const say = one => one.outerHTML.slice(0, 120)
    const ids = [...document.querySelectorAll('[id]')].map(one => one.id)
    wrong.push(...ids.filter((id, at) => ids.indexOf(id) !== at).map(id => 'twice: ' + id))
    for (const one of document.querySelectorAll('[tabindex]'))
        if (one.tabIndex > 0) wrong.push('out of order: ' + say(one))
    for (const part of ['aria-labelledby', 'aria-describedby', 'aria-controls'])
        for (const one of document.querySelectorAll(`[${part}]:not(dialog:not([open]))`))
            for (const id of one.getAttribute(part).split(' '))
                if (!document.getElementById(id)) wrong.push(`${part} of nothing: ` + say(one))
    const heads = [...document.querySelectorAll('main :is(h1, h2, h3, h4)')].map(one => +one.tagName[1])
    if (heads.filter(level => level === 1).length !== 1) wrong.push('not one first level: ' + heads)
    heads.forEach((level, at) => at && level > heads[at - 1] + 1 && wrong.push('a level too deep: ' + heads))
    return wrong
}"""
FOCUSED = """() => {
    const one = document.activeElement
    if (!one || one === document.body) return null
    one.dataset.walked = (one.dataset.walked ?? 0) + 1
    const box = one.getBoundingClientRect(), style = getComputedStyle(one)
    const covering = getComputedStyle(one, '::after')
    const field = ['checkbox', 'radio', 'range'].includes(one.type)
    const outlined = style.outlineStyle !== 'none' || covering.outlineStyle !== 'none'
    return {
        what: one.outerHTML.slice(0, 160), again: one.dataset.walked > 1, main: one.id === 'main',
        seen: box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth + 1,
        outlined: outlined || field, hidden: !!one.closest('[aria-hidden=true]'),
    }
}"""


@pytest.mark.parametrize("size", EACH_SIZE)
@pytest.mark.parametrize("view", VIEWS)
def test_each_view_is_walked_by_the_tab_key_in_order_and_in_sight_and_has_names(
    words: Server, look: Look, view: str, size: str
) -> None:
    with look(words, size) as visit:
        page = visit.page
        visit.open(f"#/{view}")
        title = view.partition("?")[0].capitalize()
        expect(page).to_have_title(f"{title} · OneBase")
        expect(page.locator("main h1")).to_have_count(1)
        page.wait_for_load_state("networkidle" if view == "compare" else "load")
        assert visit.violations() == []
        assert page.evaluate(WALK) == []
        unnamed = [
            f"{node['role']['value']}: {node.get('backendDOMNodeId')}"
            for node in visit.tree()
            if node["role"]["value"] in NAMED and not node.get("name", {}).get("value", "").strip()
        ]
        assert unnamed == []
        live = page.locator("[aria-live=polite], [role=status]")
        assert live.count() >= 2
        stops: list[dict[str, object]] = []
        page.get_by_role("link", name="Go to the content").focus()
        for _ in range(400):
            stop = page.evaluate(FOCUSED)
            if stop is None or stop["again"]:
                break
            stops.append(stop)
            page.keyboard.press("Tab")
        assert len(stops) > 8
        wrong = [stop for stop in stops if not (stop["seen"] and stop["outlined"]) or stop["hidden"]]
        assert wrong == []
