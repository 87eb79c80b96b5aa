"""DiT and MDTv2 against numbers computed with their authors' code (see tests/golden), and what all models share."""

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edt_core.config import TrainConfig
from edt_core.diffusion import guided
from edt_core.errors import UserError
from edt_core.models import (
    DIFFUSION_NAMES,
    MODEL_NAMES,
    DiffusionTransformer,
    DiTConfig,
    MDTv2,
    MDTv2Config,
    ModelConfig,
    check_masked_loss,
    count_parameters,
    create_model,
    draw_masks,
    mask_sites,
    model_config,
    models_for,
    shadow,
)
from edt_core.training.state import initial_state
from tests.support.cases import suite_of
from tests.support.golden import formula_weight, relative_error
from tests.support.models import BESIDE_EDT, TINY

GOLDEN = Path(__file__).parents[1] / "golden"
MANIFEST: dict[str, Any] = json.loads((GOLDEN / "zoo_manifest.json").read_text())
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def forward() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "zoo_forward.npz") as file:
        return dict(file)


def reference_model(name: str) -> DiffusionTransformer:
    """The weights of the reference: DiT's position embedding is fixed, MDTv2's is trained."""
    model = create_model(name)
    fixed = "relative_position_index" if isinstance(model, MDTv2) else "pos_embed"
    state = model.state_dict()
    model.load_state_dict({k: v if k.endswith(fixed) else formula_weight(k, v.shape) for k, v in state.items()})
    return model.eval()


def inputs(config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    side = config.latent_size
    x = np.random.RandomState(0).randn(2, config.in_channels, side, side).astype(np.float32)
    return torch.from_numpy(x), torch.tensor([17, 903]), torch.tensor([207, 1000]).clamp(max=config.num_classes)


def tiny(name: str) -> DiffusionTransformer:
    """A small model whose output is not zero."""
    torch.manual_seed(0)
    model = create_model(name, 32, 10)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize("name", MANIFEST)
def test_keys_and_shapes_are_the_published_ones(name: str) -> None:
    model = shadow(model_config(name))
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert len(shapes) == MANIFEST[name]["tensors"]
    assert hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest() == MANIFEST[name]["sha256"]
    assert count_parameters(model) == MANIFEST[name]["parameters"]


@pytest.mark.parametrize("name", suite_of(["DiT-S/2", "MDTv2-S/2"], ["DiT-S/2", "DiT-S/4", "DiT-S/8", "MDTv2-S/2"]))
@torch.no_grad()
def test_output(name: str, forward: dict[str, np.ndarray]) -> None:
    model = reference_model(name)
    expected = forward[f"{name.replace('/', '-')}@256.plain"]
    assert relative_error(model(*inputs(model.config)), expected) < TOLERANCE


@torch.no_grad()
def test_masked_output(forward: dict[str, np.ndarray]) -> None:
    """The reference keeps, of 256 tokens, the 148 with the least of these numbers: a mask ratio of 0.42."""
    model = reference_model("MDTv2-S/2")
    uniform = torch.from_numpy(np.random.RandomState(1).rand(2, 256).astype(np.float32))
    kept = uniform.argsort(dim=1)[:, :148].sort(dim=1).values
    output = model(*inputs(model.config), masks=[kept])
    assert relative_error(output, forward["MDTv2-S-2@256.masked"]) < TOLERANCE


@torch.no_grad()
def test_guided_output_with_growing_scale(forward: dict[str, np.ndarray]) -> None:
    """The reference's guidance of 4 in its first three channels, which grows by a cosine of the 4th power."""
    model = reference_model("MDTv2-S/2")
    x, t, _ = inputs(model.config)
    output = guided(model, torch.tensor([207, 88]), 1000, 4.0, growth=(4.0, lambda t: 1 - t / 1000))(x, t)
    assert relative_error(output, forward["MDTv2-S-2@256.cfg4_power_cosine"]) < TOLERANCE


@torch.no_grad()
def test_rows_before_the_masked_ones_are_whole() -> None:
    """The two passes of a training step in one call are those of two calls."""
    for name in TINY:
        model = tiny(name)
        x, t, y = inputs(model.config)
        masks = draw_masks(model.config, 2, torch.Generator().manual_seed(1))
        both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, y]), masks)
        apart = torch.cat([model(x, t, y), model(x, t, y, masks)])
        torch.testing.assert_close(both, apart, rtol=1e-5, atol=1e-5)
        assert torch.allclose(both[:2], both[2:], atol=1e-5) == (not model.config.is_masked)


@torch.no_grad()
def test_a_masked_pass_is_not_modulated() -> None:
    """AMM belongs to sampling; a modulation matrix of all tokens does not fit those that are kept."""
    model = tiny("MDTv2-Tiny/2")
    masks = draw_masks(model.config, 2, torch.Generator().manual_seed(1))
    plain = model(*inputs(model.config), masks)
    model.set_amm((0, 1))  # of the encoder
    assert torch.equal(model(*inputs(model.config), masks), plain)


def test_decoder_depths_are_those_of_the_authors_training_commands() -> None:
    depths = {
        name: config.decode_depth for name in MODEL_NAMES if isinstance(config := model_config(name), MDTv2Config)
    }
    assert (depths["MDTv2-S/2"], depths["MDTv2-XL/2"]) == (6, 4)
    # Not published: the default of the authors' option, which is also the default here.
    default = {field.name: field.default for field in fields(MDTv2Config)}["decode_depth"]
    assert (depths["MDTv2-B/2"], depths["MDTv2-L/2"], default) == (4, 4, 4)


@torch.no_grad()
def test_order_of_kept_tokens_does_not_matter() -> None:
    model = tiny("MDTv2-Tiny/2")
    (kept,) = draw_masks(model.config, 2, torch.Generator().manual_seed(1))
    turned = kept.flip(1)
    torch.testing.assert_close(model(*inputs(model.config), [kept]), model(*inputs(model.config), [turned]))


def test_masks_of_mdt_take_away_as_many_tokens_in_every_row() -> None:
    config = model_config("MDTv2-S/2")
    assert [(site.module, site.tokens) for site in mask_sites(config)] == [("en_inblocks.0", 256)]
    for seed in range(20):
        (kept,) = draw_masks(config, 3, torch.Generator().manual_seed(seed))
        assert 128 <= kept.shape[1] <= 179  # ratios 0.5 to 0.3
        assert all(len(set(row.tolist())) == kept.shape[1] for row in kept)


@pytest.mark.parametrize("name", BESIDE_EDT)
def test_masks_of_another_model_are_refused(name: str) -> None:
    model = tiny(name)
    other = draw_masks(model_config("EDT-Tiny/2", 32), 2, torch.Generator())
    with pytest.raises(ValueError, match=r"Draw (them|masks) with draw_masks"):
        model(*inputs(model.config), masks=other)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_amm_acts_in_each_block_that_is_named_and_in_no_other(name: str) -> None:
    model = tiny(name)
    plain = model(*inputs(model.config))
    for block in range(model.config.num_blocks):
        model.set_amm((block,), radius=1.0)
        assert not torch.allclose(model(*inputs(model.config)), plain), block
    model.set_amm(())
    assert torch.equal(model(*inputs(model.config)), plain)
    with pytest.raises(UserError, match="do not exist"):
        model.set_amm((model.config.num_blocks,))


@pytest.mark.parametrize("name", TINY)
def test_training_without_a_masked_pass_reaches_every_parameter_that_wants_a_gradient(name: str) -> None:
    """Distributed training waits for each of them."""
    state = initial_state(TrainConfig(model=name, masked_loss=False), model_config(name, 32, 10))
    state.model(*inputs(state.model.config)).square().mean().backward()
    assert all(p.grad is not None for p in state.model.parameters() if p.requires_grad)


def test_a_masked_pass_reaches_every_parameter() -> None:
    state = initial_state(TrainConfig(model="MDTv2-Tiny/2"), model_config("MDTv2-Tiny/2", 32, 10))
    masks = draw_masks(state.model.config, 2, torch.Generator())
    state.model(*inputs(state.model.config), masks).square().mean().backward()
    assert all(p.grad is not None for p in state.model.parameters())


@pytest.mark.parametrize(("name", "masked"), [*((name, False) for name in BESIDE_EDT), ("MDTv2-Tiny/2", True)])
def test_activation_checkpointing_changes_no_gradient(name: str, masked: bool) -> None:
    model = tiny(name).train()
    masks = draw_masks(model.config, 2, torch.Generator().manual_seed(0)) if masked else None
    gradients = []
    for again in (False, True):
        model.zero_grad()
        model.activation_checkpointing = again
        model(*inputs(model.config), masks).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", TINY)
def test_weights_that_require_gradients_compute_the_same_bits(name: str) -> None:
    """A model in training, as previews and validation take it, and one that was loaded."""
    model = tiny(name)
    with torch.inference_mode():
        values = inputs(model.config)
        before = model.requires_grad_(True)(*values)
        assert torch.equal(model.requires_grad_(False)(*values), before)


def test_a_model_without_masks_refuses_a_masked_loss() -> None:
    with pytest.raises(UserError, match=r"DiT-S/2 has no masked pass.*false"):
        check_masked_loss(model_config("DiT-S/2"), True)
    check_masked_loss(model_config("DiT-S/2"), False)
    check_masked_loss(model_config("MDTv2-S/2"), True)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_the_architecture_is_told_by_the_configuration(name: str) -> None:
    config = model_config(name)
    assert config.to_dict()["architecture"] == name.split("-")[0].lower()


def test_numbers_that_make_no_model() -> None:
    with pytest.raises(ValueError, match="width 62 with 4 heads"):
        DiTConfig(name="x", latent_size=8, depth=2, dim=62, num_heads=4)
    with pytest.raises(ValueError, match="leave 3 for the encoder"):
        MDTv2Config(name="x", latent_size=8, depth=5, dim=64, num_heads=4, decode_depth=2)
    with pytest.raises(ValueError, match="multiple of 64"):
        model_config("DiT-S/8", 272)
    with pytest.raises(ValueError, match=r"unknown architecture 'unet'; known: .*dit, edt, maskgit, mdtv2"):
        ModelConfig.from_dict({"architecture": "unet"})


def test_a_size_that_does_not_fit_is_answered_with_the_models_that_do() -> None:
    """256 px and factor 32 give 8 x 8 latents: patches of 2 halved twice leave one token, patches of 8 are one."""
    assert set(models_for(8)) == set(DIFFUSION_NAMES)
    assert models_for(1) == ()
    with pytest.raises(ValueError, match=r"latents of 4x4 cannot be cut.* multiple of 256. Models for 4x4: ") as raised:
        model_config("EDT-S/2", 128, autoencoder_factor=32, latent_channels=32)
    named = str(raised.value).rpartition(": ")[2].removesuffix(".").split(", ")
    assert {"DiT-S/2", "DiT-S/4", "MDTv2-S/2"} <= set(named)
    assert not [name for name in named if name.startswith("EDT") or name.endswith("/8")]
    for name in named:
        assert model_config(name, 128, autoencoder_factor=32, latent_channels=32).grid >= 1


@pytest.mark.parametrize("name", ["EDT-Tiny/2", "DiT-S/8", "MDTv2-Tiny/2"])
def test_latents_of_factor_32_go_through_both_passes(name: str) -> None:
    model = create_model(name, 256, 4, autoencoder_factor=32, latent_channels=32)
    rng = torch.Generator().manual_seed(0)
    masks = draw_masks(model.config, 2, rng) if model.config.is_masked else None
    x, t, y = torch.randn(2, 32, 8, 8, generator=rng), torch.tensor([3, 900]), torch.tensor([0, 4])
    assert model.train()(x, t, y, masks).shape == (2, 64, 8, 8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05, generator=rng)
    for blocks in ((), range(model.config.num_blocks)):  # modulation in stages of one token, too
        model.eval().set_amm(blocks)
        output = model(x, t, y)
        assert torch.isfinite(output).all()
        assert output.std() > 0
