"""The ways to compute one model agree: padded heads, scores written out or not, modulated or not, what is made of the
weights made once or again, oneDNN or MKL, checkpointing, compile."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from edt_core.models import DiffusionTransformer, amm_matrix, attention, create_model, draw_masks
from edt_core.models import kernels as projection
from edt_core.models.attention import (
    Attention,
    RelativePositionBias,
    fused_modulated_attention,
    modulation_mask,
    written_out_attention,
)
from edt_core.models.config import AMM_KERNELS, AmmKernel
from tests.support.models import TINY

GRID, HEADS, HEAD_DIM = 4, 3, 20  # heads of 20 channels, as 52 no multiple of 8


def drawn(module: torch.nn.Module, std: float = 0.1) -> torch.nn.Module:
    """The module with weights drawn at random everywhere, so that no gate hides a block."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std, generator=generator)
    return module


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny(name: str = "EDT-Tiny/2") -> DiffusionTransformer:
    model = create_model(name, 64, 10)
    drawn(model)
    return model.train()


def inputs(
    model: DiffusionTransformer, size: int = 4, seed: int = 2
) -> tuple[Tensor, Tensor, Tensor, list[Tensor] | None]:
    """A batch, and masks where the model has any."""
    masks = draw_masks(model.config, size, torch.Generator().manual_seed(seed)) or None
    return normal(size, 4, 16, 16), torch.arange(size) * 250, torch.arange(size), masks


def outcome(module: torch.nn.Module, call: Callable[[], Tensor]) -> list[Tensor]:
    """What the module makes, and the gradient of every parameter for a loss of it."""
    module.zero_grad(set_to_none=True)
    out = call()
    out.float().mul(normal(*out.shape, seed=3)).sum().backward()
    return [out.detach().float(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


def largest_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Over all tensors, the largest error over the largest value."""
    assert len(actual) == len(expected)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(actual, expected, strict=True))


@pytest.fixture
def attend() -> Attention:
    module = Attention(HEADS * HEAD_DIM, HEADS, GRID, RelativePositionBias(GRID, HEADS))
    drawn(module)
    return module.train()


@pytest.mark.parametrize("path", [True, False], ids=["written out", "fused"])
def test_padded_heads_change_nothing(attend: Attention, path: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "is_written_out", lambda *_: path)
    x = normal(3, GRID**2, HEADS * HEAD_DIM)
    plain = outcome(attend, lambda: attend(x))
    monkeypatch.setattr(attention, "head_padding", lambda head_dim, device: -head_dim % 8)
    assert attend.weights(4)[0].shape == (3 * HEADS * 24, HEADS * HEAD_DIM)
    assert largest_error(outcome(attend, lambda: attend(x)), plain) < 1e-6


def test_heads_are_padded_for_the_fused_kernels_of_cuda_only() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert [attention.head_padding(width, cuda) for width in (16, 52, 64)] == [0, 4, 0]
    assert attention.head_padding(52, cpu) == 0


def test_written_out_attention_is_that_of_pytorch(attend: Attention, monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(3, GRID**2, HEADS * HEAD_DIM)
    written_out = outcome(attend, lambda: attend(x))
    monkeypatch.setattr(attention, "is_written_out", lambda *_: False)
    assert largest_error(written_out, outcome(attend, lambda: attend(x))) < 1e-6


def test_the_path_follows_the_gradient_and_the_number_of_tokens(attend: Attention) -> None:
    bias, amm = attend.rel_pos_bias(), torch.ones(1)
    few, many = torch.empty(1, HEADS, GRID**2, 1), torch.empty(1, HEADS, 256, 1)
    assert attention.is_written_out(few, bias, None)
    assert attention.is_written_out(many, bias, amm)
    assert not attention.is_written_out(few, bias.detach(), None)
    assert not attention.is_written_out(few, None, None)
    assert [attention.is_written_out(q, bias.detach(), amm) for q in (few, many)] == [True, False]
    assert not attention.is_written_out(many.to("meta"), bias.detach(), None)


def modulated_by_the_book(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, amm: Tensor) -> Tensor:
    """Attention Modulation Matrix (arXiv 2410.23788), in float64: soft-maxed, multiplied, not normalised again."""
    scores = q.double() @ k.double().transpose(-2, -1) * HEAD_DIM**-0.5
    weights = (scores if bias is None else scores + bias.double()).softmax(dim=-1)
    return (weights * amm.double()) @ v.double()


@pytest.mark.parametrize("grid", [1, 2, 7, 16])
@pytest.mark.parametrize("kernel", AMM_KERNELS)
def test_fused_modulation_is_exact(grid: int, kernel: AmmKernel) -> None:
    """Also where most factors are 0: below a radius of 1 a token sees itself alone."""
    for radius, with_bias in product((None, 0.5, 1.0, 3.0, 100.0), (True, False)):
        for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2**-5)):
            check_fused_modulation(grid, kernel, radius, with_bias, dtype, bound)


def check_fused_modulation(
    grid: int, kernel: AmmKernel, radius: float | None, with_bias: bool, dtype: torch.dtype, bound: float
) -> None:
    q, k, v = normal(3, 2, HEADS, grid**2, HEAD_DIM).to(dtype).unbind(0)
    bias = normal(HEADS, grid**2, grid**2) if with_bias else None
    amm = amm_matrix(grid, kernel, radius)
    mask = modulation_mask(amm, bias).to(dtype)
    fused = fused_modulated_attention(q, k, v, mask, HEAD_DIM**-0.5, amm[0, 0])
    written_out = written_out_attention(q, k, v, bias if bias is None else bias.to(dtype), HEAD_DIM**-0.5, amm)
    expected = modulated_by_the_book(q, k, v, bias, amm)
    assert fused.dtype == written_out.dtype == dtype
    assert largest_error([fused.double()], [expected]) < bound
    assert largest_error([written_out.double()], [expected]) < bound
    assert (fused - expected).norm() < bound / 3 * expected.norm()


def test_fused_modulation_holds_for_large_scores() -> None:
    """Where a token's weight is next to nothing for itself, and all of it with one that modulation takes away."""
    q, k, v = 40 * normal(3, 1, HEADS, GRID**2, HEAD_DIM)
    amm = amm_matrix(GRID, "cos", 1.0)
    fused = fused_modulated_attention(q, k, v, modulation_mask(amm, None), HEAD_DIM**-0.5, amm[0, 0])
    assert largest_error([fused.double()], [modulated_by_the_book(q, k, v, None, amm)]) < 1e-4


@pytest.mark.parametrize("name", TINY)
def test_the_model_is_the_same_with_its_modulation_fused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(name).eval()
    model.set_amm(range(0, model.config.num_blocks, 2), radius=3.0)
    x, t, y, _ = inputs(model)
    with torch.no_grad():
        written_out = model(x, t, y)
        monkeypatch.setattr(attention, "is_written_out", lambda *_: False)
        assert largest_error([model(x, t, y)], [written_out]) < 1e-5
        model.set_amm(())
        assert largest_error([model(x, t, y)], [written_out]) > 1e-2


def test_modulation_has_a_gradient_either_way(attend: Attention, monkeypatch: pytest.MonkeyPatch) -> None:
    attend.eval().set_amm("exp_cos", 2.0)
    x = normal(3, GRID**2, HEADS * HEAD_DIM)
    written_out = outcome(attend, lambda: attend(x))
    monkeypatch.setattr(attention, "is_written_out", lambda *_: False)
    assert largest_error(outcome(attend, lambda: attend(x)), written_out) < 1e-5


def test_softmax_sums_in_float32_under_bf16() -> None:
    """Over 4,096 equal scores a bf16 sum would stop at 256, where adding 1 no longer changes it."""
    q, k = torch.zeros(2, 1, 1, 4096, 8, dtype=torch.bfloat16)
    v, bias = torch.ones_like(q), torch.zeros(1, 4096, 4096, dtype=torch.bfloat16)
    assert written_out_attention(q, k, v, bias, 1.0).sub(1).abs().max() < 0.01


def test_bf16_is_as_close_to_fp32_as_the_fused_path_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    x, t, y, masks = inputs(model)
    exact = outcome(model, lambda: model(x, t, y, masks))
    with torch.autocast("cpu", torch.bfloat16):
        written_out = outcome(model, lambda: model(x, t, y, masks))
    monkeypatch.setattr(attention, "is_written_out", lambda *_: False)
    with torch.autocast("cpu", torch.bfloat16):
        fused = outcome(model, lambda: model(x, t, y, masks))
    relative = [float((a - b).norm() / b.norm()) for a, b in zip(written_out, exact, strict=True) if b.norm() > 0]
    others = [float((a - b).norm() / b.norm()) for a, b in zip(fused, exact, strict=True) if b.norm() > 0]
    assert max(relative) < 1.5 * max(others) + 0.01


@pytest.mark.parametrize("grid", [1, 2, 5])
def test_bias_is_looked_up_by_offset(grid: int) -> None:
    module = RelativePositionBias(grid, 2)
    drawn(module)
    bias, table = module(), module.relative_position_bias_table
    for a in range(grid**2):
        for b in range(grid**2):
            row, column = a // grid - b // grid + grid - 1, a % grid - b % grid + grid - 1
            assert torch.equal(bias[:, a, b], table[row * (2 * grid - 1) + column])


@pytest.mark.parametrize("shape", [(3, 16), (16, 5), (2, 9)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_linear_layer_is_a_convolution(
    shape: tuple[int, int], with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = projection.TokenLinear(24, 40, bias=with_bias)
    drawn(module)
    x = normal(*shape, 24)
    expected = outcome(module, lambda: F.linear(x, module.weight, module.bias))
    monkeypatch.setattr(projection, "_MIN_MACS", 0)
    for held_back in (True, False):
        monkeypatch.setattr(projection, "_BY_CONVOLUTION", held_back)
        assert largest_error(outcome(module, lambda: module(x)), expected) < 2e-6


def test_libraries_agree_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    x, t, y, masks = inputs(model)
    monkeypatch.setattr(projection, "_MIN_MACS", 0)
    monkeypatch.setattr(projection, "_BY_CONVOLUTION", False)
    mkl = outcome(model, lambda: model(x, t, y, masks))
    monkeypatch.setattr(projection, "_BY_CONVOLUTION", True)
    assert largest_error(outcome(model, lambda: model(x, t, y, masks)), mkl) < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing_saves_memory_and_keeps_every_bit(precision: str) -> None:
    model = tiny()
    x, t, y, masks = inputs(model)
    saved: list[int] = []
    results = []

    def count(tensor: Tensor) -> Tensor:
        saved[-1] += tensor.nbytes
        return tensor

    for model.activation_checkpointing in (False, True):
        saved.append(0)
        with (
            torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        ):
            results.append(outcome(model, lambda: model(x, t, y, masks)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert saved[1] < 0.6 * saved[0]


def test_checkpointing_is_a_matter_of_training() -> None:
    model = tiny()
    model.activation_checkpointing = True
    assert model.state_dict().keys() == tiny().state_dict().keys()
    assert "activation_checkpointing" not in model.config.to_dict()
