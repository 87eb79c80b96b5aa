"""DiT and MDTv2 for images of 512 px: latents of 64 x 64, a grid of 32 x 32 tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from edt_core.models import DiTConfig, MDTv2Config, ModelConfig, build_model, count_macs, model_config, shadow
from pipelines.config.schema import config_names, load_config
from tests.support.golden import GOLDEN, formula_weight, relative_error

NARROW: dict[str, ModelConfig] = {
    "dit": DiTConfig(name="narrow", latent_size=64, num_classes=10, depth=2, dim=24, num_heads=4),
    "mdtv2": MDTv2Config(name="narrow", latent_size=64, num_classes=10, depth=4, dim=24, num_heads=4, decode_depth=2),
}
NAMES = [name for name in config_names() if name.startswith("imagenet512-")]


@pytest.mark.parametrize("kind", NARROW)
@torch.no_grad()
def test_outputs_of_the_authors_code(kind: str) -> None:
    """Positions too: those of a grid of 32 are not those of 16 stretched."""
    model = build_model(NARROW[kind])
    own = ("pos_embed", "relative_position_index")
    state = {
        key: value if key.endswith(own) else formula_weight(key, value.shape)
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    x = torch.from_numpy(np.random.RandomState(0).randn(2, 4, 64, 64).astype(np.float32))
    output = model.eval()(x, torch.tensor([17, 903]), torch.tensor([3, 10]))
    with np.load(GOLDEN / "models_512.npz") as file:
        assert relative_error(output[:, :, ::4, ::4], file[kind]) < 1e-5


@pytest.mark.parametrize("kind", NARROW)
def test_the_cost_is_that_of_four_times_the_tokens_and_sixteen_times_their_pairs(kind: str) -> None:
    large = NARROW[kind]
    macs = {grid: count_macs(shadow(replace(large, latent_size=2 * grid))) for grid in (8, 16, 32)}
    pairs = 2 * large.num_blocks * large.cond_dim
    rest = {grid: count - pairs * grid**4 for grid, count in macs.items()}
    assert rest[32] - rest[16] == 4 * (rest[16] - rest[8])


def test_the_kernel_of_attention_modulation_is_that_of_512_px() -> None:
    for name in ("DiT-S/2", "MDTv2-S/2"):
        small, large = (model_config(name, size) for size in (256, 512))
        assert (large.latent_size, large.grid) == (64, 32)
        assert replace(large, latent_size=32, amm_kernel="exp_cos") == small


@pytest.mark.parametrize("name", NAMES)
def test_what_ships_trains_the_recipe_of_256_px(name: str) -> None:
    config, small = load_config(name), load_config(name.replace("512", "256"))
    assert config.preprocess.image_size == 512
    assert (config.train, config.autoencoder) == (small.train, small.autoencoder)
    (model,) = config.models
    assert model.endswith("-512")
    assert config.model_of(model, 1000).latent_size == 64


def test_the_models_of_table_2_ship() -> None:
    assert {f"imagenet512-{model}" for model in ("edt-s", "dit-s", "mdtv2-s")} < set(NAMES)
