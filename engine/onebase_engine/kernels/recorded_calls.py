"""Recorded calls of the kernels in C: a module's calls are recorded once and then made in one.

A pass of a decoder layer is a few calls of the library between many of Python. A `Recording` runs it once for
a number of rows and stores the calls, with the memory that they read and write; a `Program` repeats them for
other rows, as many or fewer. As with CUDA graphs, a program's inputs need fixed addresses: adapters are in
slots, inputs from outside are copied to a fixed place, and the mapping of slots to rows belongs to the step,
not the program.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from onebase_engine.kernels.cpu import LANES, NOT_CHOSEN, ROUTE, CpuKernels, KernelCall, RouteCallback
from onebase_engine.kernels.interface import Contexts, Router, RowMap

CHUNK = 1 << 20
"""Smallest number of elements by which an arena grows."""
_MAKE_NOTHING = (torch.ops.aten._unsafe_view.default, torch.ops.aten.empty.memory_format)
_BORDER = 32
"""Alignment of results, in elements: one cache line."""


class UnrecordableError(Exception):
    """Raised if a module does something that is not a call of the library."""


class Arena:
    """Memory for the results of one module at a time, reused from the start for the next; it never moves."""

    def __init__(self) -> None:
        self._chunks: list[torch.Tensor] = []
        self._place = (0, 0)

    def reset(self) -> None:
        self._place = (0, 0)

    def empty(self, *shape: int) -> torch.Tensor:
        """Return memory for a result, bf16."""
        count = -(-torch.Size(shape).numel() // _BORDER) * _BORDER
        chunk, used = self._place
        while chunk < len(self._chunks) and used + count > len(self._chunks[chunk]):
            chunk, used = chunk + 1, 0
        if chunk == len(self._chunks):
            self._chunks.append(torch.empty(max(CHUNK, count), dtype=torch.bfloat16))
        self._place = (chunk, used + count)
        return self._chunks[chunk][used : used + torch.Size(shape).numel()].view(shape)

    def holds(self, tensor: torch.Tensor) -> bool:
        return any(_storage(tensor) == _storage(chunk) for chunk in self._chunks)


class Fixed:
    """An input tensor, at the place where programs read it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.pointer = tensor.data_ptr()
        self._from: tuple[torch.Tensor, Contexts] | None = None
        self._first: dict[int, Fixed] = {}

    def first_rows(self, count: int) -> Fixed:
        """Return the place of the first `count` rows of a tensor [1, rows, ...], the same one each time."""
        if count not in self._first:
            self._first[count] = Fixed(self.tensor[:, :count])
        return self._first[count]

    def load_tensor(self, tensor: torch.Tensor, step: Contexts) -> None:
        """Copy the step's tensor to the fixed place, unless it is there already."""
        there = self._from is not None and self._from[0] is tensor and self._from[1] is step
        if there or tensor.data_ptr() == self.pointer:
            return
        self.tensor.copy_(tensor)
        self._from = tensor, step


class GatheredRows(NamedTuple):
    """Rows of a contiguous table [..., rows, size], by their numbers."""

    table: torch.Tensor
    numbers: Sequence[int]

    def copy_to(self, address: int) -> None:
        """Copy the rows to memory. Faster than PyTorch for a few: a call of it costs more than a row does."""
        start, size = self.table.data_ptr(), self.table.shape[-1] * self.table.itemsize
        for place, number in enumerate(self.numbers):
            ctypes.memmove(address + place * size, start + number * size, size)


class RecordedRouter:
    """A mixture's router, called within recorded calls: it leaves its results where they read."""

    def __init__(self, choose: Router, x: torch.Tensor, kernels: CpuKernels) -> None:
        """Compute the router once. x [..., rows, hidden] is the memory that it reads each time."""
        self._choose, self._x, self._kernels = choose, x, kernels
        self.results = tuple(one.clone(memory_format=torch.contiguous_format) for one in choose(x))
        self.read: set[int] = set()
        """Numbers of the results that a recorded call reads."""
        self.callback = RouteCallback(self)

    def __call__(self, rows: int) -> int:
        try:
            found = self._choose(self._x[..., :rows, :])
            for number in self.read:
                self.results[number][:rows] = found[number]
        except BaseException as error:  # it cannot pass through C
            self._kernels.route_error = error
            return NOT_CHOSEN
        return 0


class Program:
    """Recorded calls. `inputs`: numbers of the given tensors that are read, and their places.

    These and the result are [1, rows, ...].
    """

    def __init__(
        self,
        kernels: CpuKernels,
        calls: Sequence[KernelCall],
        inputs: Sequence[tuple[int, Fixed]],
        result: torch.Tensor,
        routers: Sequence[RecordedRouter] = (),
    ) -> None:
        self._kernels = kernels
        self._routers = tuple(routers)
        self._calls = (KernelCall * len(calls))(*calls)
        self._inputs = tuple(inputs)
        self.result = result
        self._result_rows = result[0]

    @property
    def inputs(self) -> list[int]:
        """Numbers of the given tensors that the calls read."""
        return [number for number, _ in self._inputs]

    @classmethod
    def joined(cls, programs: Sequence[Program]) -> Program | None:
        """Return a program that makes the calls of all. Each must read the result of the one before as its
        first tensor, and otherwise what the first program reads; None if they read other places."""
        first, last = programs[0], programs[-1]
        places = {number: fixed.pointer for number, fixed in first._inputs}
        for before, program in pairwise(programs):
            own = {number: fixed.pointer for number, fixed in program._inputs}
            if own.pop(0, None) != before.result.data_ptr() or own.items() - places.items():
                return None
        calls = [call for program in programs for call in program._calls]
        routers = [router for program in programs for router in program._routers]
        return cls(first._kernels, calls, first._inputs, last.result, routers)

    def first_rows(self, count: int) -> Program:
        """Return the same calls for the first `count` rows alone. Nothing is computed."""
        rows = self.result.shape[1]
        calls = [KernelCall.from_buffer_copy(call) for call in self._calls]
        for call in calls:  # A norm of heads has several of its own to a row.
            call.rows = call.rows // rows * count
        inputs = [(number, fixed.first_rows(count)) for number, fixed in self._inputs]
        return Program(self._kernels, calls, inputs, self.result[:, :count], self._routers)

    def run_calls(self, given: Sequence[torch.Tensor], rows: RowMap, step: Contexts) -> torch.Tensor:
        """Return the result for other tensors of the same shapes; the next run overwrites it.

        Raises:
            MemoryError: there is none for this step.
        """
        for number, fixed in self._inputs:
            fixed.load_tensor(given[number], step)
        self._run(rows, step)
        return self.result

    def run_gathered(self, given: Mapping[int, GatheredRows], rows: RowMap, step: Contexts) -> torch.Tensor:
        """Return the result [rows, ...] for rows of tables, by the number of the tensor that they make up."""
        for number, fixed in self._inputs:
            given[number].copy_to(fixed.pointer)
        self._run(rows, step)
        return self._result_rows

    def _run(self, rows: RowMap, step: Contexts) -> None:
        self._kernels.run_all(ctypes.addressof(self._calls), len(self._calls), rows, step)


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the calls that are made while it is active; they are also executed.

    Of PyTorch's own operators it allows views, and sums of two tensors, which become a call: `kernels.adds`.

    Raises:
        UnrecordableError: another operator runs, or a call reads what is none of the tensors given and no
            result of a call, or is for another number of rows than these have.
    """

    def __init__(self, kernels: CpuKernels, arena: Arena, given: Sequence[Fixed]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kernels = kernels
        self._arena = arena
        self._given = {_storage(fixed.tensor): number for number, fixed in enumerate(given)}
        self._fixed = given
        self.calls: list[KernelCall] = []
        self.reads: set[int] = set()
        """Numbers of the given tensors that a call reads."""
        self._routers: list[RecordedRouter] = []
        self._chosen: dict[int, tuple[RecordedRouter, int]] = {}
        """Router and number of each of the routers' results, by its memory."""

    def __enter__(self) -> Any:
        self._arena.reset()
        self._kernels.recorder = self
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: object) -> None:
        self._kernels.recorder = None
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.is_view or func in _MAKE_NOTHING:
            return func(*args, **(kwargs or {}))
        if func is torch.ops.aten.add.Tensor and not kwargs and self._adds(*args):
            return self._kernels.add(*args)
        raise UnrecordableError(f"{func} is none of the kernels' calls")

    def _adds(self, x: Any, other: Any) -> bool:
        both = isinstance(x, torch.Tensor) and isinstance(other, torch.Tensor) and x.shape == other.shape
        whole = both and x.shape[-1] % LANES == 0 and x.is_contiguous() and other.is_contiguous()
        return bool(whole and x.dtype == other.dtype == torch.bfloat16)

    def note(self, call: KernelCall, reads: Sequence[torch.Tensor]) -> None:
        for tensor in reads:
            storage = _storage(tensor)
            number = self._given.get(storage)
            if number is not None:
                self.reads.add(number)
            elif storage in self._chosen:
                router, result = self._chosen[storage]
                router.read.add(result)
            elif not self._arena.holds(tensor):
                raise UnrecordableError("a call reads what Python has made")
        self.calls.append(KernelCall.from_buffer_copy(call))

    def empty(self, *shape: int) -> torch.Tensor:
        return self._arena.empty(*shape)

    def route(self, choose: Router, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return what a router gives for rows, and record that it is called for those of each step."""
        with _disable_current_modes():
            self._kernels.recorder = None  # the router's own calls are made when it is called
            try:
                router = RecordedRouter(choose, x, self._kernels)
            finally:
                self._kernels.recorder = self
        self.note(KernelCall(ROUTE, x.numel() // x.shape[-1], route=router.callback), [x])
        self._routers.append(router)
        self._chosen |= {_storage(one): (router, number) for number, one in enumerate(router.results)}
        return router.results

    def program(self, result: torch.Tensor) -> Program:
        """Return the recorded calls as a program that computes `result`."""
        if not self._arena.holds(result):
            raise UnrecordableError("the result is none of a call")
        inputs = [(number, self._fixed[number]) for number in sorted(self.reads)]
        rows = result.shape[1]
        tensors = [result, *(fixed.tensor for _, fixed in inputs)]
        if any(one.shape[:2] != (1, rows) or not one.is_contiguous() for one in tensors):
            raise UnrecordableError("a layer reads or gives what is not by rows")
        if any(call.rows % rows for call in self.calls):
            raise UnrecordableError("a call is for other rows than the layer's")
        return Program(self._kernels, self.calls, inputs, result, self._routers)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
