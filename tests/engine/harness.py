"""Drive a real Engine step by step, and ask PEFT what each row should have been."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tests.device import DEVICE
from tests.oracle import greedy
from tests.tiny import ADAPTERS, load_folder, save_adapter
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from onebase_adapters.proof.texts import served_regrets, tie_of
from onebase_engine.engine import messages as protocol
from onebase_engine.engine.base_proof import rounding_unit
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.kv_cache import RESERVED_BLOCKS
from onebase_engine.engine.model import ServedModel
from onebase_engine.engine.scheduler import SchedulerLimits
from onebase_engine.engine.staging import Copy
from onebase_engine.kernels.weights import AdapterWeights


@dataclass(frozen=True)
class Request:
    """One greedy request; `adapter` is an index into the adapters, None the base. `at`: step of arrival."""

    prompt: tuple[int, ...]
    adapter: int | None
    max_tokens: int
    at: int = 0
    ignore_eos: bool = True
    tenant: str = "default"


@dataclass
class Lab:
    """A base with one adapter of every kind, PEFT's models of them, and the texts they give."""

    base: nn.Module
    folders: list[Path]
    references: list[nn.Module]
    weights: list[AdapterWeights]
    _texts: dict[tuple[tuple[int, ...], int | None, int], list[int]] = field(default_factory=dict)

    @classmethod
    def create(cls, base: nn.Module, folder: Path) -> Lab:
        folders = [
            save_adapter(base, settings, folder / f"a{i}", seed=i + 1) for i, settings in enumerate(ADAPTERS)
        ]
        loaded = [load_folder(base, path) for path in folders]
        return cls(base, folders, [one.reference for one in loaded], [one.weights for one in loaded])

    def engine(
        self,
        copy: Callable[[AdapterWeights], Copy] | None = None,
        model: ServedModel | None = None,
        **changes: int,
    ) -> Engine:
        """Create an engine. `kv_blocks`: with room for as many tokens in each group of layers."""
        settings = {
            "max_sequences": 32,
            "step_tokens": 96,
            "draft_tokens": 0,
            "kv_blocks": 400,
            "block_size": 16,
            "host_blocks": 0,
            "state_places": 0,
            "slots": 8,
            "slot_memory": 0,
        } | changes
        model = ServedModel(self.base, settings["slots"]) if model is None else model
        blocks = (settings["kv_blocks"] - RESERVED_BLOCKS) * len(model.groups) + RESERVED_BLOCKS
        limits = SchedulerLimits(
            settings["max_sequences"], settings["step_tokens"], 512, settings["draft_tokens"]
        )
        engine = Engine(
            self.base,
            name="tiny",
            limits=limits,
            kv_blocks=blocks,
            block_size=settings["block_size"],
            host_blocks=settings["host_blocks"],
            state_places=settings["state_places"],
            slots=settings["slots"],
            slot_memory=settings["slot_memory"],
            copy=copy,
            model=model,
        )
        for i, weights in enumerate(self.weights):
            engine.put_adapter(f"digest{i}", weights)
        return engine

    def expected(self, request: Request) -> list[int]:
        """PEFT's own greedy text for the request alone."""
        key = (request.prompt, request.adapter, request.max_tokens)
        if key not in self._texts:
            model = self.base if request.adapter is None else self.references[request.adapter]
            self._texts[key] = greedy(model, list(request.prompt), request.max_tokens)
        return self._texts[key]

    def disagreements(self, asked: Sequence[Request], texts: Sequence[list[int]]) -> list[Request]:
        """The requests whose text is not PEFT's, but for tokens whose logits tie in PEFT's own pass."""
        dtype = self.base.get_output_embeddings().weight.dtype  # type: ignore[operator]
        tie = tie_of(dtype)
        wrong = []
        for request, text in zip(asked, texts, strict=True):
            if text != self.expected(request):
                model = self.base if request.adapter is None else self.references[request.adapter]
                unit = rounding_unit(dtype, dtype, DEVICE)
                if max(served_regrets(model, list(request.prompt), text, tie, unit)) > tie:
                    wrong.append(request)
        return wrong


def requests(
    count: int, seed: int, *, longest: int = 70, tokens: int = 10, spread: int = 12
) -> list[Request]:
    """Random requests over the base and all adapters, arriving within the first `spread` steps."""
    generator = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    choices = len(ADAPTERS) + 1
    return [
        Request(
            prompt=invoking(
                i % choices, torch.randint(3, 320, (pick(1, longest),), generator=generator).tolist()
            ),
            adapter=None if i % choices == len(ADAPTERS) else i % choices,
            max_tokens=pick(3, tokens + 1),
            at=pick(0, spread),
        )
        for i in range(count)
    ]


def invoking(adapter: int | None, prompt: Sequence[int]) -> tuple[int, ...]:
    """The prompt, in the middle of which an activated LoRA is invoked if `adapter` is one."""
    activated = adapter is not None and adapter < len(ADAPTERS)
    tokens = ADAPTERS[adapter].get("alora_invocation_tokens", ()) if activated else ()
    half = len(prompt) // 2
    return (*prompt[:half], *tokens, *prompt[half:])


def run(engine: Engine, asked: Sequence[Request]) -> list[list[int]]:
    """Serve all requests together, each arriving at its step; returns the tokens of each."""
    texts: dict[str, list[int]] = {str(i): [] for i in range(len(asked))}
    step = 0
    while step <= max(r.at for r in asked) or engine.busy:
        for i, request in enumerate(asked):
            if request.at == step:
                engine.submit(submission(str(i), request))
        engine.step()
        for output in engine.take_outputs():
            assert output.error_message is None, output.error_message
            texts[output.id] += output.tokens
        step += 1
        assert step < 5000, "the engine makes no progress"
    return list(texts.values())


def submission(name: str, request: Request) -> protocol.Submit:
    adapters = [] if request.adapter is None else [protocol.AdapterRef(f"digest{request.adapter}")]
    sampling = protocol.Sampling(
        temperature=0.0, max_tokens=request.max_tokens, ignore_eos=request.ignore_eos
    )
    return protocol.Submit(
        id=name,
        prompt=list(request.prompt),
        sampling=sampling,
        adapters=adapters,
        tenant=request.tenant,
    )


class LiveBytes(TorchDispatchMode):  # type: ignore[misc, no-untyped-call]
    """A device's meter: the storages that operators make and that live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tensors: Counter[int] = Counter()
        self._sizes: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {_storage(one) for one in args if isinstance(one, torch.Tensor)}
        for one in found if isinstance(found, tuple | list) else (found,):
            if isinstance(one, torch.Tensor) and (_storage(one) in self._sizes or _storage(one) not in given):
                self._tensors[_storage(one)] += 1
                self._sizes[_storage(one)] = one.untyped_storage().nbytes()
                weakref.finalize(one, self._gone, _storage(one))
        self.most = max(self.most, sum(self._sizes.values()))
        return found

    def _gone(self, storage: int) -> None:
        self._tensors[storage] -= 1
        if not self._tensors[storage]:
            self._sizes.pop(storage, None)

    @classmethod
    def measure(cls, run: Callable[[], object]) -> int:
        with cls() as meter:
            run()
        return meter.most


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
