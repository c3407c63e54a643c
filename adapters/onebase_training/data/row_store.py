"""Store a run's tokenized rows in a folder: the first process that reads the data writes them, later ones map
them.

They are in flat arrays, one file each: about 5 bytes a token, 40 a row and 40 a prompt. This is a cache: a
checksum over the key and all files detects rows that are damaged, incomplete or of other data, which count
as absent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onebase_adapters.store.atomic_files import atomic_directory
from onebase_training.data.dataset import Dataset, Preference, PromptRow, Row, RowPlace, Sample

_FORMAT = 5
_CHECKSUM = "sha256"
_FACTS = 5
"""Facts of each sample: its length, its line, its prompt's length (-1: none), the places of its slice and of
its label."""
CHAT_TEMPLATE_DIR = "additional_chat_templates"
"""Folder of named templates, such as that for rows with tools, as in transformers."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")


def rows_key(settings: Mapping[str, Any], base: Path, sources: Sequence[Sequence[Path]]) -> str | None:
    """Return the SHA-256 of all that decides the rows; None if a source is no readable plain file.

    Files count by their content, which may change while size and time do not.

    Args:
        settings: settings that the rows depend on. base: its folder, in which everything but the weights
            counts: the tokenizer, its chat template, the tokens that end a generation. sources: the files of
            each.
    """
    try:
        files = [*base.iterdir(), *(base / CHAT_TEMPLATE_DIR).glob("*")]
        folder = sorted(path for path in files if path.is_file() and path.suffix not in _WEIGHTS)
        parts = [
            _FORMAT,
            settings,
            [[path.name, _sha256(path)] for path in folder],
            # The end of a file's name decides its format.
            [[[path.suffix.lower(), _sha256(path)] for path in files] for files in sources],
        ]
    except OSError:
        return None
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def write_rows(folder: Path, key: str, parts: Mapping[str, Dataset]) -> None:
    """Store the rows and prompts of data sets, replacing those stored before. Raises OSError."""
    with atomic_directory(folder) as work:
        for name, data in parts.items():
            samples = [sample for row in data.rows for sample in row.samples]
            tokens = sum(map(len, samples))
            _write(work / f"{name}.ids.npy", "<i4", tokens, (sample.ids for sample in samples))
            _write(work / f"{name}.supervised.npy", "|b1", tokens, (sample.supervised for sample in samples))
            facts: list[Iterable[int]] = [
                map(len, samples),
                (sample.line for sample in samples),
                (-1 if sample.prompt is None else sample.prompt for sample in samples),
            ]
            for what in ("slice", "label"):
                named = [getattr(sample, what) for sample in samples]
                places = {one: place for place, one in enumerate(dict.fromkeys(named))}
                np.save(work / f"{name}.{what}s.npy", np.array([*places, ""], "<U"))
                facts.append([places[one] for one in named])
            if any(sample.item for sample in samples):
                items = "\n".join(sample.item for sample in samples)  # JSON has no line breaks
                np.save(work / f"{name}.items.npy", np.frombuffer(items.encode(), "u1"))
            flat = np.array([number for some in facts for number in some], "<i8")
            sides = len(data.rows[0].samples) if data.rows else 1
            np.save(work / f"{name}.samples.npy", flat.reshape(_FACTS, -1).T.reshape(-1, sides, _FACTS))
            number = {id(sample): index for index, sample in enumerate(samples)} if data.prompts else {}
            prompts = [(number[id(p.sample)], p.own.start, p.own.stop, *p.place) for p in data.prompts]
            np.save(work / f"{name}.prompts.npy", np.array(prompts, "<i8").reshape(-1, 5))
        (work / _CHECKSUM).write_text(_checksum(work, key))


def map_rows(folder: Path, key: str, decode: Callable[[list[int]], str]) -> dict[str, Dataset] | None:
    """Return the data sets that `write_rows` stored under this key, over memory that all processes share, or
    None.

    decode: as in Prompt.
    """
    try:
        if (folder / _CHECKSUM).read_text() != _checksum(folder, key):
            return None
        names = [path.name.removesuffix(".samples.npy") for path in folder.glob("*.samples.npy")]
        return {name: _mapped(folder, name, decode) for name in names}
    except (OSError, ValueError):
        return None


def _mapped(folder: Path, name: str, decode: Callable[[list[int]], str]) -> Dataset:
    ids, supervised = (
        np.asarray(np.load(folder / f"{name}.{kind}.npy", mmap_mode="r")) for kind in ("ids", "supervised")
    )
    facts = np.load(folder / f"{name}.samples.npy")
    samples: list[Sample] = []
    start = 0
    slices, labels = (np.load(folder / f"{name}.{what}.npy").tolist() for what in ("slices", "labels"))
    stored = folder / f"{name}.items.npy"
    items = iter(np.load(stored).tobytes().decode().split("\n") if stored.exists() else ())
    for length, line, prompt, in_slice, label in facts.reshape(-1, _FACTS).tolist():
        part = slice(start, start + length)
        own = None if prompt < 0 else prompt
        names = slices[in_slice], labels[label]
        samples.append(Sample(ids[part], supervised[part], line, *names, own, next(items, "")))
        start += length
    pairs = facts.shape[1] == 2
    rows: Sequence[Row] = list(map(Preference, samples[::2], samples[1::2])) if pairs else samples
    prompts = [
        PromptRow(samples[sample], slice(first, stop), RowPlace(row, line), decode)
        for sample, first, stop, row, line in np.load(folder / f"{name}.prompts.npy").tolist()
    ]
    return Dataset(rows, prompts)


def _checksum(folder: Path, key: str) -> str:
    """Return the SHA-256 of the key and of each array's name and content."""
    total = hashlib.sha256(key.encode())
    for path in sorted(folder.glob("*.npy")):
        total.update(f" {path.name} {_sha256(path)}".encode())
    return total.hexdigest()


def _sha256(path: Path) -> str:
    """Return the SHA-256 of a plain file's content. Raises OSError."""
    if not path.is_file():  # a pipe can be read once
        raise FileNotFoundError(f"{path} is no file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, kind: str, count: int, parts: Iterable[np.ndarray[Any, Any]]) -> None:
    """Write one array of many parts, without a copy of all in memory."""
    with path.open("wb") as file:
        header = {"descr": kind, "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.ascontiguousarray(part, kind).data)
