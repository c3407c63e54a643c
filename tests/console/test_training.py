"""Training: a file becomes a job, which is watched, paused, cancelled, and compared with others."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Route, expect
from tests.server.support import Server, Starter
from tests.server.test_reinforcement import begin
from tests.server.test_reinforcement import rows as prompts
from tests.server.test_training_real import rows
from tests.server.training_support import (
    BASE,
    add_file,
    ended,
    make_job,
    openai_client,
    run_job,
    step_of,
    wait_job,
)
from tests.training.runs import talking_base

from .conftest import EACH_SIZE, Look, Visit


@pytest.fixture(scope="module")
def tiny(serve_real: Starter, small_base: Path) -> Iterator[Server]:
    """A real engine, verifier and trainer on a base that is trained in a moment."""
    with serve_real("--base", str(small_base), "--kv-memory", "50MB", "--threads", "1") as server:
        yield server


@pytest.fixture(scope="module")
def talking(serve_real: Starter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real server on a base whose replies differ enough to be graded."""
    base = talking_base(tmp_path_factory.mktemp("talking") / BASE, initializer_range=0.2)
    with serve_real("--base", str(base), "--kv-memory", "50MB", "--threads", "1") as server:
        yield server


LIKE = {
    "type": "text_similarity", "name": "like", "evaluation_metric": "fuzzy_match",
    "input": "{{sample.output_text}}", "reference": "design",
}  # fmt: skip
"""A grader whose rewards of the talking base's replies differ."""
FIRST = "Look at the rows and the estimate first"


def train(visit: Visit, content: str, name: str, *, file: str = "rows.jsonl", hold: bool = False) -> None:
    """Choose a file, and begin; other settings are as they stand."""
    page = visit.page
    page.get_by_label(FIRST).set_checked(hold)
    payload = {"name": file, "mimeType": "application/jsonl", "buffer": content.encode()}
    page.locator("dialog .drop input[type=file]").set_input_files([payload])  # type: ignore[list-item]
    page.get_by_label("Name of the adapter").fill(name)
    button = "Check the rows" if hold else "Train"
    page.get_by_role("dialog").get_by_role("button", name=button).click()


def test_a_file_is_trained_on_and_everything_of_it_is_seen(tiny: Server, look: Look) -> None:
    name, evil = "real", "What is <b>this</b>\u202e?"
    with look(tiny) as visit:
        page = visit.page
        visit.open("#/training")
        page.get_by_role("button", name="Train").click()
        assert visit.violations() == []
        for label, value in {"Epochs": "2", "Rank": "4", "Batch size": "4"}.items():
            page.get_by_label(label).fill(value)
        page.get_by_label("Prompts that are answered").fill(f"I want 3 blue hats please\n{evil}")
        page.get_by_text("More", exact=True).click()
        page.get_by_label("Steps between evaluations").fill("5")
        page.get_by_label("More settings").fill('{"learning_rate": 0.005, "metrics": ["word_f1"]}')
        train(visit, rows(20), name, file="<b>rows</b>.jsonl")
        expect(page.get_by_role("heading", name=name)).to_be_visible()
        expect(page.get_by_role("heading", name="Before and after")).to_be_visible(timeout=300_000)
        assert visit.faults() == []
        figures = page.get_by_role("table").filter(has_text="word_f1").inner_text()
        events = page.get_by_text("events", exact=False).first
        expect(events).to_be_visible()
        text = page.locator("article").inner_text()
        replies = page.get_by_role("region", name="What it answers").locator(".sample")
        expect(replies).to_have_count(2)
        assert replies.last.locator(".prompt").inner_text() == "What is <b>this</b>U+202E?"
        learned = page.locator(".example mark").first.inner_text()
        page.get_by_role("combobox", name="after step").select_option("0")
        base, now = replies.first.locator(".reply").all_inner_texts()
        assert base == now  # step 0 is the base
        page.get_by_text("The evaluations as a table").click()
        evaluated = page.get_by_role("table").filter(has_text="(best)").locator("tbody tr").all_inner_texts()
        page.get_by_role("button", name="Loss by step: closer").click()
        page.get_by_role("button", name="All steps").first.click()
        expect(page.get_by_role("button", name="All steps")).to_have_count(0)

    with tiny.client() as http:
        job = http.get("/v1/fine_tuning/jobs").json()["data"][0]
        told = http.get(f"/v1/fine_tuning/jobs/{job['id']}/events?limit=100").json()["data"]
    report = job["report"]
    assert job["name"] == name
    assert f"{report['loss_before']:.2f}"[:3] in figures
    (checked,) = (one["data"]["report"] for one in told if (one["data"] or {}).get("kind") == "data_checked")
    assert checked["source"] in text
    assert '"color"' in learned
    measured = [event["data"] for event in told if "valid_loss" in (event["data"] or {})]
    assert [int(row.split()[0]) for row in evaluated] == sorted(one["step"] for one in measured)
    method = job["method"]["supervised"]["hyperparameters"]
    assert (method["r"], method["n_epochs"], method["batch_size"], method["eval_every"]) == (4, 2, 4, 5)
    assert method["sample_prompts"] == ["I want 3 blue hats please", evil]


def test_rows_and_estimate_are_looked_at_before_anything_is_trained(tiny: Server, look: Look) -> None:
    name = "looked-at"
    with look(tiny) as visit:
        page = visit.page
        visit.open("#/training")
        page.get_by_role("button", name="Train").click()
        assert page.get_by_label(FIRST).is_checked()
        assert visit.violations() == []
        page.get_by_label("Epochs").fill("2")
        page.get_by_label("Batch size").fill("4")
        train(visit, rows(20), name, hold=True)
        state = page.locator("article .state")
        expect(state).to_have_text("Ready to train")
        takes = page.get_by_role("region", name="What training will take")
        expect(takes.locator("dd")).to_contain_text([" s", "10", "B", "B"])
        assert '"color"' in page.locator(".example mark").first.inner_text()
        expect(page.get_by_role("button", name="Resume")).to_have_count(0)
        expect(page.get_by_role("button", name="Stop and keep the best")).to_have_count(0)
        assert visit.faults() == []
        with tiny.client() as http:
            (job, *_) = http.get("/v1/fine_tuning/jobs").json()["data"]
        assert (job["name"], job["status"], job["hold"], job["progress"]["phase"]) == (
            name, "paused", True, "validating_files",
        )  # fmt: skip
        assert not tiny.trainer_pids()
        page.get_by_role("button", name="Start training").click()
        expect(state).to_have_text("Done")
        expect(takes).to_have_count(0)


def test_a_job_is_stopped_and_the_best_of_it_kept(words: Server, look: Look) -> None:
    with look(words) as visit:
        page = visit.page
        visit.open("#/training")
        page.get_by_role("button", name="Train").click()
        train(visit, "slow", "enough")
        button = page.get_by_role("button", name="Stop and keep the best")
        button.click()
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("Training ends at its next step")
        expect(dialog).to_contain_text("activated if it is better on held-out rows: than the base, and than")
        expect(dialog).to_contain_text("cannot be resumed after that")
        assert visit.violations() == []
        dialog.get_by_role("button", name="Stop and keep the best").click()
        expect(page.locator("article .state")).to_have_text("Done")
        expect(page.locator("article > p", has_text="Stopped at step")).to_contain_text("of 3,000")
        expect(button).to_have_count(0)
        expect(page.get_by_role("heading", name="Before and after")).to_be_visible(timeout=300_000)
        assert visit.faults() == []
    with words.client() as http:
        job = http.get("/v1/fine_tuning/jobs").json()["data"][0]
    assert (job["status"], job["activated"]) == ("succeeded", True)
    assert job["stopped"]["step"] == job["report"]["steps"] < 3000


def test_a_job_that_is_looked_at_may_be_cancelled_and_one_that_is_paused_stopped(
    words: Server, look: Look
) -> None:
    client = openai_client(words)
    with look(words) as visit:
        page = visit.page
        state = page.locator("article .state")
        visit.open("#/training")
        page.get_by_role("button", name="Train").click()
        train(visit, "rows", "no", hold=True)
        expect(state).to_have_text("Ready to train")
        page.get_by_role("button", name="Cancel").click()
        page.get_by_role("dialog").get_by_role("button", name="Cancel the job").click()
        expect(state).to_have_text("Cancelled")
        job = make_job(client, "until-paused", extra={"name": "halfway"})
        wait_job(words, client, job.id, lambda one: step_of(one) == 5)
        client.fine_tuning.jobs.pause(job.id)
        visit.open(f"#/training?job={job.id}")
        page.get_by_role("button", name="Stop and keep the best").click()
        expect(page.get_by_role("dialog")).to_contain_text("Training ends where it is, at step 5 of 10.")
        page.get_by_role("dialog").get_by_role("button", name="Stop and keep the best").click()
        expect(state).to_have_text("Done")
        expect(page.get_by_text("Stopped at step 5 of 10, asked")).to_be_visible()


@pytest.mark.parametrize("size", EACH_SIZE)
def test_a_job_is_watched_paused_resumed_and_cancelled(words: Server, look: Look, size: str) -> None:
    name = f"slow-{size}"
    with look(words, size) as visit:
        page = visit.page
        visit.open("#/training")
        page.get_by_role("button", name="Train").click()
        train(visit, "slow", name)
        state = page.locator("article .state")
        expect(state).to_have_text(re.compile(r"^Training, step [\d,]+ of 3,000, .+ left$"))
        first = state.inner_text()
        expect(state).not_to_have_text(first)  # by itself
        expect(page.get_by_role("figure", name="Loss by step")).to_be_visible()
        page.get_by_role("button", name="Pause").click()
        expect(page.get_by_role("button", name="Resume")).to_be_visible()
        expect(state).to_have_text(re.compile(r"^Paused, step [\d,]+ of 3,000$"))
        assert visit.violations() == []
        page.get_by_role("button", name="Resume").click()
        expect(state).to_contain_text("Training, step")
        page.get_by_role("button", name="Cancel").click()
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("it cannot be resumed")
        assert visit.violations() == []
        dialog.get_by_role("button", name="Cancel the job").click()
        expect(page.locator("article .state")).to_have_text("Cancelled")
        expect(page.get_by_role("button", name="Resume")).to_have_count(0)
    with words.client() as http:
        assert http.get("/v1/fine_tuning/jobs").json()["data"][0]["status"] == "cancelled"


def test_what_is_wrong_with_a_file_or_a_setting_is_told_in_the_servers_words(
    words: Server, look: Look
) -> None:
    with look(words, errors=("400",)) as visit:
        page = visit.page
        visit.open("#/training")
        page.get_by_role("button", name="Train").click()
        page.get_by_text("More", exact=True).click()
        page.get_by_label("More settings").fill("[1")
        train(visit, "broken", "bad")
        expect(page.get_by_role("alert")).to_contain_text("this is no JSON")
        page.get_by_label("More settings").fill('{"rnak": 4}')
        page.get_by_role("dialog").get_by_role("button", name="Train").click()
        expect(page.get_by_role("alert")).to_contain_text("rnak")
        assert visit.violations() == []
        page.get_by_label("More settings").fill("")
        page.get_by_role("dialog").get_by_role("button", name="Train").click()
        expect(page.get_by_role("dialog")).to_have_count(0)
        expect(page.locator("article .state")).to_have_text("Failed")
        alert = page.get_by_role("alert")
        expect(alert).to_contain_text("invalid_file")
        expect(alert).to_contain_text("nothing was trained")
        expect(alert).not_to_contain_text("line 3 is bad")
        table = page.get_by_role("table", name="What is wrong with the file")
        expect(table).to_contain_text("line 3 is bad")
        assert visit.violations() == []
        page.get_by_role("button", name="Try another file").click()
        expect(page.get_by_role("dialog", name="Train an adapter")).to_be_visible()


def test_a_job_that_is_left_while_it_is_made_does_not_take_the_reader_to_it(
    words: Server, look: Look
) -> None:
    with look(words) as visit:
        page, held = visit.page, list[Route]()
        visit.open("#/training")
        page.get_by_role("button", name="Train").click()
        page.route(
            "**/v1/fine_tuning/jobs",
            lambda route: held.append(route) if route.request.method == "POST" else route.continue_(),
        )
        with page.expect_request(lambda one: one.method == "POST" and one.url.endswith("/jobs")):
            train(visit, "rows left", "left", hold=True)
        page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
        page.get_by_role("button", name="Train").click()
        with page.expect_response(lambda one: one.request.method == "POST" and one.url.endswith("/jobs")):
            held[0].continue_()
        expect(page.locator(".jobs .name", has_text="left")).to_be_visible()
        expect(page.get_by_role("dialog")).to_be_visible()


def test_a_question_asked_while_the_one_before_closes_stays_open(words: Server, look: Look) -> None:
    with look(words) as visit:
        page = visit.page
        visit.tell_of_close()
        page.add_init_script(
            "const plain = HTMLDialogElement.prototype.close;"
            "HTMLDialogElement.prototype.close = function () {"
            " plain.call(this); queueMicrotask(() => window.reask?.()) }"
        )
        client = openai_client(words)
        job = make_job(client, "slow", extra={"name": "asked-twice"})
        wait_job(words, client, job.id, lambda one: (step_of(one) or 0) > 0)
        visit.open(f"#/training?job={job.id}")
        page.get_by_role("button", name="Stop and keep the best").click()
        page.evaluate(
            """() => void (window.reask = () => {
                window.reask = null
                const buttons = [...document.querySelectorAll('article button')]
                buttons.find(one => one.textContent.trim() === 'Cancel').click()
            })"""
        )
        page.get_by_role("button", name="Keep it as it is").click()
        visit.wait_for_close()
        assert page.evaluate("window.reask === null")
        expect(page.get_by_role("dialog")).to_contain_text("it cannot be resumed")
        client.fine_tuning.jobs.cancel(job.id)


def test_a_file_dropped_anywhere_on_the_view_is_what_the_form_begins_with_and_so_is_the_sample(
    serve_scripted: Starter, look: Look
) -> None:
    with serve_scripted("words") as server, look(server) as visit:
        page = visit.page
        visit.open("#/training")
        expect(page.get_by_text("Nothing has been trained yet.")).to_be_visible()
        assert visit.violations() == []
        page.get_by_role("button", name="Try the sample").click()
        dialog = page.get_by_role("dialog", name="Train an adapter")
        expect(dialog).to_contain_text("sample-orders.jsonl")
        dialog.get_by_role("button", name="Cancel").click()
        transfer = page.evaluate_handle(
            "() => { const transfer = new DataTransfer();"
            " transfer.items.add(new File(['rows'], 'mine.jsonl')); return transfer }"
        )
        view = page.locator(".view")
        view.dispatch_event("dragover", {"dataTransfer": transfer})
        view.dispatch_event("drop", {"dataTransfer": transfer})
        expect(dialog).to_contain_text("mine.jsonl")
        dialog.get_by_label("Name of the adapter").fill("dropped")
        dialog.get_by_role("button", name="Check the rows").click()
        expect(page.locator("article .state")).to_have_text("Ready to train")
        with server.client() as http:
            assert [one["filename"] for one in http.get("/v1/files").json()["data"]] == ["mine.jsonl"]


def test_a_slice_that_got_worse_is_shown_and_why_nothing_was_activated(words: Server, look: Look) -> None:
    client = openai_client(words)
    job = run_job(words, client, "regresses")
    with look(words) as visit:
        visit.open(f"#/training?job={job.id}")
        came = visit.page.locator("section").filter(has_text="Before and after").last
        expect(came).to_contain_text("worse on 1 slice, for which it is not activated")
        row = visit.page.get_by_role("table", name="By slice").locator("tbody tr")
        expect(row).to_have_count(1)
        assert row.all_inner_texts() == ["de\t12\t1\t1.5\tworse than allowed"]
        assert visit.violations() == []


def test_the_result_has_the_active_version_beside_the_base_and_says_which_one_was_replaced(
    words: Server, look: Look
) -> None:
    client, name = openai_client(words), "tickets"
    first, second, worse, other = (
        run_job(words, client, content, extra={"name": name})
        for content in ("rows", "rows", "worse-than-active", "not-comparable")
    )
    says = {
        first.id: "better than the base. No version was active to compare it with. It is not active.",
        second.id: f"which was active when training ended. Requests for its name get it, in place of "
        f"{first.fine_tuned_model}.",
        worse.id: f"no better than {second.fine_tuned_model}, which was active when training ended.",
        other.id: f"could not be compared with {second.fine_tuned_model}, which was active when training "
        "ended: its labels are others: a, b. It is not active.",
    }
    active = {first.id: None, second.id: "1.2", worse.id: "0.8", other.id: "–"}
    with look(words) as visit:
        for job, sentence in says.items():
            visit.open(f"#/training?job={job}")
            expect(visit.page.locator("section", has_text="Before and after").last).to_contain_text(sentence)
            table = visit.page.get_by_role("table", name="Held-out figures before and after")
            loss = table.locator("tbody tr").first.inner_text().split("\t")
            assert loss == ["Loss", "2", *([active[job]] if active[job] else []), "1"]
            heads = " ".join(table.locator("thead th").all_inner_texts())
            assert ("Active" in heads) is (active[job] is not None)
            assert visit.faults() == []


def test_a_version_that_training_went_on_from_has_no_second_column_while_it_is_active(
    words: Server, look: Look
) -> None:
    client, name = openai_client(words), "goes-on"
    body = {"name": name, "activate": "always"}
    _, job = (run_job(words, client, "rows", extra=body) for _ in range(2))
    versions = [job.report["active"], "0" * 64]

    def began_with(route: Route) -> None:
        """Pass the server's job on as if it had gone on from a version."""
        answer = route.fetch()
        told: Any = answer.json()
        parent = {"name": name, "version": versions[0]}
        report = told["report"] | {"loss_parent": 1.5}
        route.fulfill(response=answer, json=told | {"parent": parent, "report": report})

    with look(words) as visit:
        visit.page.route(f"**/v1/fine_tuning/jobs/{job.id}", began_with)
        heads = visit.page.get_by_role("table", name="Held-out figures before and after").locator("thead th")
        visit.open(f"#/training?job={job.id}")
        expect(heads).to_have_text(["On held-out rows", "Base", "Active", "Adapter"])
        versions.reverse()
        visit.open("#/training")
        visit.open(f"#/training?job={job.id}")
        expect(heads).to_have_text(["On held-out rows", "Base", "Began with", "Active", "Adapter"])


def test_runs_are_compared_in_one_chart_with_the_settings_that_differ(words: Server, look: Look) -> None:
    client = openai_client(words)
    jobs = [
        run_job(
            words,
            client,
            f"rows {seed}",
            method={"type": "supervised", "supervised": {"hyperparameters": {"r": seed}}},
            extra={"name": f"run-{seed}"},
        )
        for seed in (4, 8)
    ]
    with look(words) as visit:
        page = visit.page
        visit.open("#/training")
        for job in jobs:
            page.get_by_label(f"Compare the run of {job.name}, {job.id[-6:]}").check()
        page.get_by_role("radio", name="training loss").check()
        table = page.get_by_role("table", name="The runs in figures")
        expect(table.locator("tr").filter(has_text="succeeded")).to_have_count(1)
        expect(table.locator("tr", has=page.get_by_text("r", exact=True))).to_contain_text("4")
        legend = page.locator(".u-legend")
        expect(legend).to_contain_text(f"run-8 ({jobs[1].id[-6:]})")
        assert visit.faults() == []
        page.wait_for_url("**run=**run=**")
        page.reload()
        expect(page.get_by_role("region", name="Runs compared")).to_be_visible()


def test_a_job_goes_on_being_watched_when_the_server_is_back(
    serve_scripted: Starter, look: Look, tmp_path: Path
) -> None:
    goes_on = tmp_path / "goes-on"
    with serve_scripted("words") as server:
        client = openai_client(server)
        job = make_job(client, f"long until={goes_on}", extra={"name": "kept"})
        with look(server, errors=("ERR_", "503")) as visit:  # it is gone, and then it starts
            visit.open(f"#/training?job={job.id}")
            expect(visit.page.locator("article .state")).to_contain_text("Training, step")
            server.process.kill()
            server.exit_status()
            goes_on.touch()
            expect(visit.page.get_by_text("This page goes on by itself once it can.")).to_be_visible()
            options = ["--port", str(server.port)]
            with serve_scripted("words", *options, data_dir=server.data_dir, ready=False):
                expect(visit.page.locator("article .state")).to_have_text("Done")
                expect(visit.page.get_by_text("Training loss 0.01 at step 100.")).to_be_visible()


def test_a_page_that_is_hidden_follows_no_job_and_goes_on_once_it_is_seen(words: Server, look: Look) -> None:
    hide = """hidden => {
        Object.defineProperty(document, 'hidden', { value: hidden, configurable: true })
        document.dispatchEvent(new Event('visibilitychange'))
    }"""
    client = openai_client(words)
    job = make_job(client, "slow", extra={"name": "watched"})
    with look(words, errors=("ERR_ABORTED",)) as visit:
        page = visit.page
        with page.expect_request("**/events"):
            visit.open(f"#/training?job={job.id}")
        loss = page.locator("section p.figures", has_text="Training loss")
        expect(loss).to_be_visible()
        with page.expect_event("requestfailed", lambda request: request.url.endswith("/events")):
            page.evaluate(hide, True)
        before = loss.inner_text()
        with page.expect_request("**/events") as again:
            page.evaluate(hide, False)
        assert again.value.headers["last-event-id"].startswith("ftevent-")
        expect(loss).not_to_have_text(before)
    client.fine_tuning.jobs.cancel(job.id)


def test_a_job_is_asked_for_again_after_a_pause_and_not_for_having_changed(words: Server, look: Look) -> None:
    client = openai_client(words)
    job = make_job(client, "slow", extra={"name": "asked-for"})
    wait_job(words, client, job.id, lambda job: step_of(job) > 0)
    with look(words) as visit:
        page = visit.page
        page.clock.install(time=0)
        page.clock.pause_at(1)
        visit.open(f"#/training?job={job.id}")
        expect(page.get_by_role("heading", name="asked-for")).to_be_visible()

        def asked() -> int:
            page.evaluate("fetch('v1/key').then(() => 0)")  # what was asked before it is seen here by now
            return sum(one.url.endswith(job.id) for one in visit.requests)

        assert [asked() for _ in range(20)] == [1] * 20
        with page.expect_response(lambda answer: answer.url.endswith(job.id)):
            page.clock.run_for(1500)
        assert asked() == 2
    client.fine_tuning.jobs.cancel(job.id)


def test_of_runs_that_do_not_exist_it_is_said(words: Server, look: Look) -> None:
    with look(words, errors=("404",)) as visit:
        visit.open("#/training?run=ftjob-one&run=ftjob-two")
        alerts = visit.page.get_by_role("region", name="Runs compared").get_by_role("alert")
        expect(alerts).to_have_count(2)
        expect(alerts.first).to_contain_text("ftjob-one")
        visit.page.get_by_role("button", name="Compare no more").click()
        expect(alerts).to_have_count(0)


def test_a_file_that_is_there_may_be_chosen_again(serve_scripted: Starter, look: Look) -> None:
    with serve_scripted("words") as server, look(server) as visit:
        client = openai_client(server)
        file = add_file(client, "rows again", "again.jsonl")
        page = visit.page
        visit.open("#/training")
        page.get_by_role("button", name="Train").click()
        page.get_by_label("Or use an uploaded file").select_option(file)
        page.get_by_label(FIRST).uncheck()
        page.get_by_role("dialog").get_by_role("button", name="Train").click()
        expect(page.locator("article .state")).to_have_text("Done")
        assert client.fine_tuning.jobs.list(limit=1).data[0].training_file == file


def test_a_job_that_learns_from_rewards_shows_rewards_and_the_replies_that_got_them(
    talking: Server, look: Look
) -> None:
    client = openai_client(talking)
    for _ in range(2):
        job = wait_job(talking, client, begin(client, "rewarded", LIKE).id, ended)
        assert job.status == "succeeded", job.error
    report = job.report
    with look(talking) as visit:
        page = visit.page
        visit.open(f"#/training?job={job.id}")
        curves = page.get_by_role("region", name="Reward and learning rate")
        chart = curves.get_by_role("figure", name="Reward by step")
        expect(chart).to_contain_text("Training reward:")
        expect(chart).to_contain_text("Base, held out:")
        expect(chart).to_contain_text("Active version, held out:")
        assert not re.search(r": -[\d.]+", chart.locator(".unseen").inner_text())
        page.get_by_text("The evaluations as a table").click()
        evaluated = curves.get_by_role("table").locator("tbody td:last-child").all_inner_texts()
        assert len(evaluated) >= 3
        assert all(0 < float(one.split()[0]) <= 1 for one in evaluated)

        table = page.get_by_role("table", name="Held-out figures before and after")
        assert table.locator("tbody th").all_inner_texts() == ["reward"]
        assert table.locator("thead th").all_inner_texts()[1:] == ["Base", "Active", "Adapter"]
        slices = page.get_by_role("table", name="By slice").locator("tbody tr")
        (one,) = report["slices"]["slices"]
        assert slices.locator("th").all_inner_texts() == [one["slice"]]

        first = (
            page.get_by_role("region", name="Held-out prompts, and who says what").locator(".sample").first
        )
        assert first.locator(".prompt").inner_text() == "Say number 100."
        given = report["replies"][0]["rewards"]
        assert [text.split(": reward ")[0] for text in first.locator(".label").all_inner_texts()] == [
            "Base", "Active", "New",
        ]  # fmt: skip
        assert [float(text.split()[-1]) for text in first.locator(".label").all_inner_texts()] == [
            pytest.approx(given[name], abs=0.01) for name in ("base", "active", "adapter")
        ]
        assert "loss" not in page.locator("article").inner_text().casefold().replace("policy_loss", "")
        assert visit.faults() == []
        visit.open("#/training")
        expect(page.locator(".jobs")).to_contain_text("reward ")


def test_a_job_that_learns_from_rewards_is_made_in_the_form_and_its_grader_tried_before(
    talking: Server, look: Look
) -> None:
    with look(talking, errors=("400",)) as visit:  # the range that is refused
        page = visit.page
        visit.open("#/training")
        page.get_by_role("button", name="Train").click()
        dialog = page.get_by_role("dialog", name="Train an adapter")
        payload: Any = {"name": "a.jsonl", "mimeType": "application/jsonl", "buffer": prompts(8).encode()}
        page.locator("dialog .drop input[type=file]").set_input_files([payload])
        dialog.get_by_label("Method").select_option("reinforcement")
        kind, reward = (
            dialog.get_by_label("Grader, which gives"),
            dialog.locator("[role=status]", has_text="Reward"),
        )
        dialog.get_by_text("Try it on a reply").click()
        reply, grade = dialog.get_by_label("Reply", exact=True), dialog.get_by_role("button", name="Grade it")
        row, first_row = dialog.get_by_label("Its row, as JSON"), re.compile('"letter": "k"')
        expect(row).to_have_value(first_row)
        chooser = page.locator("dialog .drop input[type=file]")
        chooser.set_input_files([payload | {"name": "a.csv", "buffer": b"prompt,letter\nHi,k\n"}])
        expect(row).to_have_value("")  # and not that of the other file
        chooser.set_input_files([payload])
        expect(row).to_have_value(first_row)
        prompts_field = dialog.get_by_label("Prompts that are answered")
        expect(prompts_field).to_have_count(0)
        dialog.get_by_label("Method").select_option("supervised")
        prompts_field.fill("What is it?")  # is kept, and not sent with rewards
        dialog.get_by_label("Method").select_option("reinforcement")
        dialog.get_by_text("Try it on a reply").click()
        expect(row).to_have_value(first_row)
        reply.fill("OK")
        grade.click()
        expect(reward).to_have_text("Reward 0")
        expect(dialog).to_contain_text("A template names what the reply or the row does not have.")
        dialog.get_by_label("Text that it is compared with").fill("{{item.letter}}")
        grade.click()
        expect(reward).to_have_text("Reward 1")
        expect(dialog.get_by_text("A template names")).to_have_count(0)
        assert visit.faults() == []

        kind.select_option("python")
        source = "def grade(sample, item):\n    return sample['output_text'].count(item['letter']) / 4\n"
        dialog.get_by_label("Python: a function").fill(source)
        reply.fill("kk")
        grade.click()
        expect(reward).to_have_text("Reward 0.5")
        kind.select_option("score_model")
        dialog.get_by_label("Highest number").fill("")
        grade.click()
        expect(dialog.get_by_role("alert")).to_contain_text("Highest number: write a number.")
        dialog.get_by_label("Highest number").fill("0")
        grade.click()
        expect(dialog.get_by_role("alert")).to_contain_text("grader.range")
        kind.select_option("python")
        held: list[Route] = []
        page.route("**/graders/run", lambda route: held.append(route))
        with page.expect_request("**/graders/run"):
            grade.click()
        kind.select_option("string_check")
        held[0].continue_()
        page.unroute("**/graders/run")
        expect(grade).to_be_enabled()
        expect(reward).to_have_count(0)  # it is of the grader before
        kind.select_option("python")
        kind.select_option("multi")
        written = json.loads(dialog.get_by_label("Grader, as JSON").input_value())
        assert written["graders"] == {"first": {"type": "python", "name": "first", "source": source}}
        graders = {**written["graders"], "like": LIKE}
        several = {**written, "graders": graders, "calculate_output": "first + like"}
        dialog.get_by_label("Grader, as JSON").fill(json.dumps(several))
        reply.fill("design")
        grade.click()
        expect(reward).to_have_text("Reward 1, first 0, like 1")
        assert visit.violations() == []

        values = {"Epochs": "3", "Rank": "4", "Prompts in a step": "2", "Replies to each prompt": "4"}
        for label, value in (values | {"Longest reply": "4"}).items():
            dialog.get_by_label(label).fill(value)
        dialog.get_by_text("More", exact=True).click()
        dialog.get_by_label("More settings").fill('{"max_steps": 4, "temperature": 0.3}')
        train(visit, prompts(8), "by-form")
        state = page.locator("article .state")
        expect(state).to_have_text(re.compile("^(Done|Failed)$"), timeout=300_000)
        assert state.inner_text() == "Done", page.locator("article").inner_text()
        expect(page.get_by_role("figure", name="Reward by step")).to_be_visible()
        expect(page.locator("article")).to_contain_text(
            re.compile(r"(?<![\d.])0% of the replies could not be graded")
        )
        assert visit.faults() == []
    with talking.client() as http:
        method = http.get("/v1/fine_tuning/jobs").json()["data"][0]["method"]
    assert method["type"] == "reinforcement"
    assert method["reinforcement"]["grader"] == several
    settings = method["reinforcement"]["hyperparameters"]
    assert [settings[name] for name in ("n_epochs", "batch_size", "group_size", "sample_tokens")] == [
        3,
        2,
        4,
        4,
    ]
