"""Server: what an operator sees of memory, rows, speed, jobs, tenants, keys and the audit log."""

from __future__ import annotations

import json
import re
from pathlib import Path

from playwright.sync_api import expect
from tests.server.access import Keys, bearer, client_with
from tests.server.support import Server, Starter, make_folder, pace, upload

import onebase_server

from .conftest import Look


def test_rows_memory_and_speed_are_those_of_the_server(
    serve_scripted: Starter, tmp_path: Path, look: Look
) -> None:
    for name in ("orders", "pirate"):
        make_folder(tmp_path, name)
    with (
        pace(tmp_path) as (environment, step),
        serve_scripted("paced", "--adapters-dir", str(tmp_path), environment=environment) as server,
        look(server) as asking,
        look(server) as visit,
    ):
        page = visit.page
        visit.open("#/server")
        rows = page.locator(".tiles div", has_text="Running").locator("dd")
        asking.open("#/compare?c=a:orders&c=b&n=4000&m=one%20two%20three")
        asking.page.get_by_role("button", name="Ask all 2").click()
        server.step_until_rows(step, 2)
        expect(rows).to_contain_text("2")
        expect(page.get_by_role("figure", name="Tokens a second")).to_be_visible()
        expect(page.get_by_text("running since")).to_contain_text(f"OneBase {onebase_server.__version__}")
        expect(page.get_by_role("img", name="Memory, to one scale")).to_be_visible()
        with server.client() as http:
            status = http.get("/status").json()
        serves = page.get_by_role("region", name="What it serves")
        expect(serves).to_contain_text(f"{status['info']['max_length']:,} tokens")
        machine = page.get_by_role("region", name="Machine")
        expect(machine.locator("dd").first).to_contain_text(re.compile(r"\d%.* core"))
        expect(machine).to_contain_text("No figures of the GPU:")
        assert visit.faults() == []
        page.get_by_role("button", name="Pin pirate", exact=True).click()
        expect(page.get_by_role("button", name="Pin pirate no longer")).to_be_visible()
        page.locator(".chip", has_text="orders").drag_to(page.locator(".keep"))
        expect(page.locator(".keep .chip")).to_have_count(2)
        with server.client() as http:
            assert [one["pinned"] for one in http.get("/v1/adapters").json()["data"]] == [True, True]
        asking.page.get_by_role("button", name="Stop").click()
        step(64)
        expect(rows).to_contain_text("0")
        latency = page.locator(".tiles div", has_text="First token, p95").locator("dd")
        expect(latency).to_contain_text("s")  # known once the requests are over


def test_tenants_keys_and_the_audit_log_are_an_admins(keyed: Server, keys: Keys, look: Look) -> None:
    for _ in range(201):
        keys.make("adapters", tenant="crowd")
    admin, tenant = keys.make("admin"), "acme"
    other = keys.make("adapters", tenant=tenant, name="<i>web</i>")
    with client_with(keyed, admin) as http, client_with(keyed, other) as theirs:
        keyed.wait_for(lambda: theirs.get("/v1/key").status_code == http.get("/v1/key").status_code == 200)
        http.post(f"/v1/tenants/{tenant}", json={"quotas": {"bytes": 5_000_000, "requests": 60}})
        upload(theirs, "theirs", b"theirs", query="wait=true&activate=true")
    with look(keyed, errors=("401",)) as visit:
        page = visit.page
        visit.open("#/server")
        page.get_by_label("API key", exact=True).fill(admin)
        page.keyboard.press("Enter")
        row = page.get_by_role("table", name="Tenants").get_by_role("row").filter(has_text=tenant)
        expect(row).to_contain_text("0 of 60")
        expect(row).to_contain_text("of 5.0 MB")
        expect(row.get_by_role("meter")).to_have_count(2)
        key = page.get_by_role("table", name="Keys").get_by_role("row").filter(has_text=keys.record(other).id)
        expect(key).to_contain_text("<i>web</i>")
        rows = page.get_by_role("table", name="Keys").get_by_role("row")
        expect(rows).to_have_count(11)
        page.get_by_role("button", name="more keys").click()
        expect(page.get_by_text("The newest 200 of")).to_be_visible()
        expect(rows).to_have_count(201)
        page.get_by_label("Tenants and keys of").fill(tenant)
        expect(rows).to_have_count(2)
        log = page.get_by_role("table", name="Audit log")
        page.get_by_label("Tenant", exact=True).fill(tenant)
        page.get_by_label("What was changed").select_option("adapter")
        activated = log.get_by_role("row").filter(has_text="adapter.activated").filter(has_text=tenant)
        expect(activated).to_contain_text("<i>web</i>")  # a key by its name
        expect(log.get_by_role("row").filter(has_text="tenant.")).to_have_count(0)
        assert visit.faults() == []
        expect(activated.get_by_role("link", name="theirs")).to_have_attribute(
            "href", "#/adapters?name=theirs"
        )
        page.get_by_label("Search", exact=True).fill("THEIRS")  # as it is written, and a part is enough
        expect(activated).to_be_visible()
        page.get_by_label("Search", exact=True).fill("nothing")
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


def test_an_admin_makes_changes_and_deletes_gates(keyed: Server, keys: Keys, look: Look) -> None:
    admin = keys.make("admin", name="boss")
    with client_with(keyed, admin) as http:
        keyed.wait_for(lambda: http.get("/v1/key").status_code == 200)
        with look(keyed, errors=("401", "400", "422", "ERR_FAILED")) as visit:
            page = visit.page
            visit.open("#/server")
            page.get_by_label("API key", exact=True).fill(admin)
            page.keyboard.press("Enter")
            part = page.get_by_role("region", name="Gates")
            part.get_by_role("button", name="New rule").click()
            dialog = page.get_by_role("dialog", name="Gates of an activation")
            dialog.get_by_label("Names, as a pattern").fill("ruled-*")
            dialog.get_by_role("button", name="Set the gates").click()
            expect(dialog.get_by_role("alert")).to_contain_text("name one (signature, proof")
            dialog.get_by_label("Signers, one a line").fill("acme\nreleases, inc")
            dialog.get_by_label("Proof").select_option("exact")
            dialog.get_by_label("People who must approve it").fill("1")
            dialog.get_by_label("Not worse than the active version").check()
            dialog.get_by_label("Margin of the score").fill("0.2")
            dialog.get_by_label("Rows of a slice").fill("10")
            dialog.get_by_label("Slices that must be judged").fill("en, us")
            assert visit.faults("phone") == []
            dialog.get_by_role("button", name="Set the gates").click()
            row = part.get_by_role("row").filter(has_text="ruled-*")
            expect(row).to_contain_text("signed by acme or releases, inc")
            expect(row).to_contain_text("proved, bit for bit")
            expect(row).to_contain_text("by boss")
            assert visit.faults("phone", "narrow") == []
            row.get_by_label("More for the gates of ruled-*, *").click()
            page.get_by_role("button", name="Edit", exact=True).click()
            expect(dialog).to_contain_text("takes the place of the rule with these patterns")
            for pattern in (
                "Names, as a pattern",
                "Tenants, as a pattern",
            ):  # another one would be another rule
                expect(dialog.get_by_label(pattern)).not_to_be_editable()
            dialog.get_by_label("People who must approve it").fill("2")
            page.route(
                "**/v1/gates", lambda one: one.abort() if one.request.method == "GET" else one.continue_()
            )
            dialog.get_by_role("button", name="Set the gates").click()
            expect(dialog).to_have_count(0)  # it is set, though the list could not be had
            page.unroute("**/v1/gates")
            expect(row).to_contain_text("approved by 2")
            part.get_by_role("button", name="New rule").click()
            expect(dialog.get_by_label("Names, as a pattern")).to_be_editable()
            dialog.get_by_role("button", name="Cancel").click()
            (rule,) = (one for one in http.get("/v1/gates").json()["data"] if one["name"] == "ruled-*")
            evaluation = rule["evaluation"]
            assert (rule["signature"], rule["proof"]) == (["acme", "releases, inc"], "exact")
            assert (evaluation["margin"], evaluation["confidence"], evaluation["rows"]) == (0.2, 0.95, 10)
            assert (evaluation["slices"], rule["approvals"], rule["weights"]) == (["en, us"], 2, None)
            row.get_by_label("More for the gates of ruled-*, *").click()
            page.get_by_role("button", name="Delete", exact=True).click()
            asked = page.get_by_role("dialog", name="Delete the gates of ruled-*")
            asked.get_by_role("button", name="Delete").click()
            expect(row).to_have_count(0)
            assert not [one for one in http.get("/v1/gates").json()["data"] if one["name"] == "ruled-*"]


def test_a_key_is_made_limited_and_revoked_and_tokens_have_a_price(
    keyed: Server, keys: Keys, look: Look
) -> None:
    admin = keys.make("admin")
    with client_with(keyed, admin) as http:
        keyed.wait_for(lambda: http.get("/v1/key").status_code == 200)
        with look(keyed, errors=("401",)) as visit:
            page = visit.page
            visit.open("#/server?new=key")
            page.get_by_label("API key", exact=True).fill(admin)
            page.keyboard.press("Enter")
            dialog = page.get_by_role("dialog", name="New key")
            dialog.get_by_label("Tenant").fill("made-here")
            dialog.get_by_label("Name, for people").fill("shop")
            dialog.get_by_role("checkbox", name="adapters send").check()
            dialog.get_by_label("Requests a minute").fill("7")
            assert visit.violations() == []
            dialog.get_by_role("button", name="Make the key").click()
            told = page.get_by_role("status").filter(has_text="shown this once").locator(".code")
            made = told.inner_text()
            keyed.wait_for(
                lambda: http.get("/v1/key", headers=bearer(made)).json().get("tenant") == "made-here"
            )
            page.get_by_label("Tenants and keys of").fill("made-here")
            row = page.get_by_role("table", name="Keys").get_by_role("row").filter(has_text="shop")
            expect(row).to_contain_text("0 of 7")
            identity = keys.record(made).id
            page.get_by_label(f"More for {identity}").click()
            page.get_by_role("button", name="Edit quotas", exact=True).click()
            page.get_by_role("dialog").get_by_label("Requests a minute").fill("9")
            page.get_by_role("dialog").get_by_role("button", name="Save").click()
            expect(row).to_contain_text("0 of 9")
            page.get_by_role("button", name="Edit quotas of made-here").click()
            page.get_by_role("dialog").get_by_label("Adapters").fill("3")
            page.get_by_role("dialog").get_by_role("button", name="Save").click()
            tenant = page.get_by_role("table", name="Tenants").get_by_role("row").filter(has_text="made-here")
            expect(tenant).to_contain_text("0 of 3")
            assert visit.violations() == []
            used = http.post(
                "/generate", headers=bearer(made), json={"prompt": "a b c", "max_tokens": 4}
            ).json()["usage"]
            expect(row).to_contain_text("1 of 9")
            page.get_by_label("Price per million prompt tokens").fill("1000000")
            expect(tenant).to_contain_text(f"{used['prompt_tokens']}.00")
            page.get_by_label(f"More for {identity}").click()
            page.get_by_role("button", name="Revoke").click()
            page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
            expect(row).to_contain_text("revoked")
            keyed.wait_for(lambda: http.get("/v1/key", headers=bearer(made)).status_code == 401)


def test_a_batch_is_sent_and_its_answers_are_taken_and_files_are_found_and_deleted(
    words: Server, look: Look
) -> None:
    lines = [
        {
            "custom_id": str(one),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "pirate", "prompt": f"{one} hats", "max_tokens": 3},
        }
        for one in range(3)
    ]
    content = "".join(json.dumps(one) + "\n" for one in lines)
    with look(words) as visit:
        page = visit.page
        visit.open("#/batches")
        expect(page.get_by_text("There is no batch.")).to_be_visible()
        page.get_by_role("button", name="New batch").click()
        page.locator("dialog input[type=file]").set_input_files(
            [{"name": "hats.jsonl", "mimeType": "application/jsonl", "buffer": content.encode()}]
        )
        expect(page.get_by_label("Endpoint")).to_have_value("/v1/completions")  # as its first line says
        assert visit.violations() == []
        page.get_by_role("button", name="Answer them").click()
        row = page.get_by_role("table", name="Batches").get_by_role("row").filter(has_text="hats.jsonl")
        expect(row).to_contain_text("3 of 3")
        expect(row).to_contain_text("Done")
        assert visit.violations() == []
        page.get_by_label("More for hats.jsonl").click()
        with page.expect_download() as saved:
            page.get_by_role("button", name="Download the answers").click()
        answers = Path(saved.value.path()).read_text().splitlines()
        assert {json.loads(line)["custom_id"] for line in answers} == {"0", "1", "2"}
        page.get_by_label("Search batches and files").fill("hats requests")
        expect(page.get_by_text("No file fits.")).to_be_visible()
        page.get_by_label("Search batches and files").fill("HATS")
        files = page.get_by_role("table", name="Files").get_by_role("row")
        expect(files.filter(has_text="hats.jsonl")).to_have_count(1)
        page.set_viewport_size({"width": 360, "height": 640})
        for act in ("Download", "Delete"):  # on a phone too, and not beyond the table's right side
            expect(page.get_by_role("button", name=f"{act} hats.jsonl")).to_be_in_viewport(ratio=1)
        page.get_by_role("button", name="Delete hats.jsonl").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        expect(page.get_by_text("No file fits.")).to_be_visible()
