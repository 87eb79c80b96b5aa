"""`torch.compile` takes each model whole for sampling and in parts for training, once for all the batches of a run.

The graphs are traced and not made into code, which takes minutes.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from edt_core.config import TrainConfig, result_fields
from edt_core.diffusion import linear_schedule
from edt_core.models import DiffusionTransformer, build_model, draw_masks
from edt_core.models import kernels as projection
from edt_core.training.draws import draw_step
from edt_core.training.speed.compiled import compile_parts, is_compiled, undo_compiled_parts, wants_graphs
from edt_core.training.step import StepInputs, accumulate_gradient
from tests.support.cases import suite_of
from tests.support.models import BESIDE_EDT, TINY, shallow_config

pytestmark = pytest.mark.usefixtures("one_thread")

# Each case traces for seconds. Those that pair what others have apart are repetitions.
slow = pytest.mark.slow
SAMPLING = [
    pytest.param("UViT-Tiny/2", False, "fp32", id="UViT-Tiny/2-plain-fp32"),
    pytest.param("EDT-Tiny/2", True, "bf16", id="EDT-Tiny/2-AMM-bf16"),
    *(pytest.param(name, False, "fp32", id=f"{name}-plain-fp32", marks=slow) for name in TINY if name[:4] != "UViT"),
    *(pytest.param(name, True, "bf16", id=f"{name}-AMM-bf16", marks=slow) for name in BESIDE_EDT),
    *(pytest.param(name, False, "bf16", id=f"{name}-plain-bf16", marks=slow) for name in TINY),
    *(pytest.param(name, True, "fp32", id=f"{name}-AMM-fp32", marks=slow) for name in TINY),
]
TRAINING = [
    ("EDT-Tiny/2", "fp32"),
    ("MDTv2-Tiny/2", "bf16"),
    *((name, "fp32") for name in BESIDE_EDT if not name.startswith("MDTv2")),
    pytest.param("EDT-Tiny/2", "bf16", marks=slow),
    pytest.param("MDTv2-Tiny/2", "fp32", marks=slow),
    pytest.param("DiT-Tiny/2", "bf16", marks=slow),
]


# Of the parts, each kind once for each shape. EDT: blocks in three shapes, down, skip and up in two, the final layer.
# DiT: blocks, the final layer. MDTv2: its blocks get all tokens, with some, and with a skip, in two batches;
# in bf16 the first of them gets float32 tokens, and the others do not.
GRAPHS = {"EDT": 10, "DiT": 2, "MDTv2": 6, "UViT": 2}


class Backend:
    """Runs graphs as they are, and counts them; what a test compiles with fullgraph has no break in any."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: GraphModule, example_inputs: list[Tensor]) -> Callable[..., Tensor]:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def backend() -> Iterator[Backend]:
    torch._dynamo.reset()
    yield Backend()
    torch._dynamo.reset()


def tiny(name: str, *, training: bool) -> DiffusionTransformer:
    return drawn(build_model(shallow_config(name, 64, 10))).train(training)


def drawn(model: DiffusionTransformer) -> DiffusionTransformer:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model


def inputs(size: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(size, 4, 16, 16, generator=torch.Generator().manual_seed(size))
    return x, torch.arange(size) * 50, torch.arange(size) % 10


def largest_error(actual: Tensor, expected: Tensor) -> float:
    return float(((actual - expected).abs().max() / expected.abs().max()).detach())


@pytest.mark.parametrize(("name", "modulated", "precision"), SAMPLING)
def test_sampling_is_compiled_once_for_all_sizes(
    name: str, modulated: bool, precision: str, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projection, "_BY_CONVOLUTION", False)  # a convolution is compiled for some sizes apart
    monkeypatch.setattr("edt_core.models.attention._FUSED_FROM", 64)  # some blocks of the EDT have as many, some fewer
    model = tiny(name, training=False)
    if modulated:
        model.set_amm(range(model.config.num_blocks))
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        for size in (8, 5, 16, 3):
            out = compiled(*inputs(size))
            assert largest_error(out, model(*inputs(size))) < (1e-5 if precision == "fp32" else 0.05)
    # On a CPU PyTorch chooses the kernel of U-ViT's convolution of 3x3 by the size of the batch: two graphs for all.
    assert backend.graphs <= (2 if getattr(model.config, "final_conv", False) else 1)


@pytest.mark.parametrize(("name", "precision"), TRAINING)
def test_training_is_compiled_once_for_all_steps(
    name: str, precision: str, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the loop compiles it: for batches of one size, of which an MDTv2 keeps another number of tokens each time."""
    monkeypatch.setattr(projection, "_BY_CONVOLUTION", False)
    eager, compiled = (tiny(name, training=True) for _ in range(2))
    compile_parts(compiled, backend)
    config = TrainConfig(
        model=name, global_batch_size=4, precision=precision, compile=True, masked_loss=eager.config.is_masked
    )
    schedule, (latents, timesteps, labels) = linear_schedule(config.num_timesteps), inputs(4)
    bound, kept, graphs = 1e-4 if precision == "fp32" else 0.05, set(), []
    for step in range(4):
        draws = draw_step(config, step, eager.config)
        kept.update(mask.shape[1] for mask in draws.masks)
        ready = StepInputs(latents, labels, timesteps, torch.ones(4), draws)
        ours, theirs = (accumulate_gradient(model, config, schedule, ready, 10) for model in (compiled, eager))
        assert largest_error(ours, theirs) < bound
        graphs.append(backend.graphs)
    assert set(graphs) == {GRAPHS[name.partition("-")[0]] + (name.startswith("MDTv2") and precision == "bf16")}
    assert len(kept) == {"EDT-Tiny/2": 2, "MDTv2-Tiny/2": 4}.get(name, 0)
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert largest_error(ours.grad, theirs.grad) < bound


@pytest.mark.parametrize("name", suite_of(["EDT-Tiny/2"], TINY))
def test_a_compiled_model_computes_the_same(name: str) -> None:
    """Through all but code generation: the graph, its gradient, and decompositions.

    The parts of a DiT go through the same backend in test_training_compiled.py.
    """
    torch._dynamo.reset()
    model = tiny(name, training=True)
    masks = draw_masks(model.config, 2, torch.Generator().manual_seed(2)) or None
    compiled = torch.compile(model, backend="aot_eager", dynamic=False, fullgraph=True)
    outputs, gradients = [], []
    for call in (model, compiled):
        model.zero_grad()
        outputs.append(call(*inputs(4), masks))
        outputs[-1].square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert largest_error(*outputs) < 1e-4
    assert largest_error(*gradients) < 1e-4


@pytest.mark.parametrize("checkpointing", suite_of([True], [False, True]))
def test_the_number_of_graphs_does_not_depend_on_the_depth(checkpointing: bool, backend: Backend) -> None:
    """And the gradients of a deep model of several stages are those without compiling, in float64."""
    counts = []
    for depth in (1, 3):
        torch._dynamo.reset()
        backend.graphs = 0
        config = replace(shallow_config("EDT-Tiny/2", 64, 10), depths=(depth,) * 5)
        eager, compiled = (drawn(build_model(config)).double().train() for _ in range(2))
        compiled.activation_checkpointing = checkpointing
        compile_parts(compiled, backend)
        masks = draw_masks(config, 2, torch.Generator().manual_seed(1))
        x, t, y = inputs(4)
        for model in (eager, compiled):
            model(x.double(), t, y, masks).square().mean().backward()
        for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
            assert largest_error(ours.grad, theirs.grad) < 1e-12
        counts.append(backend.graphs)
    assert counts == [10, 10]


def test_compiling_can_be_undone_and_leaves_no_trace_in_the_state(backend: Backend) -> None:
    model = tiny("DiT-Tiny/2", training=False)
    names, expected = list(model.state_dict()), model(*inputs(2))
    compile_parts(model, backend)
    assert list(model.state_dict()) == names
    assert largest_error(model(*inputs(2)), expected) < 1e-5
    graphs = backend.graphs
    undo_compiled_parts(model)
    assert torch.equal(model(*inputs(2)), expected)
    assert model(*inputs(3)).shape[0] == 3
    assert backend.graphs == graphs > 0


def test_a_gpu_compiles_unless_it_is_told_not_to() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    values = ((None, [True, False]), (True, [True, True]), (False, [False, False]), ("reduce-overhead", [True, True]))
    for value, expected in values:
        config = TrainConfig.model_validate({"compile": value})
        assert [is_compiled(config, device) for device in (cuda, cpu)] == expected
        assert wants_graphs(config) == (value == "reduce-overhead")
        assert "compile" not in result_fields(config)
