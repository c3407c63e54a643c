"""`onebase adapters` in this process, against a server on a real port that keeps adapters.

What is said is in `golden/adapters-*.txt`; here is what is sent, what scripts get, and what is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.clients.golden import Transcript
from tests.clients.registry_double import COMMIT, Registry, digest, module, refusal, report

from onebase.cli import adapters as command
from onebase.cli import main
from onebase.cli.adapters.versions import Reference, reference

NAME = "acme-support"
ONE, TWO = digest("1"), digest("2")

pytestmark = pytest.mark.usefixtures("slept")


@pytest.fixture
def registry(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A server with two versions of one adapter, the older one active, and with a failed one of another."""
    made = Registry()
    made.activate(NAME, made.add(NAME, "1"))
    made.add(NAME, "2", report=report(("q_proj",), range(8, 30), 16, extra=[module("lm_head", 16, 2.0)]))
    made.add("broken", "3", "failed", error={"code": "no_effect", "message": "no module changes anything"})
    monkeypatch.setenv("ONEBASE_URL", serve(made.script).url)
    return made


@pytest.fixture
def shell(transcript: Callable[[str], Transcript], registry: Registry) -> Transcript:
    return transcript(os.environ["ONEBASE_URL"])


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    """The JSON that a command prints."""
    assert main(["adapters", *arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


# ---- sending -----------------------------------------------------------------------------------------


def test_push_sends_proves_and_says_what_to_do_next(
    registry: Registry, shell: Transcript, folder: Path
) -> None:
    shell.run("adapters", "push", str(folder), "--name", "fresh")
    shell.run("adapters", "push", str(folder), "--activate", "--allow-noop", "--any-base")
    shell.run("adapters", "push", str(folder), "--name", "later", "--no-wait")
    registry.failure = ("no_effect", "no module changes anything")
    shell.run("adapters", "push", str(folder), "--name", "empty")
    shell.check("adapters-push")
    flags = {"activate": "true", "allow_noop": "true", "any_base": "true"}
    assert [fields for fields, _ in registry.uploads] == [
        {"name": "fresh"}, {"name": NAME} | flags, {"name": "later"}, {"name": "empty"},
    ]  # fmt: skip
    assert registry.adapter(NAME)["version"] == registry.versions[NAME][2]["version"]


def test_a_folder_without_an_adapter_is_a_wrong_argument(
    registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapters", "push", str(tmp_path)]) == 2
    assert f"onebase: {tmp_path} lacks adapter_config.json and" in capsys.readouterr().err
    assert registry.asked == []


def test_push_sends_defaults_as_they_are_meant_and_show_prints_them(
    registry: Registry, shell: Transcript, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    given = ["temperature=0", "system=3", "stop=;", 'guided_choice=["a", "b"]', "top_k=null"]
    given += [f"guided_json=@{schema}"]
    words = [word for one in given for word in ("--set", one)]
    printed(capsys, "push", str(folder), "--name", "fresh", *words)
    ((fields, _),) = registry.uploads
    assert json.loads(fields["defaults"]) == {
        "temperature": 0,
        "system": "3",
        "stop": [";"],
        "guided_choice": ["a", "b"],
        "top_k": None,
        "guided_json": {"type": "object"},
    }
    for wrong in ("temprature=1", "temperature", "top_k=many", "guided_json=@missing.json"):
        shell.run("adapters", "push", str(folder), "--set", wrong)
    defaults = {"system": "Be brief. " * 20, "temperature": 0, "stop": ["\n", ";"]}
    registry.add("told", "4", report={**report(), "defaults": defaults})
    shell.run("adapters", "show", f"told@{digest('4')[:12]}")
    shell.check("adapters-defaults")


def test_push_prints_json_for_scripts_also_of_what_is_rejected(
    registry: Registry, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version = printed(capsys, "push", str(folder), "--name", "fresh")
    assert (version["name"], version["state"]) == ("fresh", "ready")
    assert len(version["report"]["modules"]) == 60
    registry.failure = ("no_effect", "no module changes anything")
    version = printed(capsys, "push", str(folder), status=1)
    assert version["error"] == {"code": "no_effect", "message": "no module changes anything"}


def test_pull_names_repository_revision_and_folder(registry: Registry, shell: Transcript) -> None:
    registry.steps = [("pulling", 0.5), ("proving", 0.5)]
    shell.run("adapters", "pull", "hub:acme/loras@v2", "--subfolder", "best", "--activate")
    shell.check("adapters-pull")
    assert registry.asked[0][2] == {
        "name": "loras",
        "hub": {"repo": "acme/loras", "revision": "v2", "subfolder": "best"},
        "activate": True,
    }


# ---- looking -----------------------------------------------------------------------------------------


def test_list_is_tab_separated_and_whole_through_a_pipe(
    registry: Registry, shell: Transcript, capsys: pytest.CaptureFixture[str]
) -> None:
    shell.run("adapters", "list")
    registry.versions.clear()
    shell.run("adapters", "list")
    shell.check("adapters-list")
    assert printed(capsys, "list") == []


def test_show_has_the_versions_what_answered_before_and_a_versions_proof(
    registry: Registry, shell: Transcript
) -> None:
    source = {"kind": "hub", "repo": "acme/x", "revision": "main", "commit": COMMIT, "subfolder": None}
    registry.versions[NAME][1] |= {"source": source, "created_by": "ci"}
    odd = "model.layers.7.mlp.down_proj: norm 41.2 is 38 times the median of its name"
    registry.versions[NAME][1]["report"] |= {"warnings": [odd]}
    registry.activate(NAME, registry.versions[NAME][1])
    shell.run("adapters", "show", NAME)
    shell.run("adapters", "show", f"{NAME}@{TWO[:8]}")
    shell.run("adapters", "show", "broken")
    shell.run("adapters", "show", f"broken@{digest('3')[:12]}")
    shell.run("adapters", "show", "nobody")
    shell.check("adapters-show")


def test_show_as_json_has_everything(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = printed(capsys, "show", NAME)
    assert adapter["name"] == NAME
    assert [one["version"] for one in adapter["versions"]] == [TWO, ONE]
    assert adapter["history"][0]["action"] == "activate"
    assert printed(capsys, "show", f"{NAME}@{ONE}")["version"] == ONE


def test_diff_takes_the_active_version_or_the_one_given(
    registry: Registry, shell: Transcript, capsys: pytest.CaptureFixture[str]
) -> None:
    shell.run("adapters", "diff", NAME, f"{NAME}@{TWO[:8]}")
    shell.run("adapters", "diff", NAME, "broken")
    shell.run("adapters", "diff", NAME, f"broken@{digest('3')}")
    shell.check("adapters-diff")
    found = printed(capsys, "diff", NAME, f"{NAME}@{TWO[:8]}")
    assert (found["a"], found["b"]) == (f"{NAME}@{ONE[:12]}", f"{NAME}@{TWO[:12]}")
    registry.versions[NAME][0]["active"] = False
    assert printed(capsys, "diff", NAME, NAME)["a"] == f"{NAME}@{TWO[:12]}"


# ---- changing ----------------------------------------------------------------------------------------


def test_what_a_name_answers_with_is_said_after_each_change(
    registry: Registry, shell: Transcript, capsys: pytest.CaptureFixture[str]
) -> None:
    shell.run("adapters", "activate", NAME, TWO[:8])
    shell.run("adapters", "rollback", NAME)
    shell.run("adapters", "activate", f"{NAME}@{TWO}")
    shell.run("adapters", "deactivate", NAME)
    shell.run("adapters", "pin", NAME)
    shell.run("adapters", "unpin", NAME)
    shell.run("adapters", "share", NAME)
    shell.run("adapters", "unshare", NAME)
    shell.run("adapters", "activate", NAME, ONE, "--expected", ONE[:8])
    shell.run("adapters", "activate", NAME, "ffffffff")
    shell.run("adapters", "activate", "broken", digest("3"))
    shell.check("adapters-change")
    assert printed(capsys, "activate", NAME, ONE)["version"] == ONE


def test_expected_is_sent_as_the_whole_digest_or_as_none(registry: Registry) -> None:
    assert main(["adapters", "activate", NAME, TWO, "--expected", ONE[:8]]) == 0
    assert registry.asked[-1][2] == {"version": TWO, "expected": ONE}
    assert main(["adapters", "rollback", NAME, "--expected", "none"]) == 1
    assert registry.asked[-1][2] == {"expected": None}


def test_activate_wants_a_version(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["adapters", "activate", NAME])
    assert caught.value.code == 2
    assert f"give a version too; `onebase adapters show {NAME}` lists them" in capsys.readouterr().err


def test_rm_deletes_one_version_or_all(
    registry: Registry, shell: Transcript, capsys: pytest.CaptureFixture[str]
) -> None:
    shell.run("adapters", "rm", f"{NAME}@{TWO[:8]}")
    assert [one["version"] for one in registry.versions[NAME]] == [ONE]
    shell.run("adapters", "rm", f"{NAME}@{ONE[:8]}")
    shell.run("adapters", "rm", NAME)
    assert [one["version"] for one in registry.versions[NAME]] == [ONE]
    shell.run("adapters", "rm", NAME, "--force")
    shell.check("adapters-rm")
    assert registry.asked[-1][1].endswith("?force=true")
    assert printed(capsys, "rm", "broken") == {"name": "broken", "version": None, "deleted": True}


# ---- failures and help -------------------------------------------------------------------------------


def test_another_base_leads_to_the_option_that_overrules(
    serve: Callable[..., Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def script(request: Any) -> None:
        for _ in request.chunks():
            pass
        request.reply(409, refusal(409, "base_mismatch", "trained on gemma").json())

    assert main(["adapters", "push", str(folder), "--url", serve(script).url]) == 1
    assert "trained on gemma (HTTP 409)\n" in (err := capsys.readouterr().err)
    assert err.endswith("--any-base\n")


@pytest.mark.parametrize("action", sorted(command.ACTIONS))
def test_each_action_explains_itself_and_finds_no_server(
    action: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["adapters", action, "--help"])
    assert caught.value.code == 0
    assert f"usage: onebase adapters {action}" in capsys.readouterr().out
    needed = {"push": [str(folder)], "pull": ["a/b"], "list": [], "diff": ["a", "b"], "activate": ["a", ONE]}
    needed |= {"approve": [f"a@{ONE}"], "evaluate": [f"a@{ONE}", "--data", "rows.jsonl"]}
    needed |= {"merge": ["a:1", "b:1", "--name", "c"], "export": ["a", "--format", "peft"]}
    monkeypatch.setenv("ONEBASE_URL", "http://127.0.0.1:1")
    assert main(["adapters", action, *needed.get(action, ["a"])]) == 3
    assert "No server answers" in capsys.readouterr().err


def test_help_names_every_action_and_fits_a_narrow_terminal(
    shell: Transcript, capsys: pytest.CaptureFixture[str]
) -> None:
    assert all(f" {action} " in command.HELP for action in command.ACTIONS)
    assert max(map(len, command.HELP.splitlines())) <= 80
    shell.run("adapters", "--help")
    shell.run("adapters", "activat")
    shell.run("adapters", "xyzzy")
    shell.check("adapters")
    assert main(["adapters"]) == 2
    assert capsys.readouterr() == ("", command.HELP)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("acme", Reference("acme")),
        ("acme@3f2a9c41", Reference("acme", "3f2a9c41")),
        ("hub:org/repo", Reference("hub:org/repo")),
        ("hub:org/repo@main", Reference("hub:org/repo@main")),
        ("hub:org/repo@main@3f2a9c41", Reference("hub:org/repo@main", "3f2a9c41")),
    ],
)
def test_a_reference_is_a_name_or_a_version_of_it(text: str, meant: Reference) -> None:
    assert reference(text) == meant
    assert str(meant) == text


@pytest.mark.parametrize("text", ["", "@3f2a9c41", "acme@", "@"])
def test_a_reference_without_a_name_or_with_an_empty_version_is_refused(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="write NAME or NAME@VERSION"):
        reference(text)
    for action in ("show", "rm"):
        with pytest.raises(SystemExit):
            main(["adapters", action, text])
