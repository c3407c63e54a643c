"""Compare: one message, several columns, all from one mixed batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Route, expect
from tests.server.support import SOURCES, Server, Starter, make_folder, pace

from .conftest import Look

ORDER = "Hi, I'm Anna Keller. I need three blue mugs in Lisbon."
EVIL = '<img src=x onerror="document.title=\'owned\'"><script>document.title="owned"</script>'
UNSEEN = "\u202egnp.exe\u0007"


def test_the_base_two_adapters_and_a_mix_answer_one_message_as_the_api_does(real: Server, look: Look) -> None:
    mix = [{"name": "orders", "weight": 0.7}, {"name": "pirate", "weight": 0.3}]
    with look(real) as visit:
        visit.open("#/compare?c=b&c=a:orders&c=a:pirate&c=m:orders*0.7%2Bpirate*0.3&n=16")
        visit.ask(ORDER)
        answers = visit.answers
        marked = [column.locator("mark").all_inner_texts() for column in visit.page.locator(".column").all()]
        figures = visit.page.locator(".column dd").all_inner_texts()
        assert visit.faults(scrolls=True) == []

    with real.client() as http:
        body = {"messages": [{"role": "user", "content": ORDER}], "temperature": 0, "max_tokens": 16}
        alone = [
            http.post("/generate", json=body | ({"adapter": adapter} if adapter else {})).json()
            for adapter in (None, "orders", "pirate", mix)
        ]
    texts = [answer["choices"][0]["text"] for answer in alone]
    assert [text.strip() for text in answers] == [text.strip() for text in texts]
    assert marked[0] == []
    for text, (mark,) in zip(texts[1:], marked[1:], strict=True):
        pairs = zip(text, texts[0], strict=False)
        common = next(at for at, (one, base) in enumerate(pairs) if one != base)
        assert text.strip().endswith(mark.strip())
        assert len(text) - len(mark) <= common
        assert " " not in text[len(text) - len(mark) : common]
    for column in range(4):
        speed, ttft, cached, tokens = figures[4 * column : 4 * column + 4]
        assert float(speed) > 0
        assert ttft.endswith(" ms")
        assert cached.endswith(f" of {alone[column]['usage']['prompt_tokens']}")
        assert int(tokens) == alone[column]["usage"]["completion_tokens"]


def test_without_a_link_the_base_is_asked_by_keyboard_alone(words: Server, look: Look) -> None:
    with look(words) as visit:
        visit.open()
        expect(visit.page.get_by_label("Message to all columns")).to_be_focused()
        visit.page.keyboard.type("one two")
        visit.page.keyboard.press("Enter")
        expect(visit.page.locator("[aria-live=polite]")).to_have_text("1 answer complete.")
        titles = visit.page.locator(".column .who").all_inner_texts()
        assert [title.strip() for title in titles] == ["smollm2-135m-instruct"]


def test_a_message_sent_before_the_adapters_are_known_goes_to_them_once_they_are(
    words: Server, look: Look
) -> None:
    with look(words) as visit:
        held: list[Route] = []
        visit.page.route("**/v1/models", lambda one: held.append(one))
        visit.open()
        visit.page.get_by_label("Message to all columns").fill("one two")
        visit.page.keyboard.press("Enter")
        visit.page.wait_for_timeout(600)  # in which the address would be written
        assert "#" not in visit.page.url
        expect(visit.page.get_by_text("No column is left")).to_be_hidden()
        for one in held:
            one.continue_()
        expect(visit.page.locator("[aria-live=polite]")).to_have_text("1 answer complete.")


def test_all_columns_stream_at_once_and_stop_together(
    serve_scripted: Starter, tmp_path: Path, look: Look
) -> None:
    for name in ("orders", "pirate"):
        make_folder(tmp_path, name)
    with (
        pace(tmp_path) as (environment, step),
        serve_scripted("paced", "--adapters-dir", str(tmp_path), environment=environment) as server,
        look(server) as visit,
    ):
        visit.open(f"#/compare?{'&'.join(['c=b', 'c=a:orders', 'c=a:pirate', 'c=b'] * 3)}&n=4000")
        visit.page.get_by_label("Message to all columns").fill("one two three four five six seven")
        visit.page.get_by_role("button", name="Ask all 12").click()
        with server.client() as http:
            server.step_until_rows(step, 12)
            step(1)
            expect(visit.page.locator(".answer .text")).to_have_count(12)
            step(24)
            stop = visit.page.get_by_role("button", name="Stop")
            expect(stop).to_be_visible()
            stop.click()
            expect(visit.page.get_by_text("Stopped by you.")).to_have_count(12)
            step(24)
            server.wait_for(lambda: http.get("/status").json()["stats"]["sequences_running"] == 0)
        assert all(visit.answers)
        expect(visit.page.get_by_role("button", name="Ask all 12")).to_be_visible()
        sent = [one for one in visit.requests if one.url.endswith("/generate/many")]
        assert [len(one.post_data_json["requests"]) for one in sent] == [3, 3, 3, 3]


@pytest.mark.parametrize("columns", [2, 4, 7])
def test_a_column_that_is_removed_while_it_is_answered_is_computed_no_further(
    serve_scripted: Starter, tmp_path: Path, look: Look, columns: int
) -> None:
    make_folder(tmp_path, "orders")
    with (
        pace(tmp_path) as (environment, step),
        serve_scripted("paced", "--adapters-dir", str(tmp_path), environment=environment) as server,
        look(server) as visit,
        server.client() as http,
    ):

        def running() -> int:
            return int(http.get("/status").json()["stats"]["sequences_running"])

        visit.open(f"#/compare?c=a:orders&{'&'.join(['c=b'] * (columns - 1))}&n=4000")
        visit.page.get_by_label("Message to all columns").fill("one two three four five six seven")
        visit.page.get_by_role("button", name="Ask all").click()
        server.step_until_rows(step, columns)
        assert running() == columns
        visit.page.get_by_role("button", name="Remove orders").click()
        expect(visit.page.locator(".column")).to_have_count(columns - 1)

        def ended() -> bool:
            step(1)
            return running() == columns - 1

        server.wait_for(ended)
        expect(visit.page.locator(".answer .text")).to_have_count(columns - 1)
        before = visit.answers
        step(24)
        server.wait_for(
            lambda: all(len(now) > len(was) for now, was in zip(visit.answers, before, strict=True))
        )
        visit.page.get_by_role("button", name="Stop").click()


def test_a_column_is_added_changed_and_removed(words: Server, look: Look) -> None:
    with look(words) as visit:
        page = visit.page
        visit.open("#/compare?c=b")
        expect(page.get_by_role("button", name="Remove smollm2")).to_be_visible()  # what there is, is known
        page.get_by_role("button", name="Column", exact=True).click()
        page.get_by_placeholder("Add a column").press_sequentially("weighted")
        page.keyboard.press("Enter")
        expect(page.get_by_role("slider")).to_have_count(2)
        slider = page.get_by_role("slider", name="pirate")
        slider.focus()
        for _ in range(4):
            page.keyboard.press("ArrowRight")
        expect(page.locator(".term output").last).to_have_text("0.70")
        page.get_by_role("button", name="Leave orders out of the mix").click()
        expect(page.locator(".term")).to_have_count(1)
        page.get_by_role("button", name="Add an adapter to the mix").click()
        page.get_by_role("option", name="orders").click()
        expect(page.locator(".term")).to_have_count(2)
        page.get_by_role("button", name="pirate × 0.7 + orders × 0.5: choose who answers here").click()
        page.get_by_role("option", name="orders").click()
        expect(page.get_by_role("heading", name="orders")).to_be_visible()
        page.get_by_role("button", name="Remove orders").click()
        page.get_by_role("button", name="Remove smollm2").click()
        expect(page.get_by_text("No column is left.")).to_be_visible()


@pytest.mark.parametrize("how", ["beside", "Escape"])
def test_a_dialog_that_is_closed_and_opened_again_at_once_stays_open(
    words: Server, look: Look, how: str
) -> None:
    with look(words) as visit:
        page = visit.page
        visit.tell_of_close()
        visit.open("#/compare?c=b")
        opener = page.get_by_role("button", name="Column", exact=True)
        opener.click()
        if how == "beside":
            opener.evaluate("one => { document.querySelector('dialog[open]').click(); one.click() }")
        else:
            # Once whoever listens has heard of it.
            opener.evaluate(
                "one => document.querySelector('dialog[open]').addEventListener('cancel', () => one.click())"
            )
            page.keyboard.press("Escape")
        visit.wait_for_close()
        expect(page.get_by_placeholder("Add a column")).to_be_visible()


def test_samples_end_with_the_view_that_asked_for_them(words: Server, look: Look) -> None:
    with look(words) as visit:
        page = visit.page
        visit.open("#/adapters")
        visit.open("#/compare?c=b&m=one%20two")
        page.get_by_role("button", name="usually say").click()
        page.route("**/generate", lambda route: None)
        with page.expect_request("**/generate"):
            page.get_by_role("dialog").get_by_role("button", name="Ask").click()
        with page.expect_event("requestfailed", lambda one: one.url.endswith("/generate")):
            page.go_back()
        expect(page.get_by_label("Search adapters")).to_be_visible()


def test_what_may_answer_in_a_column_is_offered_once_the_server_has_said_it(
    words: Server, look: Look
) -> None:
    with look(words) as visit:
        page, held = visit.page, list[Route]()
        page.route("**/v1/models", lambda route: held.append(route))
        with page.expect_request("**/v1/models"):
            visit.open("#/compare?c=b")
        page.get_by_role("button", name="Column", exact=True).click()
        expect(page.get_by_role("option")).to_have_count(1)
        for route in held:
            route.continue_()
        expect(page.get_by_role("option", name="pirate")).to_be_visible()


def test_a_given_version_answers_and_the_link_and_the_copies_name_it(words: Server, look: Look) -> None:
    with words.client() as http:
        digest = http.get("/v1/adapters/orders").json()["version"]
    with look(words) as visit:
        page = visit.page
        visit.open("#/compare?c=a:orders&n=5&seed=3&t=0.5&s=Be%20brief.&m=It%27s%20%22one%22")
        page.get_by_role("button", name="orders: choose who answers here").click()
        page.get_by_role("combobox").press_sequentially(digest[:12])
        page.keyboard.press("Enter")
        copied = {}
        for shape in ("JSON", "curl", "Python"):
            page.get_by_label("Copy the request to orders").click()
            page.get_by_role("button", name=shape, exact=True).click()
            expect(page.locator("[aria-live=polite]")).to_have_text(f"{shape} copied.")
            copied[shape] = page.evaluate("navigator.clipboard.readText()")
        page.get_by_role("button", name="Ask").click()
        page.locator("[aria-live=polite]", has_text="complete").wait_for(state="attached")
        (sent,) = (one.post_data_json for one in visit.requests if one.url.endswith("/generate"))
        (answer,) = visit.answers
        page.get_by_role("button", name="Copy a link to this view").click()
        link = page.evaluate("navigator.clipboard.readText()")

    wanted = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": 'It\'s "one"'},
        ],
        "adapter": f"orders@{digest}",
        "temperature": 0.5,
        "max_tokens": 5,
        "seed": 3,
    }
    assert json.loads(copied["JSON"]) == wanted
    assert sent == wanted | {"stream": True}
    by_curl = run(["bash", "-c", copied["curl"]])
    assert json.loads(by_curl)["choices"][0]["text"].strip() == answer.strip()
    assert run([sys.executable, "-c", copied["Python"]]).strip() == answer.strip()
    with look(words) as other:
        other.page.goto(link)
        expect(other.page.locator(".who")).to_have_text(f"orders · {digest[:8]}")
        expect(other.page.get_by_label("Message to all columns")).to_have_value('It\'s "one"')
        expect(other.page.get_by_label("System prompt")).to_have_value("Be brief.")
        expect(other.page.get_by_label("Seed")).to_have_value("3")
        assert not [one for one in other.requests if one.method != "GET"]  # a link asks nothing by itself


def run(command: list[str]) -> str:
    environment = os.environ | {"PYTHONPATH": SOURCES}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def test_an_error_is_shown_in_the_servers_words_and_the_other_columns_answer(
    words: Server, look: Look
) -> None:
    with words.client() as http:
        refused = http.post("/generate", json={"prompt": "x", "adapter": "nobody"}).json()["error"]["message"]
    with look(words, errors=("404",)) as visit:
        visit.open("#/compare?c=a:nobody&c=b&n=3")
        visit.ask("hello")
        expect(visit.page.get_by_role("alert").first).to_contain_text(refused)
        expect(visit.page.locator("[aria-live=polite]")).to_have_text("1 answer complete, 1 failed.")
        assert len(visit.answers) == 1
        assert visit.violations() == []


def test_names_and_texts_with_markup_and_unseen_characters_are_only_ever_text(
    words: Server, look: Look
) -> None:
    with look(words, errors=("404", "400")) as visit:
        visit.open()
        visit.page.evaluate("hash => { location.hash = hash }", link_with_names(EVIL + UNSEEN))
        visit.ask(f"{EVIL} {UNSEEN} ok")
        page = visit.page
        expect(page.locator(".answer .text").first).to_contain_text("<script>")
        expect(page.locator(".answer .hidden", has_text="U+202E").first).to_be_visible()
        expect(page.locator(".who .hidden", has_text="U+202E").first).to_be_visible()
        assert page.title() == "Compare · OneBase"
        assert page.locator("main img, main script").count() == 0
        assert not page.evaluate("document.body.innerText.match(/[\\u202e\\u0007]/)")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert visit.faults("phone", "narrow", scrolls=True) == []


def link_with_names(name: str) -> str:
    from urllib.parse import quote, urlencode

    quoted = quote(name, safe="")
    return "#/compare?" + urlencode(
        [("c", "b"), ("c", f"a:{quoted}"), ("c", f"m:{quoted}*0.5"), ("n", "120")]
    )


def test_what_a_link_says_wrongly_is_left_out(words: Server, look: Look) -> None:
    with look(words) as visit:
        visit.open("#/compare?c=b&c=a:x@main&c=m:x*1e9&c=%ff&c=a:%25&t=NaN&n=1e99&seed=-1&m=hi")
        expect(visit.page.locator(".column")).to_have_count(1)
        visit.ask("hello")
        (sent,) = (one.post_data_json for one in visit.requests if one.url.endswith("/generate"))

    assert sent == {
        "messages": [{"role": "user", "content": "hello"}],
        "temperature": 0,
        "max_tokens": 128,
        "stream": True,
    }


@pytest.mark.parametrize("how", [{"size": "narrow"}, pytest.param({"zoom": True}, marks=pytest.mark.full)])
def test_it_fits_360_pixels_and_twice_the_size(words: Server, look: Look, how: dict[str, Any]) -> None:
    # At 200% a window of 1440 by 900 has as much room as one of 720 by 450.
    viewport = {"viewport": {"width": 720, "height": 450}} if how.get("zoom") else {}
    with look(words, how.get("size", "desktop")) as visit:
        if viewport:
            visit.page.set_viewport_size(viewport["viewport"])
        visit.open("#/compare?c=b&c=m:orders*0.5%2Bpirate*0.5")
        visit.ask("hello there")
        visit.page.get_by_role("button", name="Settings").click()
        assert visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        for part in ("System prompt", "Message to all columns"):
            visit.page.get_by_label(part).scroll_into_view_if_needed()
            expect(visit.page.get_by_label(part)).to_be_in_viewport()
            visit.page.keyboard.press("Escape")
        assert visit.violations() == []


def test_the_view_opens_with_what_was_used_last_and_stop_texts_and_top_p_go_with_the_message(
    words: Server, look: Look
) -> None:
    with look(words) as visit:
        page = visit.page
        visit.open("#/compare")
        page.get_by_role("button", name="Choose an adapter").click()
        page.get_by_role("option", name="pirate").click()
        page.wait_for_url("**c=a%3Apirate**")
        visit.page.goto("about:blank")
        visit.open("#/compare")
        expect(page.locator(".who").last).to_have_text("pirate · active")
        page.get_by_role("group", name="Examples").get_by_role("button").first.click()
        expect(page.get_by_label("Message to all columns")).not_to_have_value("")
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Top-p").fill("0.5")
        page.get_by_label("Stop at these texts").fill("END\nand then")
        assert visit.violations() == []
        visit.ask("hello")
    sent = [one.post_data_json for one in visit.requests if one.url.endswith("/generate")]
    assert len(sent) == 2
    assert all((body["top_p"], body["stop"]) == (0.5, ["END", "and then"]) for body in sent)
