"""Adapters: ten thousand in a list, and all that can be done with one."""

from __future__ import annotations

import base64
import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, Route, expect
from tests.hub_standin import HubStandIn
from tests.server.access import Keys, client_with
from tests.server.support import CONFIG, Server, Starter, make_folder, pace, upload, upload_folder
from tests.server.test_many_adapters import MODULES, REPORT, add, copies, register
from tests.server.training_support import openai_client, run_job, sha256
from tests.signing import make_key, sign, signing

from onebase_adapters.registry import AdapterFiles
from onebase_edge.settings import Settings
from onebase_server.storage.opening import open_storage

from .conftest import EACH_SIZE, ROOT, Look, Visit

MANY = 10_000
EVIL = "<b>\u202egnp.exe</b>"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def many(serve_scripted: Starter, base_folder: Path, quick_folder: Path) -> Iterator[Server]:
    """Ten thousand adapters, and one whose texts are not nice."""
    data_dir = quick_folder / "many"
    storage = open_storage(Settings(data_dir=str(data_dir)), "smollm2-135m-instruct", base_folder)
    config, prepared = add(storage.store, b"{}"), add(storage.store, b"prepared")
    for number in range(10):
        register(storage.registry, number, config, prepared)
    copies(data_dir / "registry.db", MANY // 10)
    digest = hashlib.sha256(b"evil").hexdigest()
    files = AdapterFiles(config, add(storage.store, b"evil"))
    modules = [MODULES[0] | {"name": f"m.layers.0.{EVIL}", "relative_norm": 0.5}]
    proof = {
        "modules_compared": 1, "modules_changed": 1, "rows": 1, "exact": True, "largest_difference": 0.0,
        "texts": 0, "tokens_compared": 0, "texts_changed": 0, "base_unchanged": True, "seconds": 1.0,
    }  # fmt: skip
    report = REPORT | {
        "targets": [EVIL], "base_name": EVIL, "task": "SEQ_CLS", "labels": 2, "label_names": [EVIL, "b"],
        "warnings": [f"Look at {EVIL}."], "modules": modules, "proof": proof | {"shown": EVIL},
    }  # fmt: skip
    storage.registry.add_version("evil", files.digest, files, {"kind": "hub", "repo": EVIL, "commit": digest})
    storage.registry.set_state("default", "evil", files.digest, "ready", report=report, prepared=prepared)
    storage.registry.close()
    with serve_scripted("words", data_dir=data_dir) as server:
        yield server


def payload(name: str, weights: str = "weights", config: str = CONFIG) -> list[dict[str, Any]]:
    """An adapter's two files, as a page's input takes them."""
    return [
        {"name": "adapter_config.json", "mimeType": "application/json", "buffer": config.encode()},
        {"name": WEIGHTS, "mimeType": "application/octet-stream", "buffer": f"{name} {weights}".encode()},
    ]


def drop(page: Page, files: list[dict[str, Any]]) -> None:
    """Drop files on the place for them."""
    texts = [[one["name"], base64.b64encode(one["buffer"]).decode()] for one in files]
    transfer = page.evaluate_handle(
        """files => {
            const transfer = new DataTransfer()
            for (const [name, text] of files) transfer.items.add(new File([atob(text)], name))
            return transfer
        }""",
        texts,
    )
    page.get_by_role("group", name="Choose files").dispatch_event("drop", {"dataTransfer": transfer})


def add_by_page(visit: Visit, name: str, files: list[dict[str, Any]], *, dropped: bool = False) -> None:
    page = visit.page
    page.get_by_role("button", name="Add", exact=True).click()
    page.get_by_label("Name", exact=True).fill(name)
    if dropped:
        drop(page, files)
    else:
        page.locator("input[type=file]").set_input_files(files)  # type: ignore[arg-type]
    page.get_by_role("button", name="Upload").click()


def confirm(page: Page, verb: str, *means: str) -> None:
    """Read what it means, and do it."""
    dialog = page.get_by_role("dialog")
    for sentence in means:
        expect(dialog).to_contain_text(sentence)
    dialog.get_by_role("button", name=verb).click()


def more(page: Page, of: str, item: str) -> None:
    """Choose in the menu of an adapter, or of a version by the beginning of its digest."""
    page.get_by_label(f"More for {of}", exact=True).click()
    page.get_by_role("button", name=item).click()


def row_of(page: Page, version: str) -> Locator:
    return page.get_by_role("table", name="Versions").get_by_role("row").filter(has_text=version[:12])


def test_ten_thousand_are_listed_of_which_only_those_seen_are_in_the_page(many: Server, look: Look) -> None:
    with look(many) as visit:
        page = visit.page
        visit.open("#/adapters")
        expect(page.get_by_text(f"{MANY + 1:,} adapters")).to_be_visible()
        rows = page.locator(".line")
        assert 5 < rows.count() < 60
        assert visit.faults(scrolls=True) == []
        page.locator(".line a").first.focus()
        page.keyboard.press("End")
        last = page.get_by_role("link", name="tenant-9999")
        expect(last).to_be_focused()
        assert 5 < rows.count() < 60
        page.keyboard.press("ArrowUp")
        expect(page.get_by_role("link", name="tenant-9998")).to_be_focused()
        page.get_by_label("Search adapters").fill("TENANT 77")
        expect(page.get_by_role("status").filter(has_text="of 10,001 adapters")).to_be_visible()
        shown = page.locator(".line a").all_inner_texts()
        assert shown
        assert all("77" in name for name in shown)
        page.get_by_label("Search adapters").fill("")
        page.get_by_label("State").select_option("active")
        expect(page.get_by_text("Nothing fits.")).to_be_visible()
        page.get_by_label("State").select_option("")
        page.get_by_label("Tier").select_option("none")
        page.wait_for_url("**tier=none")
        page.reload()
        expect(page.get_by_label("Tier")).to_have_value("none")


def test_texts_of_an_adapter_are_never_html_and_show_what_is_hidden(many: Server, look: Look) -> None:
    with look(many) as visit:
        page = visit.page
        visit.open("#/adapters?name=evil")
        expect(page.get_by_role("heading", name="Where it acts")).to_be_visible()
        text = page.locator("article").inner_text()
        assert text.count("<b>U+202Egnp.exe</b>") >= 6
        assert "\u202e" not in page.inner_text("body")
        assert page.locator("article b").count() == 0
        assert visit.faults() == []


def test_an_adapter_is_dropped_proved_and_active_and_its_page_says_so(words: Server, look: Look) -> None:
    name = "dropped"
    with look(words) as visit:
        page = visit.page
        visit.open("#/adapters")
        add_by_page(visit, name, payload(name), dropped=True)
        expect(page.get_by_role("heading", name=name)).to_be_visible()
        expect(page.get_by_text("Active, in host memory")).to_be_visible()
        expect(page.locator(".time")).to_contain_text("Uploaded")
        expect(page.locator(".time")).to_contain_text("Activated")
        assert visit.faults() == []
        page.get_by_role("link", name="Ask it").click()
        expect(page.get_by_role("heading", name=name)).to_be_visible()  # a column of Compare
    with words.client() as http:
        assert http.get(f"/v1/adapters/{name}").json()["active"] is True


def test_a_link_is_followed_though_the_address_is_just_being_written(words: Server, look: Look) -> None:
    with look(words) as visit:
        page = visit.page
        page.add_init_script(
            "const later = setTimeout, writes = []; window.writes = writes;"
            "window.setTimeout = (what, ms, ...rest) => "
            "ms === 300 ? (writes.push(what), 0) : later(what, ms, ...rest)"
        )
        visit.open("#/adapters")
        expect(page.get_by_role("link", name="orders")).to_be_visible()
        assert page.evaluate("writes.length") > 0
        page.evaluate("location.hash = '#/adapters?name=orders'; writes.forEach(write => write())")
        expect(page.get_by_role("heading", name="orders")).to_be_visible()


def test_what_is_wrong_with_an_upload_is_told_in_the_servers_words(words: Server, look: Look) -> None:
    wrong = CONFIG.replace("LORA", "LOHA")
    with words.client() as http:
        refused = upload(http, "x", b"w", wrong).json()["error"]["message"]
        broken = upload(http, "x", b"broken y").json()["error"]["message"]
    with look(words, errors=("400", "422")) as visit:
        page = visit.page
        visit.open("#/adapters")
        page.get_by_role("button", name="Add", exact=True).click()
        drop(page, payload("x")[:1])
        expect(page.get_by_role("alert")).to_contain_text(f"add {WEIGHTS}")
        expect(page.get_by_role("button", name="Upload")).to_be_disabled()
        page.get_by_label("Name", exact=True).fill("refused")
        drop(page, payload("x", config=wrong))
        page.get_by_role("button", name="Upload").click()
        expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text(refused)
        assert visit.violations() == []
        drop(page, [payload("broken")[0], payload("broken", "refused")[1]])
        page.get_by_label("Name", exact=True).fill("not-proved")
        page.get_by_role("button", name="Upload").click()
        expect(page.locator(".versions").get_by_role("alert")).to_contain_text(broken)
        expect(page.locator(".versions .state")).to_have_text("Failed")


def test_one_is_pulled_from_the_hub_or_why_not_is_told(
    serve_scripted: Starter, look: Look, tmp_path: Path
) -> None:
    with HubStandIn() as hub:
        commit = hub.add_repo("acme/lora", {"adapter_config.json": CONFIG.encode(), WEIGHTS: b"hub"})
        with (
            serve_scripted("words", environment=hub.environment(tmp_path)) as server,
            look(server, errors=("404",)) as visit,
        ):
            page = visit.page
            visit.open("#/adapters")
            expect(page.get_by_text("There is no adapter yet.")).to_be_visible()
            for repo in ("acme/absent", "acme/lora"):
                page.get_by_role("button", name="Add", exact=True).click()
                page.get_by_role("radio", name="Hugging Face Hub").check()
                page.get_by_label("Repository").fill(repo)
                page.get_by_label("Name, if not its reference").fill(repo.partition("/")[2])
                assert visit.violations() == []
                page.get_by_role("button", name="Pull").click()
                expect(page.get_by_role("dialog")).to_have_count(0)
                if repo == "acme/absent":
                    expect(page.locator(".versions").get_by_role("alert")).to_contain_text("acme/absent")
            expect(page.locator(".versions")).to_contain_text(f"commit {commit[:12]}")
            expect(page.get_by_text("Active, in host memory")).to_be_visible()


@pytest.mark.parametrize("size", EACH_SIZE)
def test_versions_are_activated_rolled_back_and_deleted_and_the_time_line_says_by_whom(
    keyed: Server, keys: Keys, look: Look, size: str
) -> None:
    name, key = f"life-{size}", keys.make("admin")
    with client_with(keyed, key) as http:
        keyed.wait_for(lambda: http.get("/v1/key").status_code == 200)
        first, second = (
            upload(http, name, f"{name} {number}".encode()).json()["version"] for number in (1, 2)
        )
        http.post(f"/v1/adapters/{name}/activate", json={"version": first}).raise_for_status()

        def active() -> str | None:
            found: str | None = http.get(f"/v1/adapters/{name}").json()["version"]
            return found

        with look(keyed, size, errors=("401", "409", "404")) as visit:
            page = visit.page
            visit.open(f"#/adapters?name={name}")
            page.get_by_label("API key", exact=True).fill(key)
            page.keyboard.press("Enter")
            narrow = size == "phone"  # where buttons of a row are in its menu

            def activate(version: str) -> None:
                if narrow:
                    more(page, version[:12], "Activate")
                else:
                    page.get_by_role("button", name=f"Activate {version[:12]}").click()

            activate(second)
            expect(page.locator(".time")).to_contain_text(f"by {keys.record(key).id}")
            toast = page.get_by_role("group", name="What was just done")
            expect(toast).to_contain_text(f"{second[:12]} answers requests for {name}.")
            assert active() == second
            toast.get_by_role("button", name="Undo").click()
            expect(page.locator("[aria-live=polite]")).to_have_text("Undone.")
            assert active() == first
            activate(second)
            expect(toast).to_be_visible()
            more(page, name, f"Roll back to {first[:6]}…")
            expect(page.locator(".time")).to_contain_text("Rolled back to")
            expect(toast).to_contain_text(f"{name} is rolled back to {first[:12]}.")
            assert active() == first
            more(page, name, "Pin")
            expect(page.get_by_text("Active, in host memory, pinned")).to_be_visible()
            more(page, name, "Share")
            assert visit.violations() == []
            confirm(page, "Share", "Every tenant of this server may use it", "Nobody else may change it")
            expect(page.get_by_text("shared with all tenants")).to_be_visible()
            more(page, first[:12], "Delete")
            confirm(page, "Delete", "It is active: the server asks for force.", "download it before")
            expect(page.get_by_role("dialog").get_by_role("alert")).to_contain_text("adapter_in_use")
            confirm(page, "Delete by force", "end now")
            expect(row_of(page, first)).to_have_count(0)
            expect(page.get_by_text("Not active, pinned")).to_be_visible()
            activate(second)
            expect(toast).to_contain_text(f"{second[:12]} answers requests for {name}.")
            more(page, name, "Deactivate")
            confirm(page, "Deactivate", "are answered 404 from now on")
            expect(page.locator(".time")).to_contain_text("Deactivated")
            more(page, name, "Delete")
            confirm(page, "Delete", "cannot be undone")
            expect(page.get_by_role("heading", name=name)).to_have_count(0)
            assert http.get(f"/v1/adapters/{name}").status_code == 404


@pytest.mark.parametrize("status", [200, 409])
def test_an_answer_to_a_question_that_was_left_says_nothing_of_the_next(
    words: Server, look: Look, status: int
) -> None:
    with look(words, errors=("409",)) as visit:
        page, held = visit.page, list[Route]()
        visit.open("#/adapters?name=orders")
        page.route("**/v1/adapters/orders/deactivate", lambda route: held.append(route))
        more(page, "orders", "Deactivate")
        with page.expect_request("**/v1/adapters/orders/deactivate"):
            confirm(page, "Deactivate")
        page.get_by_role("button", name="Keep it as it is").click()
        more(page, "orders", "Delete")
        error = {
            "code": "adapter_in_use",
            "message": "in use",
            "type": "invalid_request_error",
            "param": None,
        }
        with page.expect_response("**/v1/adapters/orders/deactivate"):
            held[0].fulfill(status=status, json={"error": error} if status == 409 else {})
        said = "in use" if status == 409 else "is not active any more"
        page.locator("[aria-live=polite]", has_text=said).wait_for(state="attached")
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("cannot be undone")
        expect(dialog.get_by_role("button", name="Delete", exact=True)).to_be_enabled()
        expect(dialog.get_by_role("alert")).to_have_count(0)


def test_an_adapter_that_is_deleted_elsewhere_is_said_to_be_gone_and_one_that_cannot_be_asked_for_stays(
    words: Server, look: Look
) -> None:
    with words.client() as http:
        upload(http, "passing", b"passing")
        with look(words, errors=("404", "ERR_")) as visit:
            page = visit.page
            page.clock.install()
            visit.open("#/adapters?name=passing")
            changes = page.get_by_role("button", name="New version")
            expect(changes).to_be_visible()
            page.route("**/v1/adapters/passing", lambda route: route.abort())
            for _ in range(2):
                with page.expect_event("requestfailed"):
                    page.clock.fast_forward(6000)  # it looks again every 5 s
            assert changes.is_visible()
            page.unroute("**/v1/adapters/passing")
            http.delete("/v1/adapters/passing").raise_for_status()
            page.clock.fast_forward(6000)
            expect(page.get_by_role("alert")).to_contain_text("There is no adapter 'passing'.")
            expect(changes).to_have_count(0)


@pytest.mark.parametrize("back", [False, True])
def test_a_pull_that_is_left_does_not_take_the_reader_elsewhere(
    words: Server, look: Look, back: bool
) -> None:
    with look(words) as visit:
        page, held = visit.page, list[Route]()
        visit.open("#/compare")
        visit.open("#/adapters?q=pirate")
        page.get_by_role("button", name="Add", exact=True).click()
        page.get_by_role("radio", name="Hugging Face Hub").check()
        page.get_by_label("Repository").fill("acme/left")
        page.route(
            "**/v1/adapters",
            lambda route: held.append(route) if route.request.method == "POST" else route.continue_(),
        )
        with page.expect_request(lambda request: request.method == "POST"):
            page.get_by_role("button", name="Pull").click()
        if back:
            page.go_back()
            expect(page.get_by_label("Message to all columns")).to_be_visible()
        else:
            page.get_by_role("button", name="Cancel").click()
        with page.expect_response("**/v1/models"):  # which it asks for anew once the answer is there
            held[0].continue_()
        if back:
            expect(page.get_by_label("Message to all columns")).to_be_visible()
            return
        expect(page.get_by_label("Search adapters")).to_have_value("pirate")
        page.wait_for_url("**q=pirate")
        expect(page.get_by_role("heading", name="hub:acme/left")).to_have_count(0)


def test_an_adapter_that_requests_use_is_deleted_by_force_alone(
    serve_scripted: Starter, tmp_path: Path, look: Look
) -> None:
    make_folder(tmp_path, "busy")
    with (
        pace(tmp_path) as (environment, step),
        serve_scripted("paced", "--adapters-dir", str(tmp_path), environment=environment) as server,
        look(server, errors=("409",)) as visit,
    ):
        page = visit.page
        visit.open("#/compare?c=a:busy&n=4000&m=one%20two%20three")
        page.get_by_role("button", name="Ask").click()
        step(8)
        with look(server, errors=("409",)) as other:
            other.open("#/adapters?name=busy")
            more(other.page, "busy", "Delete")
            confirm(other.page, "Delete")
            confirm(other.page, "Delete by force", "adapter_deleted")
            expect(other.page.get_by_text("There is no adapter yet.")).to_be_visible()
        step(64)
        expect(page.locator(".answer").get_by_role("alert")).to_contain_text("deleted")


def test_a_key_without_admin_is_not_shown_what_it_may_not_do(keyed: Server, keys: Keys, look: Look) -> None:
    mine, theirs = keys.make("adapters", tenant="mine"), keys.make("admin", tenant="theirs")
    with client_with(keyed, mine) as http, client_with(keyed, theirs) as other:
        keyed.wait_for(lambda: http.get("/v1/key").status_code == other.get("/v1/key").status_code == 200)
        upload(http, "own", b"own")
        upload(other, "lent", b"lent", query="wait=true&activate=true")
        other.post("/v1/adapters/lent/share", json={"shared": True}).raise_for_status()
    with look(keyed, errors=("401",)) as visit:
        page = visit.page
        visit.open("#/adapters?name=own")
        page.get_by_label("API key", exact=True).fill(mine)
        page.keyboard.press("Enter")
        page.get_by_label("More for own", exact=True).click()
        expect(page.get_by_role("button", name="Delete")).to_be_visible()
        for name in ("Pin", "Share"):
            expect(page.get_by_role("button", name=name)).to_have_count(0)
        page.keyboard.press("Escape")
        expect(page.get_by_role("link", name="Ask it")).to_have_count(0)
        page.get_by_role("link", name="lent").click()
        expect(page.get_by_text("shared with all tenants by theirs")).to_be_visible()
        expect(page.get_by_role("button", name="New version")).to_have_count(0)
        expect(page.get_by_label("More for")).to_have_count(0)


def test_the_picture_has_the_figures_of_the_report_and_two_versions_differ_in_it(
    real: Server, look: Look
) -> None:
    with real.client() as http:
        pirate = upload_folder(http, "orders", ROOT / "examples/adapters/pirate").json()
        orders = next(one for one in http.get("/v1/adapters/orders/versions").json()["data"] if one["active"])
    with look(real) as visit:
        page = visit.page
        visit.open("#/adapters?name=orders")
        table = page.get_by_role("table").filter(has_text="self_attn.q_proj")
        cells = table.locator("tbody tr")
        expect(cells).to_have_count(7)
        modules = {one["name"]: one for one in orders["report"]["modules"]}
        for row in ("self_attn.q_proj", "mlp.up_proj"):
            said = cells.filter(has_text=row).locator("td .unseen").all_text_contents()
            assert len(said) == 30
            for layer, text in enumerate(said):
                module = modules.get(f"model.layers.{layer}.{row}")
                if module is None:
                    assert text == "not adapted"
                else:
                    assert float(text.partition("%")[0]) == pytest.approx(
                        100 * module["relative_norm"], rel=0.05
                    )
        assert visit.violations() == []
        page.get_by_role("group", name="Layers by module").focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        first = orders["report"]["base_linears"][0]
        expect(page.locator(".readout")).to_contain_text(f"Layer 1 {first}")
        page.get_by_label("norm of the update").check()
        expect(page.locator(".readout")).to_contain_text("norm ")
        page.get_by_label("Compared with").select_option(pirate["version"])
        expect(page.locator("figcaption")).to_contain_text(f"than {pirate['version'][:12]}")
        change = cells.filter(has_text="mlp.up_proj").locator("td .unseen").first.text_content() or ""
        assert change.endswith("before, norm 0 now")
        assert set(table.locator(".sign").all_text_contents()) >= {"+", "−"}
        assert visit.faults("phone", "narrow") == []


def test_the_list_says_who_was_asked_and_is_sorted_by_it_and_a_version_is_taken_elsewhere(
    words: Server, look: Look, tmp_path: Path
) -> None:
    with words.client() as http:
        for _ in range(3):
            http.post("/generate", json={"prompt": "hi", "adapter": "pirate", "max_tokens": 2})
        version = http.get("/v1/adapters/pirate").json()["version"]
        asked = next(
            row["requests"]
            for row in http.get("/v1/usage?group_by=adapter").json()["data"]
            if row["adapter"] == "pirate"
        )
    with look(words) as visit:
        page = visit.page
        visit.open("#/adapters")
        rows = page.get_by_role("table", name="Adapters")
        pirate = rows.get_by_role("row").filter(has_text="pirate")
        expect(pirate).to_contain_text(version[:12])
        expect(pirate.get_by_role("cell").nth(3)).to_have_text(str(asked))
        expect(pirate).to_contain_text("today")
        assert page.locator(".line").first.evaluate("line => line.offsetHeight") == 36
        page.get_by_role("button", name="Requests 7 d").click()
        column = rows.get_by_role("columnheader", name="Requests 7 d")
        expect(column).to_have_attribute("aria-sort", "descending")
        counts = [int(row.get_by_role("cell").nth(3).inner_text()) for row in page.locator(".line").all()]
        assert counts == sorted(counts, reverse=True)
        page.wait_for_url("**sort=-requests**")
        assert visit.violations() == []
        page.get_by_role("link", name="pirate").click()
        expect(page.get_by_role("region", name="Usage")).to_contain_text(f"Requests in 7 days{asked}")
        with page.expect_download() as saved:
            page.get_by_role("button", name=f"Download {version[:12]}").click()
        archive = tmp_path / saved.value.suggested_filename
        saved.value.save_as(archive)
        more(page, version[:12], "Export …")
        page.get_by_role("radio", name="GGUF adapter").check()
        expect(page.get_by_role("dialog")).to_contain_text(
            f"onebase adapters export 'pirate@{version[:12]}' --format gguf-lora --url {words.url}"
        )
        assert visit.violations() == []
    with tarfile.open(archive) as unpacked:
        names = [Path(name) for name in unpacked.getnames()]
        assert {name.parent for name in names} == {Path(f"pirate-{version[:12]}")}
        assert {name.name for name in names} == {"adapter_config.json", WEIGHTS}
        with words.client() as http:
            for name in names:
                member = unpacked.extractfile(str(name))
                sent = http.get(f"/v1/adapters/pirate/versions/{version}/files/{name.name}").content
                assert member is not None
                assert member.read() == sent


def test_two_versions_are_compared_by_what_they_answer(words: Server, look: Look) -> None:
    with words.client() as http:
        first, second = (upload(http, "twice", f"twice {one}".encode()).json()["version"] for one in (1, 2))
        http.post("/v1/adapters/twice/activate", json={"version": first}).raise_for_status()
    with look(words) as visit:
        page = visit.page
        visit.open("#/adapters?name=twice")
        more(page, second[:12], "Compare answers with the active one")
        dialog = page.get_by_role("dialog")
        dialog.get_by_label("Questions, one a line").fill("one fish\ntwo fish")
        dialog.get_by_role("button", name="Ask both").click()
        expect(dialog.get_by_role("status")).to_contain_text("2 of 2 pairs of answers are the same.")
        expect(dialog.locator(".reply")).to_have_count(4)
        expect(dialog).to_contain_text(f"{first[:12]}, active")
        assert visit.violations() == []
        sent = [one.post_data_json for one in visit.requests if one.url.endswith("/generate/many")]
        asked = {each["adapter"] for body in sent for each in body["requests"]}
        assert asked <= {f"twice@{first}", f"twice@{second}"}


# ---- rollouts -----------------------------------------------------------------------------------


def test_a_rollout_is_started_looked_at_and_rolled_back(words: Server, look: Look) -> None:
    name = "rolled"
    with words.client() as http, look(words) as visit:
        upload(http, name, f"{name} old".encode(), query="wait=true&activate=true")
        new = upload(http, name, f"{name} new".encode()).json()["version"]
        visit.open(f"#/adapters?name={name}")
        part = visit.page.get_by_role("region", name="Rollout")
        part.get_by_text("Start one").click()
        part.get_by_label("Percent of the users").fill("50")
        part.get_by_label("Judge", exact=True).select_option("pirate")
        part.get_by_label("Percent of the answers that it judges").fill("0.1")
        part.get_by_role("button", name="Start").click()
        expect(part.get_by_text("Running")).to_be_visible()
        begun = http.get(f"/v1/adapters/{name}/rollout").json()
        assert begun["judge"] == {"adapter": "pirate", "approves": "yes", "percent": 0.1}
        expect(part.get_by_text("judge: no answer of pirate yet")).to_be_visible()
        for number in range(60):
            answer = http.post(
                "/generate", json={"prompt": "a b", "adapter": name, "user": f"u{number}", "max_tokens": 3}
            )
            thumb = {"id": answer.json()["id"], "thumb": "up"}
            assert http.post("/v1/feedback", json=thumb).json()["counted"]
        row = part.get_by_role("row", name="Feedback")
        expect(row.get_by_text("Not decided").or_(row.get_by_text("Not worse"))).to_be_visible()
        curves = part.get_by_role("figure", name="Both versions")
        part.get_by_label("Curves of").select_option("feedback")
        expect(curves).to_contain_text("active: 1 at last")
        expect(curves).to_contain_text("candidate: 1 at last")
        part.get_by_label("Curves of").select_option("errors")
        expect(curves).to_contain_text("candidate: 0 at last")
        closer = curves.get_by_role("button", name="Both versions: closer")
        while not closer.is_enabled():  # before it has looked three times
            http.post("/generate", json={"prompt": "a b", "adapter": name, "user": "u0", "max_tokens": 3})
            visit.page.wait_for_timeout(200)
        closer.click()
        expect(curves.get_by_role("button", name="All steps")).to_be_visible()
        part.get_by_label("Curves of").select_option("tokens")
        expect(curves.get_by_role("button", name="All steps")).to_have_count(0)
        expect(curves).to_contain_text("candidate: 3 at last")
        assert visit.faults("phone", "narrow") == []
        share = part.get_by_label("Share of the candidate")
        share.fill("80")
        share.dispatch_event("change")
        expect(part.get_by_text("80%").first).to_be_visible()
        words.wait_for(lambda: http.get(f"/v1/adapters/{name}/rollout").json()["percent"] == 80)
        part.get_by_role("button", name="Roll back").click()
        visit.page.get_by_role("dialog").get_by_role("button", name="Roll back").click()
        expect(part.get_by_text("Rolled back", exact=True)).to_be_visible()
        expect(part.get_by_text("Start another")).to_be_visible()
        assert http.get(f"/v1/adapters/{name}").json()["version"] != new


# ---- gates --------------------------------------------------------------------------------------


def sign_in(visit: Visit, key: str, view: str) -> None:
    visit.open(view)
    visit.page.get_by_label("API key", exact=True).fill(key)
    visit.page.keyboard.press("Enter")


def test_a_version_says_which_gates_are_closed_until_another_key_approves_it(
    keyed: Server, keys: Keys, look: Look
) -> None:
    ann, ben = keys.make("adapters", name="ann"), keys.make("adapters", name="ben")
    cat, admin = keys.make("adapters", name="cat"), keys.make("admin")
    with (
        client_with(keyed, ann) as http,
        client_with(keyed, admin) as ruling,
        client_with(keyed, cat) as again,
    ):
        keyed.wait_for(lambda: http.get("/v1/key").status_code == ruling.get("/v1/key").status_code == 200)
        old = upload(http, "gated", b"gated old", query="wait=true&activate=true").json()["version"]
        new = upload(http, "gated", b"gated new").json()["version"]
        with look(keyed, errors=("401",)) as hers, look(keyed, errors=("401",)) as his:
            sign_in(hers, ann, "#/adapters?name=gated")
            activate = hers.page.get_by_role("button", name=f"Activate {new[:12]}")
            expect(activate).to_be_enabled()
            rule = {"name": "gated", "approvals": 1, "signature": ["acme"]}
            ruling.post("/v1/gates", json=rule).raise_for_status()
            expect(activate).to_have_attribute("title", "Closed by signature, approval")
            expect(activate).to_have_accessible_description("Gates: closed by signature, approval")
            activate.press("Enter")  # says why, and asks nothing
            gates = hers.page.get_by_role("group").filter(has_text="Gates: closed by")
            expect(gates.get_by_text("a signature of acme is needed")).to_be_visible()
            expect(gates.get_by_text("1 person who neither made nor activate it")).to_be_visible()
            made = f"Key {keys.record(ann).id} made this version, so another person's key has to approve it."
            expect(gates.get_by_text(made)).to_be_visible()
            assert hers.faults("phone", "narrow") == []
            assert http.get("/v1/adapters/gated").json()["version"] == old

            ruling.post("/v1/gates", json={"name": "gated", "signature": ["acme"]}).raise_for_status()
            expect(activate).to_have_attribute("title", "Closed by signature")
            expect(gates.get_by_text("a signature of acme is needed")).to_be_visible()
            expect(gates.get_by_text("made this version")).to_have_count(0)  # no approval is asked for
            expect(gates.get_by_role("button")).to_have_count(0)

            ruling.post("/v1/gates", json=rule | {"signature": []}).raise_for_status()
            sign_in(his, ben, "#/adapters?name=gated")
            his.page.get_by_text("Gates: closed by approval").click()
            approve = his.page.get_by_role("button", name=f"Approve {new[:12]}")
            approve.click()
            expect(his.page.get_by_text("Approved by ben (you)")).to_be_visible()
            expect(his.page.get_by_text("counts when another person’s key activates")).to_be_visible()
            expect(hers.page.get_by_text("Gates: open")).to_be_visible()
            his.page.get_by_role("button", name=f"Withdraw the approval of {new[:12]}").click()
            expect(hers.page.get_by_text("Gates: closed by approval")).to_be_visible()
            approve.click()
            expect(hers.page.get_by_text("Gates: open")).to_be_visible()
            expect(hers.page.get_by_text("approved by 1.")).to_be_visible()
            expect(hers.page.get_by_text(made)).to_have_count(0)

            upload(again, "gated", b"gated new").raise_for_status()  # who sends it too has made it, too
            refusal = again.get(f"/v1/adapters/gated/versions/{new}/gates").json()["refusal"]
            assert refusal == made.replace(keys.record(ann).id, keys.record(cat).id)

            expect(activate).not_to_have_attribute("aria-disabled", "true")
            activate.click()
            keyed.wait_for(lambda: http.get("/v1/adapters/gated").json()["version"] == new)
            expect(hers.page.get_by_text("Gates of its next activation: closed by approval")).to_be_visible()


def test_a_version_says_who_signed_it_or_why_its_signature_was_refused(
    serve_scripted: Starter, tmp_path: Path, look: Look
) -> None:
    signing()
    acme, _ = make_key(tmp_path, "acme")
    rules = [{"policy": "warn", "signers": ["acme"]}]
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"signers": {"acme": {"key": "acme.pub"}}, "rules": rules}))
    with serve_scripted("words", "--signatures", str(policy)) as server, server.client() as http:
        for name, private in (("signed", acme), ("unsigned", None)):
            folder = make_folder(tmp_path, name)
            if private is not None:
                sign(folder, private)
            files = [("files", (one.name, one.read_bytes())) for one in folder.iterdir()]
            http.post("/v1/adapters?wait=true", data={"name": name}, files=files).raise_for_status()
        with look(server) as visit:
            visit.open("#/adapters?name=signed")
            versions = visit.page.get_by_role("table", name="Versions")
            expect(versions).to_contain_text("Signed by acme")
            visit.open("#/adapters?name=unsigned")
            expect(versions).to_contain_text("It has no signature, and the policy only warns:")
            expect(versions).to_contain_text("model.sig")
            assert visit.faults("phone", "narrow") == []


def test_a_signed_folder_is_sent_with_its_signature_and_taken_elsewhere_with_it(
    serve_scripted: Starter, tmp_path: Path, look: Look
) -> None:
    signing()
    acme, _ = make_key(tmp_path, "acme")
    policy = tmp_path / "policy.json"
    rules = [{"policy": "require", "signers": ["acme"]}]
    policy.write_text(json.dumps({"signers": {"acme": {"key": "acme.pub"}}, "rules": rules}))
    folder = make_folder(tmp_path, "sent")
    sign(folder, acme)
    files = [
        {"name": one.name, "mimeType": "application/octet-stream", "buffer": one.read_bytes()}
        for one in folder.iterdir()
    ]
    with serve_scripted("words", "--signatures", str(policy)) as server, look(server) as visit:
        page = visit.page
        visit.open("#/adapters")
        add_by_page(visit, "sent", files)
        expect(page.get_by_role("table", name="Versions")).to_contain_text("Signed by acme")
        with server.client() as http:
            (known,) = http.get("/v1/adapters/sent/versions").json()["data"]
        version = known["version"]
        with page.expect_download() as saved:
            page.get_by_role("button", name=f"Download {version[:12]}").click()
        archive = tmp_path / "sent.tar"
        saved.value.save_as(archive)
    with tarfile.open(archive) as unpacked:
        member = unpacked.extractfile(f"sent-{version[:12]}/model.sig")
        assert member is not None
        assert member.read() == (folder / "model.sig").read_bytes()


def test_a_version_that_was_trained_here_shows_what_the_server_signed(
    serve_scripted: Starter, tmp_path: Path, look: Look
) -> None:
    signing()
    with serve_scripted("words", "--signing-key", str(tmp_path / "server.key")) as server:
        job = run_job(server, openai_client(server), "rows scored", extra={"name": "made"}, seed=7)
        with look(server) as visit:
            visit.open("#/adapters?name=made")
            visit.page.get_by_text("Signed by server: what it was made of").click()
            signed = visit.page.get_by_role("region", name="What was signed")
            for fact in (job.id, sha256("rows scored"), "activation decision rule", "if_better"):
                expect(signed).to_contain_text(fact)
            assert visit.faults("phone", "narrow") == []
