"""Muon: its step against the equations, what it trains of each family, and trainings with it that are resumed."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from edt_core.config import TrainConfig
from edt_core.data.latents import LatentDataset
from edt_core.errors import UserError
from edt_core.models import DiffusionTransformer, build_model, model_config
from edt_core.training.checkpoint import load_checkpoint
from edt_core.training.context import LocalContext
from edt_core.training.loop import train
from edt_core.training.optim import flatten_state, make_optimizer, restore_state
from edt_core.training.optimizers.muon import Muon, hidden_matrices, orthogonalized
from edt_core.training.start.base import Base, SavedOptimizer
from edt_core.training.start.initial import initial_checkpoint
from edt_core.training.start.kept import kept
from edt_core.training.state import initial_state
from tests.support.models import TINY
from tests.support.trainings import cut_back, narrow, place, same

A, B, C = 3.4445, -4.7750, 2.0315


def by_singular_values(matrix: Tensor) -> Tensor:
    """Five iterations of the polynomial a s + b s^3 + c s^5 on the singular values of a matrix, in float64."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = A * values + B * values**3 + C * values**5
    return (left * values) @ right


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(12, 12), (8, 20), (20, 8), (1, 6)])
def test_the_iteration_is_the_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    matrices = torch.stack([random(*shape, seed=seed) * 10.0**seed for seed in range(3)])
    expected = torch.stack([by_singular_values(matrix) for matrix in matrices])
    assert torch.allclose(orthogonalized(matrices).double(), expected, rtol=0, atol=1e-5)
    assert torch.allclose(orthogonalized(matrices.double()), expected, rtol=0, atol=1e-9)
    values = torch.linalg.svdvals(expected)
    assert values.max() < 1.3  # near 1, but for a value that was tiny
    assert values.median() > 0.6


def test_a_matrix_of_zeros_has_no_step() -> None:
    assert torch.equal(orthogonalized(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def reference(weight: Tensor, gradients: list[Tensor], lr: float, decay: float) -> Tensor:
    """Muon with Nesterov momentum (Jordan et al.) and Moonlight's scale, of one matrix, in float64."""
    weight, momentum = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for gradient in gradients:
        momentum = 0.95 * momentum + 0.05 * gradient.double()
        nesterov = 0.05 * gradient.double() + 0.95 * momentum
        weight = weight * (1 - lr * decay) - lr * 0.2 * math.sqrt(max(weight.shape)) * by_singular_values(nesterov)
    return weight


def test_steps_are_those_of_the_equations() -> None:
    """Of matrices of several shapes, of queries, keys and values each by itself, and of AdamW's parameters."""
    shapes, lr, decay = {"one": (6, 10), "other": (6, 10), "tall": (10, 6), "qkv": (18, 6), "bias": (7,)}, 1e-2, 0.1
    weights = {name: nn.Parameter(random(*shape, seed=place)) for place, (name, shape) in enumerate(shapes.items())}
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    parts = {weights[name]: 3 if name == "qkv" else 1 for name in shapes if name != "bias"}
    config = TrainConfig(optimizer="muon", lr=lr, weight_decay=decay)
    optimizer = make_optimizer(config, weights.values(), parts)
    beside = nn.Parameter(start["bias"].clone())
    adamw = torch.optim.AdamW([beside], lr=lr, weight_decay=decay, betas=(0.9, 0.95))
    gradients = [{name: random(*shape, seed=100 * k + 7) for name, shape in shapes.items()} for k in range(4)]
    for step in gradients:
        for name, weight in weights.items():
            weight.grad = step[name].clone()
        beside.grad = step["bias"].clone()
        optimizer.step()
        adamw.step()
        assert all(torch.equal(weight.grad, step[name]) for name, weight in weights.items())
    for name in ("one", "other", "tall"):
        expected = reference(start[name], [step[name] for step in gradients], lr, decay)
        assert torch.allclose(weights[name].double(), expected, rtol=0, atol=1e-6)
    thirds = zip(start["qkv"].chunk(3), *(step["qkv"].chunk(3) for step in gradients), strict=True)
    expected = torch.cat([reference(first, grads, lr, decay) for first, *grads in thirds])
    assert torch.allclose(weights["qkv"].double(), expected, rtol=0, atol=1e-6)
    assert torch.allclose(weights["bias"], beside, rtol=0, atol=1e-6)


def test_a_step_has_the_size_of_adamw_s() -> None:
    weight = nn.Parameter(torch.zeros(64, 256))
    weight.grad = random(64, 256)
    Muon([weight], {weight: 1}, lr=1.0).step()
    assert 0.15 < float(weight.detach().square().mean().sqrt()) < 0.25


@pytest.mark.parametrize("name", TINY)
def test_the_matrices_are_those_between_tokens(name: str) -> None:
    model = build_model(model_config(name, 32, 4, autoencoder_factor=4))
    found = hidden_matrices(model)
    names = {value: key for key, value in model.named_parameters()}
    muon = {names[matrix]: parts for matrix, parts in found.items()}
    others = {key: value for key, value in model.named_parameters() if key not in muon}
    assert {key.rpartition(".")[0].rpartition(".")[2] for key, parts in muon.items() if parts == 3} == {"qkv"}
    assert all(matrix.ndim == 2 for matrix in found)
    assert not [key for key in muon if "embed" in key or "final" in key or "pred" in key or "adaLN" in key]
    left = {key for key, value in others.items() if value.ndim == 2 and not key.endswith("bias_table")}
    assert all("embed" in k or "label_emb" in k or "final" in k or "pred" in k or "adaLN" in k for k in left)
    assert sum(value.numel() for value in found) > sum(value.numel() for value in others.values()) / 2


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_it_continues_from_its_flat_state(stop: int) -> None:
    config = TrainConfig(optimizer="muon", lr=1e-2, weight_decay=0.01)

    def made(start: list[Tensor]) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        both = [nn.Parameter(value.clone()) for value in start]
        return both, make_optimizer(config, both, {both[1]: 3})

    def stepped(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            for parameter in parameters:
                parameter.grad = random(*parameter.shape, seed=step)
            optimizer.step()

    start = [random(5), random(12, 4)]
    whole, optimizer = made(start)
    stepped(whole, optimizer, range(5))
    first, optimizer = made(start)
    stepped(first, optimizer, range(stop))
    tensors, groups = flatten_state(optimizer)
    second, resumed = made([value.detach() for value in first])
    stepped(second, resumed, range(2))  # what it had before is replaced
    for parameter, value in zip(second, first, strict=True):
        parameter.data.copy_(value.data)
    restore_state(resumed, {key: value.clone() for key, value in tensors.items()}, json.loads(json.dumps(groups)))
    stepped(second, resumed, range(stop, 5))
    assert all(torch.equal(one, other) for one, other in zip(whole, second, strict=True))


MUON = TrainConfig(
    model="EDT-Tiny/2", optimizer="muon", lr=1e-3, weight_decay=0.01, global_batch_size=4, max_steps=4,
    checkpoint_every=2, log_every=1, max_grad_norm=1.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(dataset: LatentDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("muon") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edt_core.training.loop.matmul_rate", lambda *_: 1e9)
        train(MUON, narrow(), dataset, LocalContext(folder))
    return folder


@pytest.mark.usefixtures("quickly")
def test_a_resumed_training_equals_the_uninterrupted_one(trained: Path, dataset: LatentDataset, tmp_path: Path) -> None:
    context = cut_back(trained, tmp_path / "cut", 2)
    train(MUON, narrow(), dataset, context)
    whole, resumed = (load_checkpoint(place(folder, 4)) for folder in (trained, tmp_path / "cut"))
    assert all(same(dict(whole.tensors[file]), dict(resumed.tensors[file])) for file in whole.tensors)
    losses = [row["loss"] for row in whole.state["history"]["rows"]]
    assert len(losses) == 4
    assert all(math.isfinite(loss) for loss in losses)


def test_another_training_can_keep_its_state(trained: Path) -> None:
    saved = load_checkpoint(place(trained, 4))
    state = SavedOptimizer("muon", saved.tensors["optimizer.safetensors"], saved.state["optimizer_groups"])
    base = Base(narrow(), saved.tensors["model.safetensors"], "there", tuple("abcd"), state)
    config = MUON.model_copy(update={"init_optimizer": "keep", "init_from": "there"})
    kept, _ = initial_checkpoint(config, narrow(), base, tuple("abcd"))
    assert same(dict(kept.tensors["optimizer.safetensors"]), dict(saved.tensors["optimizer.safetensors"]))
    reordered, _ = initial_checkpoint(config, narrow(), base, tuple("dcba"))
    table = next(i for i, name in enumerate(names_in_order()) if name.endswith("embedding_table.weight"))
    for moment in ("exp_avg", "exp_avg_sq"):
        before, after = (c.tensors["optimizer.safetensors"][f"{table}.{moment}"] for c in (kept, reordered))
        assert torch.equal(after, before[[3, 2, 1, 0, 4]])
    other = replace(base, optimizer=SavedOptimizer("adamw", state.tensors, state.groups))
    with pytest.raises(UserError, match=r"has the state of adamw, and train\.optimizer is muon"):
        initial_checkpoint(config, narrow(), other, tuple("abcd"))


def names_in_order() -> list[str]:
    """Names of the parameters in the order of a Muon's state."""
    state = initial_state(MUON, narrow())
    names = {value: name for name, value in state.model.named_parameters()}
    return [names[value] for group in state.optimizer.param_groups for value in group["params"]]


def test_the_estimate_counts_one_momentum_for_a_matrix() -> None:
    model: DiffusionTransformer
    state = initial_state(MUON, model_config("EDT-Tiny/2", 32, 4))
    model = state.model
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    tensors = [v for s in state.optimizer.state.values() for v in s.values() if v.ndim]
    assert kept(MUON, model.config, images=100).optimizer == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("trainable", ["difffit", "bias"])
def test_few_parameters_have_no_matrix(trainable: str) -> None:
    with pytest.raises(ValueError, match=r"trains none of the matrices that Muon is for; set optimizer=adan"):
        TrainConfig(optimizer="muon", trainable=trainable, init_from="x")
