"""`onebase keys`: on the machine of a server, with or without one that runs."""

from __future__ import annotations

import os
import pwd
import socket
import sqlite3
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from onebase.cli import main
from onebase_adapters.registry import ApiKeys, Quotas, RegistryError, TenantRecord
from onebase_edge.settings import SettingsError, parse_duration
from onebase_server.app.cli import keys, tenants
from onebase_server.app.console import print_tenants

from .access import Keys


def test_a_key_is_made_shown_once_listed_and_revoked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEBASE_DATA_DIR", str(tmp_path / "data"))
    assert main(["keys", "create", "--scope", "admin,train", "--expires", "90d", "--name", "[b]mine"]) == 0
    made = capsys.readouterr()
    (key,) = made.out.splitlines()
    assert key not in made.err
    assert "shown this once" in made.err
    assert f"Servers with --data-dir {tmp_path / 'data'} know it." in made.err

    assert main(["keys", "list"]) == 0
    listed = capsys.readouterr().out
    record = Keys(tmp_path / "data").record(key)
    assert (record.tenant, record.scopes) == ("default", ("train", "admin"))
    assert (record.expires_at or 0) - time.time() == pytest.approx(90 * 86400, abs=600)
    for part in (record.id, "default", "train,admin", "valid", "[b]mine", "never"):
        assert part in listed
    assert key not in listed

    assert main(["keys", "revoke", record.id]) == 0
    assert "revoked" in capsys.readouterr().out
    assert main(["keys", "create", "--scope", "generate", "--tenant", "acme"]) == 0
    assert main(["keys", "list"]) == 0
    last, first = capsys.readouterr().out.splitlines()[-2:]
    assert ("acme" in last, "revoked" in first) == (True, True)
    with sqlite3.connect(tmp_path / "data" / "registry.db") as database:
        actors = {actor for (actor,) in database.execute("SELECT actor FROM audit")}
    user = pwd.getpwuid(os.getuid()).pw_name
    assert actors == {f"onebase keys of {user}@{socket.gethostname()}"}


def test_scopes_and_quotas_may_be_given_in_several_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEBASE_DATA_DIR", str(tmp_path))
    given = [
        "--scope",
        "train",
        "--scope",
        "generate,adapters",
        "--quota",
        "sequences=2",
        "--quota",
        "requests=5",
    ]
    assert main(["keys", "create", *given]) == 0
    record = Keys(tmp_path).record(capsys.readouterr().out.strip())
    assert set(record.scopes) == {"generate", "adapters", "train"}
    assert record.quotas == Quotas(sequences=2, requests=5)


def test_whoever_makes_a_first_key_without_admin_is_told_that_nobody_may_do_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEBASE_DATA_DIR", str(tmp_path))
    said = []
    for scope in ("generate", "train", "admin", "generate"):
        assert main(["keys", "create", "--scope", scope]) == 0
        words = " ".join(capsys.readouterr().err.split())
        remedy = "--scope admin, with the same --data-dir and --registry"
        said.append((remedy in words, "from now on" in words))
    assert said == [(True, True), (True, False), (False, False), (False, False)]


def test_a_registry_that_fails_once_a_key_is_made_does_not_lose_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    create, all_keys = ApiKeys.create, ApiKeys.all
    made = []

    def creating(registry: ApiKeys, *given: Any, **more: Any) -> Any:
        made.append(create(registry, *given, **more))
        return made[-1]

    def listing(registry: ApiKeys) -> Any:
        if made:
            raise RegistryError("The registry is away.")
        return all_keys(registry)

    monkeypatch.setattr(ApiKeys, "create", creating)
    monkeypatch.setattr(ApiKeys, "all", listing)
    assert keys(["create", "--scope", "generate", "--data-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{made[0][1]}\n"


def test_on_a_narrow_terminal_keys_are_blocks_whose_words_are_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEBASE_DATA_DIR", str(tmp_path))
    made = ["keys", "create", "--scope", "generate,adapters", "--name", "web shop"]
    made += ["--quota", "requests=600,sequences=16"]
    monkeypatch.setenv("COLUMNS", "80")
    assert main(made) == 0
    lines = [line.rstrip() for line in capsys.readouterr().err.splitlines()]
    for title, value in (
        ("tenant", "default"),
        ("scopes", "generate,adapters"),
        ("quotas", "requests=600,sequences=16"),
        ("name", "web shop"),
    ):
        assert f"{title:9}  {value}" in lines
    monkeypatch.setenv("COLUMNS", "200")
    assert main(made) == 0
    heading, line = capsys.readouterr().err.splitlines()[:2]
    assert heading.split()[0] == "id"
    assert line.split()[1:3] == ["default", "generate,adapters"]


def test_quotas_are_set_for_keys_and_tenants_and_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEBASE_DATA_DIR", str(tmp_path))
    made = ["--scope", "generate", "--quota", "requests=60,sequences=8", "--priority", "-3"]
    assert main(["keys", "create", "--tenant", "acme", *made]) == 0
    known = Keys(tmp_path)
    record = known.record(capsys.readouterr().out.strip())
    assert (record.quotas, record.priority) == (Quotas(requests=60, sequences=8), -3)
    assert main(["keys", "set", record.id, "--quota", "sequences=none, tokens=5"]) == 0
    assert "requests=60,tokens=5 priority=-3" in capsys.readouterr().out
    assert main(["keys", "set", record.id, "--priority", "0"]) == 0
    assert "priority" not in capsys.readouterr().out
    assert known.registry.all()[0].quotas == Quotas(requests=60, tokens=5)

    assert main(["tenants", "set", "acme", "--quota", "bytes=1.5GB,training_seconds=20h,adapters=3"]) == 0
    assert main(["tenants", "set", "zeta", "--quota", "training_seconds=90"]) == 0
    capsys.readouterr()
    assert main(["tenants", "list"]) == 0
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert "adapters=3,bytes=1500MB,training_seconds=20h" in first
    assert second.split() == ["zeta", "training_seconds=90", "0", "0", "B", "0", "0", "s"]
    known.close()


@pytest.mark.parametrize(
    ("stored", "trained", "said"),
    [
        (999, 59.0, "999 B 1 59 s"),
        (999_900_000_000, 45 * 60 + 30.0, "999.9 GB 1 45 min"),
        (1_250_000_000_000, 71_000.0, "1.2 TB 1 19 h 43 min"),
    ],
)
def test_what_a_tenant_used_has_units_like_its_limits(stored: int, trained: float, said: str) -> None:
    quotas = Quotas(bytes=2_000_000_000_000, training_seconds=72_000)
    out = StringIO()
    print_tenants(Console(file=out, width=200), [TenantRecord("acme", quotas, 2, stored, 1, trained)])
    assert " ".join(out.getvalue().splitlines()[1].split()) == f"acme bytes=2TB,training_seconds=20h 2 {said}"


@pytest.mark.parametrize(
    "quota",
    [
        "",
        "sequences",
        "sequences=",
        "sequences=few",
        "sequences=1,sequences=2",
        "bytes=10XB",
        "sequences=1.5",
    ],
)
def test_a_quota_that_cannot_be_read_is_a_wrong_argument(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quota: str
) -> None:
    with pytest.raises(SystemExit) as end:
        tenants(["set", "acme", "--quota", quota, "--data-dir", str(tmp_path)])
    assert end.value.code == 2
    assert "--quota" in capsys.readouterr().err


def test_the_registry_and_the_data_folder_are_named_as_for_serve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    assert keys(["create", "--scope", "train", "--registry", url]) == 0
    capsys.readouterr()
    assert keys(["list", "--registry", url, "--data-dir", str(tmp_path / "unused")]) == 0
    assert "train" in capsys.readouterr().out
    assert keys(["list", "--data-dir", str(tmp_path / "other")]) == 0
    assert "train" not in capsys.readouterr().out
    assert (tmp_path / "other").stat().st_mode & 0o77 == 0
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["create", "--scope", "root"], "'root' is none; choose among generate, adapters, train, admin"),
        (["create", "--scope", ","], "there is none; choose among"),
        (["create", "--scope", "train", "--tenant", "a b"], "'a b' cannot be a tenant's name"),
        (["revoke", "ob-nobody"], "There is no API key 'ob-nobody'"),
        (["set", "ob-nobody", "--priority", "1"], "There is no API key 'ob-nobody'"),
        (["create", "--scope", "train", "--quota", "bytes=1"], "onebase tenants set"),
        (["create", "--scope", "train", "--quota", "wishes=3"], "choose among requests, tokens, sequences"),
        (["create", "--scope", "train", "--priority", "5"], "priority: use a whole number from -4 to 4"),
        (["list", "--registry", "mysql://host/name"], "a sqlite:/// or a postgresql:// URL"),
        (["list", "--registry", "sqlite:////proc/none/registry.db"], "registry"),
    ],
)
def test_what_cannot_be_done_is_said_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert keys([*arguments, "--data-dir", str(tmp_path)]) == 1
    written = capsys.readouterr()
    assert said in written.err
    assert "Traceback" not in written.err
    assert written.out == ""


@pytest.mark.parametrize(
    ("text", "seconds"), [("90d", 90 * 86400), ("12h", 43200), ("30m", 1800), (" 45s ", 45)]
)
def test_a_time_is_written_with_its_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "90", "d", "-1d", "1.5h", "1d2h", "1w", "9999999d"])
def test_another_time_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="write days, hours or minutes"):
        parse_duration(text)
