"""The environments of child processes: what their libraries read, and so no secret that is not theirs.

A list of what is passed, not of what is kept back: nobody can list how secrets are named.
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
"""A name, or with `*` the beginning of names."""
_COMPUTING = (
    "CC", "CXX",  # Triton compiles
    "OMP_*", "GOMP_*", "KMP_*", "MKL_*", "OPENBLAS_*", "BLIS_*", "DNNL_*", "ONEDNN_*", "ATEN_*", "TORCH*",
    "PYTORCH_*", "TRITON_*", "CUDA_*", "CUBLAS*", "CUDNN_*", "NVIDIA_*", "NCCL_*", "HIP_*", "HSA_*", "ROCM_*",
    "ROCR_*", "AMD_*", "GPU_*", "MIOPEN_*", "ROCBLAS_*", "HIPBLASLT_*", "BNB_*", "BITSANDBYTES_*",
    "TOKENIZERS_*", "RAYON_*", "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT",
    "HF_HOME", "HF_HUB_CACHE", "HF_MODULES_CACHE", "ONEBASE_CACHE", "ONEBASE_KERNELS*",
)  # fmt: skip
_NO_HUB = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
"""The base is a folder by then. Without these a library could ask the Hub, with the token in HF_HOME."""
KERNELS = Path(__file__).parent / "kernels" / "native" / "libonebase_kernels.so"
"""The kernels in C, if they were built."""
_PATIENT = {"OMP_WAIT_POLICY": "passive"}
"""What PyTorch's threads have left to do is little: they would spin on cores that the kernels' threads need.
Where PyTorch computes everything, to wake them for each of thousands of calls would cost more."""
_BELOW_NORMAL = {"CUDA_MPS_CLIENT_PRIORITY": "1"}
_FETCHING = (
    "HF_*", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_*", "TRANSFORMERS_OFFLINE", "DISABLE_TELEMETRY",
    "DO_NOT_TRACK", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy",
    "all_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
)  # fmt: skip


def computing_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """For a process that computes: what torch and its like read, no credentials, and no way to the Hub."""
    passed = _passed(environ, _EVERY + _COMPUTING) | _NO_HUB
    return _PATIENT | passed if _kernels_compute(passed) else passed


def mps_runs(environ: Mapping[str, str] | None = None) -> bool:
    """Whether CUDA's Multi-Process Service is there, by which processes use a GPU at once instead of in turn.
    CUDA takes it by itself where its control daemon listens (https://docs.nvidia.com/deploy/mps/).

    Asked by a socket of another kind than the daemon's, which it never hears of: the system says which kind
    it is, or that nobody listens.
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
    """For a process that computes on the engine's GPU and is to yield to it, besides `computing_environment`.

    A priority, and not CUDA_MPS_ACTIVE_THREAD_PERCENTAGE, which would bound it on an idle GPU as well.
    """
    found = os.environ if environ is None else environ
    return {} if "CUDA_MPS_CLIENT_PRIORITY" in found or not mps_runs(environ) else _BELOW_NORMAL


def _kernels_compute(environ: Mapping[str, str]) -> bool:
    """Whether it looks as if the kernels in C will compute; each process tries them before it uses them."""
    if environ.get("ONEBASE_KERNELS") == "torch" or not KERNELS.exists():
        return False
    with contextlib.suppress(OSError):
        return " avx2 " in Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    return False


def fetching_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """For a process that asks the Hub: the Hub's own settings and token, and those of the network."""
    return _passed(environ, _EVERY + _FETCHING)


def _passed(environ: Mapping[str, str] | None, wanted: tuple[str, ...]) -> dict[str, str]:
    beginnings = tuple(name[:-1] for name in wanted if name.endswith("*"))
    found = os.environ if environ is None else environ
    return {name: value for name, value in found.items() if name in wanted or name.startswith(beginnings)}
