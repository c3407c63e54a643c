"""One file to carry to a machine with a GPU and no network: the sources, and the wheels that it lacks.

Made of what is installed here. Only for packages that are compiled for one version of Python, the wheels of
the other versions are fetched. Unpacked there without pip. The standard library alone, but to make it.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

LIMIT = 64 << 20
"""Bytes of the file."""
FOLDER, WHEELS, COMMIT = "onebase-gpu-check", "wheels", "COMMIT"
PYTHONS = ("3.11", "3.12", "3.13")
ROOTS = (
    "accelerate", "anyio", "bitsandbytes", "httpx2", "msgspec", "peft", "rich", "safetensors",
    "transformers", "hypothesis", "pytest", "pytest-timeout",
)  # fmt: skip
"""Packages that the parts import, the tests' libraries last."""
THERE = ("torch", "triton", "numpy")
"""Packages that, with what torch needs itself, are on the machine already; they would fill the file many
times."""
SPARED = ("hf-xet", "typer")
"""Packages that only commands and downloads use."""
USELESS = re.compile(r"bitsandbytes/libbitsandbytes_(rocm|xpu|cuda11|cuda12[0-5])|/tests?/")
"""Files of wheels that are left out. Of bitsandbytes' libraries those are kept that torch since 2.9 is built
for: it takes the one for its version of CUDA, or else for another one of the same major version."""
UNUSED = ("examples/", "docs/", "clients/web/", ".github/", "deploy/", f"{WHEELS}/")
"""Folders of the sources that the check never reads."""
_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 24, 17, 12, 5)]
_PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]


def advice() -> str:
    """Return instructions for a machine without a GPU."""
    return (
        "To check a GPU elsewhere, also one without a network, carry one file there (at most "
        f"{LIMIT >> 20} MiB):\n"
        '    make gpu-check CHECK_ARGS="--bundle onebase-gpu-check.tar.gz"\n'
        "and there\n"
        f"    tar xf onebase-gpu-check.tar.gz && cd {FOLDER} && python3 benchmarks/gpu_check.py\n"
        f"{requirements()}\n"
        "Without a GPU, --device cpu runs the parts on a tiny base under Triton's interpreter."
    )


def requirements() -> str:
    return (
        f"That machine must have: Linux on x86-64, Python {PYTHONS[0]} to {PYTHONS[-1]}, torch 2.9 or newer "
        "built for CUDA 12.6 or newer, with its triton and numpy; a C compiler and Python's headers, which "
        "Triton needs."
    )


# ---- here ----------------------------------------------------------------------------------------


def write_bundle(
    root: Path,
    file: Path,
    roots: Sequence[str] = ROOTS,
    pythons: Sequence[str] = PYTHONS,
    *,
    cuda: str | None = None,
    there: Mapping[str, str] | None = None,
) -> int:
    """Write the file, and say what it holds and lacks. Exit status: 0 if nothing is lacking.

    Args:
        cuda: version of CUDA, as in 130, that bitsandbytes' library is for; None: all that torch may have.
        there: versions of what that machine has, by name; what has the same version is not carried.
    """
    try:
        files = list(_sources(root))
    except (OSError, subprocess.SubprocessError) as error:
        print(f"The sources are those that Git knows, and Git fails: {error}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="onebase-bundle-") as temporary:
        folder = Path(temporary)
        if there and "numpy" not in there:
            roots = (*roots, "numpy")  # which torch does without
        lacking = _collect(folder, roots, pythons, useless(cuda), there or {})
        wheels = sorted(folder.glob("*.whl"), key=lambda path: path.stat().st_size)
        left_out = []
        while _write(root, file, files, wheels) > LIMIT and wheels:
            left_out.append(wheels.pop().name)
    for wheel in wheels:
        print(f"  {wheel.name}")
    print(f"{file}: {file.stat().st_size / (1 << 20):.1f} MiB, {len(files)} sources, {len(wheels)} wheels.")
    print(requirements())
    for name in left_out:
        print(f"It must have this too, which did not fit into {LIMIT >> 20} MiB: {name}")
    for line in lacking:
        print(f"Could not be had: {line}")
    return 1 if lacking or left_out else 0


def _sources(root: Path) -> Iterator[str]:
    """Yield tracked files and new ones, as they are now."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in sorted(filter(None, listed.split("\0"))):
        if not name.startswith(UNUSED) and (root / name).is_file():
            yield name


def _write(root: Path, file: Path, files: Sequence[str], wheels: Sequence[Path]) -> int:
    """Write the file, and return its bytes."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w:gz") as tar:
        for name in files:
            tar.add(root / name, f"{FOLDER}/{name}")
        for wheel in wheels:
            tar.add(wheel, f"{FOLDER}/{WHEELS}/{wheel.name}")
        told = tarfile.TarInfo(f"{FOLDER}/{COMMIT}")
        told.size = len(commit)
        tar.addfile(told, io.BytesIO(commit))
    return file.stat().st_size


def missing(roots: Sequence[str] = ROOTS) -> list[str]:
    """Return what would have to be carried and is not installed here."""
    lacking: list[str] = []
    _closure(roots, lacking)
    return lacking


def installed(listed: str) -> dict[str, str]:
    """Return versions by name, from what `pip list --format=freeze` prints."""
    pairs = (line.strip().partition("==") for line in listed.splitlines())
    return {_key(name): version.partition("+")[0] for name, _, version in pairs if version}


def useless(cuda: str | None) -> re.Pattern[str]:
    """Return a pattern of files that are left out of wheels. `cuda`: the only version that is wanted."""
    if cuda is None:
        return USELESS
    return re.compile(rf"bitsandbytes/libbitsandbytes_(rocm|xpu|cuda(?!{re.escape(cuda)}\.))|/tests?/")


def _key(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _collect(
    folder: Path,
    roots: Sequence[str],
    pythons: Sequence[str],
    left_out: re.Pattern[str],
    there: Mapping[str, str],
) -> list[str]:
    """Put wheels for all `pythons` into the folder; says which could not be had."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    lacking: list[str] = []
    for distribution in _closure(roots, lacking):
        name, version = distribution.metadata["Name"], distribution.version
        if there.get(_key(name)) == version:
            continue
        tags = re.findall(r"^Tag: (\S+)", distribution.read_text("WHEEL") or "", re.M)
        ours = [tag for tag in tags if tag.endswith(("-any", "x86_64")) and "musllinux" not in tag]
        ours.sort(key=lambda tag: not fits(tag, sys.version_info[:2]))
        if ours:
            wheel = folder / f"{name.replace('-', '_')}-{version}-{ours[0]}.whl"
            if here in pythons or fits_all(ours, pythons):
                _pack(distribution, wheel, left_out)
        others = [one for one in pythons if one != here or not ours]
        for python in () if fits_all(ours, pythons) else others:
            if not _fetch(folder, f"{name}=={version}", python):
                lacking.append(f"{name} {version} for Python {python} on Linux, x86-64")
    return lacking


def _closure(roots: Sequence[str], lacking: list[str]) -> list[metadata.Distribution]:
    """Return the installed distributions of these names and what they need, but for what torch brings."""
    from packaging.requirements import Requirement

    def walk(names: Sequence[str], known: dict[str, metadata.Distribution], without: set[str]) -> None:
        for name in names:
            key = _key(name)
            if key in known or key in without or key.startswith(("nvidia-", "cuda-")):
                continue
            try:
                known[key] = metadata.distribution(name)
            except metadata.PackageNotFoundError:
                lacking.append(f"{name}, which is not installed here")
                continue
            required = (Requirement(line) for line in known[key].requires or ())
            linux = {"sys_platform": "linux", "platform_system": "Linux", "extra": ""}
            linux |= {"platform_machine": "x86_64"}
            walk(
                [one.name for one in required if not one.marker or one.marker.evaluate(linux)], known, without
            )

    there: dict[str, metadata.Distribution] = {}
    known: dict[str, metadata.Distribution] = {}
    said = len(lacking)
    walk(THERE, there, set())
    del lacking[said:]  # none of it is carried
    walk(roots, known, {*there, *THERE, *SPARED} - set(roots))
    return list(known.values())


def _pack(distribution: metadata.Distribution, file: Path, left_out: re.Pattern[str] = USELESS) -> None:
    """Write a wheel of the files that are installed, without those that are of no use there."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as wheel:
        for path in distribution.files or ():
            name = path.as_posix()
            if name.startswith("..") or "__pycache__" in name or left_out.search(name):
                continue
            if (source := Path(str(path.locate()))).is_file():
                wheel.write(source, name)


def _fetch(folder: Path, requirement: str, python: str) -> bool:
    """Have pip fetch the wheel for another version of Python."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--retries", "1", "--timeout", "15", "--dest", str(folder)]
    command += ["--python-version", python, "--implementation", "cp"]
    command += [part for platform in _PLATFORMS for part in ("--platform", platform)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr.strip()[-500:], file=sys.stderr)
    return done.returncode == 0


# ---- there ---------------------------------------------------------------------------------------


def fits(tag: str, python: tuple[int, int]) -> bool:
    """Return True if a wheel with this tag (`cp312-cp312-manylinux_2_28_x86_64`) is for that version of
    Python."""
    interpreters, abis, _ = tag.split("-")
    major, minor = python
    for one in interpreters.split("."):
        if one in ("py3", f"py{major}{minor}", f"cp{major}{minor}"):
            return True
        if "abi3" in abis and (found := re.fullmatch(r"cp3(\d+)", one)) and int(found[1]) <= minor:
            return True
    return False


def fits_all(tags: Sequence[str], pythons: Sequence[str]) -> bool:
    """Return True if one wheel, with one of these tags, is for all these versions of Python."""
    wanted = [tuple(map(int, python.split("."))) for python in pythons]
    return any(all(fits(tag, (major, minor)) for major, minor in wanted) for tag in tags)


def unpack(wheels: Path, site: Path) -> None:
    """Unpack the wheels for this Python into a folder for PYTHONPATH, unless they are there."""
    site.mkdir(parents=True, exist_ok=True)
    for wheel in sorted(wheels.glob("*.whl")):
        tag = "-".join(wheel.stem.split("-")[-3:])
        done = site / f".{wheel.name}"
        if done.exists() or not fits(tag, sys.version_info[:2]):
            continue
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                # What wheels keep apart from the folder that they are put into.
                kept = re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", member.filename)
                if ".data/" not in kept:
                    member.filename = kept
                    archive.extract(member, site)
        done.touch()
