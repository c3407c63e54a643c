"""The OpenAPI file is true: whatever is sent by it or against it gets an answer that it names, and no 500.

A longer look, by hand, at a server that may be spoiled, takes minutes:
`schemathesis run URL/openapi.json -H "Authorization: Bearer KEY" --exclude-checks positive_data_acceptance`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from .access import Keys, client_with
from .support import Server, Starter

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "ignored_auth",
)
CALLERS = {
    "an operator": ("admin",),
    "a tenant": ("generate", "adapters", "train"),
    "a key that is revoked": (),
}


@pytest.fixture(scope="module")
def callers(keys: Keys) -> dict[str, str]:
    made = {who: keys.make(*scopes or ("admin",), tenant="default") for who, scopes in CALLERS.items()}
    keys.revoke(made["a key that is revoked"])
    return made


@pytest.fixture(scope="module")
def server(serve_scripted: Starter, keys: Keys, callers: dict[str, str]) -> Iterator[Server]:
    with serve_scripted("flood", data_dir=keys.file.parent) as server:
        yield server


@pytest.mark.parametrize("who", CALLERS)
def test_what_the_reference_allows_and_forbids_gets_an_answer_that_it_names(
    server: Server, callers: dict[str, str], keys: Keys, who: str
) -> None:
    schema = keys.file.parent / "openapi.json"
    if not schema.exists():
        with server.client() as http:
            key = {"Authorization": f"Bearer {callers['an operator']}"}
            schema.write_text(http.get("/openapi.json", headers=key).text)
    options = {
        "--url": server.url,
        "--header": f"Authorization: Bearer {callers[who]}",
        "--phases": "fuzzing",
        "--max-examples": "4" if who == "an operator" else "2",
        "--checks": ",".join(CHECKS),
        "--request-timeout": "100",
    }
    run = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", str(schema)),
            *(part for pair in options.items() for part in pair),
            *("--generation-deterministic", "--no-color", "--continue-on-failure", "--no-shrink"),
        ],
        capture_output=True,
        text=True,
        cwd=keys.file.parent,
    )

    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2_000:]
    cases = re.search(r"(\d+) generated, \1 passed", run.stdout)
    assert cases is not None, run.stdout[-2_000:]
    assert int(cases[1]) >= 60


def test_a_method_that_is_not_possible_is_answered_with_all_that_are(
    server: Server, callers: dict[str, str]
) -> None:
    with client_with(server, callers["an operator"]) as http:
        answers = {path: http.put(path) for path in ("/v1/files", "/v1/adapters/red", "/health")}

    assert {answer.status_code for answer in answers.values()} == {405}
    assert answers["/v1/files"].headers["allow"] == "GET, HEAD, POST"
    assert answers["/v1/adapters/red"].headers["allow"] == "DELETE, GET, HEAD"
    assert answers["/health"].headers["allow"] == "GET, HEAD"
