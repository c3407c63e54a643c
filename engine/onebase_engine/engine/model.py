"""The served view of the base: wrapped layers, paged attention, one forward pass per step."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from onebase_engine.base.layers import decoder_of
from onebase_engine.base.load import STATELESS_LAYERS, UnsupportedBaseError, described
from onebase_engine.base.view import view
from onebase_engine.engine.attention import PagedAttention, UnsupportedAttentionError
from onebase_engine.engine.batch import StepBatch
from onebase_engine.engine.experts import SlotExperts, UnsupportedExpertsError, attach_experts
from onebase_engine.engine.kv_cache import (
    DUMP_BLOCK,
    RESERVED_BLOCKS,
    BlockGroup,
    HostCache,
    KVCache,
    Sight,
    block_groups,
    bytes_per_block,
    bytes_per_token,
)
from onebase_engine.engine.recurrence import Recurrence, UnsupportedRecurrenceError
from onebase_engine.kernels.cpu import find_kernels
from onebase_engine.kernels.interface import TILE, Contexts, Kernels, RowMap, StateRuns
from onebase_engine.kernels.reference import sent
from onebase_engine.kernels.weights import AdapterWeights, ExpertLora, LoraWeights, folded
from onebase_engine.lora.module import SlotModule, StepRows
from onebase_engine.lora.slots import AdapterSlots, SlotLinear, wrap_layers
from onebase_engine.machine import is_out_of_memory

if TYPE_CHECKING:
    from onebase_engine.engine.fusion import RecordedLayer, StraightPass
    from onebase_engine.engine.graphs import Graphs
    from onebase_engine.kernels.cuda import FixedStep

logger = logging.getLogger(__name__)


class Outputs(NamedTuple):
    """Logits and hidden states of one step."""

    logits: torch.Tensor
    """[L, vocab], raw, in the model's dtype."""
    hidden: torch.Tensor | None
    """[H, size], behind the last norm; None where none are wanted."""


class ServedModel:
    """A view of the base in which each sequence may have adapters of its own.

    Raises:
        UnsupportedBaseError: the model does not go through transformers' attention interface, layer by layer.
    """

    def __init__(
        self,
        base: nn.Module,
        slots: int,
        *,
        unpacked: bool = False,
        kv_dtype: torch.dtype | None = None,
        kernels: Kernels | None = None,
        max_length: int | None = None,
        step_tokens: int = 0,
    ) -> None:
        """Build the view and check that its attention can be replaced.

        Args:
            unpacked: on the CPU, 4-bit weights are stored as bf16 too, in four times their memory.
            kv_dtype: int8, or None for the base's own.
            kernels: the back-end to use instead of the best one for the device.
            max_length: largest number of tokens of a sequence; layers with a window of so many see all.
            step_tokens: largest number of tokens of a step; more than 256 may be worth a trial of a library.
        """
        self.device: torch.device = next(base.parameters()).device
        self.dtype: torch.dtype = base.get_output_embeddings().weight.dtype  # type: ignore[operator]
        self.kv_dtype = kv_dtype or self.dtype
        """Dtype of keys and values in the KV cache."""
        self.host: HostCache | None = None
        """Host memory for blocks that leave the KV cache."""
        self._view: Any = view(base)
        self._decoder = decoder_of(self._view)
        self._rows = StepRows()
        self.kernels = kernels if kernels is not None else find_kernels(self.device, self.dtype)
        self.kernels.step_rows = max(self.kernels.step_rows, step_tokens)
        self._recorded: list[RecordedLayer] = []
        self._straight: StraightPass | None = None
        self._fused = False
        self._attention = PagedAttention(self.kernels)
        self._recurrence = Recurrence(self.kernels)
        modules = wrap_layers(
            self._view,
            self._rows,
            self.kernels,
            slots=slots,
            unpacked=unpacked and self.device.type == "cpu",
        )
        self._slot_count = slots
        self._graphs: Graphs | None = None
        linear = [module for module in modules.values() if isinstance(module, SlotLinear)]
        self._ragged = any(one.base.in_features % TILE or one.base.out_features % TILE for one in linear)
        self._hidden_rows: torch.Tensor | None = None
        self._hidden: torch.Tensor | None = None
        try:
            self._attention.attach(self._view)
            self._recurrence.attach(self._view)
            experts = attach_experts(self._view, self.kernels, self._rows, slots)
            self._probe()
        except Exception as error:
            if is_out_of_memory(error):
                raise
            known = isinstance(
                error, UnsupportedAttentionError | UnsupportedRecurrenceError | UnsupportedExpertsError
            )
            reason = str(error) if known else f"{described(error)}. Choose another --quantization, or base"
            raise UnsupportedBaseError(f"{type(base).__name__} cannot be served: {reason}") from error
        adapted: dict[str, SlotModule | SlotExperts] = {**modules, **experts}
        self._slots = AdapterSlots(adapted, slots, self.device)
        self._modules = tuple(adapted.values())
        self._mixtures = len({name.rpartition(".")[0] for name in experts})
        self._waits_for_routers = not all(one.captures for one in experts.values())
        exact = [*(module.exact(0) for module in linear), *(one.exact(0) for one in experts.values())]
        named = "linear layers and mixtures" if experts else "linear layers"
        self.promise = _promise(self.kernels, exact, self.kv_dtype, named)
        """Guarantee about a sequence's bits, in a sentence or two."""
        self.groups = self._group_layers(max_length or sys.maxsize)
        """Groups of layers, each with blocks of its own."""

    def _group_layers(self, max_length: int) -> tuple[BlockGroup, ...]:
        sights = {
            layer: sight if (sight.most or max_length) < max_length else Sight()
            for layer, sight in self._attention.sights.items()
        }
        if self.state_bytes:
            # A prefix whose recurrent state is kept has all of its blocks.
            sights = dict.fromkeys(sights, Sight())
        return block_groups(self._attention.shapes, sights)

    def _probe(self) -> None:
        """Run one pass over padding tokens, to learn KV shapes and to check that attention is called."""
        ids = torch.zeros(1, TILE, dtype=torch.int64, device=self.device)
        kept = ids[0, : TILE // 2]
        logits = self._forward(ids, torch.arange(TILE, device=self.device)[None], kept)
        if len(logits) != len(kept):
            raise UnsupportedAttentionError(
                "its forward pass does not know logits_to_keep, and gives logits of every token"
            )
        text = self._view.config.get_text_config()
        kinds = getattr(text, "layer_types", None) or [""] * text.num_hidden_layers
        mixing = {layer for layer, kind in enumerate(kinds) if kind not in STATELESS_LAYERS}
        if missing := mixing - self._attention.end_probe() - self._recurrence.layers:
            raise UnsupportedAttentionError(
                f"{len(missing)} of {len(mixing)} layers do not call the attention interface, nor a "
                "recurrence that OneBase knows"
            )

    @property
    def row_multiple(self) -> int:
        """Number to a multiple of which the packed rows of a step are padded.

        PyTorch computes the last elements of an odd count in another way, and with it those of another
        sequence."""
        return TILE if self.kernels.tiled and self._ragged else self.kernels.row_multiple

    @property
    def empty_slot(self) -> int:
        """Number of a slot that is never filled."""
        return self._slot_count

    @property
    def vocabulary(self) -> int:
        """Number of tokens of the base."""
        return int(self._view.config.get_text_config().vocab_size)

    @property
    def _layers(self) -> int:
        return int(self._view.config.get_text_config().num_hidden_layers)

    @property
    def kv_tensors(self) -> int:
        """Number of tensors of the KV cache."""
        eight = self.kv_dtype == torch.int8
        if len(self.groups) > 1:
            return 2 + 2 * eight * len({group.stride for group in self.groups})
        return len(set(self._attention.shapes.values())) * (4 if eight else 2)

    @property
    def _captures(self) -> bool:
        """Whether passes are captured as CUDA graphs. Not where the host computes one expert after the other,
        which are others in each pass."""
        return self.kernels.captures and not self.state_bytes and not self._waits_for_routers

    @property
    def captures(self) -> bool:
        """Whether more passes are captured as CUDA graphs, once there is a KV cache."""
        return self._graphs is not None and not self._graphs.full

    @property
    def graph_bytes(self) -> int:
        """Largest number of bytes that captured passes may take."""
        if not self._captures:
            return 0
        from onebase_engine.engine import graphs  # imports Triton

        return graphs.most_bytes(graphs.executable_bytes(self._layers, self._mixtures), self.device)

    @property
    def drafts(self) -> bool:
        """Whether drafts are worth it."""
        return self.kernels.drafts

    @property
    def state_bytes(self) -> int:
        """Bytes of one recurrent state over all layers; 0 for a base with attention alone."""
        return self._recurrence.bytes_per_place

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token in the KV cache; 1 where no layer attends, so that blocks are numbers alone."""
        return bytes_per_token(self._attention.shapes, self.kv_dtype) or 1

    @property
    def kv_bytes_per_old_token(self) -> int:
        """Bytes of a token in the KV cache that lies before every window."""
        kept = [layer for group in self.groups if group.sight.most is None for layer in group.layers]
        return bytes_per_token({layer: self._attention.shapes[layer] for layer in kept}, self.kv_dtype)

    def kv_bytes_per_block(self, block_size: int) -> int:
        """Return the bytes of a block in the KV cache, which each group of layers has of its own."""
        size = bytes_per_block(self._attention.shapes, self.kv_dtype, block_size, self.groups)
        return size or block_size

    def allocate_kv(self, blocks: int, block_size: int, host_blocks: int = 0, state_places: int = 1) -> None:
        """Create the KV cache, once. It is zeroed memory: on the CPU, pages are taken only when written.

        Args:
            host_blocks: places in host memory for what leaves it; no `host` is made where they cannot be had.
            state_places: places for recurrent states, the one of zeros included.
        """
        if self._attention.cache is not None:
            raise RuntimeError("the served model has its KV cache, whose place is recorded")
        shapes = self._attention.shapes
        cache = KVCache(shapes, blocks, block_size, self.kv_dtype, self.device, self.groups)
        self._attention.replace_cache(cache)
        self._recurrence.allocate(state_places, self.device)
        if host_blocks and cache.layers:
            try:
                self.host = HostCache(cache, host_blocks)
            except (RuntimeError, OSError) as error:
                logger.warning("prefixes that leave the KV cache are dropped: %s", error)
        parts, strides = -(-TILE // block_size), [group.stride for group in self.groups]
        tried = 2 * parts * len(strides)
        if self.kernels.joins and not self._fused and blocks >= RESERVED_BLOCKS + tried:
            self._fused = True
            numbers = np.arange(RESERVED_BLOCKS, RESERVED_BLOCKS + tried, dtype=np.int32)
            tables = numbers.reshape(-1, 2, parts) * np.array(strides, dtype=np.int32)[:, None, None]
            self._recorded, self._straight = self._fuse(
                lambda number, rows: self._try_pass(number, rows, tables, block_size)
            )
        if self._captures:
            from onebase_engine.engine.graphs import Graphs, executable_bytes  # imports Triton
            from onebase_engine.kernels.cuda import part_bytes, tile_rows

            padding = [DUMP_BLOCK * stride * block_size for stride in strides]
            self._graphs = Graphs(
                self._run_fixed,
                self.kernels,
                self._slot_count,
                block_size,
                padding,
                self.device,
                executable=executable_bytes(self._layers, self._mixtures),
                tile_rows=tile_rows(self._attention.groups),
                part_bytes=max(
                    (
                        part_bytes(heads * self._attention.groups, size)
                        for heads, _, size in self._attention.shapes.values()
                    ),
                    default=0,
                ),
            )

    def _fuse(
        self, try_pass: Callable[[int, int], torch.Tensor]
    ) -> tuple[list[RecordedLayer], StraightPass | None]:
        """Fuse the decoder's layers, unless this PyTorch lacks the private parts that recording needs."""
        try:
            from onebase_engine.engine.fusion import fuse
        except (ImportError, AttributeError) as error:
            logger.warning("layers are computed one by one, and slower: %s", described(error))
            return [], None
        return fuse(self._view, self._attention, self.kernels, self._rows, try_pass)

    def release_kv(self) -> None:
        """Release the KV cache, so that another one can be allocated before sequences run.

        Raises:
            RuntimeError: layers are recorded with its place (kernels in C).
        """
        if self._recorded:
            raise RuntimeError("the place of the KV cache is recorded")
        self._attention.replace_cache(None)
        self._recurrence.release()
        self.host = self._graphs = None

    def _try_pass(self, number: int, rows: int, tables: np.ndarray, block_size: int) -> torch.Tensor:
        """Return the logits of `rows` rows of two contexts in the blocks of `tables`, still unused.

        Rows beyond TILE are padding, which gives no logits.
        """
        words = self.vocabulary
        used = min(rows, TILE)
        first = max(1, used - 5 - 3 * number)
        row = (np.arange(rows) >= first).astype(np.int32)
        position = np.arange(rows, dtype=np.int32) - row * first
        row[used:], position[used:] = 0, -1
        places = np.maximum(position, 0)
        write = np.ascontiguousarray(tables[:, row, places // block_size]) * block_size
        write += places % block_size
        write[:, used:] = np.array([[group.stride] for group in self.groups]) * DUMP_BLOCK * block_size
        starts, none = np.array([0, first, used], dtype=np.int32), np.zeros(2, dtype=np.int32)
        step = Contexts(position, row, write, tables, runs=StateRuns(starts, none, none - 1))
        self._attention.step = step
        every = torch.arange(rows, device=self.device)
        positions = torch.from_numpy(places).long().to(self.device)
        try:
            return self._forward((every[None] * 7 + number) % words, positions[None], every[:used], step.runs)
        finally:
            self._attention.step = None

    def kept(self, weights: AdapterWeights) -> AdapterWeights:
        """Convert a version's finished tensors once to the form for host memory, without changing results."""
        return self._slots.narrowed(folded(weights))

    def move_slots(
        self, moves: Mapping[int, str | None], weights_of: Callable[[str], AdapterWeights]
    ) -> dict[int, Exception]:
        """Load or empty slots; `weights_of` returns a digest's tensors, on any device.

        Returns the errors of slots that could not be loaded, for lack of memory for instance, and are now
        empty.
        """
        failed: dict[int, Exception] = {}
        for slot in moves:
            self._slots.clear(slot)
        ranks: dict[int, int] = dict.fromkeys(moves, 0)
        for slot, digest in moves.items():
            try:
                if digest is not None:
                    weights = weights_of(digest)
                    self._slots.load(slot, weights)
                    found = (one for one in weights.values() if isinstance(one, LoraWeights | ExpertLora))
                    ranks[slot] = max((one.rank for one in found), default=0)
            except torch.AcceleratorError:
                raise
            except Exception as error:
                self._slots.clear(slot)
                failed[slot] = error
        for layer in self._recorded:
            layer.refresh()
        if self._graphs is not None:
            self._graphs.ranks |= ranks
            self._graphs.uncaptured = {slot for one in self._modules for slot in one.uncaptured}
        return failed

    def release_memory(self) -> bool:
        """Release memory that is not needed, when memory is short. Return True if there was any."""
        return self._graphs is not None and self._graphs.forget()

    def prepare(self, batch: StepBatch) -> None:
        """Prepare `forward` as far as possible without the batch's tokens and before its slots are filled."""
        if self._graphs is not None:
            self._graphs.prepare(batch)

    def synchronize(self) -> None:
        """Wait until an accelerator has computed all work in flight."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def forward(self, batch: StepBatch) -> Outputs:
        """Return the logits of the batch's `logit_rows`, and the hidden states of its `hidden_rows`.

        They are read before the next pass, which may overwrite them.
        """
        if self._graphs is None or (found := self._graphs.run_graph(batch)) is None:
            return self.launch(batch)
        arrays = batch.logit_rows, batch.hidden_rows
        own = sent(np.concatenate(arrays), self.device)
        logit_rows, hidden_rows = torch.split(own, [len(array) for array in arrays])
        logits, hidden = found
        return Outputs(logits[logit_rows], hidden[hidden_rows] if len(hidden_rows) else None)

    def launch(self, batch: StepBatch) -> Outputs:
        """Return what `forward` does, computed kernel by kernel."""
        wants_hidden = len(batch.hidden_rows) > 0
        if not wants_hidden and (few := self._few_logits(batch)) is not None:
            return Outputs(few, None)
        arrays = batch.input_ids, batch.positions, batch.logit_rows, batch.hidden_rows
        there = sent(np.concatenate(arrays), self.device)
        ids, positions, logit_rows, hidden_rows = torch.split(there, [len(array) for array in arrays])
        step = batch.contexts, batch.token_map, batch.logit_map
        return Outputs(*self._pass(*step, ids, positions, logit_rows, hidden_rows if wants_hidden else None))

    def _few_logits(self, batch: StepBatch) -> torch.Tensor | None:
        """Return the logits of a batch of few rows, if they can be had without modelling code."""
        if self._straight is None or len(batch.input_ids) > self._straight.most_rows:
            return None
        ids, positions, kept = batch.input_ids.tolist(), batch.positions.tolist(), batch.logit_rows.tolist()
        self._rows.tokens, self._rows.logits = batch.token_map, batch.logit_map
        try:
            return self._straight.few_logits(ids, positions, kept, batch.contexts)
        finally:
            self._rows.tokens = self._rows.logits = RowMap()

    @torch.inference_mode()
    def rewind(self, rows: np.ndarray, runs: StateRuns) -> None:
        """Compute recurrent states of the last pass again, from its rows as far as drafts were right."""
        self._recurrence.rewind(sent(rows, self.device), runs)

    def _run_fixed(self, step: FixedStep) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits and hidden states of all rows of a step whose place is fixed."""
        given = step.contexts, step.rows, step.rows, step.ids, step.positions, step.every_row
        logits, hidden = self._pass(*given, step.every_row)
        if hidden is None:
            raise UnsupportedBaseError("its decoder's hidden states are not seen")
        return logits, hidden

    def _pass(
        self,
        contexts: Contexts,
        tokens: RowMap,
        logits: RowMap,
        ids: torch.Tensor,
        positions: torch.Tensor,
        logit_rows: torch.Tensor,
        hidden_rows: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self._attention.step = contexts
        self._rows.tokens, self._rows.logits = tokens, logits
        self._hidden_rows = hidden_rows
        # A hook would have the decoder's output computed by itself in every pass.
        hook = None if hidden_rows is None else self._decoder.register_forward_hook(self._keep_hidden)
        try:
            return self._forward(ids[None], positions[None], logit_rows, contexts.runs), self._hidden
        finally:
            if hook is not None:
                hook.remove()
            self._hidden_rows = self._hidden = None
            self._attention.step = None
            self._rows.tokens = self._rows.logits = RowMap()

    def _keep_hidden(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._hidden_rows is not None:
            self._hidden = output[0][0][self._hidden_rows]

    @torch.inference_mode()
    def _forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        logit_rows: torch.Tensor,
        runs: StateRuns | None = None,
    ) -> torch.Tensor:
        self._recurrence.begin_pass(runs)
        self._attention.rows.positions = positions[0]
        output = self._view(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=logit_rows)
        logits: torch.Tensor = output.logits[0]
        return logits


def _promise(kernels: Kernels, exact: list[bool], kv_dtype: torch.dtype, named: str) -> str:
    """Describe which bits are guaranteed. `exact`: whether layers, `named` so, have PEFT's bits without
    adapters."""
    cached = " Keys and values are rounded to 8 bits, which PEFT's are not." if kv_dtype == torch.int8 else ""
    if not kernels.tiled:
        return f"A sequence agrees with PEFT, and with itself in another batch, up to rounding.{cached}"
    count = f"{'All' if all(exact) else f'{sum(exact)} of'} {len(exact)}"
    base = f"{count} {named} of the base give PEFT's own bits"
    rest = "" if all(exact) else ", the others sum in another order and are as close to the exact result"
    own = "A sequence's bits do not depend on the sequences next to it."
    return f"{own} {base}{rest}; what an adapter gives, its proof says.{cached}"
