"""Fetch data sets from the Hub: `org/name[:split][@revision]`. Only files of rows are fetched, never code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from onebase_adapters.hub.reference import HubError, HubReference
from onebase_engine.base.hub_access import hub_silence
from onebase_training.data.dataset import DataError, Problem
from onebase_training.data.files import FORMATS, MOST_FILE_BYTES

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_ID = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<split>[\w./-]{1,120}))?(?:@(?P<revision>.{1,250}))?", re.ASCII
)
_BEST_FIRST = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_SPLITS = {"train": ("train",), "eval": ("validation", "valid", "val", "eval", "dev", "test")}
_NO_ROWS = re.compile(r"(?i)^(dataset_infos?|dataset_dict|config|state|package|metadata|\..*)\.json$")
_NUMBERED = re.compile(r"-of-(\d{1,9})")
_NUMBER = re.compile(r"(?i)[-_.](?:part|shard|chunk)?[-_.]?\d{1,9}(?:-of-\d{1,9})?(?:-[0-9a-f]{16})?$")
_FIRST_NUMBER = re.compile(r"(?i)^(?:part|shard|chunk)?[-_.]?\d{1,9}(?:-of-\d{1,9})?[-_.]")
"""Number of a split's part at the end of a file's name, or at its beginning, as in `train-00000-of-2`."""
_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class DatasetId:
    """A data set on the Hub. split: `validation`, or a configuration's folder with it, as in `main/test`."""

    repo: str
    split: str | None
    revision: str | None

    def __str__(self) -> str:
        split = f":{self.split}" if self.split else ""
        return f"{self.repo}{split}" + (f"@{self.revision}" if self.revision else "")


def parse_dataset_id(text: str) -> DatasetId | None:
    """Parse a data set's id; None if the text is none, or has the suffix of a file."""
    found = _ID.fullmatch(text)
    if not found or Path(text).suffix.lower() in FORMATS:
        return None
    try:
        HubReference(found["repo"], found["revision"])
    except HubError:
        return None
    return DatasetId(found["repo"], found["split"], found["revision"])


def fetch(dataset: DatasetId, part: str) -> list[Path]:
    """Return the data set's files of one split, in the Hub's own cache. `part`: train or eval, if it names
    none.

    Raises DataError.
    """
    import huggingface_hub

    hub = huggingface_hub.HfApi()
    silence = hub_silence(dataset.repo, "datasets")
    try:
        commit = hub.resolve_revision(
            dataset.repo,
            repo_type="dataset",
            revision=dataset.revision,
            local_files_only=silence is not None,
        ).resolved
        if silence is None:
            return _download(hub, dataset, commit, part)
        if (cached := _cached(dataset, commit, part)) is not None:
            return cached
    except DataError:
        raise
    except Exception as error:  # the client's exceptions share no base class
        if silence is None:
            raise _error(dataset, f"the Hub did not give it: {_first_line(error)}") from error
    raise _error(dataset, f"it is not on this machine, and {silence}")


def _download(hub: HfApi, dataset: DatasetId, commit: str, part: str) -> list[Path]:
    try:
        info = hub.dataset_info(dataset.repo, revision=commit, files_metadata=True, timeout=_TIMEOUT_S)
    except Exception:  # what an earlier run has fetched
        if (cached := _cached(dataset, commit, part)) is not None:
            return cached
        raise
    sizes = {item.rfilename: item.size or 0 for item in info.siblings or []}
    names = choose(dataset, list(sizes), part)
    if (total := sum(sizes[name] for name in names)) > MOST_FILE_BYTES:
        raise _error(dataset, f"{total} bytes are too many: at most {MOST_FILE_BYTES} are read")
    download = partial(hub.hf_hub_download, dataset.repo, repo_type="dataset", revision=commit)
    return [Path(download(filename=name)) for name in names]


def _cached(dataset: DatasetId, commit: str, part: str) -> list[Path] | None:
    """Return the files in the Hub's cache; None if there are none, or parts of the split are missing."""
    import huggingface_hub

    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                dataset.repo, repo_type="dataset", revision=commit, local_files_only=True
            )
        )
        there = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        names = choose(dataset, there, part)
    except Exception:  # whatever it is, the Hub's own error says more
        return None
    numbered = [found for name in names if (found := _NUMBERED.search(name))]
    return [folder / name for name in names] if all(int(n[1]) == len(names) for n in numbered) else None


def choose(dataset: DatasetId, names: Sequence[str], part: str) -> list[str]:
    """Return the files of the wanted split, all of one format and one configuration.

    A split is recognized by its whole name, as `train_sft` is, or by the word `train` if one split alone has
    it. Raises DataError.
    """
    files = sorted(name for name in names if _suffix(name) in FORMATS and not _NO_ROWS.match(_base(name)))
    folder, wanted = _wanted(dataset.split, part)
    if folder:
        files = [name for name in files if name.startswith(f"{folder}/")]
    split = next((split for split in wanted if _of_split(files, split)), "")
    found = _one_split(dataset, _of_split(files, split), split) if split else []
    if not found and dataset.split is None and not any(_of_split(files, s) for s in _words()):
        found = files
    if not found:
        there = ", ".join(files[:8]) or "none"
        raise _error(dataset, f"no file of split {wanted[0]} is there; files of rows: {there}")
    best = next(suffix for suffix in _BEST_FIRST if any(_suffix(name) == suffix for name in found))
    found = [name for name in found if _suffix(name) == best]
    folders = sorted({_configuration(name) for name in found})
    if len(folders) > 1:
        shown = ", ".join(folders[:8])
        raise _error(
            dataset, f"it has several configurations ({shown}): write {dataset.repo}:{folders[-1]}/train"
        )
    return found


def _wanted(split: str | None, part: str) -> tuple[str, tuple[str, ...]]:
    if split is None:
        return "", _SPLITS.get(part, _SPLITS["train"])
    folder, _, last = split.rpartition("/")
    return folder, (last,)


def _words() -> list[str]:
    return [word for words in _SPLITS.values() for word in words]


def _of_split(names: Sequence[str], split: str) -> list[str]:
    """Return the files whose path has the split's name as a word."""
    return [name for name in names if _has_word(name, split)]


def _has_word(text: str, word: str) -> bool:
    return bool(re.search(rf"(?i)(?:^|[^a-z0-9]){re.escape(word)}(?:[^a-z0-9]|$)", text))


def _one_split(dataset: DatasetId, names: Sequence[str], split: str) -> list[str]:
    """Return those of the files, whose paths have the split's name as a word, that belong to the split of
    exactly this name.

    Raises DataError if several splits have the word, and none has exactly this name.
    """
    by_split: dict[str, list[str]] = {}
    for name in names:
        by_split.setdefault(_split_name(name, split), []).append(name)
    if len(by_split) == 1:
        return list(names)
    for called, found in by_split.items():
        if called.lower() == split.lower():
            return found
    shown, folder = ", ".join(sorted(by_split)[:8]), f"{dataset.split}".rpartition("/")[0]
    example = f"{folder}/{min(by_split)}" if folder else min(by_split)
    raise _error(dataset, f"it has several splits of that name ({shown}): write {dataset.repo}:{example}")


def _split_name(name: str, split: str) -> str:
    """Return the whole name of a file's split: an equal folder's name, or the file's name without its
    number."""
    path = PurePosixPath(name)
    if any(part.lower() == split.lower() for part in path.parent.parts):
        return split
    stem = _FIRST_NUMBER.sub("", _NUMBER.sub("", path.stem))
    parts = (stem, path.stem, *path.parent.parts)
    return next((part for part in parts if _has_word(part, split)), split)


def _configuration(name: str) -> str:
    """Return the file's folder, without parts that only name the split."""
    plain = {"data", *_words()}
    return "/".join(part for part in PurePosixPath(name).parent.parts if part not in plain)


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _base(name: str) -> str:
    return PurePosixPath(name).name


def _first_line(error: Exception) -> str:
    """Return the first line of an error, without secrets: queries of URLs, and tokens."""
    first = (str(error).strip() or "no details").splitlines()[0]
    first = re.sub(r"(https?://[^\s?'\"]*)\?[^\s'\"]*", r"\1", first)
    return f"{type(error).__name__}: {re.sub(r'hf_[A-Za-z0-9]+', '***', first)[:300]}"


def _error(dataset: DatasetId, reason: str) -> DataError:
    return DataError(str(dataset), [Problem(0, "", reason)])
