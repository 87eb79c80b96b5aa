"""Padded projections of the attention, as on a GPU, are made once for a step and once for a sampling chain.

Every head gets four channels of zeros here, since no head of a CPU is padded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode

from edt_core.config import ChainConfig, TrainConfig
from edt_core.data.latents import LatentDataset
from edt_core.diffusion import linear_schedule
from edt_core.models import DiffusionTransformer, build_model
from edt_core.models.attention import Attention
from edt_core.sampling.sampler import LatentSampler
from edt_core.training import step as training_step
from edt_core.training.context import LocalContext
from edt_core.training.draws import draw_step
from edt_core.training.loop import train
from edt_core.training.speed.compiled import compile_parts
from edt_core.training.step import StepInputs, accumulate_gradient
from tests.support.trainings import OneOfOne, narrow, same

pytestmark = pytest.mark.usefixtures("quickly", "one_thread")
HEAD_PADDING = "edt_core.models.attention.head_padding"
PADS = (torch.nn.functional.pad, torch._C._nn.pad)  # as a graph names it
BATCH, OF_AN_ATTENTION = 6, 3  # weights of qkv, bias of qkv, weights of proj
WAYS = {  # options of a step, and how often it calls each attention
    "one pass": ({}, 1),
    "micro-batches": ({"micro_batch_size": 2}, 3),
    "checkpointing": ({"activation_checkpointing": True}, 2),
    "all, in bf16": ({"micro_batch_size": 4, "activation_checkpointing": True, "precision": "bf16"}, 4),
}


class Pads(TorchDispatchMode):
    """Counts paddings; their gradients are paddings by negative numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func is torch.ops.aten.constant_pad_nd.default and max(args[1]) > 0
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HEAD_PADDING, lambda head_dim, device: 4 if device.type == "cpu" else 0)


def drawn() -> DiffusionTransformer:
    model = build_model(narrow()).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model


def attentions(model: nn.Module) -> list[Attention]:
    return [module for module in model.modules() if isinstance(module, Attention)]


def inputs(config: TrainConfig) -> StepInputs:
    draws = draw_step(config, 0, narrow())
    generator = torch.Generator().manual_seed(1)
    return StepInputs(
        latents=torch.randn(draws.posterior_noise.shape, generator=generator),
        labels=torch.arange(BATCH) % 4,
        timesteps=(draws.uniforms * config.num_timesteps).long(),
        weights=torch.ones(BATCH),
        draws=draws,
    )


def config_of(options: dict[str, Any]) -> TrainConfig:
    return TrainConfig.model_validate({"global_batch_size": BATCH, **options})


def result(network: nn.Module, config: TrainConfig) -> list[Tensor]:
    """Losses and gradients of a step."""
    for module in network.modules():
        if isinstance(module, DiffusionTransformer):
            module.activation_checkpointing = config.activation_checkpointing
    network.zero_grad(set_to_none=True)
    losses = accumulate_gradient(network, config, linear_schedule(config.num_timesteps), inputs(config), 4)
    return [losses, *(p.grad.clone() for p in network.parameters() if p.grad is not None)]


@contextmanager
def nothing_shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(training_step, "shared_projections", lambda _model: nullcontext())
        yield


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_a_step_pads_each_projection_once_and_its_bits_stay(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, calls = WAYS[way]
    model, config = drawn(), config_of(options)
    with Pads() as ours:
        shared = result(model, config)
    with nothing_shared(monkeypatch), Pads() as theirs:
        apart = result(model, config)
    once = OF_AN_ATTENTION * len(attentions(model))
    assert (ours.number, theirs.number) == (once, calls * once)
    assert equal(shared, apart)
    assert all(attention.shared is None for attention in attentions(model))


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_heads_without_padding(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = drawn(), config_of(WAYS[way][0])
    padded = result(model, config)
    monkeypatch.setattr(HEAD_PADDING, lambda head_dim, device: 0)
    bound = 0.02 if config.precision == "bf16" else 1e-5
    for mine, other in zip(padded, result(model, config), strict=True):
        assert float((mine - other).norm()) <= bound * float(other.norm())


def test_a_training_of_several_steps_ends_with_the_same_bits(
    dataset: LatentDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step pads the weights as they are then."""
    config = config_of({"micro_batch_size": 2, "max_steps": 4, "lr": 0.01, "activation_checkpointing": True})
    ours = train(config, narrow(), dataset, LocalContext(tmp_path / "a"))
    with nothing_shared(monkeypatch):
        theirs = train(config, narrow(), dataset, LocalContext(tmp_path / "b"))
    assert same(ours.model.state_dict(), theirs.model.state_dict())
    assert ours.model.state_dict().keys() == build_model(narrow()).state_dict().keys()


def test_an_error_in_a_step_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = drawn(), config_of({"micro_batch_size": 2})
    monkeypatch.setattr(training_step, "step_losses", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        result(model, config)
    assert all(attention.shared is None for attention in attentions(model))


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("way", WAYS)
def test_ddp_gets_every_gradient_once(way: str) -> None:
    """Those of all micro-batches but the last one are not exchanged."""
    config, alone, wrapped = config_of(WAYS[way][0]), drawn(), drawn()
    network = OneOfOne().wrap(wrapped)
    for _ in range(2):
        expected = result(alone, config)
        assert equal(result(network, config), expected)


def test_compiled_parts_pad_in_their_graphs_and_are_compiled_once() -> None:
    torch._dynamo.reset()
    graphs = Counter[str]()

    def backend(graph: GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        graphs["all"] += 1
        graphs["pads"] += sum(node.target in PADS for node in graph.graph.nodes)
        return graph.forward

    eager, compiled = drawn(), drawn()
    compile_parts(compiled, backend)
    config, numbers = config_of({"micro_batch_size": 2}), []
    for _ in range(3):
        for mine, other in zip(result(compiled, config), result(eager, config), strict=True):
            assert float((mine - other).norm()) <= 1e-5 * float(other.norm())
        numbers.append(graphs["all"])
    assert numbers == numbers[:1] * 3
    assert graphs["pads"] >= OF_AN_ATTENTION
    torch._dynamo.reset()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_chain_pads_each_projection_once(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = drawn().eval()
    chain = ChainConfig(num_sampling_steps=3, cfg_scale=2.0, precision=precision)
    sampler = LatentSampler(model, chain, 1000)
    with Pads() as pads:
        latents = sampler([0, 1], 0, [0, 1])
    assert pads.number == OF_AN_ATTENTION * len(attentions(model))
    monkeypatch.setattr("edt_core.models.weight_memo._MOST_BYTES", 0)
    with Pads() as again:
        assert torch.equal(sampler([0, 1], 0, [0, 1]), latents)
    assert again.number > pads.number
    monkeypatch.setattr(HEAD_PADDING, lambda head_dim, device: 0)
    plain = sampler([0, 1], 0, [0, 1])
    assert float((plain - latents).norm()) <= (0.05 if precision == "bf16" else 1e-4) * float(plain.norm())


def test_a_chain_follows_the_weights() -> None:
    """The next chain pads the weights as they are then."""
    model = drawn().eval()
    sampler = LatentSampler(model, ChainConfig(num_sampling_steps=2), 1000)
    before = sampler([0], 0, [0])
    with torch.no_grad():
        for attention in attentions(model):
            attention.qkv.weight.mul_(0.5)
    assert not torch.equal(sampler([0], 0, [0]), before)
