"""Alignment of hidden states: what is aligned with what, in every family, and the numbers of the authors' code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from edt_core.config import TrainConfig, result_fields
from edt_core.diffusion import OBJECTIVES, linear_schedule, with_objective
from edt_core.errors import UserError
from edt_core.models import (
    DiffusionTransformer,
    ModelConfig,
    build_model,
    count_macs,
    draw_masks,
    macs_by_part,
    model_config,
    shadow,
)
from edt_core.models.layers import image_to_patches, patches_to_image
from edt_core.training.align.alignment import (
    AlignedSamples,
    Alignment,
    SelfTarget,
    alignment_of,
    loss_terms,
    with_align,
)
from edt_core.training.align.cost import align_flops
from edt_core.training.align.distances import DISTANCES
from edt_core.training.align.head import AlignedModel, BlockOutput, averaged, projection_head
from edt_core.training.align.settings import AlignSettings, align_settings
from edt_core.training.draws import MOST_SHIFT, draw_step
from edt_core.training.estimate import estimate
from edt_core.training.start.trainable import step_flops
from edt_core.training.state import TrainState, initial_state
from pipelines.config.schema import load_config
from tests.support.golden import GOLDEN, formula_weight
from tests.support.models import TINY, shallow_config

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SCHEDULE = linear_schedule()
EXPECTED = json.loads((GOLDEN / "align.json").read_text())
EXACT = 1e-6  # relative, of one float32 number


def of_formula(module: nn.Module, prefix: str = "") -> None:
    """Weights as those of the authors' modules when the numbers were made."""
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(formula_weight(f"{prefix}{name}", value.shape))


def normal(rng: np.random.RandomState, *shape: int) -> Tensor:
    return torch.from_numpy(rng.randn(*shape).astype(np.float32))


def lively(model: DiffusionTransformer) -> DiffusionTransformer:
    """None of its weights is zero: every block changes its tokens."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=rng))
    return model


def state_of(name: str, **fields: Any) -> tuple[TrainConfig, TrainState, AlignSettings]:
    """The state of a training of a tiny model, whose averages are its weights."""
    shape = shallow_config(name)
    config = TrainConfig(model=name, global_batch_size=4, masked_loss=shape.is_masked, **fields)
    state = initial_state(config, shape)
    lively(state.model)
    state.ema.load([state.model.state_dict()])
    settings = align_settings(config, shape)
    assert settings is not None
    return config, state, settings


def samples_of(count: int = 3, shift: float | None = 0.1) -> AlignedSamples:
    rng = np.random.RandomState(0)
    t, y = torch.tensor([960, 517, 203])[:count], torch.tensor([0, 3, 4])[:count]
    shifts = None if shift is None else torch.full((count,), shift)
    return AlignedSamples(normal(rng, count, 4, 8, 8), t, normal(rng, count, 4, 8, 8), y, shifts)


def hidden_of(model: DiffusionTransformer, block: int, samples: AlignedSamples) -> Tensor:
    output = BlockOutput(model, block)
    x_t = OBJECTIVES["epsilon"].noised(SCHEDULE, samples.latents, samples.timesteps, samples.noise)
    model(x_t, samples.timesteps, samples.labels)
    return output.take()


# --- numbers of the authors' code


def test_the_term_is_that_of_sra() -> None:
    """Hidden states of DiT through SRA's head, and those of another DiT as its EMA model, at less noise."""
    dit = replace(model_config("DiT-Tiny/2", 32, 4), name="DiT")
    config = TrainConfig(model="DiT-Tiny/2", masked_loss=False, align="self", align_block=2, align_target_block=4)
    state = initial_state(config, dit)
    of_formula(state.model)
    teacher = build_model(dit)
    of_formula(teacher, "ema.")
    state.ema.load([teacher.state_dict()])
    assert state.aligned is not None
    names = {"0": "ap_head.linear1", "2": "ap_head.linear2"}
    with torch.no_grad():
        for name, value in state.aligned.head.named_parameters():
            layer, kind = name.split(".")
            value.copy_(formula_weight(f"{names[layer]}.{kind}", value.shape))
    samples = replace(samples_of(), shift=(torch.tensor([0, 57, 199]) + 0.5) / 1000)
    settings = align_settings(replace_fields(config, align_weight=1.0), dit)
    alignment = alignment_of(config, settings, state, CPU)
    assert alignment is not None
    x_t = OBJECTIVES["epsilon"].noised(SCHEDULE, samples.latents, samples.timesteps, samples.noise)
    with torch.no_grad():
        _, projected = state.aligned(x_t, samples.timesteps, samples.labels, None, 3)
    target = alignment.target.tokens(SCHEDULE, samples)
    found = {
        "smooth_l1": alignment.term(SCHEDULE, projected, samples),
        "cos": replace(alignment, settings=replace(alignment.settings, distance="channel_cosine")).term(
            SCHEDULE, projected, samples
        ),
        "projected_rms": projected.double().square().mean().sqrt(),
        "target_rms": target.double().square().mean().sqrt(),
    }
    for name, value in found.items():
        assert value.mean().item() == pytest.approx(EXPECTED["sra"][name], rel=EXACT), name


def test_head_and_distance_are_those_of_repa() -> None:
    """Three layers around SiLU, and the cosine of each token, whose sign their code turns round."""
    head = projection_head((60, 128, 128, 24), 0)
    of_formula(head)
    rng = np.random.RandomState(1)
    hidden, target = normal(rng, 3, 16, 60), normal(rng, 3, 16, 24)
    with torch.no_grad():
        projected = head(hidden)
    rms = projected.double().square().mean().sqrt().item()
    assert rms == pytest.approx(EXPECTED["repa"]["projected_rms"], rel=EXACT)
    distance = DISTANCES["cosine"](projected, target).mean().item()
    assert distance - 1.0 == pytest.approx(EXPECTED["repa"]["proj_loss"], abs=EXACT)


# --- distances


@pytest.mark.parametrize("name", DISTANCES)
def test_a_distance_is_of_each_sample_and_zero_for_equal_tokens(name: str) -> None:
    a, b = torch.randn(2, 5, 16, 6, generator=torch.Generator().manual_seed(0)).double()
    both = DISTANCES[name](a, b)
    assert both.shape == (5,)
    assert float(both.min()) > 0.1
    assert torch.allclose(DISTANCES[name](a, a), torch.zeros(5).double(), atol=1e-12)
    alone = torch.cat([DISTANCES[name](a[i : i + 1], b[i : i + 1]) for i in range(5)])
    assert torch.allclose(both, alone, rtol=1e-12)


def test_the_cosines_are_over_features_and_over_tokens() -> None:
    a = torch.randn(2, 16, 6, generator=torch.Generator().manual_seed(0)).double()
    of_tokens, of_features = 1 + torch.arange(16.0)[:, None], 1 + torch.arange(6.0)
    assert torch.allclose(DISTANCES["cosine"](a, a * of_tokens), torch.zeros(2).double(), atol=1e-12)
    assert torch.allclose(DISTANCES["channel_cosine"](a, a * of_features), torch.zeros(2).double(), atol=1e-12)
    assert float(DISTANCES["cosine"](a, a * of_features).min()) > 0.01
    assert float(DISTANCES["channel_cosine"](a, a * of_tokens).min()) > 0.01


# --- hidden states


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_hidden_states_are_a_blocks_output_and_change_nothing(name: str, checkpointing: bool) -> None:
    shape = shallow_config(name)
    model = lively(build_model(shape)).train()
    samples = samples_of()
    x, t, y = samples.noise, samples.timesteps, samples.labels
    plain = model(x, t, y)
    for block, (module, attention) in enumerate(zip(model.ordered_blocks(), model.attentions(), strict=True), start=1):
        assert attention in list(module.children())
        seen: list[Tensor] = []
        hook = module.register_forward_hook(lambda _module, _inputs, output, seen=seen: seen.append(output))
        model.activation_checkpointing = checkpointing
        output = BlockOutput(model, block)
        assert torch.equal(model(x, t, y), plain)
        hidden = output.take(2)
        hook.remove()
        assert hidden.shape[:2] == (2, attention.grid**2)
        assert torch.equal(hidden, seen[0][:2, -(attention.grid**2) :])  # U-ViT has two tokens before those of patches
        assert module not in [m for m in model.children() if not isinstance(m, nn.ModuleList)] or name.startswith(
            "UViT"
        )
    assert model.state_dict().keys() == build_model(shape).state_dict().keys()


@pytest.mark.parametrize("name", TINY)
def test_the_gradient_of_the_term_reaches_no_later_block(name: str) -> None:
    """And every block before it. Only rows of the full pass are aligned, also where a masked pass follows them."""
    config, state, settings = state_of(name, align="autoencoder", align_block=2)
    alignment = alignment_of(config, settings, state, CPU)
    assert state.aligned is not None
    assert alignment is not None
    samples, rows = samples_of(shift=None), 3
    masks = draw_masks(state.model.config, rows, torch.Generator().manual_seed(0)) if config.masked_loss else None
    x, t, y = (
        each.repeat(config.passes, *(1,) * (each.ndim - 1))
        for each in (samples.noise, samples.timesteps, samples.labels)
    )
    x = x.requires_grad_(True)
    _, projected = state.aligned(x, t, y, masks, rows)
    assert len(projected) == rows
    alignment.term(SCHEDULE, projected, samples).sum().backward()
    for index, block in enumerate(state.model.ordered_blocks()):
        reached = [p.grad is not None and bool(p.grad.any()) for p in block.parameters() if p.requires_grad]
        assert any(reached) == (index < 2), index
    assert all(p.grad is not None and bool(p.grad.any()) for p in state.aligned.head.parameters())
    assert x.grad is not None
    assert bool(x.grad[:rows].any())
    assert not bool(x.grad[rows:].any())


# --- grids and targets


def test_patches_are_the_tokens_that_an_image_is_made_of() -> None:
    image = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    patches = image_to_patches(image, 4, 3)
    assert patches.shape == (2, 16, 36)
    assert torch.equal(patches_to_image(patches, 4, 3), image)


def test_tokens_are_averaged_over_cells() -> None:
    tokens = torch.randn(2, 64, 5, generator=torch.Generator().manual_seed(0)).double()
    assert averaged(tokens, 8) is tokens
    image = tokens.transpose(1, 2).unflatten(2, (8, 8))
    for grid in (4, 2, 1):
        expected = F.adaptive_avg_pool2d(image, grid).flatten(2).transpose(1, 2)
        assert torch.allclose(averaged(tokens, grid), expected, rtol=1e-12)


@pytest.mark.parametrize("name", TINY)
def test_the_target_of_the_autoencoder_is_the_clean_latents(name: str) -> None:
    for block in range(1, shallow_config(name).num_blocks + 1):
        config, state, settings = state_of(name, align="autoencoder", align_block=block, align_weight=3.0)
        alignment = alignment_of(config, settings, state, CPU)
        assert alignment is not None
        assert alignment.networks == []
        samples = samples_of(shift=None)
        patches = averaged(image_to_patches(samples.latents, 4, 2), settings.hidden.grid)
        assert float(alignment.term(SCHEDULE, patches, samples).abs().max()) < 1e-6
        off = alignment.term(SCHEDULE, patches + 1.0, samples)
        assert off.tolist() == pytest.approx([3.0 * 0.975] * 3, rel=1e-5)  # |1| - beta / 2


@pytest.mark.parametrize("name", TINY)
def test_the_target_of_a_feature_network_is_its_tokens(name: str) -> None:
    """16 x 16 tokens of width 6, averaged to the grid of the hidden states."""
    config, state, settings = state_of(name, align="features", align_block=2, align_features=(16, 6))
    alignment = alignment_of(config, settings, state, CPU)
    assert alignment is not None
    assert settings.head_widths == (settings.hidden.width, 2048, 2048, 6)
    rng, grid = np.random.RandomState(0), settings.hidden.grid
    tokens, projected = normal(rng, 3, 256, 6).half(), normal(rng, 3, grid**2, 6)
    samples = replace(samples_of(shift=None), tokens=tokens)
    expected = 0.5 * DISTANCES["cosine"](projected, averaged(tokens.float(), grid))
    assert torch.equal(alignment.term(SCHEDULE, projected, samples), expected)
    assert alignment.networks == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", TINY)
def test_the_averaged_model_sees_the_same_samples_with_less_noise(name: str, precision: str) -> None:
    """Without a shift, and with averages equal to the weights, its hidden states are the model's own."""
    config, state, settings = state_of(name, align="self", align_block=2, align_target_block=3, precision=precision)
    target = SelfTarget(config, state, 3, CPU)
    assert not any(p.requires_grad for p in target.model.parameters())
    amp = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.no_grad(), amp:
        for shift, earlier in ((0.0, 0), (0.2, 200)):
            samples = samples_of(shift=shift)
            expected = hidden_of(state.model, 3, replace(samples, timesteps=samples.timesteps - earlier))
            assert torch.equal(target.tokens(SCHEDULE, samples), expected)
    assert target.tokens(SCHEDULE, samples_of()).requires_grad is False
    state.ema.averages[0][next(iter(dict(state.model.named_parameters())))].add_(1.0)
    with torch.no_grad(), amp:  # it shares the memory of the average
        assert not torch.equal(target.tokens(SCHEDULE, samples), expected)
    assert settings.target.grid == model_grid(state.model, 3)


def model_grid(model: DiffusionTransformer, block: int) -> int:
    return model.attentions()[block - 1].grid


@pytest.mark.parametrize("objective", [name for name, own in OBJECTIVES.items() if not own.of_tokens])
def test_a_cleaner_time_has_less_noise_and_stays_in_the_chain(objective: str) -> None:
    own, rng = OBJECTIVES[objective], np.random.RandomState(0)
    t = torch.from_numpy(own.times("uniform", 1000).draw(rng.rand(200)).timesteps)
    share = torch.from_numpy(MOST_SHIFT * rng.rand(200).astype(np.float32))
    cleaner = own.cleaner(t, share, 1000)
    assert cleaner.dtype == t.dtype
    assert torch.equal(own.cleaner(t, torch.zeros(200), 1000), t)
    before, after = own.progress(t, 1000), own.progress(cleaner, 1000)
    assert torch.allclose(after, (before + share).clamp(max=1.0), atol=1.01e-3)  # timesteps are whole numbers
    schedule, x, noise = own.schedule(1000), torch.zeros(200, 1, 1, 1), torch.ones(200, 1, 1, 1)
    before, after = (own.noised(schedule, x, at, noise).flatten() for at in (t, cleaner))
    assert bool((after <= before).all())
    assert float(before.mean() - after.mean()) > 0.05


# --- settings


def replace_fields(config: TrainConfig, **fields: Any) -> TrainConfig:
    return TrainConfig.model_validate({**config.model_dump(), **fields})


def settings_of(name: str, **fields: Any) -> AlignSettings:
    shape = model_config(name, 256)
    settings = align_settings(TrainConfig(model=name, masked_loss=shape.is_masked, **fields), shape)
    assert settings is not None
    return settings


@pytest.mark.parametrize(
    ("name", "block", "target"),
    [
        ("DiT-XL/2", 8, 16),
        ("DiT-B/2", 4, 8),
        ("DiT-L/2", 8, 16),
        ("EDT-S/2", 4, 8),
        ("EDT-XL/2", 8, 16),
        ("UViT-S/2", 4, 9),
    ],
)
def test_blocks_are_the_published_ones_or_at_the_same_depth(name: str, block: int, target: int) -> None:
    settings = settings_of(name, align="self")
    assert (settings.block, settings.target_block) == (block, target)
    assert settings_of(name, align="autoencoder").target_block is None
    assert settings.hidden.grid == settings.target.grid == (8 if name.startswith("EDT") else 16)


def test_with_flow_matching_the_largest_model_has_the_target_of_sit() -> None:
    config = TrainConfig(model="DiT-XL/2", masked_loss=False, align="self", objective="flow", min_snr_gamma=None)
    settings = align_settings(config, with_objective(model_config("DiT-XL/2", 256), "flow"))
    assert settings is not None
    assert (settings.block, settings.target_block) == (8, 20)


def test_weights_are_the_published_ones() -> None:
    assert settings_of("DiT-S/2", align="self").weight == 0.2
    assert settings_of("DiT-S/2", align="self", align_distance="channel_cosine").weight == 0.5
    assert settings_of("DiT-S/2", align="autoencoder").weight == 1.0
    assert settings_of("DiT-S/2", align="autoencoder", align_distance="cosine").weight == 0.5
    assert settings_of("DiT-S/2", align="self", align_weight=0.0).weight == 0.0
    repa = settings_of("DiT-XL/2", align="features")
    assert (repa.weight, repa.distance, repa.block, repa.head_widths) == (0.5, "cosine", 8, (1152, 2048, 2048, 768))


def test_an_hourglass_is_compared_on_the_coarser_grid() -> None:
    settings = settings_of("EDT-S/2", align="autoencoder", align_block=5)
    assert (settings.hidden.grid, settings.target.grid, settings.grid) == (4, 16, 4)
    settings = settings_of("EDT-S/2", align="self", align_block=1, align_target_block=6)
    assert (settings.hidden.grid, settings.target.grid, settings.grid) == (16, 4, 4)
    assert settings.head_widths == (312, 312 + 520, 520)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"align_block": 2}, "align_block is 2, but align is null"),
        ({"align_weight": 0.0}, "align_weight is 0.0, but align is null"),
        ({"align": "autoencoder", "align_target_block": 2}, "leave it out"),
        ({"align": "features", "align_target_block": 2}, "leave it out"),
        ({"align": "features", "reader": "webdataset", "holdout": 0.0}, "set reader=arrow"),
        ({"align": "features", "align_features": (0, 768)}, "at least 1"),
        ({"align": "self", "init_optimizer": "keep"}, "set init_optimizer=fresh"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields: Mapping[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainConfig(**fields)


def test_grids_that_do_not_divide_each_other_are_refused() -> None:
    config = TrainConfig(model="DiT-S/2", masked_loss=False, align="features", align_features=(15, 8))
    with pytest.raises(UserError, match="15 x 15 tokens and that block of DiT-S/2 has 16 x 16; one must divide"):
        align_settings(config, model_config("DiT-S/2", 256))


@pytest.mark.parametrize("field", ["align_block", "align_target_block"])
def test_a_block_that_does_not_exist_is_refused(field: str) -> None:
    config = TrainConfig(model="EDT-S/2", align="self", **{field: 13})
    with pytest.raises(UserError, match=f"train.{field} is 13, but EDT-S/2 has 12 blocks; use a number from 1 to 12"):
        align_settings(config, model_config("EDT-S/2", 256))


def test_a_pipeline_refuses_it_before_anything_runs() -> None:
    name, fields = "quickstart", ["train.align=self", "train.align_block=99"]
    with pytest.raises(UserError, match=r"train\.align_block is 99"):
        load_config(name, fields)
    config = load_config(name, fields[:1])
    assert [config.train_of(model).align for model in config.models] == ["self"]


def test_without_it_nothing_is_drawn_recorded_or_added() -> None:
    config, shape = TrainConfig(model="EDT-Tiny/2", global_batch_size=4), model_config("EDT-Tiny/2", 32, 4)
    assert not [name for name in result_fields(config) if name.startswith("align")]
    assert draw_step(config, 0, shape).shift is None
    assert loss_terms(config) == ("mse", "vb")
    assert align_settings(config, shape) is None
    state = initial_state(config, shape)
    assert state.network is state.model
    assert state.heads() == {}
    assert state.model.watched is None


def test_shifts_depend_on_step_and_place_alone() -> None:
    config = TrainConfig(model="EDT-Tiny/2", global_batch_size=40, align="self")
    shape = model_config("EDT-Tiny/2", 32, 4)
    whole = draw_step(config, 3, shape)
    assert whole.shift is not None
    part, pieces = draw_step(config, 3, shape, slice(17, 30)), whole.rows(slice(17, 30))
    assert part.shift is not None
    assert pieces.shift is not None
    assert torch.equal(part.shift, whole.shift[17:30])
    assert torch.equal(pieces.shift, part.shift)
    assert 0.0 <= float(whole.shift.min()) < 0.05 < 0.15 < float(whole.shift.max()) < MOST_SHIFT
    plain = draw_step(replace_fields(config, align=None), 3, shape)
    assert torch.equal(plain.noise, whole.noise)
    assert torch.equal(plain.drop_label, whole.drop_label)


def test_the_masked_pass_has_no_term() -> None:
    terms = with_align({"mse": torch.ones(6), "vb": torch.ones(6)}, torch.tensor([1.0, 2.0, 3.0]))
    assert list(terms) == ["mse", "vb", "align"]
    assert terms["align"].tolist() == [1.0, 2.0, 3.0, 0.0, 0.0, 0.0]
    alone = with_align({"mse": torch.ones(3)}, torch.tensor([1.0, 2.0, 3.0]))
    assert alone["align"].tolist() == [1.0, 2.0, 3.0]


def test_a_head_depends_on_its_seed_alone() -> None:
    torch.manual_seed(1)
    first = projection_head((8, 24, 16), 5).state_dict()
    torch.manual_seed(2)
    again, other = projection_head((8, 24, 16), 5).state_dict(), projection_head((8, 24, 16), 6).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])
    assert float(first["0.weight"].abs().max()) <= (6 / (8 + 24)) ** 0.5
    assert not first["2.bias"].any()


# --- cost


def head_macs(config: TrainConfig, shape: ModelConfig, target_block: int) -> int:
    settings = align_settings(replace_fields(config, align_target_block=target_block), shape)
    assert settings is not None
    first, between, last = settings.head_widths
    return settings.hidden.grid**2 * (first * between + between * last)


@pytest.mark.parametrize("align", ["autoencoder", "self"])
def test_head_and_averaged_model_are_counted(align: str) -> None:
    shape = model_config("EDT-Tiny/2", 32, 4)
    plain = TrainConfig(model="EDT-Tiny/2", global_batch_size=8)
    config = replace_fields(plain, align=align)
    settings = align_settings(config, shape)
    assert settings is not None
    head = projection_head(settings.head_widths, 0)
    tokens = torch.randn(1, settings.hidden.grid**2, settings.hidden.width, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        head(tokens).sum().backward()
    of_head = counter.get_total_flops()
    if align == "autoencoder":
        assert align_flops(config, shape) == of_head
    else:  # less than a whole forward pass, each block costs, and after the last one there is only the final layer
        upto = [align_flops(replace_fields(config, align_target_block=b), shape) for b in range(1, 8)]
        own = [upto[b - 1] - 6 * head_macs(config, shape, b) for b in range(1, 8)]
        assert own == sorted(set(own))
        final = sum(part.macs for part in macs_by_part(shape) if part.kind == "final")
        final += 64 * 2 * 64  # its adaptive norm
        assert own[-1] + 2 * final == 2 * count_macs(shadow(shape))
        assert settings.target_block is not None
        assert align_flops(config, shape) == own[settings.target_block - 1] + of_head
    assert step_flops(config, shape) == step_flops(plain, shape) + align_flops(config, shape)
    assert align_flops(plain, shape) == 0


@pytest.mark.parametrize("optimizer", ["adan", "adamw"])
def test_the_heads_tensors_are_in_the_estimate(optimizer: str) -> None:
    shape = model_config("EDT-Tiny/2", 32, 4)
    plain = TrainConfig(model="EDT-Tiny/2", global_batch_size=8, optimizer=optimizer, ema_decay=(0.9, 0.99))
    config = replace_fields(plain, align="self")
    state, before, needs = initial_state(config, shape), estimate(plain, shape, 100), estimate(config, shape, 100)
    assert state.aligned is not None
    head = sum(p.nbytes for p in state.aligned.head.parameters())
    assert needs.weights == before.weights + head
    assert needs.gradients == before.gradients + head
    assert needs.ema == before.ema
    assert needs.activations > before.activations
    for parameter in state.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    tensors = [v for s in state.optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.ndim]
    assert needs.optimizer == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("trainable", ["difffit", "bias", "all"])
def test_the_merged_weights_of_the_averaged_model_are_in_the_estimate(trainable: str) -> None:
    """Those of its tensors that it does not share: of DiffFit, the projections that take up a scale."""
    shape = model_config("DiT-Tiny/2", 32, 4)
    plain = TrainConfig(model="DiT-Tiny/2", masked_loss=False, global_batch_size=1, trainable=trainable)
    config = replace_fields(plain, align="self")
    state, before, needs = initial_state(config, shape), estimate(plain, shape, 100), estimate(config, shape, 100)
    target = SelfTarget(config, state, 2, CPU)
    shared = {v.data_ptr() for tensors in (state.model.state_dict(), *state.ema.averages) for v in tensors.values()}
    merged = sum(v.nbytes for v in target.model.state_dict().values() if v.data_ptr() not in shared)
    assert (merged > 0) == (trainable == "difffit")
    assert needs.weights == before.weights + sum(p.nbytes for p in state.heads().values()) + merged
    assert needs.temporary >= merged


def test_an_alignment_is_of_its_target() -> None:
    config, state, settings = state_of("DiT-Tiny/2", align="self")
    alignment = alignment_of(config, settings, state, CPU)
    assert isinstance(alignment, Alignment)
    assert alignment.networks == [alignment.target.model]
    assert alignment_of(config, None, state, CPU) is None
    assert isinstance(state.network, AlignedModel)
    assert set(state.heads()) == {"head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"}
