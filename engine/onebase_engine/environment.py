"""Environments of child processes: what their libraries read, and so no secret that is not theirs.

The lists name what is passed, not what is withheld, since nobody can list how secrets are named.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Mapping
from pathlib import Path

_EVERY = (
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_*", "TZ", "TMPDIR", "TEMP", "TMP", "COLUMNS", "NO_COLOR",
    "XDG_CACHE_HOME", "PYTHON*", "LD_*", "NIX_LD*", "MALLOC_*", "TCMALLOC_*", "MIMALLOC_*", "GLIBC_TUNABLES",
    "COVERAGE_*", "ONEBASE_LOG_FORMAT",
)  # fmt: skip
"""Names, or with `*` beginnings of names, that every process gets."""
_COMPUTING = (
    "CC", "CXX",  # Triton compiles
    "OMP_*", "GOMP_*", "KMP_*", "MKL_*", "OPENBLAS_*", "BLIS_*", "DNNL_*", "ONEDNN_*", "ATEN_*", "TORCH*",
    "PYTORCH_*", "TRITON_*", "CUDA_*", "CUBLAS*", "CUDNN_*", "NVIDIA_*", "NCCL_*", "HIP_*", "HSA_*", "ROCM_*",
    "ROCR_*", "AMD_*", "GPU_*", "MIOPEN_*", "ROCBLAS_*", "HIPBLASLT_*", "BNB_*", "BITSANDBYTES_*",
    "TOKENIZERS_*", "RAYON_*", "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT",
    "HF_HOME", "HF_HUB_CACHE", "HF_MODULES_CACHE", "ONEBASE_CACHE", "ONEBASE_KERNELS*",
)  # fmt: skip
_NO_HUB = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
"""Settings that keep libraries off the Hub, which they could ask with the token in HF_HOME."""
KERNELS = Path(__file__).parent / "kernels" / "native" / "libonebase_kernels.so"
"""Path of the kernels in C, if they were built."""
_PATIENT = {"OMP_WAIT_POLICY": "passive"}
"""Setting for processes with the kernels in C. PyTorch's threads have little to do there and would spin on
cores that the kernels' threads need. Without the kernels, waking them for each of thousands of calls would
cost more."""
_BELOW_NORMAL = {"CUDA_MPS_CLIENT_PRIORITY": "1"}
_FETCHING = (
    "HF_*", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_*", "TRANSFORMERS_OFFLINE", "DISABLE_TELEMETRY",
    "DO_NOT_TRACK", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy",
    "all_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
)  # fmt: skip


def computing_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a process that computes: no credentials, and no way to the Hub."""
    passed = _passed(environ, _EVERY + _COMPUTING) | _NO_HUB
    return _PATIENT | passed if _kernels_compute(passed) else passed


def mps_runs(environ: Mapping[str, str] | None = None) -> bool:
    """Return True if CUDA's Multi-Process Service runs, with which processes share a GPU at once.

    CUDA uses it by itself if its control daemon listens (https://docs.nvidia.com/deploy/mps/). The check
    connects by a socket of another kind than the daemon's, which the daemon does not notice: the system
    reports the wrong kind, or that nothing listens.
    """
    found = os.environ if environ is None else environ
    folder = found.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(f"{folder}/control")
        except OSError as error:
            return error.errno == errno.EPROTOTYPE
    return True


def behind_serving(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return additions to `computing_environment` for a process that yields the engine's GPU to the engine.

    A priority, and not CUDA_MPS_ACTIVE_THREAD_PERCENTAGE, which would bound it on an idle GPU as well.
    """
    found = os.environ if environ is None else environ
    return {} if "CUDA_MPS_CLIENT_PRIORITY" in found or not mps_runs(environ) else _BELOW_NORMAL


def _kernels_compute(environ: Mapping[str, str]) -> bool:
    """Return True if the kernels in C will probably be used; each process tries them before it uses them."""
    if environ.get("ONEBASE_KERNELS") == "torch" or not KERNELS.exists():
        return False
    with contextlib.suppress(OSError):
        return " avx2 " in Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    return False


def fetching_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a process that uses the Hub: its settings and token, and the network's."""
    return _passed(environ, _EVERY + _FETCHING)


def _passed(environ: Mapping[str, str] | None, wanted: tuple[str, ...]) -> dict[str, str]:
    beginnings = tuple(name[:-1] for name in wanted if name.endswith("*"))
    found = os.environ if environ is None else environ
    return {name: value for name, value in found.items() if name in wanted or name.startswith(beginnings)}
