"""Experts of a mixture in NF4 or int8, matrix by matrix.

transformers keeps the matrices of all experts in one parameter [experts, ...], which bitsandbytes leaves
alone. Here an `ExpertStack` takes the parameter's place: each matrix is quantized by itself, to the numbers
that bitsandbytes gives it as a linear layer's weight, and is dequantized where modelling code takes it by its
number. So a mixture's own code computes with the quantized experts, in its own order.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn

NAME = "onebase_eager"
"""Name, in transformers' interface of experts, of the model's own code with dequantized matrices."""
_LLAMA4 = "Llama4TextMoe"
_TRANSPOSED = {
    "LongcatFlashExperts": False,
    "MuseSparkExperts": False,
    "Step3p7Experts": False,
    "Llama4TextExperts": True,
}
"""Classes of experts outside transformers' interface that take their matrices by number as well, and whether
these are [in, out]."""
_NESTED_BLOCKSIZE = 256
_OWNER = "onebase_owner"
"""Attribute of a dequantized matrix: the stack and the number that it is dequantized from again."""


class Matrices(NamedTuple):
    """Place of a parameter that holds one matrix for each expert."""

    path: str
    """Full name."""
    module: Any
    """Module of the experts."""
    name: str
    """Name in that module."""
    transposed: bool
    """Whether a matrix is [in, out]."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Number of experts, inputs and outputs."""
        held = getattr(self.module, self.name)
        if isinstance(held, ExpertStack):
            return held.count, held.size_in, held.size_out
        count, first, second = held.shape
        return (count, first, second) if self.transposed else (count, second, first)


class ExpertStack(nn.Module):
    """Matrices of one shape in NF4, one for each expert; `stack[number]` is one of them, dequantized."""

    weight: nn.Parameter
    """Two values a byte, [experts, out * in / 2] uint8."""
    absmax: torch.Tensor
    """Largest value of each block, [experts, blocks]: fp32, or uint8 with double quantization."""

    def __init__(
        self,
        weight: torch.Tensor,
        statistics: Mapping[str, torch.Tensor],
        *,
        size_in: int,
        size_out: int,
        blocksize: int,
        dtype: torch.dtype,
        transposed: bool = False,
    ) -> None:
        """Stack quantized matrices.

        Args:
            statistics: `absmax` and `code`; with double quantization `offset` [experts], `nested_absmax`
                [experts, ...] and `nested_code` as well.
            dtype: of the matrices before they were quantized, and dequantized.
            transposed: whether modelling code expects [in, out].
        """
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        for name, tensor in statistics.items():
            self.register_buffer(name, tensor)
        self.size_in, self.size_out = size_in, size_out
        self.blocksize, self.dtype, self.transposed = blocksize, dtype, transposed

    @property
    def count(self) -> int:
        """Number of experts."""
        return len(self.weight)

    @property
    def weights(self) -> int:
        """Number of weights before they were packed."""
        return self.count * self.size_in * self.size_out

    @property
    def nested(self) -> bool:
        """Whether the statistics are quantized themselves."""
        return "nested_absmax" in self._buffers

    @property
    def shape(self) -> torch.Size:
        """Shape of the parameter before it was quantized."""
        sizes = (self.size_in, self.size_out) if self.transposed else (self.size_out, self.size_in)
        return torch.Size((self.count, *sizes))

    def state(self, number: int) -> Any:
        """Return bitsandbytes' quantization state of one matrix."""
        from bitsandbytes.functional import QuantState

        nested: dict[str, Any] = {}
        if self.nested:
            inner = QuantState(
                absmax=self.nested_absmax[number],  # type: ignore[index]
                code=self.nested_code,
                blocksize=_NESTED_BLOCKSIZE,
                dtype=torch.float32,
            )
            nested = {"offset": self.offset[number], "state2": inner}  # type: ignore[index]
        return QuantState(
            absmax=self.absmax[number],
            shape=torch.Size((self.size_out, self.size_in)),
            code=self.code,
            blocksize=self.blocksize,
            quant_type="nf4",
            dtype=self.dtype,
            **nested,
        )

    def layer(self, number: int) -> Any:
        """Return one matrix as bitsandbytes' linear layer, over the same memory."""
        import bitsandbytes as bnb

        state = self.state(number)
        layer = bnb.nn.Linear4bit(
            self.size_in, self.size_out, bias=False, compute_dtype=self.dtype,
            compress_statistics=self.nested, quant_type="nf4", device="meta",
        )  # fmt: skip
        packed = self.weight.detach()[number].view(-1, 1)
        layer.weight = bnb.nn.Params4bit(
            packed, requires_grad=False, quant_state=state, blocksize=self.blocksize,
            compress_statistics=self.nested, quant_type="nf4", bnb_quantized=True, module=layer,
        )  # fmt: skip
        layer.support_avx512bf16_for_cpu = False
        return layer

    def __getitem__(self, number: int | torch.Tensor) -> torch.Tensor:
        """Return one expert's matrix as the parameter would hold it, in `dtype`."""
        matrix = self._matrix(int(number))
        return matrix.T if self.transposed else matrix

    def _matrix(self, number: int) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        packed = self.weight.detach()[number].view(-1, 1)
        matrix: torch.Tensor = dequantize_4bit(packed, self.state(number))
        setattr(matrix, _OWNER, (self, number))
        return matrix


class Int8Stack(ExpertStack):
    """Matrices of one shape in int8, one for each expert, with a scale for each output.

    bitsandbytes' own layers also round the rows that they multiply to int8. Here rows are multiplied as they
    are.
    """

    weight: nn.Parameter
    """[experts, out, in] int8."""
    absmax: torch.Tensor
    """Largest weight of each output, fp32 [experts, out]."""

    def layer(self, number: int) -> Int8Matrix:
        """Return one matrix as a linear layer, over the same memory."""
        return Int8Matrix(self.weight.detach()[number], self.absmax[number], self.dtype)

    def _matrix(self, number: int) -> torch.Tensor:
        matrix = self.layer(number).plain()
        setattr(matrix, _OWNER, (self, number))
        return matrix


class Int8Matrix(nn.Module):
    """Linear layer with a weight in int8, which is dequantized for each product."""

    bias = None

    def __init__(self, weight: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> None:
        """Take a weight [out, in] int8, the largest weight of each output [out] fp32, and the dtype of
        products."""
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.absmax, self.dtype = absmax, dtype
        self.out_features, self.in_features = weight.shape

    def plain(self) -> torch.Tensor:
        """Return the weight in `dtype`, as bitsandbytes dequantizes it."""
        from bitsandbytes.functional import int8_vectorwise_dequant

        dequantized: torch.Tensor = int8_vectorwise_dequant(self.weight.detach(), self.absmax)
        return dequantized.to(self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.plain().to(x.dtype))


class AdaptedStack(ExpertStack):
    """Matrices of which modelling code gets each as an adapter changes it."""

    def __init__(
        self, held: ExpertStack | nn.Parameter, taken: Callable[[int, torch.Tensor], Any], *, transposed: bool
    ) -> None:
        """Wrap matrices.

        Args:
            held: a stack, or a plain parameter [experts, ...].
            taken: returns what modelling code gets, by number and matrix.
            transposed: whether a matrix of a plain parameter is [in, out].
        """
        nn.Module.__init__(self)
        self.held = held
        self.dtype, self.transposed, self._taken = held.dtype, transposed, taken
        first, second = held.shape[1:]
        self.size_in, self.size_out = (first, second) if transposed else (second, first)

    @property
    def count(self) -> int:
        return int(self.held.shape[0])

    def __getitem__(self, number: int | torch.Tensor) -> Any:
        """Return one expert's matrix, or what stands for it in a product."""
        return self._taken(int(number), self.held[int(number)])


def layer_of(held: ExpertStack | torch.Tensor, number: int, transposed: bool = False) -> Any:
    """Return one matrix of a stack, or of a plain parameter, as a linear layer over the same memory."""
    if isinstance(held, ExpertStack):
        return held.layer(number)
    matrix = held.detach()[number].T if transposed else held.detach()[number]
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(matrix, requires_grad=False)
    return layer


def quantize_stack(
    matrices: torch.Tensor, *, transposed: bool, blocksize: int, double_quant: bool
) -> ExpertStack:
    """Quantize a parameter [experts, ...], matrix by matrix, as bitsandbytes would each of them."""
    from bitsandbytes.functional import quantize_4bit

    parts: dict[str, list[torch.Tensor]] = {}
    code: dict[str, torch.Tensor] = {}
    for matrix in matrices.unbind():
        plain = (matrix.T if transposed else matrix).contiguous()
        packed, state = quantize_4bit(
            plain, blocksize=blocksize, compress_statistics=double_quant, quant_type="nf4"
        )
        found = {"weight": packed.flatten(), "absmax": state.absmax}
        code["code"] = state.code
        if double_quant:
            found |= {"offset": state.offset, "nested_absmax": state.state2.absmax}
            code["nested_code"] = state.state2.code
        for name, tensor in found.items():
            parts.setdefault(name, []).append(tensor)
    stacked = {name: torch.stack(tensors) for name, tensors in parts.items()}
    # Codes are one tensor for all of bitsandbytes' layers.
    codes = {name: tensor.to(matrices.device) for name, tensor in code.items()}
    size_out, size_in = plain.shape
    return ExpertStack(
        stacked.pop("weight"), stacked | codes, size_in=size_in, size_out=size_out, blocksize=blocksize,
        dtype=matrices.dtype, transposed=transposed,
    )  # fmt: skip


def quantize_stack_to_int8(matrices: torch.Tensor, *, transposed: bool) -> Int8Stack:
    """Quantize a parameter [experts, ...], matrix by matrix, as bitsandbytes would each of them."""
    from bitsandbytes.functional import int8_vectorwise_quant

    count, first, second = matrices.shape
    size_in, size_out = (first, second) if transposed else (second, first)
    weight = torch.empty(count, size_out, size_in, dtype=torch.int8, device=matrices.device)
    absmax = torch.empty(count, size_out, device=matrices.device)
    for number, matrix in enumerate(matrices.unbind()):
        plain = (matrix.T if transposed else matrix).to(torch.float16).contiguous()
        weight[number], absmax[number], _ = int8_vectorwise_quant(plain)
    return Int8Stack(
        weight, {"absmax": absmax}, size_in=size_in, size_out=size_out, blocksize=0, dtype=matrices.dtype,
        transposed=transposed,
    )  # fmt: skip


def expert_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the modules of experts that transformers computes through its interface, by full name."""
    for path, module in model.named_modules():
        if _is_known(module):
            yield path, module


def expert_matrices(model: nn.Module) -> Iterator[Matrices]:
    """Yield the parameters and stacks that hold one matrix for each expert."""
    for path, module in expert_modules(model):
        for name in matrix_names(module):
            yield Matrices(f"{path}.{name}", module, name, is_transposed(module))


def experts_per_token(config: Any) -> int:
    """Return how many experts of a layer a token uses, by a text model's config; 0 without experts."""
    names = ("num_experts_per_tok", "top_k_experts", "moe_topk")
    return next((int(found) for name in names if (found := getattr(config, name, None))), 0)


def _is_known(module: Any) -> bool:
    """Return True for a module of experts whose matrices are where transformers' interface has them.

    A norm behind each expert would be applied to rows in another order than the step's.
    """
    usual = hasattr(module, "is_concatenated") and not getattr(module, "has_post_expert_norm", True)
    if not usual and type(module).__name__ not in _TRANSPOSED:
        return False
    held = [getattr(module, name, None) for name in matrix_names(module)]
    return all(
        isinstance(one, ExpertStack) or (isinstance(one, nn.Parameter) and one.dim() == 3) for one in held
    )


def matrix_names(module: Any) -> tuple[str, str]:
    """Return the names of the two parameters that hold the experts' matrices."""
    return ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"), "down_proj"


def is_transposed(module: Any) -> bool:
    """Return True if a module of experts holds matrices as [in, out]."""
    own = _TRANSPOSED.get(type(module).__name__)
    return bool(module.is_transposed) if own is None else own


def place_stacks(model: nn.Module, stacks: Mapping[str, ExpertStack]) -> None:
    """Put stacks where the parameters of these full names are."""
    for path, stack in stacks.items():
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        module._parameters.pop(name, None)
        setattr(module, name, stack)


def use_own_code(model: nn.Module) -> None:
    """Let a model's experts be computed by the model's own code, one after the other."""
    modules = [module for _, module in expert_modules(model)]
    if modules:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(NAME, compute_experts)
    for module in modules:
        if type(module).__name__ in _TRANSPOSED:
            module.forward = partial(compute_experts, module)
        else:
            module.config._experts_implementation = NAME
    for module in model.modules():
        if type(module).__name__ == _LLAMA4:
            module.forward = partial(_compute_llama4, module)


def own_code(module: Any) -> Any:
    """Return the forward of a module of experts without transformers' interface."""
    return inspect.unwrap(type(module).forward)


@cache
def is_usual(kind: Any) -> bool:
    """Return True if a class of experts is computed like Mixtral's, as most are."""
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    own, usual = (inspect.unwrap(one.forward).__code__ for one in (kind, MixtralExperts))
    return all(getattr(own, part) == getattr(usual, part) for part in ("co_code", "co_names", "co_consts"))


@cache
def takes_rows_in_order(kind: Any) -> bool:
    """Return True if a class of experts in transformers' interface gives each expert its rows in the order of
    `rows_of_expert`."""
    if kind.__name__ in _TRANSPOSED:
        return False
    names = inspect.unwrap(kind.forward).__code__.co_names
    return {"one_hot", "permute", "where", "index_add_"} <= set(names)


def rows_of_expert(chosen: torch.Tensor, number: int) -> torch.Tensor:
    """Return the rows that have chosen an expert, in the order in which modelling code computes them.

    chosen: numbers of the experts, [rows, k].
    """
    return torch.nonzero(chosen.T.eq(number))[:, 1]


def compute_experts(module: nn.Module, *args: Any, **named: Any) -> torch.Tensor:
    """Compute experts by the model's own code; for a backward, matrices are dequantized once more."""
    with _without_matrices():
        result: torch.Tensor = own_code(module)(module, *args, **named)
        return result


def _compute_llama4(module: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute Llama 4's mixture: hidden_states [..., size] -> [rows, size], and the router's logits.

    Its own code multiplies each row by each expert, of which those that it has not chosen give zeros.
    """
    rows, experts = hidden_states.reshape(-1, module.hidden_dim), module.experts
    scores, logits = module.router(rows)
    result: torch.Tensor = module.shared_expert(rows)
    routed = torch.zeros_like(result, dtype=torch.float32)
    with _without_matrices():
        for number in scores.any(0).nonzero()[:, 0].tolist():
            chosen = scores[:, number].nonzero()[:, 0]
            own = rows[chosen] * scores[chosen, number, None]
            gate, up = torch.matmul(own, experts.gate_up_proj[number]).chunk(2, dim=-1)
            made = torch.matmul(up * experts.act_fn(gate), experts.down_proj[number])
            routed = routed.index_add(0, chosen, made.float())
    return result + routed.to(result.dtype), logits


def _without_matrices() -> torch.autograd.graph.saved_tensors_hooks:
    """Return a context in which autograd keeps no dequantized matrices.

    Of nested hooks autograd calls the innermost alone: those of gradient checkpointing, if there are any, get
    from here whatever is no matrix.
    """
    outer = _outer_hooks()

    def pack(tensor: torch.Tensor) -> Any:
        source = _source(tensor)
        return (None, outer[0](tensor)) if source is None else (source, None)

    def unpack(kept: Any) -> torch.Tensor:
        source, other = kept
        return outer[1](other) if source is None else _matrix_again(source)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _outer_hooks() -> tuple[Any, Any]:
    """Return the functions that pack and unpack what autograd saves here."""
    # Private: PyTorch has no other way to ask for them. Without it checkpointing saves what it need not.
    top = getattr(getattr(torch._C, "_autograd", None), "_top_saved_tensors_default_hooks", None)
    found = None if top is None else top(True)
    return found or (lambda tensor: tensor, lambda tensor: tensor)


def _source(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """Return where a dequantized matrix, or a view of one, comes from; None for any other tensor."""
    for one in (tensor, tensor._base):
        owner = getattr(one, _OWNER, None)
        if owner is not None:
            return *owner, tensor.size(), tensor.stride()
    return None


def _matrix_again(source: tuple[Any, ...]) -> torch.Tensor:
    stack, number, size, stride = source
    matrix: torch.Tensor = stack._matrix(number)
    return matrix.as_strided(size, stride)
