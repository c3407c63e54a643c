"""Cross-entropy without a copy of the logits, and DPO's loss.

What training computes by functions of its own equals what it stands for.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tests.engine import triton_on_cpu  # noqa: F401 (mends Triton's interpreter)
from torch.nn.functional import cross_entropy

from onebase_engine.base.view import peft_view
from onebase_engine.kernels import cuda_training
from onebase_training import kernels, losses
from onebase_training.attention import STEP, grouped
from onebase_training.kernels import ShortAttention, fuse
from onebase_training.losses import CHUNK, token_losses
from onebase_training.objectives import dpo_losses


@pytest.mark.parametrize("count", [1, CHUNK - 1, CHUNK, 2 * CHUNK + 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-3)])
def test_losses_and_gradients_are_those_of_torch(count: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(count)
    logits = (torch.randn(count, 97) * 5).to(dtype)
    targets, scale = torch.randint(0, 97, (count,)), torch.rand(count)
    one, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    # `* 1`: as in a model, the logits are no leaf, and their memory may be used up.
    ours, theirs = (
        token_losses(one * 1, targets),
        cross_entropy((other * 1).float(), targets, reduction="none"),
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-6)
    (ours * scale).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ours.sum().backward()  # the logits are no longer there
    (theirs * scale).sum().backward()
    torch.testing.assert_close(one.grad, other.grad, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("words", [97, 5000])
def test_losses_by_triton_are_those_of_torch(words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its interpreter."""
    losses._tried_kernels.cache_clear()
    assert losses._tried_kernels(CPU) is cuda_training
    monkeypatch.setattr(losses, "_kernels", lambda logits: cuda_training)
    torch.manual_seed(words)
    logits, targets = (torch.randn(5, words) * 20).bfloat16(), torch.randint(0, words, (5,))
    one, other, scale = logits.clone().requires_grad_(), logits.clone().requires_grad_(), torch.rand(5)
    ours = token_losses(one * 1, targets)
    theirs = cross_entropy((other * 1).float(), targets, reduction="none")
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-6)
    (ours * scale).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ours.sum().backward()  # the logits are no longer there
    (theirs * scale).sum().backward()
    torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=2**-7)
    logits[2, 3], logits[3, :-1] = torch.nan, -torch.inf
    targets[3] = words - 1
    assert token_losses(logits.clone().requires_grad_() * 1, targets).isfinite().tolist() == [
        True, True, False, True, True,
    ]  # fmt: skip


def test_without_gradients_the_losses_are_the_same() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(CHUNK + 5, 50), torch.randint(0, 50, (CHUNK + 5,))
    torch.testing.assert_close(
        token_losses(logits, targets), token_losses(logits.clone().requires_grad_() * 1, targets)
    )


def test_dpo_is_the_papers_formula() -> None:
    chosen, rejected = torch.tensor([-10.0, -3.0]), torch.tensor([-12.0, -2.0])
    reference = torch.tensor([1.0, -4.0])
    losses, margins = dpo_losses(chosen, rejected, reference, 0.5)
    assert margins.tolist() == [0.5, 1.5]
    torch.testing.assert_close(losses, torch.log1p(torch.exp(-margins)))


CPU = torch.device("cpu")


def peft_model(base: torch.nn.Module, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    model = get_peft_model(peft_view(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return model


@pytest.mark.parametrize("tokens", [1, 5, 32, 100])
def test_a_fused_layer_is_pefts_bit_for_bit_forwards_and_nearly_so_backwards(
    base: torch.nn.Module, tokens: int
) -> None:
    ids = torch.randint(3, 320, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    outputs, gradients = [], []
    for fused in (False, True):
        model = peft_model(base)
        assert not fused or fuse(model, "default") == 14
        logits = model(input_ids=ids, use_cache=False).logits
        logits.float().logsumexp(-1).sum().backward()
        outputs.append(logits.detach())
        gradients.append([one.grad for one in model.parameters() if one.requires_grad])
    assert torch.equal(outputs[0], outputs[1])
    for plain, ours in zip(*gradients, strict=True):
        scale = plain.abs().max()
        torch.testing.assert_close(ours, plain, atol=float(0.02 * scale), rtol=0.02)


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of bf16 that are given in fp32, as a GPU has them, of micro-batches of any length."""
    monkeypatch.setattr(kernels, "_takes_parts", lambda x, a: x.dtype == torch.bfloat16)
    monkeypatch.setattr(kernels, "_multiplied", lambda left, right: left.float() @ right.float())


@pytest.mark.parametrize("spread", [1.0, 1e-6, 1e6])
def test_parts_in_bf16_give_fp32s_products(tensor_cores: None, spread: float) -> None:
    torch.manual_seed(3)
    left, right = torch.randn(40, 96).bfloat16(), torch.randn(8, 96) * spread
    exact = left.double() @ right.double().T
    for product in (kernels._by_parts(left, kernels._parts(right)), left.float() @ right.T):
        assert (product - exact).abs().max() < 3e-6 * exact.abs().max()
    assert torch.equal(kernels._parts(right).double().sum(1), right.double())
    for other in (torch.randn(96, 8) * spread, (torch.randn(8, 96) * spread).T):
        exact = left.double() @ other.double()
        product = kernels._with_parts(left, kernels._parts(other))
        assert (product - exact).abs().max() < 3e-6 * exact.abs().max()
        product = kernels._parts_with(kernels._parts(other), left.T)
        assert (product - exact.T).abs().max() < 3e-6 * exact.abs().max()
    other = torch.randn(30, 8)
    exact = right.T.double() @ other.double().T
    rounded = kernels._of_parts(kernels._parts(right.T), kernels._parts(other))
    assert (rounded != exact.bfloat16()).float().mean() < 0.01
    assert torch.equal(
        kernels._of_parts(kernels._parts(right).permute(2, 1, 0), kernels._parts(other)), rounded
    )


@pytest.mark.parametrize("shape", [(1, 1), (30, 70), (1, 1024), (700, 3)])
def test_triton_splits_a_matrix_as_pytorch_does(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By its interpreter."""
    kernels._tried_splitter.cache_clear()
    assert kernels._tried_splitter(CPU) is cuda_training.split
    monkeypatch.setattr(kernels, "_splitter", kernels._tried_splitter)
    torch.manual_seed(4)
    for matrix in (torch.randn(shape), torch.randn(shape[::-1]).T * 1e-30):
        assert torch.equal(kernels._parts(matrix), kernels._split(matrix))
    kernels._tried_splitter.cache_clear()
    monkeypatch.setattr(cuda_training, "split", lambda matrix: torch.zeros(len(matrix), 3, matrix.shape[1]))
    assert kernels._tried_splitter(CPU) is None
    assert "PyTorch splits matrices: the trial's parts are others" in caplog.text
    kernels._tried_splitter.cache_clear()


def test_by_parts_a_layer_gives_what_it_gives_by_fp32(base: torch.nn.Module, tensor_cores: None) -> None:
    """As a GPU computes it; forwards PEFT's bits but where a sum in another order is rounded otherwise."""
    found = []
    for fused in (False, True):
        model = peft_model(base)
        layer = model.base_model.model.model.layers[0].mlp.down_proj
        if fused:
            fuse(model, "default")
        draw = torch.Generator().manual_seed(1)
        x = torch.randn(2, 30, layer.in_features, generator=draw).bfloat16().requires_grad_()
        y = layer(x)
        (y * torch.randn(y.shape, generator=draw).bfloat16()).sum().backward()
        assert x.grad is not None
        found.append((y.detach(), x.grad, layer.lora_A.default.weight.grad, layer.lora_B.default.weight.grad))
    (y, x_grad, *grads), (our_y, our_x_grad, *our_grads) = found
    assert (y != our_y).float().mean() < 0.01
    torch.testing.assert_close(our_y, y, atol=0.01, rtol=0.01)
    torch.testing.assert_close(our_x_grad, x_grad, atol=0.02 * float(x_grad.abs().max()), rtol=0.01)
    for plain, ours in zip(grads, our_grads, strict=True):
        torch.testing.assert_close(ours, plain, atol=0.02 * float(plain.abs().max()), rtol=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_norms_gates_and_rotations_of_one_kernel_give_a_models_gradients(
    base: Any, checkpointing: bool
) -> None:
    """By Triton's interpreter."""
    ids, layers = torch.arange(10, 30)[None], len(base.model.layers)
    gradients = []
    for fused in (False, True):
        model = peft_model(base)
        if fused:
            assert fuse(model, "default") == 7 * layers
            assert kernels.fuse_norms(model) == 2 * layers + 1
            assert kernels.fuse_gates(model) == kernels.fuse_rotations(model) == layers
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum().backward()
        gradients.append([one.grad for one in model.parameters() if one.requires_grad])
    for plain, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, atol=0.03 * float(plain.abs().max()), rtol=0.03)


def test_nothing_of_a_trained_model_stays_when_it_is_collected(base: Any) -> None:
    """By Triton's interpreter. On a GPU an adapter's weights and gradients would stay."""
    model = peft_model(base)
    for fuse_parts in (kernels.fuse_norms, kernels.fuse_gates, kernels.fuse_rotations):
        assert fuse_parts(model)
    assert fuse(model, "default")
    model(input_ids=torch.arange(10, 14)[None], use_cache=False).logits.float().logsumexp(-1).sum().backward()
    parts = [weakref.ref(model), weakref.ref(next(one for one in model.parameters() if one.requires_grad))]
    del model
    gc.collect()
    assert [part() for part in parts] == [None, None]


def test_where_triton_compiles_nothing_a_model_stays_pytorchs(
    base: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def launch(*args: object, **options: object) -> None:
        raise RuntimeError("no C compiler")

    for name in ("normed", "_gated", "_both_turned"):
        monkeypatch.setattr(cuda_training, name, launch)
    model = peft_view(base)
    for fuse_parts in (kernels.fuse_norms, kernels.fuse_gates, kernels.fuse_rotations):
        assert fuse_parts(model) == 0
    assert not any("forward" in vars(module) for module in model.modules())
    for what in ("the norms", "what MLPs' gates let through", "rotary embeddings"):
        assert f"PyTorch computes {what}: RuntimeError: no C compiler" in caplog.text


def test_an_mlp_that_does_more_than_to_open_a_gate_is_left_as_it_is() -> None:
    class Mlp(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj = self.up_proj = self.down_proj = torch.nn.Linear(4, 4)
            self.act_fn, self.dropout = torch.nn.SiLU(), torch.nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> Any:
            return self.down_proj(self.dropout(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))

    assert kernels.fuse_gates(Mlp()) == 0


def test_in_fp32_the_gradients_are_equal_up_to_rounding(exact_base: torch.nn.Module) -> None:
    ids = torch.arange(10, 50)[None]
    gradients = []
    for fused in (False, True):
        model = peft_model(exact_base)
        if fused:
            fuse(model, "default")
        model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum().backward()
        gradients.append([one.grad for one in model.parameters() if one.requires_grad])
    for plain, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5 * float(plain.abs().max()), rtol=1e-3)


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}],
    ids=lambda one: next(iter(one)),
)
def test_other_kinds_are_left_to_peft(base: torch.nn.Module, settings: dict[str, Any]) -> None:
    assert fuse(peft_model(base, **settings), "default") == 0


def test_with_the_adapter_off_a_fused_model_is_the_base(base: torch.nn.Module) -> None:
    model = peft_model(base)
    fuse(model, "default")
    ids = torch.arange(10, 20)[None]
    with model.disable_adapter():
        silent = model(input_ids=ids, use_cache=False).logits
    with torch.no_grad():
        assert torch.equal(silent, peft_view(base)(input_ids=ids, use_cache=False).logits)


@given(lengths=st.lists(st.integers(1, 3 * STEP), min_size=1, max_size=9))
@settings(max_examples=60)
def test_rows_come_out_of_their_groups_as_they_went_in(lengths: list[int]) -> None:
    states = torch.randn(2, sum(lengths), 3, requires_grad=True)
    groups = grouped(lengths, CPU)
    packed = torch.cat([group.packed(group.padded(states)) for group in groups])
    assert torch.equal(packed, states.transpose(0, 1))
    weights = torch.randn_like(packed)
    (packed * weights).sum().backward()
    assert states.grad is not None
    assert torch.equal(states.grad, weights.transpose(0, 1))


@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (6, 2), (3, 1)])
def test_attention_of_short_rows_is_torchs(heads: int, shared: int) -> None:
    torch.manual_seed(heads)
    q = torch.randn(3, heads, 17, 8, requires_grad=True)
    k, v = (torch.randn(3, shared, 17, 8, requires_grad=True) for _ in range(2))
    scale, weights = 8**-0.5, torch.randn(3, heads, 17, 8)
    ours = ShortAttention.apply(q, k, v, scale)  # type: ignore[no-untyped-call]
    theirs = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=True
    )
    torch.testing.assert_close(ours, theirs)
    expected = torch.autograd.grad((theirs * weights).sum(), (q, k, v))
    for mine, other in zip(torch.autograd.grad((ours * weights).sum(), (q, k, v)), expected, strict=True):
        torch.testing.assert_close(mine, other)
