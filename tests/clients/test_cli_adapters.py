"""`onebase adapters` in this process, against a server on a real port that keeps adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
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


def said(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> tuple[str, str]:
    """What a command prints to stdout and stderr."""
    assert main(["adapters", *arguments]) == status
    out, err = capsys.readouterr()
    return out, err


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    """The JSON that a command prints."""
    return json.loads(said(capsys, *arguments, "--json", status=status)[0])


# ---- bringing ----------------------------------------------------------------------------------------


def test_push_sends_proves_and_says_what_to_do_next(
    registry: Registry, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = said(capsys, "push", str(folder), "--name", "fresh")
    made = registry.versions["fresh"][0]["version"][:12]
    assert out == (
        f"fresh@{made}  ready\n"
        "  lora, rank 8, alpha 16 on q v; 480,000 parameters, 1.9 MB\n"
        "  proven in 3.2 s: 60 modules equal PEFT's bit for bit, 60 of them changed; "
        "3 of 4 texts differ from the base's\n"
    )
    assert err == (
        "uploading 12.5 kB\nvalidating\nproving\n"
        f'Try it: onebase generate --adapter fresh@{made} "..."\n'
        f"Activate it: onebase adapters activate fresh {made}\n"
    )
    assert registry.uploads[0][0] == {"name": "fresh"}


def test_push_takes_the_folders_name_and_activates_when_told(
    registry: Registry, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = said(capsys, "push", str(folder), "--activate", "--allow-noop", "--any-base")
    assert out.splitlines()[0].endswith("ready, active")
    assert err.endswith(f'Ask it: onebase generate --adapter {NAME} "..."\n')
    assert registry.uploads[0][0] == {
        "name": NAME,
        "activate": "true",
        "allow_noop": "true",
        "any_base": "true",
    }
    assert registry.adapter(NAME)["version"] == registry.versions[NAME][2]["version"]


def test_push_without_waiting_says_how_to_see_how_it_goes(
    registry: Registry, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = said(capsys, "push", str(folder), "--name", "fresh", "--no-wait")
    made = registry.versions["fresh"][0]["version"][:12]
    assert out == f"fresh@{made}  validating\n"
    assert err.endswith(f"See its state: onebase adapters show fresh@{made}\n")


def test_push_prints_json_for_scripts(
    registry: Registry, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version = printed(capsys, "push", str(folder), "--name", "fresh")
    assert (version["name"], version["state"]) == ("fresh", "ready")
    assert len(version["report"]["modules"]) == 60


def test_pull_names_repository_revision_and_folder(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.steps = [("pulling", 0.5), ("proving", 0.5)]
    out, err = said(capsys, "pull", "hub:acme/loras@v2", "--subfolder", "best", "--activate")
    assert out.startswith(f"loras@{digest('acme/loras')[:12]}  ready, active\n")
    assert err.splitlines()[:2] == ["pulling", "proving"]
    assert registry.asked[0][2] == {
        "name": "loras",
        "hub": {"repo": "acme/loras", "revision": "v2", "subfolder": "best"},
        "activate": True,
    }


def test_a_folder_without_an_adapter_is_a_wrong_argument(
    registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = said(capsys, "push", str(tmp_path), status=2)
    assert err.startswith(f"onebase: {tmp_path} lacks adapter_config.json and adapter_model.safetensors.\n")
    assert registry.asked == []


def test_a_rejected_adapter_says_why_and_what_to_do(
    registry: Registry, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.failure = ("no_effect", "no module changes anything")
    out, err = said(capsys, "push", str(folder), status=1)
    made = registry.versions[NAME][2]["version"][:12]
    assert out == ""
    assert err.endswith(
        f"onebase: {NAME}@{made}: no module changes anything (no_effect)\nIf that is intended: --allow-noop\n"
    )
    version = printed(capsys, "push", str(folder), status=1)
    assert version["error"] == {"code": "no_effect", "message": "no module changes anything"}


# ---- looking -----------------------------------------------------------------------------------------


def test_list_is_tab_separated_and_whole_through_a_pipe(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = said(capsys, "list")
    titles, *rows = (line.split("\t") for line in out.splitlines())
    facts = [dict(zip(titles, row, strict=True)) for row in rows]
    assert facts[0] | {"changed": ""} == {
        "name": NAME,
        "state": "active",
        "version": ONE[:12],
        "kind": "lora",
        "rank": "8",
        "alpha": "16",
        "parameters": "480,000",
        "size": "1.9 MB",
        "in": "slot",
        "versions": "2",
        "changed": "",
        "changes": "q v",
    }
    assert (facts[1]["name"], facts[1]["state"], facts[1]["version"]) == ("broken", "failed", "")


def test_an_empty_list_says_how_to_fill_it(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    registry.versions.clear()
    assert said(capsys, "list") == (
        "",
        "The server has no adapters. Send it one: onebase adapters push FOLDER --activate\n",
    )
    assert printed(capsys, "list") == []


def test_show_has_the_versions_and_what_answered_before(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.activate(NAME, registry.versions[NAME][1])
    lines = said(capsys, "show", NAME)[0].splitlines()
    assert lines[0] == f"{NAME}  active"
    assert lines[1] == "  on SmolLM2-135M-Instruct, in a slot"
    table = [line.split() for line in lines[3:6]]
    assert table[0] == ["version", "state", "rank", "size", "from", "when"]
    assert table[1][:5] == [TWO[:12], "active", "16", "1.5", "MB"]
    assert table[2][:5] == [ONE[:12], "ready", "8", "1.9", "MB"]
    assert [line.split()[:3] for line in lines[8:10]] == [
        [TWO[:12], "activate", ONE[:12]],
        [ONE[:12], "activate", "none"],
    ]


def test_show_says_why_a_version_failed(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    failed = digest("3")[:12]
    assert f"{failed}: no module changes anything" in said(capsys, "show", "broken")[0]
    assert "no module changes anything (no_effect)" in said(capsys, "show", f"broken@{failed}")[0]


def test_show_of_a_version_has_its_proof_and_its_modules(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    source = {"kind": "hub", "repo": "acme/x", "revision": "main", "commit": COMMIT, "subfolder": None}
    registry.versions[NAME][1] |= {"source": source, "created_by": "ci"}
    out, _ = said(capsys, "show", f"{NAME}@{TWO[:8]}")
    assert f"{NAME}@{TWO[:12]}  ready\n  from hub acme/x@a1b2c3d," in out
    assert "by ci" in out
    assert f"sha256 {TWO}" in out
    assert "lora, rank 16, alpha 32 on q lm_head; 368,000 parameters, 1.5 MB" in out
    assert "23 modules equal PEFT's bit for bit" in out
    row = next(line for line in out.splitlines() if line.startswith("q_proj"))
    assert row.split()[1:4] == ["8-29", "16", "32"]
    assert row.endswith("█")
    assert "lm_head" in out


def test_show_as_json_has_everything(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = printed(capsys, "show", NAME)
    assert adapter["name"] == NAME
    assert [one["version"] for one in adapter["versions"]] == [TWO, ONE]
    assert adapter["history"][0]["action"] == "activate"
    assert printed(capsys, "show", f"{NAME}@{ONE}")["version"] == ONE


def test_diff_takes_the_active_version_or_the_one_given(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    found = printed(capsys, "diff", NAME, f"{NAME}@{TWO[:8]}")
    assert (found["a"], found["b"]) == (f"{NAME}@{ONE[:12]}", f"{NAME}@{TWO[:12]}")
    out, _ = said(capsys, "diff", NAME, f"{NAME}@{TWO[:8]}")
    assert "█" in out
    registry.versions[NAME][0]["active"] = False
    assert printed(capsys, "diff", NAME, NAME)["a"] == f"{NAME}@{TWO[:12]}"


def test_diff_needs_versions_that_are_ready(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "diff", NAME, "broken", status=2)[1] == (
        "onebase: no version of broken is ready: see `onebase adapters show broken`\n"
    )
    assert (
        "is failed: only versions that are ready"
        in said(capsys, "diff", NAME, f"broken@{digest('3')}", status=2)[1]
    )


# ---- switching and removing --------------------------------------------------------------------------


def test_activate_roll_back_and_deactivate_say_what_answers_now(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(capsys, "activate", NAME, TWO[:8]) == (
        f"The active version of {NAME} is {TWO[:12]} now.\n",
        f"To go back: onebase adapters rollback {NAME}\n",
    )
    assert said(capsys, "rollback", NAME)[0] == f"The active version of {NAME} is {ONE[:12]} now.\n"
    assert said(capsys, "activate", f"{NAME}@{TWO}")[0].endswith(f"{NAME} is {TWO[:12]} now.\n")
    assert "has no active version now. Its versions are kept." in said(capsys, "deactivate", NAME)[0]
    assert said(capsys, "pin", NAME) == (f"{NAME} stays in memory.\n", "")
    assert said(capsys, "unpin", NAME) == (f"{NAME} no longer stays in memory.\n", "")
    assert printed(capsys, "activate", NAME, ONE)["version"] == ONE


def test_expected_is_sent_as_the_whole_digest_or_as_none(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    said(capsys, "activate", NAME, TWO, "--expected", ONE[:8])
    assert registry.asked[-1][2] == {"version": TWO, "expected": ONE}
    said(capsys, "rollback", NAME, "--expected", "none", status=1)
    assert registry.asked[-1][2] == {"expected": None}


def test_a_lost_race_says_what_is_active(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = said(capsys, "activate", NAME, TWO, "--expected", TWO, status=1)
    assert err.endswith(
        f"The active version is {ONE[:12]}. If that is what you expect: --expected {ONE[:12]}\n"
    )


def test_activate_wants_a_version(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["adapters", "activate", NAME])
    assert caught.value.code == 2
    assert f"give a version too; `onebase adapters show {NAME}` lists them" in capsys.readouterr().err


def test_rm_deletes_one_version_or_all(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "rm", f"{NAME}@{TWO[:8]}")[0] == f"Deleted {NAME}@{TWO[:8]}.\n"
    assert [one["version"] for one in registry.versions[NAME]] == [ONE]
    _, err = said(capsys, "rm", f"{NAME}@{ONE[:8]}", status=1)
    assert err.endswith("To delete it anyway: --force\n")
    assert said(capsys, "rm", NAME, "--force")[0] == f"Deleted {NAME}, with all its versions.\n"
    assert registry.asked[-1][1].endswith("?force=true")
    assert printed(capsys, "rm", "broken") == {"name": "broken", "version": None, "deleted": True}


# ---- failures and help -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["show", "nobody"], "`onebase adapters list` lists the adapters that the server has."),
        (["activate", NAME, "ffffffff"], "`onebase adapters show NAME` lists the versions."),
        (["activate", "broken", digest("3")], "See its state, or why it failed: onebase adapters show"),
    ],
)
def test_each_failure_says_what_to_do(
    registry: Registry, capsys: pytest.CaptureFixture[str], arguments: list[str], hint: str
) -> None:
    assert hint in said(capsys, *arguments, status=1)[1]


def test_another_base_leads_to_the_option_that_overrules(
    serve: Callable[..., Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def script(request: Any) -> None:
        for _ in request.chunks():
            pass
        request.reply(409, refusal(409, "base_mismatch", "trained on gemma").json())

    _, err = said(capsys, "push", str(folder), "--url", serve(script).url, status=1)
    assert err.endswith("trained on gemma (HTTP 409)\nIf you are sure that it fits this base: --any-base\n")


@pytest.mark.parametrize("action", sorted(command.ACTIONS))
def test_each_action_explains_itself_and_finds_no_server(
    action: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["adapters", action, "--help"])
    assert caught.value.code == 0
    assert f"usage: onebase adapters {action}" in capsys.readouterr().out
    needed = {"push": [str(folder)], "pull": ["a/b"], "list": [], "diff": ["a", "b"], "activate": ["a", ONE]}
    monkeypatch.setenv("ONEBASE_URL", "http://127.0.0.1:1")
    assert "No server answers" in said(capsys, action, *needed.get(action, ["a"]), status=3)[1]


def test_help_names_every_action_and_fits_a_narrow_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = said(capsys, "--help")
    assert all(f" {action} " in out for action in command.ACTIONS)
    assert max(map(len, out.splitlines())) <= 80
    assert said(capsys, status=2) == ("", out)
    assert "Did you mean `onebase adapters activate`?" in said(capsys, "activat", status=2)[1]
    assert "`onebase adapters --help` lists them." in said(capsys, "xyzzy", status=2)[1]


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
