"""U-ViT against numbers computed with its authors' code (`made` in uvit_manifest.json says how), and their checkpoints.

The authors' models predict noise alone; models here have as many channels again for the variance.
"""

import argparse
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edt_core.config import ChainConfig
from edt_core.errors import UserError
from edt_core.models import (
    DiffusionTransformer,
    amm_matrix,
    build_model,
    count_macs,
    count_parameters,
    import_released,
    model_config,
    read_released_model,
    shadow,
)
from edt_core.models.families.uvit import UViT, UViTConfig
from edt_core.models.import_released import ReleasedModel
from edt_core.sampling.sampler import LatentSampler
from tests.support.cases import suite_of
from tests.support.golden import GOLDEN, formula_weight, relative_error

MANIFEST: dict[str, Any] = json.loads((GOLDEN / "uvit_manifest.json").read_text())["models"]
PAPER = {"UViT-S/2": 44, "UViT-M/2": 131, "UViT-L/2": 287, "UViT-H/2": 501}  # arXiv 2209.12152: millions of parameters
TOLERANCE = 1e-5
LINEAR = argparse.Namespace(noise_schedule="linear")


def published_shapes(config: UViTConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the state dict of the authors' model, whose output has half as many channels."""
    shapes = {key: tuple(value.shape) for key, value in shadow(config).state_dict().items()}
    for key, shape in shapes.items():
        if key.startswith("decoder_pred."):
            shapes[key] = (shape[0] // 2, *shape[1:])
        elif key.startswith("final_layer."):
            shapes[key] = tuple(side // 2 for side in shape[:2]) + shape[2:]
    return shapes


def of_formula(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The weights of the reference."""
    norms = ("norm.weight", "norm1.weight", "norm2.weight")
    return {key: formula_weight(key, torch.Size(shape)) + key.endswith(norms) for key, shape in shapes.items()}


def config_of(name: str, image_size: int = 256, num_classes: int = 1000, **numbers: Any) -> UViTConfig:
    config = model_config(name, image_size, num_classes)
    assert isinstance(config, UViTConfig)
    return config if not numbers else UViTConfig(**{**vars(config), **numbers})


def read(folder: Path, content: object) -> ReleasedModel:
    torch.save(content, folder / "nnet_ema.pth")
    return read_released_model(folder / "nnet_ema.pth")


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> ReleasedModel:
    """A small model without variance, as the authors' training would write it."""
    return read(tmp_path_factory.mktemp("released"), of_formula(published_shapes(config_of("UViT-Tiny/2", 32, 4))))


@pytest.mark.parametrize("name", suite_of(["UViT-S/2@256", "UViT-S/4@256", "UViT-H/4@512"], MANIFEST))
def test_keys_shapes_and_costs_are_the_authors_but_for_the_variance(name: str) -> None:
    model, _, image_size = name.partition("@")
    config = config_of(model, int(image_size))
    shapes = {key: list(shape) for key, shape in published_shapes(config).items()}
    known = MANIFEST[name]
    assert hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest() == known["sha256"]
    assert len(shapes) == known["tensors"]
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == known["parameters"]
    channels, pixels = config.in_channels, config.latent_size**2
    variance = pixels * config.dim * channels  # in the layer that makes patches, and in the convolution
    variance += pixels * 9 * 3 * channels**2 if config.final_conv else 0
    # The authors' model projects the two tokens before the patches too, and throws them away.
    thrown_away = 2 * config.dim * config.patch_size**2 * channels
    assert count_macs(shadow(config)) == known["macs"] + variance - thrown_away


CHECKPOINTS = [("UViT-S/2", True), ("UViT-S/2", False), ("UViT-S/4", True)]  # all that they have is in the last two


@pytest.mark.parametrize("name", PAPER)
def test_sizes_are_those_of_the_paper(name: str) -> None:
    """To a million; the paper's S has no labels, of which the table here is half a million."""
    counted = count_parameters(shadow(config_of(name))) / 1e6
    labels = 1001 * 512 / 1e6 if name == "UViT-S/2" else 0
    assert counted - labels == pytest.approx(PAPER[name], abs=0.5)


@pytest.mark.parametrize(("name", "conv"), suite_of(CHECKPOINTS[1:], CHECKPOINTS), ids=["S/2", "S/2 no conv", "S/4"])
@torch.no_grad()
def test_a_checkpoint_of_the_authors_predicts_what_their_code_does(name: str, conv: bool, tmp_path: Path) -> None:
    config = config_of(name, final_conv=conv)
    state = of_formula(published_shapes(config))
    loaded = read(tmp_path, state if conv else {"ema": state, "args": LINEAR})
    assert loaded.model.config == config
    assert any("predicts no variance" in note for note in loaded.notes)
    x = torch.from_numpy(np.random.RandomState(0).randn(2, 4, 32, 32).astype(np.float32))
    noise, variance = loaded.model(x, torch.tensor([17, 903]), torch.tensor([207, 1000])).chunk(2, dim=1)
    with np.load(GOLDEN / "uvit_forward.npz") as file:
        expected = file[f"{name.replace('/', '-')}@256.{'conv' if conv else 'no_conv'}"]
    assert relative_error(noise, expected) < TOLERANCE
    assert not variance.any()


RELEASED = ["UViT-L/2@256", "UViT-L/4@512"]


def of_one_number(config: UViTConfig) -> dict[str, torch.Tensor]:
    """Tensors of the published shapes, of one number each in memory and on disk."""
    return {key: torch.full((1,), 0.5).expand(shape) for key, shape in published_shapes(config).items()}


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_checkpoints_are_told_by_their_shapes(name: str) -> None:
    model, _, image_size = name.partition("@")
    expected = config_of(model, int(image_size))
    assert import_released._identify(Path("nnet_ema.pth"), of_one_number(expected)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASED)
def test_the_released_checkpoints_are_read(name: str, tmp_path: Path) -> None:
    """All of their 287 million weights; S is read above."""
    model, _, image_size = name.partition("@")
    expected = config_of(model, int(image_size))
    assert read(tmp_path, of_one_number(expected)).model.config == expected


def test_a_state_dict_of_a_model_here_is_read_as_it_is(released: ReleasedModel, tmp_path: Path) -> None:
    """Also that of a checkpoint without variance, whose output for it is 0."""
    for model in (build_model(config_of("UViT-Tiny/2", 32, 4)), released.model):
        loaded = read(tmp_path, model.state_dict())
        assert not any("variance" in note for note in loaded.notes)
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.model.state_dict().items())


def test_a_checkpoint_of_another_noise_schedule_is_refused(tmp_path: Path) -> None:
    """The authors' UViT-H was trained on Stable Diffusion's; nothing in its file says so but the missing layer."""
    with pytest.raises(UserError, match=r"UViT-H/2, but without a convolution .* noise schedule of Stable Diffusion"):
        read(tmp_path, of_one_number(config_of("UViT-H/2")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_emb.weight": None}, "'label_emb.weight' is missing"),  # unconditional
        ({"context_embed.weight": torch.ones(1)}, "'context_embed.weight' is not a key of it"),  # of texts
        ({"final_layer.bias": None}, "'final_layer.bias' is missing"),
        ({"decoder_pred.bias": torch.ones(())}, "'decoder_pred.bias' has shape"),
        ({"decoder_pred.weight": torch.ones(16)}, "closest is"),
        ({"decoder_pred.weight": torch.ones(16, 64).to_sparse()}, "'decoder_pred.weight' has shape"),
        ({"patch_embed.proj.weight": torch.ones(64, 0, 2, 2)}, "closest is"),
        ({"pos_embed": torch.ones(1, 1, 64)}, "'pos_embed' has shape"),
    ],
)
def test_what_is_no_checkpoint_of_a_model_of_classes_is_refused(
    change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    state = {**of_formula(published_shapes(config_of("UViT-Tiny/2", 32, 4))), **change}
    with pytest.raises(UserError, match=message):
        read(tmp_path, {key: value for key, value in state.items() if value is not None})


def test_a_checkpoint_of_pixels_is_refused(tmp_path: Path) -> None:
    """The authors' models of 64 pixels have three channels and a label table without a null class."""
    config = config_of("UViT-S/4", 512, 999, in_channels=3)
    with pytest.raises(UserError, match="of pixels"):
        read(tmp_path, of_one_number(config))


def test_the_table_of_the_docs_is_counted() -> None:
    page = (GOLDEN.parents[1] / "docs" / "models.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if "| UViT-" in line]
    assert {name for name, *_ in rows} == {"UViT-S/2", "UViT-M/2", "UViT-L/2", "UViT-H/2", "UViT-L/4", "UViT-H/4"}
    for name, numbers, parameters, _, image_size, macs in rows:
        model = shadow(config := config_of(name, int(image_size)))
        assert numbers == f"{config.depth}, {config.dim}, {config.num_heads}"
        assert (parameters, macs) == (f"{count_parameters(model) / 1e6:.1f}", f"{count_macs(model) / 1e9:.2f}")


def test_padded_heads_without_a_bias_attend_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose kernels want heads of a multiple of 8 channels."""
    attention = UViT(config_of("UViT-Tiny/2", 32, 4)).eval().mid_block.attn
    x = torch.randn(2, 18, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = attention(x)
        monkeypatch.setattr("edt_core.models.attention.head_padding", lambda *_: 8)
        torch.testing.assert_close(attention(x), plain)


def drawn(model: DiffusionTransformer, **chain: Any) -> Tensor:
    latents: Tensor = LatentSampler(model, ChainConfig(num_sampling_steps=4, **chain), 1000)([0, 1], 0, [0, 3])
    return latents


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpmsolver++", "unipc"])
def test_any_sampler_draws_from_a_checkpoint_without_variance(released: ReleasedModel, sampler: str) -> None:
    """Only the ancestral chain uses one; where the model has none it lies halfway between the bounds of the range."""
    chain = {"sampler": sampler, "cfg_scale": 1.4, "guidance_channels": None}
    latents = drawn(released.model, **chain)
    assert latents.isfinite().all()
    other = build_model(released.model.config)
    state = dict(released.model.state_dict())
    state["final_layer.bias"] = state["final_layer.bias"].clone()
    state["final_layer.bias"][4:] = 0.9
    other.load_state_dict(state)
    assert torch.equal(drawn(other.eval(), **chain), latents) == (sampler != "ancestral")


def test_the_last_label_is_the_null_class_of_guidance(released: ReleasedModel) -> None:
    unguided, guided = (drawn(released.model, cfg_scale=scale, guidance_channels=None) for scale in (1.0, 3.0))
    assert not torch.allclose(unguided, guided)
    same = build_model(released.model.config)
    state = dict(released.model.state_dict())
    state["label_emb.weight"] = state["label_emb.weight"][-1:].expand(5, -1)  # every label is the null class
    same.load_state_dict(state)
    pair = [drawn(same.eval(), cfg_scale=scale, guidance_channels=None) for scale in (1.0, 3.0)]
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)


def test_modulation_leaves_label_and_timestep_near_to_all() -> None:
    model = UViT(config_of("UViT-Tiny/2", 32, 4))
    model.set_amm((2,), radius=1.0)
    amm, grid = model.mid_block.attn.amm, amm_matrix(4, radius=1.0)
    assert amm is not None
    assert torch.equal(amm[2:, 2:], grid)
    assert bool((amm[:2] == grid[0, 0]).all())
    assert bool((amm[:, :2] == grid[0, 0]).all())


def test_numbers_that_make_no_model() -> None:
    with pytest.raises(ValueError, match="depth is 4, but a U-ViT has one block in the middle"):
        config_of("UViT-Tiny/2", 32, 4, depth=4)
