"""Adapters that make a base say nothing but two words, so that an answer tells which adapter made it.

An update of rank 1 of the last layer's `down_proj` adds `c * B` to the residual stream. With a large enough
scale nothing else is left of it, and the final norm keeps only the sign of `c`: every answer consists of the
word whose row of the head is nearest to `B` and of the word that is nearest to `-B`. `B` is chosen from the
base's own head, so the two words are known beforehand. Quantization and rounding do not change them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

Matrix: TypeAlias = NDArray[np.float32]

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
GGUF_FILE: Final = "adapter.gguf"

STRONG: Final = 20_000.0
"""Scale of an update of which nothing but its direction is left after the final norm. Its residual stream
stays within the range of fp16."""
WEAK: Final = 300.0
"""Scale of an update that outweighs the base, and is outweighed a hundred times by a strong one."""
MARK: Final = 100.0
"""Scale of the mark that an adapter leaves in cached values. Sums of some hundred stay within the range
of fp16, in which llama.cpp adds them up."""
STALE_GAIN: Final = 5.0
"""Factor by which an adapter prefers another adapter's mark in cached values to its own."""
_PATTERN_ALPHA: Final = 16_384.0
"""Alpha that `alpha_pattern` gives to `down_proj`; without it the alpha is 1."""
_WORD: Final = re.compile("[Ġ▁]([a-z]{3,12})")
"""Tokens that are a lower-case word after a blank, in byte-level and in SentencePiece vocabularies."""
_POOL: Final = 192
"""Pairs of words among which those with the clearest effect are chosen."""
_ROWS: Final = 8192
"""Rows of the head that are read at once."""
_DTYPES: Final[Mapping[str, Any]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


class UnreadableBaseError(ValueError):
    """The base's folder cannot be used; the message says why."""


@dataclass(frozen=True)
class TensorSpan:
    """Place of a tensor in a safetensors file. start: in bytes from the file's beginning."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    def rows(self, step: int = _ROWS) -> Iterator[Matrix]:
        """Yield the tensor in fp32, `step` rows at a time."""
        dtype = _DTYPES.get(self.dtype)
        if dtype is None:
            raise UnreadableBaseError(f"{self.file} holds {self.dtype}, and F32, F16 or BF16 is needed")
        mapped = np.memmap(self.file, dtype, "r", self.start, self.shape)
        for first in range(0, self.shape[0], step):
            part = np.asarray(mapped[first : first + step])
            if self.dtype == "BF16":
                part = (part.astype(np.uint32) << 16).view(np.float32)
            yield part.astype(np.float32)

    def read(self) -> Matrix:
        return np.concatenate(list(self.rows()))


@dataclass(frozen=True)
class Words:
    """Two words, and the direction of the residual stream `[hidden]` of which the head makes the first, and
    of whose opposite it makes the second. The direction's root mean square is 1."""

    first: str
    second: str
    direction: Matrix
    tokens: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.first}/{self.second}"


NO_WORDS: Final = Words("", "", np.zeros(0, np.float32), (0, 0))
"""Words of an adapter that forces none."""


class Base:
    """The parts of a base that adapters are made from.

    folder: config.json, tokenizer.json and safetensors files, as transformers saves them.

    Raises:
        UnreadableBaseError: a file is missing, or the base has another structure than Llama's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            config = json.loads((folder / "config.json").read_text())
            self.config: dict[str, Any] = config.get("text_config") or config
            self.tensors = _tensors(folder)
            self._vocabulary = _vocabulary(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UnreadableBaseError(
                f"{folder} is no folder of a base with config.json, tokenizer.json and safetensors: {error}"
            ) from error
        self.layer, self.prefix = self._last_layer()

    def _last_layer(self) -> tuple[int, str]:
        """Return the number and the name of the last layer."""
        found = [re.fullmatch(r"(.*\.layers)\.(\d+)\.mlp\.down_proj\.weight", name) for name in self.tensors]
        layers = [(int(one[2]), f"{one[1]}.{one[2]}") for one in found if one]
        if not layers:
            raise UnreadableBaseError(
                f"{self.folder} has no mlp.down_proj, as Llama, Mistral and Qwen have: adapters with a "
                "sure effect cannot be made for it"
            )
        last = max(layers)
        if f"{last[1]}.post_feedforward_layernorm.weight" in self.tensors:
            raise UnreadableBaseError(
                f"{self.folder} normalizes what its MLP adds, so that no adapter on it outweighs the rest: "
                "adapters with a sure effect cannot be made for it"
            )
        return last

    def module(self, name: str) -> str:
        """Return the whole name of a module of the last layer, such as `mlp.down_proj`."""
        return f"{self.prefix}.{name}"

    def shape(self, module: str) -> tuple[int, int]:
        """Return (out, in) of a linear module, by its whole name."""
        tensor = self.tensors.get(f"{module}.weight")
        if tensor is None or len(tensor.shape) != 2:
            raise UnreadableBaseError(f"{self.folder} has no {module}.weight")
        return tensor.shape[0], tensor.shape[1]

    @property
    def fp32_bytes(self) -> int:
        """The size, in bytes, of all weights in fp32."""
        return 4 * sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @cached_property
    def hidden(self) -> int:
        return self.shape(self.module("mlp.down_proj"))[0]

    @cached_property
    def head(self) -> TensorSpan:
        """The output head, which may be the embedding."""
        own = [self.tensors[name] for name in self.tensors if re.fullmatch(r"(.*\.)?lm_head\.weight", name)]
        tied = [self.tensors[name] for name in self.tensors if name.endswith("embed_tokens.weight")]
        if not own and not tied:
            raise UnreadableBaseError(f"{self.folder} has neither lm_head.weight nor embed_tokens.weight")
        return (own or tied)[0]

    @cached_property
    def gain(self) -> Matrix:
        """The final norm's weight, [hidden]; Gemma's is stored less 1."""
        stem = self.prefix.rpartition(".layers.")[0]
        tensor = self.tensors.get(f"{stem}.norm.weight")
        if tensor is None:
            raise UnreadableBaseError(f"{self.folder} has no {stem}.norm.weight")
        gain = tensor.read()
        return gain + 1 if str(self.config.get("model_type", "")).startswith("gemma") else gain

    def words(
        self, count: int, seed: int, dimensions: NDArray[np.bool_] | slice = slice(None)
    ) -> list[Words]:
        """Return pairs of words and their directions, the clearest ones first. No word is in two pairs.

        dimensions: those of the residual stream that a direction may use.

        Raises:
            UnreadableBaseError: the vocabulary has too few words.
        """
        candidates = sorted(
            (token, match[1]) for text, token in self._vocabulary.items() if (match := _WORD.fullmatch(text))
        )
        if len(candidates) < 2 * _POOL:
            raise UnreadableBaseError(f"the vocabulary of {self.folder} has too few words of one token")
        rng = np.random.default_rng(seed)
        picked = rng.permutation(len(candidates))[: 2 * _POOL]
        pairs = [(candidates[one], candidates[other]) for one, other in picked.reshape(_POOL, 2)]
        chosen = np.array([[one[0], other[0]] for one, other in pairs])
        rows, mean = self._head_rows(chosen.reshape(-1))
        # What all rows have in common moves no token ahead of another.
        rows = (rows - mean) * self.gain
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        made = np.zeros((_POOL, self.hidden), np.float32)
        made[:, dimensions] = (rows[0::2] - rows[1::2])[:, dimensions]
        made /= np.sqrt(np.mean(made**2, axis=1, keepdims=True))
        margins = self._margins(made, chosen)
        order = [int(number) for number in np.argsort(-margins) if margins[number] > 0][:count]
        if len(order) < count:
            raise UnreadableBaseError(
                f"the head of {self.folder} has too few words that an adapter can force"
            )
        return [
            Words(
                pairs[number][0][1], pairs[number][1][1], made[number], (chosen[number][0], chosen[number][1])
            )
            for number in order
        ]

    def _head_rows(self, tokens: NDArray[np.int64]) -> tuple[Matrix, Matrix]:
        """Return the head's rows of some tokens, [tokens, hidden], and the mean of all rows."""
        rows, total, first = np.zeros((len(tokens), self.hidden), np.float32), np.zeros(self.hidden), 0
        for part in self.head.rows():
            total += part.sum(axis=0, dtype=np.float64)
            here = (tokens >= first) & (tokens < first + len(part))
            rows[here] = part[tokens[here] - first]
            first += len(part)
        return rows, (total / first).astype(np.float32)

    def _margins(self, directions: Matrix, tokens: NDArray[np.int64]) -> Matrix:
        """Return by how much each pair's words win at the head, at either sign, relative to their lead over
        the mean; at most 0 where another token wins."""
        scored = np.concatenate([part @ (directions * self.gain).T for part in self.head.rows()])
        place = np.arange(len(tokens))
        margins = []
        for sign, token in ((1, tokens[:, 0]), (-1, tokens[:, 1])):
            scores = sign * scored
            own = scores[token, place]
            scores[token, place] = -np.inf
            lead = own - sign * scored.mean(axis=0, where=np.isfinite(scored))
            margins.append((own - scores.max(axis=0)) / np.abs(lead))
            scores[token, place] = own
        least: Matrix = np.minimum(*margins)
        return least


def _tensors(folder: Path) -> dict[str, TensorSpan]:
    found: dict[str, TensorSpan] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        for name, one in header.items():
            if name != "__metadata__":
                start = 8 + length + one["data_offsets"][0]
                found[name] = TensorSpan(file, one["dtype"], tuple(one["shape"]), start)
    return found


def _vocabulary(folder: Path) -> dict[str, int]:
    """Return the ids of the tokens, by their texts in tokenizer.json."""
    known = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    if isinstance(known, dict):
        return known
    return {text: token for token, (text, _) in enumerate(known)}


# ---- adapters ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crafted:
    """One adapter: its tensors by PEFT's names, and the fields of its config.

    says: the words that an answer may consist of. never: words that show what went wrong, with the reason.
    """

    name: str
    tensors: Mapping[str, Matrix]
    config: Mapping[str, Any]
    says: Words
    never: Mapping[str, str]

    def write(self, folder: Path) -> Path:
        """Write it as PEFT saves it, into a folder of its name. Return that."""
        target = folder / self.name
        target.mkdir(parents=True, exist_ok=True)
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "lora_dropout": 0.0,
            "inference_mode": True, **self.config,
        }  # fmt: skip
        (target / CONFIG_FILE).write_text(json.dumps(config, indent=2))
        _write_safetensors(target / WEIGHTS_FILE, self.tensors)
        return target


class Adapters:
    """Makes adapters for one base, the same ones for the same seed."""

    def __init__(self, base: Base, seed: int) -> None:
        self.base = base
        self._rng = np.random.default_rng([seed, 1])
        self._words = iter(base.words(_MOST_PAIRS, seed))
        self._seed = seed

    def plain(self, name: str) -> Crafted:
        """Make an adapter of rank 1 on the last layer's `down_proj`."""
        words, module = next(self._words), self.base.module("mlp.down_proj")
        tensors = self._lora(module, words.direction[:, None] * STRONG)
        return Crafted(name, tensors, self._config(["down_proj"]), words, {})

    def ordinary(self, name: str) -> Crafted:
        """Make an adapter of rank 8 on `q_proj` and `v_proj` of all layers, as trained ones are.

        It has no words of its own: what it makes the base say is known from PEFT.
        """
        tensors: dict[str, Matrix] = {}
        for key in self.base.tensors:
            module = key.removesuffix(".weight")
            if module != key and re.search(r"\.self_attn\.(q|v)_proj$", module):
                rows, columns = self.base.shape(module)
                a = self._rng.uniform(-(columns**-0.5), columns**-0.5, (_ORDINARY_RANK, columns))
                b = self._rng.normal(0.0, _ORDINARY_STD, (rows, _ORDINARY_RANK))
                tensors |= _pair(module, a, b)
        if not tensors:
            raise UnreadableBaseError("the base has no q_proj and v_proj")
        config = _config(["q_proj", "v_proj"], _ORDINARY_RANK, 2.0 * _ORDINARY_RANK)
        return Crafted(name, tensors, config, NO_WORDS, {})

    def other_class(self, name: str) -> Crafted:
        """Make a plain adapter whose keys are those of the model without its head, as `AutoModel` has."""
        made = self.plain(name)
        tensors = {key.replace(".model.model.", ".model.", 1): value for key, value in made.tensors.items()}
        if tensors.keys() == made.tensors.keys():
            raise UnreadableBaseError("the base's layers are not below `model.`")
        config = _config([f"layers.{self.base.layer}.mlp.down_proj"], 1, 1.0)
        return Crafted(name, tensors, config, made.says, {})

    def missing_layer(self, name: str) -> Crafted:
        """Make a plain adapter with one more module, in a layer that the base lacks."""
        made = self.plain(name)
        other = f".layers.{self.base.layer + 100}."
        extra = {key.replace(f".layers.{self.base.layer}.", other): one for key, one in made.tensors.items()}
        layers = [self.base.layer, self.base.layer + 100]
        config = {**made.config, "layers_to_transform": layers}
        return Crafted(name, {**made.tensors, **extra}, config, made.says, {})

    def head(self, name: str) -> Crafted:
        """Make an adapter on `lm_head` alone. B is [vocabulary, 1]: two of its rows are not 0."""
        words = next(self._words)
        b = np.zeros((self.base.head.shape[0], 1), np.float32)
        b[words.tokens[0]], b[words.tokens[1]] = STRONG, -STRONG
        a = self._rng.normal(0, self.base.hidden**-0.5, (1, self.base.hidden)).astype(np.float32)
        keys = "base_model.model.lm_head.lora_A.weight", "base_model.model.lm_head.lora_B.weight"
        return Crafted(name, dict(zip(keys, (a, b), strict=True)), _config(["lm_head"], 1, 1.0), words, {})

    def patterns(self, name: str) -> Crafted:
        """Make an adapter that says other words if `rank_pattern` and `alpha_pattern` are not followed.

        `o_proj` has the config's rank and alpha, and pulls weakly towards one pair of words; `down_proj` has
        those of the patterns, and pulls a hundred times as strongly towards another; without the patterns a
        hundred times as weakly.
        """
        words, ignored = next(self._words), next(self._words)
        down, out = self.base.module("mlp.down_proj"), self.base.module("self_attn.o_proj")
        strong = np.repeat(words.direction[:, None], 2, axis=1) * (STRONG / _PATTERN_ALPHA)
        tensors = self._lora(down, strong) | self._lora(out, ignored.direction[:, None] * WEAK)
        patterns = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": _PATTERN_ALPHA}}
        config = {**self._config(["down_proj", "o_proj"]), **patterns}
        return Crafted(
            name, tensors, config, words, _never(ignored, "rank_pattern and alpha_pattern ignored")
        )

    def dora(self, name: str) -> Crafted:
        """Make an adapter with DoRA that says other words if its magnitudes are not applied.

        Three quarters of the rows of B pull towards its words, and the others a hundred times as strongly
        elsewhere; the magnitudes undo that.
        """
        acting = np.arange(self.base.hidden) % 4 != 0
        (words,) = self.base.words(1, self._seed + 1, acting)
        module = self.base.module("mlp.down_proj")
        elsewhere = self._rng.normal(0, STRONG, self.base.hidden)
        b = np.where(acting, np.sign(words.direction) * (STRONG / 100), elsewhere)
        magnitudes = np.where(acting, np.abs(words.direction) * STRONG, 0.01)
        key = f"base_model.model.{module}.lora_magnitude_vector"
        tensors = self._lora(module, b[:, None].astype(np.float32)) | {key: magnitudes.astype(np.float32)}
        config = {**self._config(["down_proj"]), "use_dora": True}
        return Crafted(name, tensors, config, words, {})

    def marking(self, first: str, second: str) -> tuple[Crafted, Crafted]:
        """Make two adapters that mark the values in the KV cache. The second reads marks of the first, if
        there are any, before its own."""
        words, others, stale = next(self._words), next(self._words), next(self._words)
        value, out = self.base.module("self_attn.v_proj"), self.base.module("self_attn.o_proj")
        rows, columns = self.base.shape(value)[0], self.base.shape(out)[1]
        marks = np.linalg.qr(self._rng.normal(size=(rows, 2)))[0].T.astype(np.float32) * rows**0.5
        read = self._expanded(marks, columns) / columns
        one = self._lora(value, marks[0][:, None] * MARK) | _pair(
            out, read[:1], words.direction[:, None] * (STRONG / MARK)
        )
        both = np.stack([others.direction, stale.direction * STALE_GAIN], axis=1) * (STRONG / MARK)
        other = self._lora(value, marks[1][:, None] * MARK) | _pair(out, read[::-1], both)
        targets = ["v_proj", "o_proj"]
        # Both modules of the second have rank 2: servers that know one rank alone take it as well.
        key = f"base_model.model.{value}.lora"
        other[f"{key}_A.weight"] = np.concatenate([other[f"{key}_A.weight"]] * 2)
        other[f"{key}_B.weight"] = np.concatenate([other[f"{key}_B.weight"] / 2] * 2, axis=1)
        never = _never(stale, "cached values of another adapter")
        return (
            Crafted(first, one, self._config(targets), words, {}),
            Crafted(second, other, self._config(targets, 2), others, never),
        )

    def _config(self, targets: Sequence[str], rank: int = 1) -> dict[str, Any]:
        """Return the config of an adapter on the last layer alone, without a scale."""
        return {**_config(targets, rank, float(rank)), "layers_to_transform": [self.base.layer]}

    def _expanded(self, marks: Matrix, columns: int) -> Matrix:
        """Return marks of the values, [2, kv heads * head size], as attention hands them to `o_proj`."""
        size = int(
            self.base.config.get("head_dim") or self.base.hidden // self.base.config["num_attention_heads"]
        )
        heads = marks.reshape(len(marks), -1, size)
        return np.repeat(heads, columns // marks.shape[1], axis=1).reshape(len(marks), columns)

    def _lora(self, module: str, b: Matrix) -> dict[str, Matrix]:
        """Return the tensors of one module, with a random A. b: [out, rank]."""
        rows, columns = self.base.shape(module)
        if rows != len(b):
            raise UnreadableBaseError(f"{module} has {rows} rows, and {len(b)} were expected")
        return _pair(module, self._a(b.shape[1], columns), b)

    def _a(self, rank: int, columns: int) -> Matrix:
        """Return A, [rank, in]; its rows are equal, so that the parts of an update never cancel out."""
        row = self._rng.normal(0, columns**-0.5, (1, columns)).astype(np.float32)
        return np.repeat(row, rank, axis=0)


_MOST_PAIRS: Final = 24
_ORDINARY_RANK: Final = 8
_ORDINARY_STD: Final = 0.18
"""Standard deviation of B: enough that texts differ from the base's within some tokens."""


def _pair(module: str, a: NDArray[Any], b: NDArray[Any]) -> dict[str, Matrix]:
    key = f"base_model.model.{module}.lora"
    return {f"{key}_A.weight": a.astype(np.float32), f"{key}_B.weight": b.astype(np.float32)}


def _config(targets: Sequence[str], rank: int, alpha: float) -> dict[str, Any]:
    return {"target_modules": list(targets), "r": rank, "lora_alpha": alpha}


def _never(words: Words, reason: str) -> dict[str, str]:
    return {words.first: reason, words.second: reason}


def _write_safetensors(file: Path, tensors: Mapping[str, Matrix]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            opened.write(np.ascontiguousarray(tensor, np.float32).tobytes())


# ---- GGUF, for llama.cpp -----------------------------------------------------------------------------

_GGUF_NAMES: Final[Mapping[str, str]] = {
    "mlp.down_proj": "ffn_down", "self_attn.o_proj": "attn_output", "self_attn.v_proj": "attn_v",
    "self_attn.q_proj": "attn_q",
}  # fmt: skip
_ALIGNMENT: Final = 32


def write_gguf(crafted: Crafted, base: Base, file: Path) -> None:
    """Write an adapter as llama.cpp reads it: GGUF version 3, fp32.

    Raises:
        UnreadableBaseError: a LoRA in GGUF cannot hold it.
    """
    config = crafted.config
    if config.get("use_dora") or config.get("rank_pattern"):
        raise UnreadableBaseError("a LoRA in GGUF has neither magnitudes nor patterns")
    tensors = {_gguf_name(key, base): _gguf_rows(key, value, base) for key, value in crafted.tensors.items()}
    fields = (
        ("general.architecture", str(base.config["model_type"])), ("general.type", "adapter"),
        ("adapter.type", "lora"), ("adapter.lora.alpha", float(config["lora_alpha"])),
    )  # fmt: skip
    head = b"GGUF" + _u32(3) + _u64(len(tensors)) + _u64(len(fields))
    for name, value in fields:
        is_text = isinstance(value, str)
        head += _text(name) + _u32(8 if is_text else 6)
        head += _text(str(value)) if is_text else np.float32(value).tobytes()
    offset = 0
    for name, tensor in tensors.items():
        head += _text(name) + _u32(tensor.ndim)
        head += b"".join(_u64(size) for size in reversed(tensor.shape)) + _u32(0) + _u64(offset)
        offset += tensor.nbytes + -tensor.nbytes % _ALIGNMENT
    with file.open("wb") as opened:
        opened.write(head + bytes(-len(head) % _ALIGNMENT))
        for tensor in tensors.values():
            opened.write(np.ascontiguousarray(tensor).tobytes() + bytes(-tensor.nbytes % _ALIGNMENT))


def _gguf_name(key: str, base: Base) -> str:
    module, _, part = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
    ending = part.lower()
    if module == "lm_head":
        tied = not any(re.fullmatch(r"(.*\.)?lm_head\.weight", name) for name in base.tensors)
        return f"{'token_embd' if tied else 'output'}.weight.{ending}"
    found = re.search(r"\.layers\.(\d+)\.(.+)$", module)
    if found is None or found[2] not in _GGUF_NAMES:
        raise UnreadableBaseError(f"GGUF has no name for {module}")
    return f"blk.{found[1]}.{_GGUF_NAMES[found[2]]}.weight.{ending}"


def _gguf_rows(key: str, tensor: Matrix, base: Base) -> Matrix:
    """Return a tensor with its rows in llama.cpp's order: of a Llama those of q are laid out for another form
    of the rotary embedding."""
    if not key.endswith(".self_attn.q_proj.lora_B.weight") or base.config.get("model_type") != "llama":
        return tensor
    halves = tensor.reshape(int(base.config["num_attention_heads"]), 2, -1, tensor.shape[1])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def _u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def _u64(value: int) -> bytes:
    return value.to_bytes(8, "little")


def _text(value: str) -> bytes:
    encoded = value.encode()
    return _u64(len(encoded)) + encoded
