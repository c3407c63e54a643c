"""Compare, message after message: conversations, edited messages, tokens that are taken otherwise."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from tests.server.support import Server

from .conftest import EACH_SIZE, Look, Visit

ORDER = "Hi, I'm Anna Keller. I need three blue mugs in Lisbon."


def bodies(visit: Visit) -> list[dict[str, Any]]:
    """What was asked last, in the order of the columns."""
    sent = [one.post_data_json for one in visit.requests if "/generate" in one.url]
    every = [body for one in sent for body in one.get("requests", [one])]
    asked: list[dict[str, Any]] = []
    for body in reversed(every):  # of the newest message
        if body["messages"][-1] != every[-1]["messages"][-1]:
            break
        asked.insert(0, body)
    return asked


def conversation(page: Page, column: int) -> list[str]:
    """What was said in a column, the reader's and its own in turn."""
    return [
        text.strip()
        for reply in page.locator(".column").nth(column).locator(".reply").all()
        for text in (reply.locator(".asked p").inner_text(), reply.locator(".text").inner_text())
    ]


def test_each_column_goes_on_with_its_own_conversation(real: Server, look: Look) -> None:
    with look(real) as visit:
        visit.open("#/compare?c=b&c=a:orders&n=12&s=Be%20brief.")
        visit.ask(ORDER)
        visit.ask("And in red?")
        said = [conversation(visit.page, column) for column in range(2)]
        asked = bodies(visit)
        assert visit.faults(scrolls=True) == []
        visit.page.get_by_role("button", name="Start over").click()
        expect(visit.page.locator(".reply")).to_have_count(0)
        expect(visit.page.get_by_label("Message to all columns")).to_be_focused()

    with real.client() as http:
        for column, body in enumerate(asked):
            roles = [message["role"] for message in body["messages"]]
            assert roles == ["system", "user", "assistant", "user"]
            assert [message["content"].strip() for message in body["messages"][1:]] == said[column][:3]
            alone = http.post("/generate", json={**body, "stream": False}).json()
            assert alone["choices"][0]["text"].strip() == said[column][3]


@pytest.mark.parametrize("size", EACH_SIZE)
def test_a_message_is_edited_and_what_came_after_it_is_asked_again(
    words: Server, look: Look, size: str
) -> None:
    with look(words, size) as visit:
        page = visit.page
        visit.open("#/compare?c=b&c=a:orders&n=6")
        for message in ("one", "two", "three"):
            visit.ask(message)
        page.get_by_role("button", name="Edit this message and send it again").nth(1).click()
        expect(page.get_by_label("Message to all columns")).to_have_value("two")
        assert visit.violations() == []
        page.keyboard.press("Escape")
        expect(page.get_by_label("Message to all columns")).to_have_value("")
        page.get_by_role("button", name="Edit this message and send it again").nth(1).click()
        visit.ask("zwei")
        expect(page.locator(".column").first.locator(".asked p")).to_have_text(["one", "zwei"])
        expect(page.locator(".column").last.locator(".asked p")).to_have_text(["one", "zwei"])
        users = [one["content"] for one in bodies(visit)[0]["messages"] if one["role"] == "user"]

    assert users == ["one", "zwei"]


def test_a_message_that_nobody_answers_is_not_lost(words: Server, look: Look) -> None:
    with look(words, errors=("404",)) as visit:
        visit.open("#/compare?c=a:nobody&c=a:noone&n=3")
        visit.ask("what I had written")
        expect(visit.page.get_by_role("alert")).to_have_count(2)
        expect(visit.page.get_by_label("Message to all columns")).to_have_value("what I had written")
        visit.page.get_by_label("Message to all columns").press("Enter")
        visit.page.locator("[aria-live=polite]", has_text="2 failed").wait_for(state="attached")
        expect(visit.page.locator(".reply")).to_have_count(2)  # in the place of the first ones


def choose(page: Page, size: str) -> None:
    """The second likeliest in place of the third token of the last column: by keyboard, or by touch."""
    tokens = page.locator(".column").last.locator(".token")
    if size == "phone":
        tokens.nth(2).tap()
        panel = page.get_by_role("group", name=re.compile("^Instead of"))
        panel.get_by_role("button", name="Go on with").first.tap()
        return
    tokens.first.focus()
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    expect(tokens.nth(2)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Close what else was likely")).to_be_focused()
    page.keyboard.press("Escape")
    expect(tokens.nth(2)).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")


def test_of_a_long_answer_the_tokens_that_are_seen_are_made_and_the_keys_reach_each(
    words: Server, look: Look
) -> None:
    with look(words, "narrow") as visit:
        visit.open("#/compare?c=b&n=400&p=1")
        visit.ask("Tell me of the sea.")
        group = visit.page.get_by_role("group", name=re.compile("^Tokens"))
        whole, tokens = group.inner_text().replace("↵", ""), group.locator(".token")
        tokens.nth(59).wait_for()
        assert tokens.count() < 300
        tokens.first.focus()
        for _ in range(61):
            visit.page.keyboard.press("ArrowRight")
        expect(group.locator("[data-at='61']")).to_be_focused()
        visit.page.keyboard.press("End")
        expect(tokens.last).to_be_focused()
        assert int(tokens.last.get_attribute("data-at") or 0) > 200
        assert group.inner_text().replace("↵", "") == whole


@pytest.mark.parametrize("size", EACH_SIZE)
def test_another_token_is_chosen_and_the_answer_goes_on_from_it(real: Server, look: Look, size: str) -> None:
    with look(real, size, has_touch=size == "phone") as visit:
        page = visit.page
        visit.open("#/compare?c=b&c=a:pirate&n=10")
        page.get_by_role("button", name="Probabilities").click()
        visit.ask(ORDER)
        tokens = page.locator(".column").last.locator(".token")
        tokens.first.wait_for()  # a frame after the text
        before = "".join(tokens.all_inner_texts())
        if size == "desktop":
            tokens.nth(1).hover()
            expect(page.get_by_role("group", name=re.compile("^Instead of"))).to_be_visible()
            page.mouse.move(0, 0)
            expect(page.get_by_role("group", name=re.compile("^Instead of"))).to_have_count(0)
        tokens.nth(2).click()
        assert visit.violations() == []
        page.keyboard.press("Escape")
        choose(page, size)
        page.locator("[aria-live=polite]", has_text="1 answer complete.").wait_for(state="attached")
        expect(page.get_by_text("Continued from another token.")).to_be_visible()
        tokens.first.wait_for()
        after = "".join(tokens.all_inner_texts())
        (body,) = bodies(visit)

    with real.client() as http:
        asked = {key: value for key, value in body.items() if key != "stream"}
        first = {**asked, "messages": asked["messages"][:1], "continue_final_message": False}
        logprobs = http.post("/generate", json=first).json()["choices"][0]["logprobs"]
        likeliest = sorted(logprobs["top_logprobs"][2].items(), key=lambda one: -one[1])
        other = next(name for name, _ in likeliest if name != logprobs["tokens"][2])
        prefix = "".join(logprobs["tokens"][:2])
        assert asked["messages"][1] == {"role": "assistant", "content": prefix + other}
        goes_on = http.post("/generate", json=asked).json()["choices"][0]["text"]
    assert before.startswith("".join(logprobs["tokens"][:3]))
    assert after == prefix + other + goes_on


def test_a_schema_and_tools_go_with_the_message_and_the_servers_errors_are_shown(
    real: Server, look: Look
) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    with look(real, errors=("400",)) as visit:
        page = visit.page
        visit.open("#/compare?c=b&n=30")
        page.get_by_role("button", name="Settings").click()
        page.get_by_text("JSON schema and tools").click()
        page.get_by_label("JSON schema that answers keep to").fill(json.dumps(schema))
        visit.ask("Is it?")
        assert json.loads(visit.answers[0])["ok"] in (True, False)
        page.get_by_label("JSON schema that answers keep to").fill('{"type": 7}')
        visit.ask("Is it now?")
        alert = page.locator(".answer").get_by_role("alert")
        with real.client() as http:
            refused = http.post("/generate", json={"prompt": "x", "guided_json": '{"type": 7}'})
        expect(alert).to_contain_text(refused.json()["error"]["message"][:60])
        page.get_by_label("JSON schema that answers keep to").fill("")
        page.get_by_label("Tools that answers may call").fill("[{")
        expect(page.get_by_text("This is not JSON yet")).to_be_visible()
        expect(page.get_by_role("button", name="Ask", exact=True)).to_be_disabled()
        assert visit.faults(scrolls=True) == []
        page.get_by_label("Tools that answers may call").fill(json.dumps([tool]))
        visit.ask("How is the weather?")
        assert bodies(visit)[0]["tools"] == [tool]
        page.get_by_label("Tools that answers may call").fill('[{"type": "magic"}]')
        visit.ask("And now?")
        expect(alert.last).to_contain_text("tools[0]")
