"""Fused execution: our kernels compute in few calls what transformers' modules compute in many small ones.

The modelling code stays as it is. Layers that are called with the same rows are multiplied at the first call.
A gated MLP is one call and `down_proj`. Queries and keys are rotated where attention reads them, and residual
sums are computed with the product that they add. A decoder layer that consists of nothing else is recorded
once, before the first request, and then runs as one call for any small number of rows; layers of which each
reads what the one before has written, and nothing else that differs, run as one call together. If those are
all layers, and a pass shows that nothing lies between them and the embedding, the last norm and the head,
these are called without the modelling code around them, and with few rows the norm and the head are part of
the call. Each fusion is used only if a pass of the whole model gives the same bits with it and without.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from onebase_engine.base.layers import decoder_of
from onebase_engine.base.load import described
from onebase_engine.base.view import ROTARY, called_by, forward_with
from onebase_engine.engine.attention import PagedAttention
from onebase_engine.kernels.cpu import CpuKernels
from onebase_engine.kernels.interface import TILE, Contexts, JoinedLayers, Kernels, RowMap
from onebase_engine.kernels.recorded_calls import (
    Arena,
    Fixed,
    GatheredRows,
    Program,
    Recording,
    UnrecordableError,
)
from onebase_engine.lora.embedding import SlotEmbedding
from onebase_engine.lora.linear import SharedRows
from onebase_engine.lora.module import StepRows
from onebase_engine.lora.slots import SlotLinear, SlotModule, SlotNorm

logger = logging.getLogger(__name__)

_TURNED_MULTIPLE = 32
_SHARED_ROWS = (
    ("q_proj", "k_proj", "v_proj"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
    ("in_proj_qkvz", "in_proj_ba"),
)
"""Names of layers that a module calls with the same rows."""
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
"""Children of a decoder layer that consists of nothing but them and two sums."""
MOST_ROWS = 64
"""Number of rows for which a decoder layer is recorded, and the largest for which the recording is used; with
more, call overhead does not matter."""
_FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Kinds of rotations (transformers' `rope_type`) that depend on a row's position alone."""
KEPT = 1 << 14
"""Number of positions whose rotations are stored at most: 8 MB for heads of 128 numbers."""
MOST_ENDED = 16
"""Largest number of rows for which the norm and the head are calls of the chain, which keeps memory for their
logits: 8 MB for a vocabulary of 262,144."""
FEW_ROWS = 3
"""Number of rows of a trial, small like that of most steps."""


def fuse(
    model: nn.Module,
    attention: PagedAttention,
    kernels: Kernels,
    rows: StepRows,
    run: Callable[[int, int], torch.Tensor],
) -> tuple[list[RecordedLayer], StraightPass | None]:
    """Fuse what can be fused in a served view. Return the recorded layers, and the pass without modelling
    code, if there is one.

    The caller has to `refresh` the layers when adapters are loaded or evicted.

    Args:
        run: a pass of the whole model over so many rows, which depend on a number, for logits of them.
    """
    recorded: list[RecordedLayer] = []
    if isinstance(kernels, CpuKernels) and kernels.adds:
        recorded = list(_recorded_layers(model, attention, kernels, rows))
    parts = {
        "layers of the same rows": list(_shared_rows(model, kernels)),
        "positions": list(_rotations(model, attention)),
        "gated MLPs": list(_gated(model, kernels)),
        "sums": list(_sums(model)),
    }
    parts = {title: switches for title, switches in parts.items() if title not in kernels.unfused}
    whole = [layer.switch for layer in recorded]
    every = [switch for switches in parts.values() for switch in switches]
    trial = _Trial(run)
    # A pass over a large base takes seconds: parts are tried together, and one by one only if that fails.
    if not trial.passes(every, _PASSES):
        for title, switches in parts.items():
            if not trial.passes(switches, _PASSES):
                logger.info("kernels: %s are not fused: %s", title, trial.said)
    # Once more the first: what others have left in the memory of a recording changes nothing.
    passes = (*_PASSES, (0, FEW_ROWS), _PASSES[0])
    if not trial.passes(whole, passes, begin=lambda: run(0, MOST_ROWS)):
        logger.info("kernels: decoder layers are not recorded, which would change bits")
        return [], None
    if recorded:
        with _watching(model) as seen:
            calls = _calls(recorded, run)
        if not trial.passes(list(_chains(calls)), passes):
            logger.info("kernels: decoder layers are called one by one, as together they would change bits")
        elif (straight := _straight(model, attention, rows, recorded, calls, seen)) is not None:
            if trial.passes([straight.switch], passes):
                return recorded, straight
            logger.info(
                "kernels: the model's own code runs around the layers, without which bits would change"
            )
    return recorded, None


_Switch = tuple[Callable[[], None], Callable[[], None]]
"""Functions that switch a fusion on, and off again."""


_PASSES = ((0, TILE), (1, TILE))
"""Numbers and rows of the passes with which fusions are tried."""


@dataclass
class _Trial:
    """Passes of the whole model, by number and rows, against its logits before."""

    run: Callable[[int, int], torch.Tensor]
    said: str = ""
    """Reason why the last trial failed."""
    _expected: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def passes(
        self,
        switches: list[_Switch],
        passes: Sequence[tuple[int, int]],
        begin: Callable[[], object] = lambda: None,
    ) -> bool:
        """Switch fusions on, and off again unless these passes still give the same bits.

        Args:
            begin: called first when they are on.
        """
        if not switches:
            return True
        for one in passes:
            if one not in self._expected:
                self._expected[one] = self.run(*one)
        for on, _ in switches:
            on()
        try:
            begin()
            same = all(self._is_same(one) for one in passes)
        except Exception as error:
            logger.exception("kernels: calls cannot be fused")
            self.said, same = described(error), False
        if not same:
            for _, off in switches:
                off()
        return same

    def _is_same(self, one: tuple[int, int]) -> bool:
        got, expected = self.run(*one), self._expected[one]
        if torch.equal(got, expected):
            return True
        wrong = (got != expected).nonzero()
        first = ", ".join(map(str, wrong[0].tolist()))
        self.said = f"{len(wrong)} of {got.numel()} logits have other bits, the first at {first}"
        return False


def _layers(module: nn.Module, *names: str) -> list[SlotLinear] | None:
    """Return the layers of these names if all take rows of one size, else None."""
    found = [getattr(module, name, None) for name in names]
    layers = [layer for layer in found if isinstance(layer, SlotLinear)]
    sizes = {layer.base.in_features for layer in layers}
    return layers if len(layers) == len(names) and len(sizes) == 1 else None


def _shared_rows(model: nn.Module, kernels: Kernels) -> Iterator[_Switch]:
    for module in model.modules():
        for names in _SHARED_ROWS:
            if (layers := _layers(module, *names)) is not None:
                joined = kernels.join([layer.kernel for layer in layers])
                if joined is not None:
                    yield _sharing(layers, joined)


def _sharing(layers: list[SlotLinear], joined: JoinedLayers) -> _Switch:
    shared = SharedRows(layers, joined)

    def switch(to: SharedRows | None) -> None:
        for layer in layers:
            layer.shared = to

    return lambda: switch(shared), lambda: switch(None)


def _gated(model: nn.Module, kernels: Kernels) -> Iterator[_Switch]:
    for module in model.modules():
        both, down = _layers(module, "gate_proj", "up_proj"), getattr(module, "down_proj", None)
        if both is not None and isinstance(down, SlotLinear) and hasattr(module, "act_fn"):
            gate, up = both
            joined = kernels.join([gate.kernel, up.kernel], gated=True)
            if joined is not None and gate.base.out_features == up.base.out_features:
                yield _gating(module, gate, up, down, joined)


def _gating(module: Any, gate: SlotLinear, up: SlotLinear, down: SlotLinear, both: JoinedLayers) -> _Switch:
    whole = module.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor
        if gate.replacements or up.replacements or x.dtype != torch.bfloat16:
            y = whole(x)
        else:
            hidden = both(x.reshape(-1, x.shape[-1]).contiguous(), gate.rows)[0]
            y = down(hidden.view(*x.shape[:-1], -1))
        return y

    return lambda: setattr(module, "forward", forward), lambda: delattr(module, "forward")


def _sums(model: nn.Module) -> Iterator[_Switch]:
    """Yield decoder layers that add the attention's output to their rows, and then the MLP's."""
    for module in model.modules():
        if set(dict(module.named_children())) == _LAYER:
            both = [
                getattr(part, name, None)
                for part, name in ((module.self_attn, "o_proj"), (module.mlp, "down_proj"))
            ]
            layers = [one for one in both if isinstance(one, SlotLinear) and one.kernel.adds]
            if len(layers) == 2:
                yield _summing(module, *layers)


def _summing(module: Any, output: SlotLinear, down: SlotLinear) -> _Switch:
    whole = module.forward

    def forward(hidden_states: torch.Tensor, *args: Any, **named: Any) -> Any:
        replaced = output.replacements or down.replacements
        if args or replaced or hidden_states.dtype != torch.bfloat16:
            return whole(hidden_states, *args, **named)
        try:
            output.onto = hidden_states.contiguous()
            attended = module.self_attn(hidden_states=module.input_layernorm(hidden_states), **named)[0]
            down.onto = attended.contiguous()
            return module.mlp(module.post_attention_layernorm(attended))
        finally:
            output.onto = down.onto = None

    return lambda: setattr(module, "forward", forward), lambda: delattr(module, "forward")


def _rotations(model: nn.Module, attention: PagedAttention) -> Iterator[_Switch]:
    for module in model.modules():
        turn = called_by(module, ROTARY) if getattr(module, "paged", None) is attention else None
        if turn is not None:
            yield _rotating(module, attention, turn)


def _rotating(module: Any, attention: PagedAttention, turn: Callable[..., Any]) -> _Switch:
    def later(*given: Any, **named: Any) -> Any:
        attention.rotation = None
        if named or len(given) != 4 or attention.step is None:  # Some rotate queries and keys one by one.
            return turn(*given, **named)
        q, k, cos, sin = given
        fits = cos.shape == (1, q.shape[2], q.shape[3]) and q.shape[3] == k.shape[3]
        plain = cos.dtype == sin.dtype == q.dtype == torch.bfloat16
        if not (fits and plain and q.shape[3] % _TURNED_MULTIPLE == 0):
            return turn(q, k, cos, sin)
        attention.rotation = cos.contiguous(), sin.contiguous()
        return q, k

    own = forward_with(module, {ROTARY: later})
    return lambda: setattr(module, "forward", own), lambda: delattr(module, "forward")


# ---- whole decoder layers ----------------------------------------------------------------------

_Call: TypeAlias = "tuple[RecordedLayer, Sequence[torch.Tensor], torch.Tensor]"
"""A recorded layer, what it was given in a pass and what it gave."""


@dataclass
class _Memory:
    """Memory that the recorded layers of a model share."""

    arenas: tuple[Arena, Arena] = field(default_factory=lambda: (Arena(), Arena()))
    """Arenas of layers with even and with odd numbers: each layer reads what the one before has written."""
    fixed: dict[tuple[Any, ...], Fixed] = field(default_factory=dict)
    """Fixed places of a layer's arguments, by number among its tensors, shape and dtype."""
    said: set[str] = field(default_factory=set)
    """Reasons why layers are not recorded that have been logged."""
    watched: list[_Call] | None = None
    """Calls of layers by their recordings in the pass that is watched, in order."""


class RecordedLayer:
    """A decoder layer that is one call for up to MOST_ROWS rows, unless an adapter replaces a part of it or a
    part has a forward hook. It is recorded in its first pass over MOST_ROWS rows, which `fuse` makes."""

    def __init__(
        self,
        module: nn.Module,
        number: int,
        attention: PagedAttention,
        kernels: CpuKernels,
        rows: StepRows,
        memory: _Memory,
    ) -> None:
        self._module: Any = module
        self._whole: Callable[..., Any] = module.forward
        self._attention = attention
        self.kernels = kernels
        self._rows = rows
        self.memory = memory
        self._arena, self._before = memory.arenas[number % 2], memory.arenas[1 - number % 2]
        self._wrapped = [one for one in module.modules() if isinstance(one, SlotModule)]
        self._hooks = _Hooks(*module.children())
        self._tried = False
        """Whether the layer was to be recorded."""
        self._programs: dict[int, Program] = {}
        """The recording by number of rows; empty if there is none."""
        self._plain = True
        self.chain: Sequence[RecordedLayer] = ()
        """This layer and those after it that it computes with it; empty if it has none."""
        self.leader: RecordedLayer | None = None
        """The layer that computes this one with it."""
        self._chained: dict[int, Program | None] = {}
        """Programs of the chain, by number of rows."""
        self._chain_hooks = _Hooks()
        self._ran: tuple[torch.Tensor, ...] | None = None
        """Tensors that the chain's other layers must be given in this pass; None if each computes alone."""

    @property
    def switch(self) -> _Switch:
        return lambda: setattr(self._module, "forward", self._forward), lambda: delattr(
            self._module, "forward"
        )

    def refresh(self) -> None:
        """Check whether adapters in the slots now replace a part of the layer."""
        self._plain = not any(one.replacements for one in self._wrapped)

    @property
    def inputs(self) -> set[int]:
        """Numbers of the given tensors that the recording reads."""
        return {number for program in self._programs.values() for number in program.inputs}

    def _forward(self, *args: Any, **named: Any) -> Any:
        step = self._attention.step
        given = _tensors(args, named)
        if self.leader is not None and (ran := self.leader._ran) is not None:
            return self.leader.result_for(given, ran)
        self._ran = None
        if not self._plain or step is None or not given or given[0].dim() != 3 or self._hooks:
            return self._whole(*args, **named)
        count = given[0].shape[1]
        if count > MOST_ROWS or given[0].dtype != torch.bfloat16:
            return self._whole(*args, **named)
        if count == MOST_ROWS and not self._tried:
            self._tried = True
            return self._record(args, named, step)
        program = self._programs.get(count) or self._shorter(count)
        if program is None:
            return self._whole(*args, **named)
        together = self.together(count)
        if together is not None:
            result = together.run_calls(given, self._rows.tokens, step)
            self._ran = (result, *given[1:])
            return result
        result = program.run_calls(given, self._rows.tokens, step)
        if self.memory.watched is not None:
            self.memory.watched.append((self, given, result))
        return result

    def result_for(self, given: Sequence[torch.Tensor], ran: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the chain's result as that of one of its layers, which must be given what `ran` holds.

        Raises:
            RuntimeError: the layer is given something else than in the pass by which the chain was found.
                From then on, each layer computes alone.
        """
        if len(ran) != len(given) or any(a is not b for a, b in zip(ran, given, strict=True)):
            self.part()
            raise RuntimeError("a decoder layer was given other tensors than the layers before it")
        return ran[0]

    def lead(self, chain: Sequence[RecordedLayer]) -> None:
        """Compute these layers, of which this is the first, in one call."""
        self.chain = chain
        self._chain_hooks = _Hooks(*(one._module for one in chain))
        for one in chain[1:]:
            one.leader = self

    def part(self) -> None:
        """Have each layer of the chain compute by itself again."""
        for one in self.chain[1:]:
            one.leader = None
        self.chain, self._ran = (), None
        self._chained.clear()

    def run_chain(self, given: Sequence[torch.Tensor], step: Contexts) -> torch.Tensor | None:
        """Return what the chain computes for these tensors; None if it cannot run as one call."""
        count = given[0].shape[1]
        fits = count <= MOST_ROWS and given[0].dtype == torch.bfloat16
        together = self.together(count) if fits else None
        return None if together is None else together.run_calls(given, self._rows.tokens, step)

    def together(self, count: int) -> Program | None:
        """Return the programs of the chain for so many rows as one; None if it has none, or if something
        needs what happens within a layer, or between it and its neighbours."""
        if not self.chain or self._chain_hooks or not all(layer._plain for layer in self.chain):
            return None
        if count not in self._chained:
            programs = [one._programs.get(count) or one._shorter(count) for one in self.chain]
            there = [one for one in programs if one is not None]
            self._chained[count] = Program.joined(there) if len(there) == len(programs) else None
        return self._chained[count]

    def _shorter(self, count: int) -> Program | None:
        """Return the recording for fewer rows than it was made with; None if there is none."""
        if MOST_ROWS not in self._programs:
            return None
        return self._programs.setdefault(count, self._programs[MOST_ROWS].first_rows(count))

    def _record(self, args: Any, named: Any, step: Contexts) -> Any:
        fixed = [self._fix(number, tensor, step) for number, tensor in enumerate(_tensors(args, named))]
        places = iter(one.tensor for one in fixed)
        own_args, own_named = (
            _replaced(args, places),
            dict(zip(named, _replaced(named.values(), places), strict=True)),
        )
        try:
            with Recording(self.kernels, self._arena, fixed) as recording:
                result = self._whole(*own_args, **own_named)
            if not isinstance(result, torch.Tensor):
                raise UnrecordableError("a layer gives more than its rows")
            self._programs[MOST_ROWS] = recording.program(result)
        except UnrecordableError as error:
            if str(error) not in self.memory.said:
                self.memory.said.add(str(error))
                logger.info("kernels: %s are not recorded: %s", type(self._module).__name__, error)
            return self._whole(*args, **named)
        return result

    def _fix(self, number: int, tensor: torch.Tensor, step: Contexts) -> Fixed:
        if self._before.holds(tensor):
            return Fixed(tensor)
        key = (number, tuple(tensor.shape), tensor.dtype)
        fixed = self.memory.fixed
        if key not in fixed:
            fixed[key] = Fixed(torch.empty_like(tensor, memory_format=torch.contiguous_format))
        fixed[key].load_tensor(tensor, step)
        return fixed[key]


def _calls(recorded: Sequence[RecordedLayer], run: Callable[[int, int], torch.Tensor]) -> list[_Call]:
    """Return the calls of recorded layers in a pass, in order."""
    memory = recorded[0].memory
    memory.watched = []
    try:
        run(0, TILE)
        return memory.watched
    finally:
        memory.watched = None


def _chains(calls: Sequence[_Call]) -> Iterator[_Switch]:
    """Yield switches for the layers that run as one call, as a pass shows which are given what."""
    ends = [at for at in range(1, len(calls)) if not _follows(calls[at - 1], calls[at])]
    for first, last in pairwise([0, *ends, len(calls)]):
        if last - first > 1:
            layers = tuple(layer for layer, _, _ in calls[first:last])
            yield partial(layers[0].lead, layers), layers[0].part


def _follows(before: _Call, call: _Call) -> bool:
    """Return whether a layer is given what the one before has given, and the same tensors besides."""
    (_, given, result), (_, then, _) = before, call
    same = len(given) == len(then) and all(a is b for a, b in zip(given[1:], then[1:], strict=True))
    return same and then[0] is result


# ---- what lies around the layers ---------------------------------------------------------------


class _Seen(NamedTuple):
    """Call of a module in a pass that is watched."""

    module: nn.Module
    given: tuple[Any, ...]
    result: Any


class _Logits(NamedTuple):
    """Output of a model, as far as it is read."""

    logits: torch.Tensor


@contextmanager
def _watching(model: nn.Module) -> Iterator[list[_Seen]]:
    """Collect the calls of a view's outermost modules, and of the decoder and the view, as they end."""
    seen: list[_Seen] = []

    def note(module: nn.Module, args: Any, named: dict[str, Any], result: Any) -> None:
        seen.append(_Seen(module, (*args, *named.values()), result))

    outer = (model, decoder_of(model), *_outermost(model))
    hooks = [one.register_forward_hook(note, with_kwargs=True) for one in outer]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that stand beside the lists of layers."""
    for one in module.children():
        if isinstance(one, SlotModule) or not any(True for _ in one.children()):
            yield one
        elif not isinstance(one, nn.ModuleList):
            yield from _outermost(one)


def _straight(
    model: nn.Module,
    attention: PagedAttention,
    rows: StepRows,
    recorded: Sequence[RecordedLayer],
    calls: Sequence[_Call],
    seen: Sequence[_Seen],
) -> StraightPass | None:
    """Return a pass that leaves out the modelling code around a chain of all layers; None if it may not be.

    A pass must show that this code hands tensors on as they are: from the embedding and the rotations to the
    first layer, from the last layer to the norm, and rows of that to the head.
    """
    decoder: Any = decoder_of(model)
    leader = recorded[0]
    whole_chain = tuple(leader.chain) == tuple(recorded) and len(calls) == len(recorded)
    if decoder is model or not whole_chain or len(seen) != 6:
        return None
    embedding, rotary, norm, body, head, whole = seen
    (_, first, _), (_, _, last) = calls[0], calls[-1]
    if (body.module, whole.module) != (decoder, model) or len(embedding.given) != 1 or len(rotary.given) != 2:
        return None
    turns, hidden = rotary.result, norm.result
    places = {number: _place(turns, first[number]) for number in leader.inputs if number}
    numbers = {number: place for number, place in places.items() if place is not None}
    joins = (
        isinstance(turns, tuple)
        and rotary.given[0] is first[0] is embedding.result
        and all(_place(body.given, one) is not None for one in (embedding.given[0], rotary.given[1]))
        and len(numbers) == len(places)
        and isinstance(norm.module, SlotNorm)
        and isinstance(head.module, SlotLinear)
        and len(norm.given) == len(head.given) == 1
        and norm.given[0] is last
        and body.result[0] is hidden
        and whole.result.logits is head.result
    )
    if not joins:
        return None
    modules = embedding.module, rotary.module, norm.module, head.module
    return StraightPass(model, decoder, attention, leader, numbers, rows, *modules)


def _copied(logits: torch.Tensor) -> torch.Tensor:
    """Return a copy that this thread makes alone. For `clone` PyTorch wakes its own threads, which by default
    then spin on the cores that the kernels' threads need."""
    copy = torch.empty_like(logits, memory_format=torch.contiguous_format)
    ctypes.memmove(copy.data_ptr(), logits.data_ptr(), logits.nbytes)
    return copy


def _place(among: Any, tensor: torch.Tensor) -> int | None:
    """Return the number of a tensor in a tuple; None if it is not in it."""
    return next((number for number, one in enumerate(among) if one is tensor), None)


class StraightPass:
    """A pass of a model through its modules, one after the other, without the modelling code around them."""

    most_rows = MOST_ENDED
    """Largest number of rows of `few_logits`."""

    def __init__(
        self,
        model: Any,
        decoder: Any,
        attention: PagedAttention,
        leader: RecordedLayer,
        turns: Mapping[int, int],
        rows: StepRows,
        embedding: nn.Module,
        rotary: nn.Module,
        norm: Any,
        head: Any,
    ) -> None:
        """Describe the pass. `turns`: places in the rotations of the tensors that the chain reads, by their
        numbers among those that its first layer is given."""
        self._model, self._decoder = model, decoder
        self._attention = attention
        self._leader = leader
        self._turns = turns
        self._rows = rows
        self._embedding: Any = embedding
        self._table = _table_of(embedding)
        self._rotations = _Rotations(rotary)
        self._norm, self._head = norm, head
        self._end = _End(leader, norm, head, rows)
        self._hooks = _Hooks(model)

    @property
    def switch(self) -> _Switch:
        decoder, model, norm, head = self._decoder, self._model, self._norm, self._head
        own_body, own_whole = decoder.forward, model.forward

        def body(input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool) -> Any:
            step, result = self._attention.step, None
            if step is not None and input_ids.shape[1] <= MOST_ROWS:
                result = self._leader.run_chain(self._given(input_ids, position_ids), step)
            if result is None:
                return own_body(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)
            return (norm(result),)

        def whole(
            input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool, logits_to_keep: torch.Tensor
        ) -> _Logits:
            step, kept = self._attention.step, logits_to_keep
            if step is not None and input_ids.shape[1] <= MOST_ENDED and not self._hooks:
                there = input_ids[0].tolist(), position_ids[0].tolist(), kept.tolist()
                logits = self.few_logits(*there, step)
                if logits is not None:
                    return _Logits(_copied(logits)[None])
                program = self._end.program(input_ids.shape[1], there[-1])
                if program is not None:
                    given = self._given(input_ids, position_ids)
                    return _Logits(_copied(program.run_calls(given, self._rows.tokens, step)))
            hidden = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)[0]
            return _Logits(head(hidden.index_select(1, kept)))

        def on() -> None:
            decoder.forward, model.forward = body, whole

        def off() -> None:
            decoder.forward, model.forward = own_body, own_whole

        return on, off

    @torch.inference_mode()
    def few_logits(
        self, ids: Sequence[int], positions: Sequence[int], kept: Sequence[int], step: Contexts
    ) -> torch.Tensor | None:
        """Return the logits [rows, vocabulary] of a pass over a few rows; the next pass overwrites them.

        No operator of PyTorch is called, of which each costs as much as a layer's part while the caches hold
        weights alone. Returns None where the pass needs one, or where not every row's logits are kept.
        """
        if self._hooks or self._table is None or self._embedding.filled:
            return None
        tables = self._rotations.tables(max(positions)) if self._turns else ()
        program = self._end.program(len(ids), kept)
        if tables is None or program is None or min(ids) < 0 or max(ids) >= len(self._table):
            return None
        gathered = {number: GatheredRows(tables[place], positions) for number, place in self._turns.items()}
        gathered[0] = GatheredRows(self._table, ids)
        return program.run_gathered(gathered, self._rows.tokens, step)

    def _given(self, ids: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
        """Return what the chain is given for these rows."""
        x = self._embedding(ids)
        turned = self._rotations(x, positions) if self._turns else ()
        given = [x] * (1 + max(self._turns, default=0))
        for number, place in self._turns.items():
            given[number] = turned[place]
        return given


def _table_of(embedding: nn.Module) -> torch.Tensor | None:
    """Return the table of which an embedding gives rows as they are, unless it has adapters; None if it has
    none."""
    base = embedding.base if isinstance(embedding, SlotEmbedding) else None
    if type(base) is not nn.Embedding or base.max_norm is not None:
        return None
    weight = base.weight
    return weight if weight.is_contiguous() and weight.dtype == torch.bfloat16 else None


class _Hooks:
    """Hooks around forward passes of modules and their parts: True while there is one."""

    def __init__(self, *modules: nn.Module) -> None:
        inside = {one: None for module in modules for one in module.modules()}
        self._of_each = [hooks for one in inside for hooks in (one._forward_pre_hooks, one._forward_hooks)]
        self._none_by: int | None = None
        """Number of hooks that were ever added anywhere when there was none here."""

    def __bool__(self) -> bool:
        added = getattr(RemovableHandle, "next_id", None)  # all are looked at again only after one was added
        if added is not None and added == self._none_by:
            return False
        found = any(self._of_each)
        self._none_by = None if found else added
        return found


class _Rotations:
    """Cosines and sines by position, stored for the first KEPT positions if they depend on nothing else."""

    def __init__(self, rotary: nn.Module) -> None:
        self._rotary = rotary
        self._fixed = getattr(rotary, "rope_type", None) in _FIXED_ROTATIONS
        self._tables: tuple[torch.Tensor, ...] = ()

    def __call__(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tables = self.tables(int(positions.max()), x)
        if tables is None:
            return self._rotary(x, positions)  # type: ignore[no-any-return]
        return tuple(table.index_select(1, positions[0]) for table in tables)

    def tables(self, last: int, x: torch.Tensor | None = None) -> tuple[torch.Tensor, ...] | None:
        """Return the stored tables [1, positions, size] up to a position; None if there are none.

        x: rows of the dtype that the tables are to have, if they are not made yet, or longer.
        """
        if not self._fixed or last >= KEPT:
            return None
        if not self._tables or last >= self._tables[0].shape[1]:
            if x is None:
                return None
            count = min(KEPT, 2 * (last + TILE))
            tables = self._rotary(x, torch.arange(count, device=x.device)[None])
            self._tables = tuple(table.contiguous() for table in tables)
        return self._tables


class _End:
    """The norm and the head as further calls of the chain, for a few rows of which all give logits.

    The caller sees to it that neither has a hook.
    """

    def __init__(self, leader: RecordedLayer, norm: Any, head: Any, rows: StepRows) -> None:
        self._leader = leader
        self._norm, self._head = norm, head
        self._rows = rows
        self._recorded: Program | None = None
        self._tried = False
        self._joined: dict[int, tuple[Program, Program | None]] = {}
        """The chain's program by number of rows, and the one that includes norm and head."""

    def program(self, count: int, kept: Sequence[int]) -> Program | None:
        """Return the program of a pass over `count` rows with the logits of the rows `kept`; None if the norm
        and the head have to be called by themselves."""
        if count > MOST_ENDED or list(kept) != list(range(count)):
            return None
        if self._norm.filled or self._head.replacements or self._head.words:
            return None
        if self._rows.tokens != self._rows.logits:
            return None
        chain = self._leader.together(count)
        if chain is None:
            return None
        if count not in self._joined or self._joined[count][0] is not chain:
            self._joined[count] = chain, self._join(chain, count)
        return self._joined[count][1]

    def _join(self, chain: Program, count: int) -> Program | None:
        if not self._tried:
            self._tried = True
            self._record()
        end = self._recorded
        if end is None:
            return None
        return Program.joined([chain, end.first_rows(count) if count < MOST_ENDED else end])

    def _record(self) -> None:
        chain = self._leader.together(MOST_ENDED)
        if chain is None:
            return
        rows = self._rows.tokens, self._rows.logits
        self._rows.tokens = self._rows.logits = RowMap()
        fixed = Fixed(chain.result)
        try:
            with Recording(self._leader.kernels, Arena(), [fixed]) as recording:
                self._recorded = recording.program(self._head(self._norm(fixed.tensor)))
        except UnrecordableError as error:
            logger.info("kernels: the head is not recorded: %s", error)
        finally:
            self._rows.tokens, self._rows.logits = rows


def _recorded_layers(
    model: nn.Module, attention: PagedAttention, kernels: CpuKernels, rows: StepRows
) -> Iterator[RecordedLayer]:
    """Yield, in order, the attention layers of lists in which each module has one attention or recurrence."""
    memory = _Memory()
    for some in model.modules():
        if not isinstance(some, nn.ModuleList) or not all(len(_numbers(one, attention)) == 1 for one in some):
            continue
        for number, module in enumerate(some):
            if _numbers(module, attention)[0] in attention.shapes:
                yield RecordedLayer(module, number, attention, kernels, rows, memory)


def _numbers(module: nn.Module, attention: PagedAttention) -> list[int]:
    """Return the layer numbers of a module's parts that have one: attentions and recurrences."""
    return [int(one.layer_idx) for one in module.modules() if getattr(one, "paged", None) is attention]  # type: ignore[arg-type]


def _tensors(args: Sequence[Any], named: Mapping[str, Any]) -> list[torch.Tensor]:
    """Return the tensors among a layer's arguments, including tuples (positions' cosines and sines)."""
    found: list[torch.Tensor] = []
    for one in (*args, *named.values()):
        if isinstance(one, torch.Tensor):
            found.append(one)
        elif isinstance(one, tuple | list):
            found += [part for part in one if isinstance(part, torch.Tensor)]
    return found


def _replaced(values: Iterable[Any], places: Iterator[torch.Tensor]) -> list[Any]:
    """Return the arguments with other tensors, in the order of `_tensors`."""
    own: list[Any] = []
    for one in values:
        if isinstance(one, torch.Tensor):
            own.append(next(places))
        elif isinstance(one, tuple | list):
            own.append(tuple(next(places) if isinstance(part, torch.Tensor) else part for part in one))
        else:
            own.append(one)
    return own
