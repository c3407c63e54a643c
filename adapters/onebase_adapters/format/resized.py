"""Plan the embedding and the head of an adapter that was trained after `resize_token_embeddings`.

PEFT saves their rows in up to three places: the module that was trained (`modules_to_save`), the rows of some
tokens (`trainable_token_indices`), and the resized base's own matrix next to either, or alone. Whatever the
file has, the canonical folder holds two whole matrices, which PEFT loads as `modules_to_save`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from onebase_adapters.format.config import WEIGHTS_FILE, AdapterFormatError
from onebase_adapters.format.names import BaseModules
from onebase_adapters.format.safetensors_file import CHUNK_BYTES, TensorEntry, TensorFile
from onebase_adapters.format.spec import ModuleSpec
from onebase_adapters.format.spellings import PREFIX
from onebase_adapters.format.strict_json import shown
from onebase_engine.kernels.weights import MOST_NEW_TOKENS
from onebase_protocol.adapters import TokenizerAdditions

Parts = Mapping[str, Mapping[str, TensorEntry]]
"""Tensors of each module by their part, as in `tensors.Tensors`."""


@dataclass(frozen=True)
class ResizedMatrix:
    """Rows of the embedding or the head, `words` of them.

    The first ones are those of `matrix` in the file, or of `base` if the file has none. Those of `indices`
    are replaced by `rows` in the file.
    """

    name: str
    """PEFT's name of the matrix in the canonical folder."""
    words: int
    base: torch.Tensor
    matrix: TensorEntry | None
    trained: bool
    """Whether `matrix` was trained; otherwise its rows must be the base's, as far as the base has them."""
    indices: tuple[int, ...]
    rows: TensorEntry | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.words, self.base.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in the canonical folder: that of the file, or the base's."""
        return self.matrix.dtype if self.matrix is not None and self.trained else self.base.dtype

    def check(self, file: TensorFile) -> None:
        """Raise AdapterFormatError if rows that were not trained are not the base's."""
        if self.matrix is None or self.trained:
            return
        both = min(len(self.base), self.matrix.shape[0])
        if not file.holds(_part(self.matrix, 0, both), self.base[:both]):
            raise AdapterFormatError(
                "foreign_tensor",
                f"{WEIGHTS_FILE}: {self.matrix.name:.200} has other rows for the base's own tokens than this "
                "base. Train the module by modules_to_save, or the rows by trainable_token_indices.",
            )

    def chunks(self, file: TensorFile) -> Iterator[torch.Tensor]:
        """Yield the matrix a few MiB at a time, flat.

        Raises:
            AdapterFormatError: a row overflows in the base's dtype.
        """
        at_once = max(1, CHUNK_BYTES // 4 // self.shape[1])
        own = None if self.rows is None else file.tensor(self.rows).to(self.dtype)
        places = {index: place for place, index in enumerate(self.indices)}
        for first in range(0, self.words, at_once):
            last = min(first + at_once, self.words)
            if self.matrix is None:
                block = torch.zeros(last - first, self.shape[1], dtype=self.dtype)
                known = self.base[first:last].detach().cpu()
                block[: len(known)] = known
            else:
                block = file.tensor(_part(self.matrix, first, last)).to(self.dtype)
            for index in range(first, last) if own is not None else ():
                if index in places:
                    block[index - first] = own[places[index]]  # type: ignore[index]
            if not torch.isfinite(block.to(self.base.dtype)).all():
                raise AdapterFormatError(
                    "not_finite", f"{WEIGHTS_FILE}: {self.name:.200} overflows the base's {self.base.dtype}"
                )
            yield block.reshape(-1)


def _part(matrix: TensorEntry, first: int, last: int) -> TensorEntry:
    """Return rows `first` to `last` of a tensor as one of its own."""
    size = matrix.shape[1]
    offset = matrix.offset + first * size * matrix.dtype.itemsize
    return TensorEntry(matrix.name, matrix.dtype, (last - first, size), offset)


def resized_to(
    by_module: Parts,
    resized: Mapping[str, Sequence[TensorEntry]],
    rows: Mapping[str, tuple[int, ...]],
    saved: set[str],
    base: BaseModules,
) -> int:
    """Return the number of rows to which the embedding and the head were resized; 0 if they were not.

    Args:
        resized: matrices of the resized base in the file, by module.
        rows: tokens whose rows were trained, by module.
        saved: modules that were trained whole.

    Raises:
        AdapterFormatError: the tensors are of several sizes, or a token is beyond them.
    """
    size = base.layers[base.embedding].size_in if base.embedding else 0
    found: dict[int, str] = {}
    for name in (base.embedding, base.head):
        weight = by_module.get(name or "", {}).get("weight") if name in saved else None
        for entry in (*resized.get(name or "", ()), *([] if weight is None else [weight])):
            if len(entry.shape) == 2:
                found.setdefault(entry.shape[0], entry.name)
    highest = max(map(max, rows.values()), default=-1)
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise AdapterFormatError(
            "bad_shape",
            f"{WEIGHTS_FILE}: {first:.150} is for a vocabulary of {one} tokens, and {second:.150} for one of "
            f"{other}; the base has {size}",
        )
    words = next(iter(found), max(highest + 1, size))
    if highest >= words:
        raise AdapterFormatError(
            "bad_config",
            f"trainable_token_indices has {shown(highest)}, and the embedding in {WEIGHTS_FILE} ends at "
            f"{words - 1}",
        )
    return 0 if words == size else words


def plan_resized(
    words: int,
    tokenizer: TokenizerAdditions | None,
    problem: str,
    by_module: Parts,
    resized: Mapping[str, Sequence[TensorEntry]],
    rows: Mapping[str, tuple[int, ...]],
    saved: set[str],
    base: BaseModules,
) -> tuple[list[ModuleSpec], list[ResizedMatrix]]:
    """Return the specs and the matrices of the embedding and the head, of as many rows as there are tokens.

    Rows behind the last token, to which some trainers pad, are left out if a tokenizer says which that is.

    Args:
        words: result of `resized_to`.
        tokenizer: what the adapter's tokenizer adds to the base's.
        problem: why its tokenizer cannot be used, or "".

    Raises:
        AdapterFormatError: rows are missing, there are too many, or they are of a kind that is not served.
    """
    embedding, head = base.embedding, base.head
    size = base.layers[embedding].size_in if embedding else 0
    about = f"{WEIGHTS_FILE} is for a vocabulary of {words} tokens, and the base has {size}"
    if embedding is None or head is None or base.layers[head].bias:
        raise AdapterFormatError(
            "unsupported_kind", f"{about}: that is served on bases whose head has no bias alone"
        )
    if problem:
        raise AdapterFormatError(
            "bad_tokenizer",
            f"{about}. The tokenizer next to it cannot be used: {problem}. Save the base's own tokenizer "
            "with the added tokens next to the adapter.",
        )
    last = tokenizer.tokens[-1] if tokenizer else None
    if last is not None and last.id >= words:
        raise AdapterFormatError(
            "bad_tokenizer",
            f"{about}. Its tokenizer has the token {last.id} ({shown(last.content)}), which has no row: call "
            "resize_token_embeddings(len(tokenizer)) before training.",
        )
    highest = max(map(max, rows.values()), default=-1)
    kept = min(words, max(size, last.id + 1, highest + 1)) if last else words
    if kept - size > MOST_NEW_TOKENS:
        raise AdapterFormatError("bad_shape", f"{about}: up to {MOST_NEW_TOKENS} new tokens are served")
    specs, matrices = [], []
    for name in (embedding, head):
        own = by_module.get(name, {})
        for what in own.keys() - {"weight", "trainable_tokens_delta"}:
            raise AdapterFormatError(
                "unsupported_kind",
                f"{about}: {own[what].name:.150} is a matrix of a resized {name:.100}, which is not served. "
                "Train it by modules_to_save, or the new rows by trainable_token_indices.",
            )
        matrix, delta, indices = own.get("weight"), own.get("trainable_tokens_delta"), rows.get(name, ())
        if matrix is None and name in saved:
            raise AdapterFormatError("incomplete", f"{WEIGHTS_FILE}: {name:.200} lacks its weight")
        if indices and delta is None and name in base.pair:
            delta = by_module.get(embedding, {}).get("trainable_tokens_delta")
        if indices and delta is None:
            raise AdapterFormatError(
                "incomplete", f"{WEIGHTS_FILE}: {name:.200} lacks its trainable_tokens_delta"
            )
        if matrix is None and resized.get(name):
            matrix = resized[name][0]
        missing = () if matrix is not None else tuple(set(range(size, kept)) - set(indices))
        if missing:
            raise AdapterFormatError(
                "incomplete",
                f"{about}: the file has no row of {name:.100} for token {min(missing)}. Save the adapter "
                "with save_embedding_layers=True.",
            )
        weight = base.tensor(f"{name}.weight")
        shapes = [(matrix, (words, base.hidden_size)), (delta, (len(indices), base.hidden_size))]
        for entry, shape in shapes:
            if entry is not None and entry.shape != shape:
                raise AdapterFormatError(
                    "bad_shape",
                    f"{WEIGHTS_FILE}: {entry.name:.150} is {list(entry.shape)}; needed is {list(shape)}",
                )
        if weight is None or not weight.is_floating_point():
            raise AdapterFormatError("unsupported_kind", f"{about}: {name:.100} is quantized here")
        new = tuple(sorted(set(indices) | set(range(size, kept))))
        trained = name in saved
        parameters = kept * base.hidden_size if trained else len(new) * base.hidden_size
        kind, own_rows = ("saved", ()) if trained else ("tokens", new)
        specs.append(ModuleSpec(name, kind, 0, 0.0, False, parameters, own_rows, kept))  # type: ignore[arg-type]
        matrices.append(
            ResizedMatrix(f"{PREFIX}{name}.weight", kept, weight, matrix, trained, indices, delta)
        )
    return specs, matrices
