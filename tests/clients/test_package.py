from __future__ import annotations

import ast
import inspect
import pickle
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

import onebase
from onebase import errors

SOURCES = sorted(Path(onebase.__file__).parent.rglob("*.py"))


def test_all_names_every_public_name_and_nothing_else() -> None:
    public = {
        name
        for name, value in vars(onebase).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and name != "sdk_version"
    }
    assert set(onebase.__all__) == public | {"__version__"}
    assert onebase.__all__ == sorted(onebase.__all__)


def test_every_error_is_exported_and_drawn_in_the_tree() -> None:
    classes = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, Exception)
    }
    assert len(classes) == 20
    assert classes <= set(onebase.__all__)
    assert errors.__doc__ is not None
    assert classes == {word for word in errors.__doc__.split() if word.endswith("Error")} - {
        "TypeError",
        "ValueError",
    }


@pytest.mark.parametrize(
    "error",
    [
        errors.APIConnectionError("broke", sent=True),
        errors.APITimeoutError("slow", sent=False),
        errors.status_error(429, errors.ErrorDetail("full", "t", "p", "c"), retry_after=3.0),
        errors.status_error(409, errors.ErrorDetail("stale", code="stale_activation", current="3f2a")),
        errors.AdapterRejectedError("no", code="no_effect", version=None),
        errors.TrainingFailedError("no", code="invalid_file", param="training_file", job=None),  # type: ignore[arg-type]
        errors.StreamError(errors.ErrorDetail("late", code="timeout")),
        errors.InvalidResponseError("no JSON"),
    ],
)
def test_errors_survive_a_process_pool(error: errors.OneBaseError) -> None:
    restored = pickle.loads(pickle.dumps(error))  # noqa: S301 (our own bytes)
    assert type(restored) is type(error)
    assert (str(restored), vars(restored)) == (str(error), vars(error))


def test_the_version_is_the_distributions() -> None:
    assert onebase.__version__ == metadata.version("onebase")


def test_importing_the_sdk_and_the_command_loads_nothing_of_the_server() -> None:
    program = "import sys, onebase, onebase.cli; print(*sorted(m.partition('.')[0] for m in sys.modules))"
    loaded = set(
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout.split()
    )
    assert "onebase" in loaded
    assert not loaded & {
        "torch",
        "numpy",
        "pydantic",
        "transformers",
        "fastapi",
        "onebase_server",
        "onebase_route",
        "onebase_edge",
        "onebase_training",
        "onebase_adapters",
        "onebase_engine",
    }


def imported(source: Path) -> set[str]:
    """Top-level packages that a file imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").partition(".")[0])
    return names


def test_the_synchronous_client_is_what_the_asynchronous_one_makes() -> None:
    script = Path(__file__).parents[2] / "tools/generate_sync.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), "run tools/generate_sync.py"


def test_the_http_library_is_imported_in_one_file_for_each_service() -> None:
    importing = [source.name for source in SOURCES if "httpx2" in imported(source)]
    # OneBase's, any server's that `onebase conform` asks, and OpenAI's
    assert importing == ["_http.py", "conform_servers.py", "openai_answers.py"]


def test_no_file_imports_the_server_or_what_only_it_has() -> None:
    foreign = {
        "onebase_server",
        "onebase_route",
        "onebase_edge",
        "onebase_training",
        "onebase_adapters",
        "onebase_engine",
        "torch",
        "pydantic",
    }
    assert {source.name: imported(source) & foreign for source in SOURCES if imported(source) & foreign} == {}


def test_the_environment_is_read_in_one_file() -> None:
    assert [source.name for source in SOURCES if "os.environ" in source.read_text()] == ["config.py"]


@pytest.mark.parametrize(
    ("sync", "asynchronous"),
    [
        (onebase.Client, onebase.AsyncClient),
        (onebase.Stream, onebase.AsyncStream),
        (type(onebase.Client().adapters), type(onebase.AsyncClient().adapters)),
        (type(onebase.Client().models), type(onebase.AsyncClient().models)),
        (type(onebase.Client().files), type(onebase.AsyncClient().files)),
        (type(onebase.Client().training), type(onebase.AsyncClient().training)),
        (onebase.TrainingJob, onebase.AsyncTrainingJob),
        (onebase.EventStream, onebase.AsyncEventStream),
    ],
)
def test_both_clients_have_the_same_methods_and_arguments(sync: type, asynchronous: type) -> None:
    def shape(kind: type) -> dict[str, list[str]]:
        methods = {name: value for name, value in inspect.getmembers(kind) if not name.startswith("_")}
        return {
            name: [str(parameter) for parameter in inspect.signature(value).parameters.values()]
            for name, value in methods.items()
            if callable(value)
        } | {name: [] for name, value in methods.items() if not callable(value)}

    assert shape(sync) == shape(asynchronous)
    assert shape(sync)
