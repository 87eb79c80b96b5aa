"""The compiled update of the weights against clipping, the library's Adan and the averages, one after the other."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from edt_core.config import TrainConfig
from edt_core.training.ema import EMA
from edt_core.training.optim import (
    Scale,
    clip_factor,
    clip_gradients,
    flatten_state,
    gradient_norm,
    make_optimizer,
    restore_state,
    set_rate,
)
from edt_core.training.speed.update import CompiledUpdate, by_block

pytestmark = pytest.mark.usefixtures("one_thread")
CLIPPING = 2.0


class Layers(nn.Module):
    """Two blocks of one shape, a parameter of no block, one that is not trained, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(5, 3) for _ in range(2))
        self.first = nn.Parameter(torch.empty(7))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("constant", torch.arange(3.0))


class Side:
    """A model with its optimizer and averages, updated by the library or compiled."""

    def __init__(self, config: TrainConfig, dtype: torch.dtype, backend: str | None, **options: bool) -> None:
        self.model = Layers().to(dtype)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.config, self.ema = config, EMA(self.model, config.ema_decays, widths=config.ema_widths)
        scaled = [layer.weight for layer in self.model.blocks] if options.pop("scaled", False) else []
        self.optimizer = make_optimizer(config, self.trained, scales=dict.fromkeys(scaled, Scale(0.5, 2.0)))
        self.compiled = backend and CompiledUpdate(self.model, self.optimizer, self.ema, backend, **options)
        self.number = 0

    def step(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for parameter in self.trained:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = (noise * (step % 7 + 0.1)).to(parameter.dtype)
        set_rate(self.optimizer, self.config.lr / (1 + step / 50))
        norm, most = gradient_norm(self.trained), self.config.max_grad_norm
        wanted = norm.isfinite() if self.compiled and self.compiled.masked else None
        if self.compiled and self.compiled(None if most is None else clip_factor(norm, most), wanted, step + 1):
            self.number += 1
            return
        if most is not None:
            clip_gradients(self.trained, norm, most)
        self.optimizer.step()
        self.ema.update(step=step + 1)

    def tensors(self) -> dict[str, Tensor]:
        averages = {f"{i}.{name}": value for i, each in enumerate(self.ema.averages) for name, value in each.items()}
        return {**self.model.state_dict(), **averages, **flatten_state(self.optimizer)[0]}

    def resume(self, other: Side) -> None:
        """Take over the state of another one, as from a checkpoint."""
        self.model.load_state_dict(other.model.state_dict())
        self.ema.load(other.ema.averages)
        tensors, groups = flatten_state(other.optimizer)
        restore_state(self.optimizer, deepcopy(tensors), deepcopy(groups))


def config(**options: Any) -> TrainConfig:
    return TrainConfig.model_validate({"lr": 0.02, "ema_decay": (0.9, 0.5), "max_grad_norm": CLIPPING, **options})


def largest_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Over all tensors, the largest difference relative to the largest value."""
    pairs = zip(ours.items(), theirs.items(), strict=True)
    worst = 0.0
    for (name, value), (other, expected) in pairs:
        assert name == other
        assert value.dtype == expected.dtype
        worst = max(worst, float((value.double() - expected.double()).abs().max() / expected.double().abs().max()))
    return worst


def check_equal(ours: Side, theirs: Side, bound: float) -> None:
    """Weights to the bound; the state, of gradients that vary more, to ten times it; averages as float32 can be."""
    states = (flatten_state(side.optimizer)[0] for side in (ours, theirs))
    assert largest_difference(ours.model.state_dict(), theirs.model.state_dict()) < bound
    assert largest_difference(*states) < 10 * bound
    for average, expected in zip(ours.ema.averages, theirs.ema.averages, strict=True):
        assert largest_difference(average, expected) < 3e-7


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


# All options in float64, whose bound is strict, and none of them in float32. The others have these apart.
FP64, FP32 = (torch.float64, 1e-14), (torch.float32, 1e-7)
CLIP, DECAY, WIDTHS = {}, {"weight_decay": 0.1}, {"max_grad_norm": None, "ema_widths": (0.05, 0.1)}
UPDATES = [
    pytest.param({"weight_decay": 0.1, "ema_widths": (0.05, 0.1)}, *FP64, id="all-fp64"),
    pytest.param({"max_grad_norm": None}, *FP32, id="none-fp32"),
    pytest.param(CLIP, *FP64, id="clip-fp64", marks=pytest.mark.slow),
    pytest.param(DECAY, *FP64, id="decay-fp64", marks=pytest.mark.slow),
    pytest.param(WIDTHS, *FP64, id="widths-fp64", marks=pytest.mark.slow),
    pytest.param(WIDTHS, *FP32, id="widths-fp32", marks=pytest.mark.slow),
    pytest.param(CLIP, *FP32, id="clip-fp32", marks=pytest.mark.slow),
    pytest.param(DECAY, *FP32, id="decay-fp32", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("options", "dtype", "bound"), UPDATES)
def test_it_is_the_library_s_update(options: dict[str, Any], dtype: torch.dtype, bound: float) -> None:
    """Over 100 steps, some of them skipped; the averages are float32 either way."""
    ours, theirs = (Side(config(**options), dtype, backend) for backend in ("aot_eager", None))
    for step in range(100):
        if step % 10 != 3:  # not finite, so left out
            ours.step(step)
            theirs.step(step)
    check_equal(ours, theirs, bound)
    assert ours.number == 89


def test_groups_of_another_rate_have_their_own() -> None:
    """Also after a checkpoint, whose groups are loaded into new dictionaries."""
    ours, theirs = (Side(config(**DECAY), torch.float64, backend, scaled=True) for backend in ("aot_eager", None))
    assert len(theirs.optimizer.param_groups) == 2
    for step in range(20):
        if step == 10:
            ours.resume(theirs)
        ours.step(step)
        theirs.step(step)
    check_equal(ours, theirs, 1e-14)
    assert ours.number == 19


@pytest.mark.extern
@pytest.mark.slow  # the masked one is below
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler for CPUs needs g++")
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [pytest.param(*FP64, id="fp64"), pytest.param(torch.float32, 2e-7, id="fp32")],
)
def test_it_is_the_library_s_update_in_machine_code(dtype: torch.dtype, bound: float) -> None:
    options = config(weight_decay=0.1, ema_widths=(0.05, 0.1))
    ours, theirs = (Side(options, dtype, backend) for backend in ("inductor", None))
    for step in range(100):
        ours.step(step)
        theirs.step(step)
    check_equal(ours, theirs, bound)
    assert ours.number == 99


def check_masked(
    backend: str, dtype: torch.dtype, options: dict[str, Any], other: str | None = "aot_eager"
) -> tuple[Side, Side]:
    """A masked update over 40 steps, some of them not finite, and one without a mask that does not see those."""
    masked = Side(config(**options), dtype, backend, masked=True)
    plain = Side(config(**options), dtype, other, masked=False)
    for step in range(40):
        if step % 5 != 3:
            masked.step(step)
            plain.step(step)
            continue
        before = {name: tensor.clone() for name, tensor in masked.tensors().items()}
        for place, parameter in enumerate(masked.trained):
            parameter.grad = torch.full_like(parameter, [torch.nan, torch.inf, -torch.inf][place % 3])
        norm = gradient_norm(masked.trained)
        assert masked.compiled(clip_factor(norm, CLIPPING) if step % 2 else None, norm.isfinite(), step + 1)
        assert all(torch.equal(before[name], tensor) for name, tensor in masked.tensors().items())
        masked.optimizer.param_groups[0]["step"] -= 1  # the host counts steps; going back to a checkpoint restores it
    assert masked.number == 31
    return masked, plain


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        pytest.param(DECAY, torch.float32, id="clip-decay-fp32"),
        pytest.param(CLIP, torch.float64, id="clip-fp64", marks=pytest.mark.slow),
        pytest.param(CLIP, torch.float32, id="clip-fp32", marks=pytest.mark.slow),
        pytest.param({**DECAY, "max_grad_norm": None}, torch.float64, id="decay-fp64", marks=pytest.mark.slow),
        pytest.param({**DECAY, "max_grad_norm": None}, torch.float32, id="decay-fp32", marks=pytest.mark.slow),
    ],
)
def test_a_masked_update_is_a_skipped_one_bit_for_bit(options: dict[str, Any], dtype: torch.dtype) -> None:
    masked, plain = check_masked("aot_eager", dtype, options)
    theirs = plain.tensors()
    assert plain.number == 31
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in masked.tensors().items())


@pytest.mark.extern
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler for CPUs needs g++")
def test_a_masked_update_in_machine_code_is_the_library_s_or_leaves_every_bit() -> None:
    masked, plain = check_masked("inductor", torch.float32, {"weight_decay": 0.1, "ema_widths": (0.05, 0.1)}, None)
    check_equal(masked, plain, 2e-7)


@pytest.mark.parametrize("compiled_first", [True, False])
def test_a_training_resumes_from_a_state_of_the_other_kind(compiled_first: bool) -> None:
    """The state has the names, shapes and numbers that the library's has."""
    first, second = ("aot_eager", None) if compiled_first else (None, "aot_eager")
    begun, theirs = Side(config(), torch.float64, first), Side(config(), torch.float64, None)
    ours = Side(config(), torch.float64, second)
    for step in range(10):
        begun.step(step)
        theirs.step(step)
    ours.resume(begun)
    for step in range(10, 20):
        ours.step(step)
        theirs.step(step)
    assert flatten_state(ours.optimizer)[1] == flatten_state(theirs.optimizer)[1]
    assert largest_difference(ours.tensors(), theirs.tensors()) < 1e-14
    assert begun.number + ours.number == (9 if compiled_first else 10)


def test_blocks_of_one_shape_share_a_graph_and_a_rehearsal_changes_nothing() -> None:
    graphs = []

    def backend(graph: GraphModule, example_inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    side = Side(config(), torch.float32, None)
    side.step(0)
    before = {name: tensor.clone() for name, tensor in side.tensors().items()}
    side.compiled = CompiledUpdate(side.model, side.optimizer, side.ema, backend)
    side.compiled.rehearse()
    assert len(graphs) == 2
    assert all(torch.equal(before[name], tensor) for name, tensor in side.tensors().items())
    for step in range(1, 5):
        side.step(step)
    assert side.number == 4
    assert len(graphs) == 2


def test_a_parameter_without_a_gradient_is_left_to_the_library() -> None:
    side = Side(config(), torch.float32, "aot_eager")
    side.step(0)
    side.model.first.grad = None
    before = {name: tensor.clone() for name, tensor in side.tensors().items()}
    assert not side.compiled(None)
    assert all(torch.equal(before[name], tensor) for name, tensor in side.tensors().items())


def test_parameters_are_grouped_by_block() -> None:
    assert by_block(["x.weight", "blocks.0.a", "blocks.0.b.c", "blocks.11.a", "pos"]) == {
        "": ["x.weight", "pos"],
        "blocks.0": ["blocks.0.a", "blocks.0.b.c"],
        "blocks.11": ["blocks.11.a"],
    }


def test_adamw_goes_on_from_the_state_of_a_gpu() -> None:
    """A fused AdamW, as on a GPU, computes the same as that of a CPU, and its checkpoint does not change the latter."""
    options = config(optimizer="adamw", weight_decay=0.1)
    fused, ours, theirs = (Side(options, torch.float64, None) for _ in range(3))
    fused.optimizer = torch.optim.AdamW(fused.trained, lr=options.lr, weight_decay=0.1, fused=True)
    for step in range(10):
        fused.step(step)
        theirs.step(step)
    ours.resume(fused)
    assert (ours.optimizer.param_groups[0]["fused"], ours.optimizer.param_groups[0]["foreach"]) == (None, True)
    for step in range(10, 20):
        ours.step(step)
        theirs.step(step)
    assert largest_difference(ours.tensors(), theirs.tensors()) < 1e-14
