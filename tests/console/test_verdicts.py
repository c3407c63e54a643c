"""Compare, to judge: samples of one column, blind comparison, and answers that are corrected."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from playwright.sync_api import expect
from tests.server.access import Keys
from tests.server.support import Server

from .conftest import EACH_SIZE, Look
from .test_frame import known


def test_what_a_column_usually_says_is_counted(real: Server, look: Look) -> None:
    with look(real) as visit:
        page = visit.page
        visit.open("#/compare?c=b&c=a:orders&n=3&seed=5&m=Say%20yes%20or%20no.")
        page.get_by_role("button", name="What does orders usually say?").click()
        page.get_by_label("Samples").fill("9")
        page.get_by_role("button", name="Ask 9 times").click()
        page.locator("[aria-live=polite]", has_text="samples complete").wait_for(state="attached")
        counts = [int(text) for text in page.locator(".times b").all_inner_texts()]
        texts = page.get_by_role("dialog").locator("li p").all_inner_texts()
        sent = next(one.post_data_json for one in visit.requests if one.url.endswith("/generate"))
        assert visit.faults(scrolls=True) == []
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_have_count(0)

    with real.client() as http:
        choices = http.post("/generate", json={**sent, "stream": False}).json()["choices"]
    told = Counter(choice["text"].strip() for choice in choices)
    assert (sent["n"], sent["temperature"], sent["adapter"]) == (9, 1, "orders")
    assert sum(counts) == 9
    assert sorted(counts) == sorted(told.values())
    assert {text.strip() for text in texts} == {text or "Nothing." for text in told}


@pytest.mark.parametrize("size", EACH_SIZE)
def test_two_columns_are_judged_blindly_by_one_key_each(
    words: Server, look: Look, size: str, tmp_path: Path
) -> None:
    with look(words, size) as visit:
        page = visit.page
        visit.open("#/compare?c=b&c=a:orders&n=4")
        page.get_by_role("button", name="Blind A/B").click()
        for key in ("1", "2", "0"):
            visit.ask("which is 1 or 2?")
            expect(page.get_by_role("group", name="Which answer is better?")).to_be_focused()
            main = page.locator("main .blind .pair").inner_text()
            assert not re.search("orders|smollm2", main)
            if key == "1":
                assert visit.violations() == []
            page.keyboard.press(key)
            expect(page.locator(".blind h2 bdi")).to_have_count(2)
        assert visit.violations() == []
        expect(page.get_by_role("row")).to_have_count(2)
        cells = page.get_by_role("row").last.locator("td, th").all_inner_texts()
        wins, ties, losses = (int(cell) for cell in cells[1:4])
        assert (wins + losses, ties, cells[0], cells[5]) == (2, 1, "orders", "3")
        with page.expect_download() as loading:
            page.get_by_role("button", name="Export JSON").click()
        exported = json.loads(Path(loading.value.path()).read_text())
        page.reload()
        page.get_by_role("button", name="Blind A/B").click()
        expect(page.get_by_role("row")).to_have_count(2)  # kept in this browser
        page.get_by_role("button", name="Forget all verdicts").click()
        expect(page.get_by_role("row")).to_have_count(0)

    assert [one["winner"] for one in exported["verdicts"]] == [1, 2, 0]
    for one in exported["verdicts"]:
        assert sorted(one["titles"]) == ["orders", "smollm2-135m-instruct"]
        labels = dict(zip(one["titles"], one["answered"], strict=True))
        assert labels["smollm2-135m-instruct"] is None
        assert labels["orders"].startswith("orders@")
    (line,) = exported["tally"]
    assert (line["wins"], line["ties"]) == ([wins, losses], ties)


def test_a_link_to_columns_ends_the_blind_judgement_that_hides_them(words: Server, look: Look) -> None:
    with look(words) as visit:
        page = visit.page
        visit.open("#/compare?c=b&c=a:orders&n=4")
        page.get_by_role("button", name="Blind A/B").click()
        expect(page.locator(".column .who")).to_have_count(0)
        page.get_by_role("link", name="Adapters").click()
        page.get_by_role("link", name="pirate").or_(page.get_by_role("button", name="pirate")).first.click()
        page.get_by_role("link", name="Ask it").click()
        expect(page.locator(".column .who").last).to_contain_text("pirate")


def test_a_corrected_answer_becomes_a_row_of_a_training_file(words: Server, look: Look) -> None:
    evil = "<b>Right</b> \u202eanswer"
    with look(words) as visit:
        page = visit.page
        visit.open("#/compare?c=b&n=4&s=Be%20exact.")
        visit.ask("first")
        visit.ask("second")
        first = visit.answers[0]
        page.get_by_role("button", name="Fix answer", exact=True).last.click()
        expect(page.get_by_label("What should it have said?")).to_be_focused()
        page.get_by_label("What should it have said?").fill(evil)
        page.get_by_role("button", name="Save as a training row").click()
        expect(page.locator(".answer .corrected")).to_contain_text("<b>Right</b>")
        page.get_by_role("button", name="Training file").click()
        assert visit.faults(scrolls=True) == []
        with page.expect_download() as loading:
            page.get_by_role("button", name="Download JSONL").click()
        downloaded = Path(loading.value.path()).read_text()
        page.get_by_role("button", name="Upload to the server").click()
        made = page.get_by_role("dialog").get_by_role("status").locator(".code").inner_text()
        page.keyboard.press("Escape")
        visit.ask("third")  # what was corrected is what was said
        sent = [one for one in visit.requests if one.url.endswith("/generate")][-1].post_data_json
        page.get_by_role("button", name="Training file").click()
        page.get_by_role("button", name="Remove this row").click()
        expect(page.get_by_role("heading", name="Training file: 0 rows")).to_be_visible()

    (row,) = map(json.loads, downloaded.splitlines())
    assert row["messages"] == [
        {"role": "system", "content": "Be exact."},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "second"},
        {"role": "assistant", "content": evil},
    ]
    assert sent["messages"][:-1] == row["messages"]
    with words.client() as http:
        assert http.get(f"/v1/files/{made}/content").text == downloaded
        assert http.get(f"/v1/files/{made}").json()["purpose"] == "fine-tune"


def test_without_the_scope_to_train_a_row_is_only_downloaded(keyed: Server, keys: Keys, look: Look) -> None:
    key = known(keyed, keys.make("generate"))
    with look(keyed, errors=("401",)) as visit:
        page = visit.page
        visit.open("#/compare?c=b&n=4")
        page.get_by_label("API key", exact=True).fill(key)
        page.keyboard.press("Enter")
        visit.ask("hello")
        page.get_by_role("button", name="Fix answer", exact=True).click()
        page.get_by_role("button", name="Save as a training row").click()
        page.get_by_role("button", name="Training file").click()
        expect(page.get_by_role("button", name="Download JSONL")).to_be_visible()
        expect(page.get_by_role("button", name="Upload to the server")).to_have_count(0)


def test_several_adapters_judge_an_answer_each_by_an_instruction_of_its_own(real: Server, look: Look) -> None:
    with look(real) as visit:
        page = visit.page
        visit.open("#/compare?c=b&n=5&m=Hello")
        visit.ask("Hello")
        page.get_by_role("button", name="Judge").click()
        dialog = page.get_by_role("dialog")
        for name, instruction in (("orders", "Is it an order?"), ("pirate", "Is it polite?")):
            dialog.get_by_label("Adapter that judges").fill(name)
            dialog.get_by_role("button", name="Add").click()
            dialog.get_by_label(f"{name} is asked").fill(instruction)
        dialog.get_by_role("button", name="Ask all 2").click()
        page.locator("[aria-live=polite]", has_text="2 verdicts complete").wait_for(state="attached")
        verdicts = {
            name: dialog.get_by_role("group", name=f"Verdict of {name}").locator("p").first.inner_text()
            for name in ("orders", "pirate")
        }
        sent = [one.post_data_json for one in visit.requests if one.url.endswith("/generate")][1:]
        assert visit.faults(scrolls=True) == []
        page.keyboard.press("Escape")
        expect(dialog).to_have_count(0)
        page.get_by_role("button", name="Judge").click()
        expect(dialog.get_by_label("pirate is asked")).to_have_value("Is it polite?")

    assert {one["adapter"]: one["instruction"] for one in sent} == {
        "orders": "Is it an order?",
        "pirate": "Is it polite?",
    }
    with real.client() as http:
        for one in sent:
            assert [message["role"] for message in one["messages"]] == ["user", "assistant"]
            said = http.post("/generate", json={**one, "stream": False}).json()["choices"][0]["text"]
            assert verdicts[one["adapter"]].split() == said.split()
