"""EDT against reference vectors: state dict, cost, outputs and gradients (see tests/golden)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edt_core.models import EDT, amm_matrix, count_macs, count_parameters, create_model
from tests.support.golden import GOLDEN, formula_weight, relative_error

MANIFEST: dict[str, Any] = json.loads((GOLDEN / "edt_manifest.json").read_text())
OUTPUT_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def forward() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "edt_forward.npz") as file:
        return dict(file)


def reference_model(name: str, image_size: int) -> EDT:
    model = create_model(name, image_size)
    state = {
        key: value if key.endswith("pos_embed") else formula_weight(key, value.shape)
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model.eval()


def reference_inputs(model: EDT) -> tuple[Tensor, Tensor, Tensor]:
    side = model.config.latent_size
    x = np.random.RandomState(0).randn(2, 4, side, side).astype(np.float32)
    return torch.from_numpy(x), torch.tensor([17, 903]), torch.tensor([207, 1000])


@pytest.fixture(scope="module")
def small() -> EDT:
    return reference_model("EDT-S/2", 256)


@pytest.mark.parametrize("key", MANIFEST)
def test_state_dict_and_cost_match_the_manifest(key: str) -> None:
    name, image_size = key.split("@")
    with torch.device("meta"):
        model = create_model(name, int(image_size))
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert shapes == MANIFEST[key]["keys"]
    assert count_parameters(model) == MANIFEST[key]["trainable_params"]
    assert count_macs(model) == MANIFEST[key]["macs"]


@pytest.mark.parametrize("grid", [4, 8, 16])
def test_amm_matrix(forward: dict[str, np.ndarray], grid: int) -> None:
    np.testing.assert_allclose(amm_matrix(grid).numpy(), forward[f"amm.{grid}"], atol=1e-6, rtol=0)


def with_amm(model: EDT, blocks: tuple[int, ...], call: Callable[[], Tensor]) -> Tensor:
    model.set_amm(blocks)
    try:
        return call()
    finally:
        model.set_amm(())


@torch.no_grad()
def test_small_output(small: EDT, forward: dict[str, np.ndarray]) -> None:
    inputs = reference_inputs(small)
    assert relative_error(small(*inputs), forward["EDT-S-2@256.plain"]) < OUTPUT_TOLERANCE
    modulated = with_amm(small, (7, 10), lambda: small(*inputs))
    assert relative_error(modulated, forward["EDT-S-2@256.amm_blocks_7_10"]) < OUTPUT_TOLERANCE


@torch.no_grad()
def test_small_masked_output(small: EDT, forward: dict[str, np.ndarray]) -> None:
    masks = [
        torch.from_numpy(forward[f"EDT-S-2@256.mask_uniform_{site}"] >= ratio)
        for site, ratio in enumerate(forward["EDT-S-2@256.mask_ratio"])
    ]
    output = small(*reference_inputs(small), masks=masks)
    assert relative_error(output, forward["EDT-S-2@256.masked"]) < OUTPUT_TOLERANCE


@torch.no_grad()
def test_small_guided_output(small: EDT, forward: dict[str, np.ndarray]) -> None:
    """Guidance 2 on the first three channels, as the paper's evaluation does it."""
    x, t, _ = reference_inputs(small)
    output = small(x.repeat(2, 1, 1, 1), t.repeat(2), torch.tensor([207, 88, 1000, 1000]))
    conditional, unconditional = output[:, :3].chunk(2)
    guided = unconditional + 2.0 * (conditional - unconditional)
    combined = torch.cat([guided.repeat(2, 1, 1, 1), output[:, 3:]], dim=1)
    assert relative_error(combined, forward["EDT-S-2@256.cfg2_three_channels"]) < OUTPUT_TOLERANCE


@pytest.mark.slow
@torch.no_grad()
def test_base_output(forward: dict[str, np.ndarray]) -> None:
    model = reference_model("EDT-B/2", 256)
    inputs = reference_inputs(model)
    assert relative_error(model(*inputs), forward["EDT-B-2@256.plain"]) < OUTPUT_TOLERANCE
    model.set_amm((7, 10))
    assert relative_error(model(*inputs), forward["EDT-B-2@256.amm_blocks_7_10"]) < OUTPUT_TOLERANCE


@torch.no_grad()
def test_small_output_at_512(forward: dict[str, np.ndarray]) -> None:
    model = reference_model("EDT-S/2", 512)
    assert relative_error(model(*reference_inputs(model)), forward["EDT-S-2@512.plain"]) < OUTPUT_TOLERANCE


def test_small_gradient_norms() -> None:
    model = reference_model("EDT-S/2", 256)
    model(*reference_inputs(model)).square().mean().backward()
    norms = {key: float(parameter.grad.norm()) for key, parameter in model.named_parameters()}
    expected = json.loads((GOLDEN / "edt_s_grad_norms.json").read_text())
    assert norms == pytest.approx(expected, rel=GRADIENT_TOLERANCE)
