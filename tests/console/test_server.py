"""Server: what an operator sees of memory, rows, speed, jobs, tenants, keys and the audit log."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import expect
from tests.server.access import Keys, client_with
from tests.server.support import Server, Starter, make_folder, pace, upload

from .conftest import EACH_SIZE, Look


@pytest.mark.parametrize("size", EACH_SIZE)
def test_rows_memory_and_speed_are_those_of_the_server(
    serve_scripted: Starter, tmp_path: Path, look: Look, size: str
) -> None:
    for name in ("orders", "pirate"):
        make_folder(tmp_path, name)
    with (
        pace(tmp_path) as (environment, step),
        serve_scripted("paced", "--adapters-dir", str(tmp_path), environment=environment) as server,
        look(server) as asking,
        look(server, size, color_scheme="dark" if size == "phone" else "light") as visit,
    ):
        page = visit.page
        visit.open("#/server")
        rows = page.locator(".tiles div", has_text="Rows that run").locator("dd")
        asking.open("#/compare?c=a:orders&c=b&n=4000&m=one%20two%20three")
        asking.page.get_by_role("button", name="Ask all 2").click()
        server.step_until_rows(step, 2)
        expect(rows).to_contain_text("2")
        expect(page.get_by_role("figure", name="Tokens a second")).to_be_visible()
        with server.client() as http:
            status = http.get("/status").json()
        expect(page.locator(".facts")).to_contain_text(f"{status['info']['max_length']:,} tokens")
        assert visit.violations() == []
        assert visit.too_wide() == []
        page.get_by_role("button", name="Pin pirate", exact=True).click()
        expect(page.get_by_role("button", name="Pin pirate no longer")).to_be_visible()
        page.locator(".chip", has_text="orders").drag_to(page.locator(".keep"))
        expect(page.locator(".keep .chip")).to_have_count(2)
        with server.client() as http:
            assert [one["pinned"] for one in http.get("/v1/adapters").json()["data"]] == [True, True]
        asking.page.get_by_role("button", name="Stop").click()
        step(64)
        expect(rows).to_contain_text("0")


@pytest.mark.parametrize("size", EACH_SIZE)
def test_tenants_keys_and_the_audit_log_are_an_admins(
    keyed: Server, keys: Keys, look: Look, size: str
) -> None:
    for _ in range(201):
        keys.make("adapters", tenant="crowd")
    admin, tenant = keys.make("admin"), f"acme-{size}"
    other = keys.make("adapters", tenant=tenant, name="<i>web</i>")
    with client_with(keyed, admin) as http, client_with(keyed, other) as theirs:
        keyed.wait_for(lambda: theirs.get("/v1/key").status_code == http.get("/v1/key").status_code == 200)
        http.post(f"/v1/tenants/{tenant}", json={"quotas": {"bytes": 5_000_000, "requests": 60}})
        upload(theirs, "theirs", b"theirs", query="wait=true&activate=true")
    with look(keyed, size, errors=("401",)) as visit:
        page = visit.page
        visit.open("#/server")
        page.get_by_label("API key", exact=True).fill(admin)
        page.keyboard.press("Enter")
        row = page.get_by_role("table", name="Tenants").get_by_role("row").filter(has_text=tenant)
        expect(row).to_contain_text("requests 60, bytes 5.0 MB")
        key = page.get_by_role("table", name="Keys").get_by_role("row").filter(has_text=keys.record(other).id)
        expect(key).to_contain_text("<i>web</i>")
        expect(page.get_by_text("The newest 200 of")).to_be_visible()
        expect(page.get_by_role("table", name="Keys").get_by_role("row")).to_have_count(201)
        log = page.get_by_role("table", name="Audit log")
        page.get_by_label("Tenant", exact=True).fill(tenant)
        page.get_by_label("What was changed").select_option("adapter")
        activated = log.get_by_role("row").filter(has_text="adapter.activated").filter(has_text=tenant)
        expect(activated).to_contain_text(keys.record(other).id)
        expect(log.get_by_role("row").filter(has_text="tenant.")).to_have_count(0)
        assert visit.violations() == []
        assert visit.too_wide() == []
        page.get_by_label("Its name or id, whole").fill("nothing")
        expect(page.get_by_text("Nothing of this kind was changed.")).to_be_visible()
        page.wait_for_url("**target=nothing**")


def test_the_view_is_not_shown_to_a_key_without_admin(keyed: Server, keys: Keys, look: Look) -> None:
    key = keys.make("adapters", "generate", "train")
    with client_with(keyed, key) as http:
        keyed.wait_for(lambda: http.get("/v1/key").status_code == 200)
    with look(keyed, errors=("401",)) as visit:
        visit.open("#/server")
        visit.page.get_by_label("API key", exact=True).fill(key)
        visit.page.keyboard.press("Enter")
        expect(visit.page.get_by_role("link", name="Training")).to_be_visible()
        expect(visit.page.get_by_role("link", name="Server")).to_have_count(0)
        expect(visit.page).to_have_title("Compare · OneBase")
    assert not [one for one in visit.requests if one.url.endswith(("/status", "/v1/keys"))]
