"""Tenant: what one customer has, uses and may, and that nobody sees another's."""

from __future__ import annotations

import re
from typing import Any

import pytest
from openai import OpenAI
from playwright.sync_api import Route, expect
from tests.server.access import Keys, client_with
from tests.server.support import Server, upload
from tests.server.training_support import ended, make_job, wait_job

from .conftest import EACH_SIZE, Look, Visit

STEP = 300


def hours_long(route: Route) -> None:
    """Pass the server's answer on as if it had run for an hour; the last point is as it came."""
    answer = route.fetch()
    load: Any = answer.json()
    (*_, last) = load["data"]
    earlier = [last | {"at": last["at"] - STEP * ago, "seconds": STEP} for ago in range(12, 0, -1)]
    route.fulfill(response=answer, json=load | {"data": [*earlier, last]})


def sign_in(visit: Visit, view: str, key: str) -> None:
    visit.open(view)
    visit.page.get_by_label("API key", exact=True).fill(key)
    visit.page.keyboard.press("Enter")


@pytest.mark.parametrize("size", EACH_SIZE)
def test_an_admin_sees_each_tenant_with_what_it_has_uses_and_changed(
    keyed: Server, keys: Keys, look: Look, size: str
) -> None:
    admin, tenant = keys.make("admin"), f"shop-{size}"
    theirs = keys.make("adapters", "generate", "train", tenant=tenant, name="<i>web</i>")
    with client_with(keyed, admin) as http, client_with(keyed, theirs) as mine:
        keyed.wait_for(lambda: http.get("/v1/key").status_code == mine.get("/v1/key").status_code == 200)
        http.post(f"/v1/tenants/{tenant}", json={"quotas": {"requests": 60, "adapters": 5}})
        for weights in (b"one", b"two"):
            upload(mine, "orders", weights, query="wait=true&activate=true")
        for _ in range(2):
            mine.post("/generate", json={"prompt": "a b c", "adapter": "orders", "max_tokens": 4})
    with look(keyed, size, errors=("401",)) as visit:
        page = visit.page
        page.route("**/v1/load*", hours_long)
        sign_in(visit, "#/server", admin)
        row = page.get_by_role("table", name="Tenants").get_by_role("row").filter(has_text=tenant)
        expect(row).to_contain_text("ms /")  # its wait in the queue
        row.get_by_role("link", name=tenant).click()
        expect(page.get_by_role("heading", level=1)).to_contain_text(tenant)
        expect(page).to_have_title("Tenant · OneBase")
        asked = page.locator(".tiles div", has_text="Requests this month").locator("dd")
        expect(asked).to_have_text("2")
        expect(page.locator(".tiles div", has_text="Wait").locator("dd")).to_contain_text("ms")
        expect(page.get_by_role("region", name="Quotas")).to_contain_text("2 of 60")
        expect(page.get_by_role("img", name="Requests by day")).to_be_visible()
        adapter = page.get_by_role("table", name="Adapters").get_by_role("row").filter(has_text="orders")
        expect(adapter).to_contain_text("Active")
        expect(adapter.get_by_role("link")).to_have_count(0)  # its page is the tenant's
        expect(page.get_by_role("table", name="Keys")).to_contain_text("<i>web</i>")
        expect(page.get_by_role("region", name="Jobs")).to_contain_text("It has trained nothing.")
        expect(page.get_by_role("region", name="Last changes")).to_contain_text("adapter.activated orders")
        assert visit.violations() == []
        assert visit.too_wide() == []
        page.get_by_label("Tenant", exact=True).select_option("default")
        expect(page.get_by_role("heading", level=1)).to_contain_text("default")
        page.get_by_role("link", name="Server").first.click()
        page.get_by_label("Price per million prompt tokens").fill("1000000")
        row.get_by_role("link", name=tenant).click()
        expect(page.locator(".tiles div", has_text="Spend").locator("dd")).to_contain_text(".00")


def test_a_tenants_key_sees_its_own_page_whatever_a_link_says(keyed: Server, keys: Keys, look: Look) -> None:
    other = keys.make("adapters", "generate", tenant="rival", name="their secret")
    key = keys.make("adapters", "generate", tenant="mine-alone")
    with client_with(keyed, other) as http, client_with(keyed, key) as own:
        keyed.wait_for(lambda: http.get("/v1/key").status_code == own.get("/v1/key").status_code == 200)
        upload(http, "rivals-adapter", b"rival", query="wait=true&activate=true")
        upload(own, "own-adapter", b"own", query="wait=true&activate=true")
    with look(keyed, errors=("401",)) as visit:
        page = visit.page
        sign_in(visit, "#/tenant?name=rival", key)
        expect(page.get_by_role("heading", level=1)).to_contain_text("mine-alone")
        link = page.get_by_role("table", name="Adapters").get_by_role("link", name="own-adapter")
        expect(link).to_have_attribute("href", "#/adapters?name=own-adapter")
        expect(page.locator("body")).not_to_contain_text("rival")
        expect(page.locator("body")).not_to_contain_text("their secret")
        expect(page.get_by_role("link", name="Server")).to_have_count(0)
        assert visit.violations() == []
        assert not [one.url for one in visit.requests if "rival" in one.url.partition("#")[0]]


def test_what_was_activated_is_marked_on_the_latency_by_keyboard_and_in_words(
    keyed: Server, keys: Keys, look: Look
) -> None:
    key = keys.make("adapters", "generate", tenant="marked", name="deploys")
    with client_with(keyed, key) as http:
        keyed.wait_for(lambda: http.get("/v1/key").status_code == 200)
        for weights in (b"first", b"second"):
            upload(http, "tickets", weights, query="wait=true&activate=true")
        http.post("/v1/adapters/tickets/rollback", json={})
    with look(keyed, errors=("401",)) as visit:
        page = visit.page
        page.route("**/v1/load*", hours_long)
        sign_in(visit, "#/tenant", key)
        figure = page.get_by_role("figure", name="Time to the first token")
        mark = figure.get_by_role("button", name="tickets:")
        expect(mark).to_have_count(1)  # at one time: three changes
        expect(mark).to_have_accessible_name(re.compile("activated by deploys.*rolled back to"))
        figure.get_by_role("button", name="Time to the first token: closer").focus()
        page.keyboard.press("Tab")
        expect(mark).to_be_focused()
        expect(figure.locator(".what")).to_contain_text("rolled back to")
        assert visit.violations() == []
        page.keyboard.press("Escape")
        expect(figure.locator(".what")).to_have_count(0)
        figure.get_by_text("3 changes in this time").click()
        expect(figure.get_by_role("listitem")).to_have_count(3)
        expect(figure.locator(".unseen").first).to_contain_text("p50:")
        page.goto(f"{visit.url}/console#/adapters?name=tickets")
        expect(figure.get_by_role("button", name="tickets:")).to_have_count(1)


def test_a_key_is_called_by_its_name_and_a_job_by_its_adapter_wherever_they_are_seen(
    keyed: Server, keys: Keys, look: Look
) -> None:
    key = keys.make("adapters", "generate", "train", tenant="named", name="nightly")
    with client_with(keyed, key) as http:
        keyed.wait_for(lambda: http.get("/v1/key").status_code == 200)
    with OpenAI(base_url=f"{keyed.url}/v1", api_key=key, max_retries=0) as client:
        job = make_job(client, "rows", extra={"name": "tickets", "activate": "always"})
        wait_job(keyed, client, job.id, ended)
    with look(keyed, errors=("401",)) as visit:
        page = visit.page
        sign_in(visit, "#/tenant", key)
        changes = page.get_by_role("region", name="Last changes")
        made = changes.get_by_role("listitem").filter(has_text="job.created")
        expect(made).to_contain_text("job.created tickets")
        expect(made).to_contain_text("by nightly")
        expect(changes.get_by_role("listitem").filter(has_text="file.added rows.jsonl")).to_have_count(1)
        activated = changes.get_by_role("listitem").filter(has_text="adapter.activated")
        expect(activated).to_contain_text("by nightly through training")
        expect(made).not_to_contain_text("ftjob-")
        made.get_by_role("link", name="tickets").click()
        expect(page.get_by_role("heading", name="tickets")).to_be_visible()
        expect(page.locator("article header")).to_contain_text("by nightly")
        page.get_by_role("link", name="Its adapter").click()
        version = page.get_by_role("table", name="Versions").get_by_role("row").nth(1)
        expect(version).to_contain_text("Trained job")
        expect(version.get_by_role("link", name="job ")).to_have_attribute("href", f"#/training?job={job.id}")
        assert visit.faults() == []
