"""Read, check and tokenize training data from a file or a data set on the Hub."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from onebase_training.data.dataset import (
    Chat,
    DataError,
    Dataset,
    Key,
    Labelled,
    Parsed,
    Preference,
    PreferencePair,
    Problem,
    PromptRow,
    Row,
    RowError,
    RowPlace,
    Task,
    Text,
    row_key,
    valid_unicode,
)
from onebase_training.data.files import Item, Record, read_file
from onebase_training.data.hub import fetch, parse_dataset_id
from onebase_training.data.rows import LABEL_FIELDS, parse_row, unfold
from onebase_training.data.tokens import (
    BaseTokens,
    RowTokens,
    Tokenized,
    dated_tokenizer,
    longest_sequence,
    reply_decoder,
    with_invocation,
)
from onebase_training.recipe import Recipe

DEFAULT_LENGTH = 2048
"""Limit of a row, in tokens, if the recipe leaves it open."""

_AT_ONCE = 256
_BYTES_AT_ONCE = 1 << 20
_MOST_PROBLEMS = 100_000
_LONGEST_SLICE = 100


def load_dataset(
    source: str | Path,
    tokenizer: Any,
    recipe: Recipe,
    *,
    part: str = "train",
    name: str | None = None,
    on_progress: Callable[[float], None] | None = None,
    files: Sequence[Path] | None = None,
) -> Dataset:
    """Read a file (or `org/name[:split][@revision]` on the Hub) and tokenize its rows for a base.

    Args:
        tokenizer: the base's own, with its chat template.
        recipe: method, train_on, max_length ("auto": 2048), too_long and template_date ("auto": today) are
            used. No row is longer than the base can read.
        part: "train" or "eval": the use of the rows. It selects the split of a data set on the Hub.
        name: the file's name, if its path does not have it (an upload); its suffix decides the format.
        on_progress: called with the part that is done, from 0 to 1. What it raises ends the reading.
        files: the result of `find_files` for the source, if it is known.

    Raises:
        DataError: with every bad line; or the file as a whole cannot be used.
    """
    shown = name or (source.name if isinstance(source, Path) else source)
    builder = _Builder(valid_unicode(shown), tokenizer, recipe)
    files = find_files(source, part) if files is None else files
    if recipe.method == "reinforcement" and any(path.suffix.lower() == ".parquet" for path in files):
        reason = (
            "a grader may read any field of a row, and of a Parquet file only known ones are read: save it"
        )
        raise DataError.of_file(valid_unicode(shown), f"{reason} as .jsonl")
    more = (recipe.slice_by, *(LABEL_FIELDS if recipe.method == "classification" else ()))
    for chunk in _chunks(_records(source, files, name, on_progress, more), _AT_ONCE):
        builder.add(chunk)
    return builder.dataset()


def find_files(source: str | Path, part: str) -> list[Path]:
    """Return the files of a source: itself, or those fetched from the Hub. Raises DataError."""
    dataset = parse_dataset_id(source) if isinstance(source, str) and not Path(source).exists() else None
    return [Path(source)] if dataset is None else fetch(dataset, part)


def _records(
    source: str | Path,
    files: Sequence[Path],
    name: str | None,
    on_progress: Callable[[float], None] | None,
    more: Sequence[str],
) -> Iterator[Item]:
    try:
        if list(files) == [Path(source)]:
            yield from read_file(files[0], on_progress, name=name, more=more)
        else:
            yield from _all_files(files, on_progress, more)
    except OSError as error:
        raise DataError.of_file(name or str(source), f"cannot be read: {error.strerror or error}") from error


def _all_files(
    paths: Sequence[Path], on_progress: Callable[[float], None] | None, more: Sequence[str]
) -> Iterator[Item]:
    """Yield the records of several files; line numbers continue from file to file."""
    before = 0
    for index, path in enumerate(paths):

        def on_part(part: float, index: int = index) -> None:
            if on_progress is not None:
                on_progress((index + part) / len(paths))

        line = 0
        for item in read_file(path, on_part, more=more):
            line = item.line
            yield replace(item, line=before + line) if line else item
        before += line


def _chunks(items: Iterable[Item], count: int) -> Iterator[list[Item]]:
    chunk: list[Item] = []
    size = 0
    for item in items:
        chunk.append(item)
        size += item.size if isinstance(item, Record) else 0
        if len(chunk) == count or size >= _BYTES_AT_ONCE:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class _Builder:
    """Collects the rows of records, or their problems."""

    def __init__(self, source: str, tokenizer: Any, recipe: Recipe) -> None:
        self._source = source
        self._method = recipe.method
        self._slice_by = recipe.slice_by
        self._decode = reply_decoder(tokenizer)
        self._tokens = RowTokens(
            BaseTokens(dated_tokenizer(tokenizer, recipe)),
            everything=recipe.train_on == "all" and recipe.method == "supervised",
            limit=_limit(recipe, tokenizer),
            too_long=recipe.too_long,
            classified=recipe.method == "classification",
            asked=recipe.method == "reinforcement",
            invocation=with_invocation(recipe, tokenizer).alora_invocation_tokens,
        )
        self._place = RowPlace(0, 0)
        self._shared_lines: set[int] = set()
        self._problems: list[tuple[RowPlace, str, str]] = []
        self._rows: list[Row] = []
        self._prompts: list[PromptRow] = []
        self._keys: list[Key] = []
        self._truncated: list[RowPlace] = []
        self._dropped: list[RowPlace] = []

    def add(self, items: Sequence[Item]) -> None:
        parsed: list[tuple[RowPlace, Parsed]] = []
        slices: dict[RowPlace, str] = {}
        for item in items:
            place = self._next_place(item.line)
            if isinstance(item, Problem):
                self._problems.append((place, item.field, item.reason))
                continue
            try:
                slices[place] = _slice(item.value, self._slice_by)
                parsed.append((place, parse_row(unfold(item.value), self._method)))
            except RowError as error:
                self._problems.append((place, error.field, error.reason))
        flat = [(place.line, side) for place, row in parsed for side in _sides(row)]
        tokenized = iter(self._tokens.tokenize(flat))
        for place, row in parsed:
            facts = {
                "slice": slices[place],
                "label": row.label if isinstance(row, Labelled) else "",
                "item": row.item if isinstance(row, Task) else "",
            }
            self._take(place, row, [_named(next(tokenized), facts) for _ in _sides(row)])
        if len(self._problems) > _MOST_PROBLEMS:
            raise self._error(Problem(0, "", "too many problems: the rest of the file was not read"))

    def dataset(self) -> Dataset:
        """Return the data set. Raises DataError if there were problems."""
        if self._problems:
            raise self._error()
        if not self._rows:
            reason = "every row was dropped as too long" if self._dropped else "the file has no rows"
            raise DataError.of_file(self._source, reason)
        return Dataset(
            self._rows,
            self._prompts,
            source=self._source,
            keys=self._keys,
            truncated=self._truncated,
            dropped=self._dropped,
            lines_shared=bool(self._shared_lines),
        )

    def _next_place(self, line: int) -> RowPlace:
        if line == self._place.line:
            self._shared_lines.add(line)
        self._place = RowPlace(self._place.row + 1, line)
        return self._place

    def _error(self, *more: Problem) -> DataError:
        """Return the problems, with the row's number if several rows share a line."""
        problems = []
        for place, field, reason in self._problems:
            number = f" (row {place.row})" if place.line in self._shared_lines else ""
            problems.append(Problem(place.line, field, reason + number))
        return DataError(self._source, [*problems, *more])

    def _take(self, place: RowPlace, row: Parsed, sides: Sequence[Tokenized | RowError]) -> None:
        for name, side in zip(("chosen", "rejected"), sides, strict=False):
            if isinstance(side, RowError):
                field = f"{name} {side.field}".strip() if isinstance(row, PreferencePair) else side.field
                self._problems.append((place, field, side.reason))
                return
        done = [side for side in sides if isinstance(side, Tokenized)]
        if not all(side.samples for side in done):
            self._dropped.append(place)
            return
        if any(side.truncated for side in done):
            self._truncated.append(place)
        first = done[0]
        if first.reply is not None:
            self._prompts.append(PromptRow(first.samples[-1], first.reply, place, self._decode))
        self._keys.append(row_key(place, row, 1 if isinstance(row, PreferencePair) else len(first.samples)))
        if isinstance(row, PreferencePair):
            # A template that rewrites earlier replies makes several samples; the last has the whole.
            self._rows.append(Preference(done[0].samples[-1], done[1].samples[-1]))
        else:
            self._rows.extend(first.samples)


def _limit(recipe: Recipe, tokenizer: Any) -> int:
    wanted = DEFAULT_LENGTH if recipe.max_length == "auto" else recipe.max_length
    longest = longest_sequence(tokenizer) or wanted + 1
    return min(wanted, longest - 1 if recipe.method == "reinforcement" else longest)


def _slice(row: Mapping[str, Any], field: str) -> str:
    """Return the name of a row's slice; "" if it has none. Raises RowError."""
    value = row.get(field)
    if value is None or value == "":
        return ""
    if not isinstance(value, str | int):
        if field == Recipe.slice_by:
            return ""  # a field of that name which means something else
        raise RowError(field, "names the row's slice: write a text or a whole number")
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if len(text) > _LONGEST_SLICE:
        raise RowError(
            field, f"the name of a slice has {len(text)} characters: write {_LONGEST_SLICE} at most"
        )
    return valid_unicode(text)


def _named(found: Tokenized | RowError, facts: Mapping[str, Any]) -> Tokenized | RowError:
    """Return the samples with the row's slice, its label and its JSON."""
    if isinstance(found, RowError) or not any(facts.values()):
        return found
    return replace(found, samples=[replace(sample, **facts) for sample in found.samples])


def _sides(row: Parsed) -> tuple[Chat | Text, ...]:
    if isinstance(row, PreferencePair):
        return row.chosen, row.rejected
    return (row.row if isinstance(row, Labelled | Task) else row,)
