"""Tokens between blocks in bfloat16 (`train.residual_dtype`) instead of float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from edt_core.config import TrainConfig, result_fields
from edt_core.data.latents import LatentDataset
from edt_core.models import DiffusionTransformer, create_model, draw_masks
from edt_core.training.context import LocalContext
from edt_core.training.loop import train
from tests.support.models import TINY
from tests.support.trainings import narrow

pytestmark = pytest.mark.usefixtures("quickly", "one_thread", "no_thread_stays")


def drawn(name: str) -> DiffusionTransformer:
    model = create_model(name, 64, 10).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model


def gradient(model: DiffusionTransformer, seen: list[torch.dtype], autocast: bool = True) -> Tensor:
    """The gradient of all parameters as one vector; `seen` gets the dtype of the tokens that enter a block."""
    generator = torch.Generator().manual_seed(1)
    x, target = torch.randn(2, 4, 4, 16, 16, generator=generator)
    masks = draw_masks(model.config, 2, generator) or None

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].dtype)

    blocks = [part for child in model.children() if isinstance(child, nn.ModuleList) for part in child]
    hooks = [part.register_forward_pre_hook(record) for part in blocks if hasattr(part, "attn")]
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(x, torch.arange(4) * 250, torch.arange(4), masks)
    (out.float()[:, :4] - target).square().mean().backward()
    for hook in hooks:
        hook.remove()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", TINY)
def test_the_gradient_points_in_the_same_direction(name: str) -> None:
    model, seen = drawn(name), list[torch.dtype]()
    usual = gradient(model, seen)
    assert torch.float32 in seen
    seen.clear()
    model.stream_dtype = torch.bfloat16
    rounded = gradient(model, seen)
    assert seen
    assert set(seen) == {torch.bfloat16}
    assert torch.nn.functional.cosine_similarity(usual, rounded, dim=0) >= 0.99
    assert not torch.equal(usual, rounded)


def test_without_autocast_it_changes_nothing() -> None:
    model, seen = drawn("EDT-Tiny/2"), list[torch.dtype]()
    usual = gradient(model, seen, autocast=False)
    model.stream_dtype = torch.bfloat16
    assert torch.equal(gradient(model, seen, autocast=False), usual)
    assert set(seen) == {torch.float32}


def test_a_training_learns_the_same(dataset: LatentDataset, tmp_path: Path) -> None:
    """The losses of 30 steps, of which the last are below the first."""
    rows = {}
    for dtype in ("fp32", "bf16"):
        config = TrainConfig.model_validate(
            {
                "global_batch_size": 16,
                "max_steps": 30,
                "checkpoint_every": 30,
                "log_every": 10,
                "lr": 5e-3,
                "precision": "bf16",
                "residual_dtype": dtype,
            }
        )
        rows[dtype] = [
            row["loss"] for row in train(config, narrow(), dataset, LocalContext(tmp_path / dtype)).history.rows
        ]
    assert rows["bf16"] == pytest.approx(rows["fp32"], rel=0.02)
    assert rows["bf16"] != rows["fp32"]
    assert rows["bf16"][-1] < rows["bf16"][0]


def test_only_another_value_is_another_training() -> None:
    assert "residual_dtype" not in result_fields(TrainConfig())
    assert result_fields(TrainConfig(residual_dtype="bf16"))["residual_dtype"] == "bf16"
