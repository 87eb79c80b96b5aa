"""Codes, masked tokens and their sampler: against numbers of valeoai/Halton-MaskGIT (`made` in maskgit_manifest.json
says how), and what is known."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from edt_core.config import ChainConfig, TrainConfig, result_fields
from edt_core.data.latents import LatentDataset, LatentInfo, LatentShardWriter
from edt_core.data.scale import LatentScale
from edt_core.diffusion import SamplerChoice, check_training, guided, objective_of, objective_of_model, with_objective
from edt_core.diffusion.tokens.halton import drawn, halton_order, unmasked_after
from edt_core.errors import UserError
from edt_core.models import ModelConfig, build_model, count_macs, model_config, training_flops
from edt_core.models.families.codes import LEVELS, MASKED, NUM_CODES, codes_of, is_masked, quantized, values_of
from edt_core.sampling.sampler import LatentSampler
from edt_core.sampling.torch_export import save_program
from edt_core.training.checkpoint import ema_model
from edt_core.training.context import LocalContext
from edt_core.training.loop import train
from tests.support.golden import GOLDEN
from tests.support.trainings import cut_back, place, same

TOKENS = objective_of("masked_tokens")
CODES = torch.arange(NUM_CODES)


def small(**fields: Any) -> ModelConfig:
    """All that a MaskGIT has, as small as can be."""
    return replace(model_config("MaskGIT-Tiny", 32, 4), **{"depth": 2, "dim": 16, "num_heads": 2, **fields})


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape).astype(np.float32))


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "maskgit.npz") as file:
        return dict(file)


# --- codes


def test_codes_are_the_integers_with_the_digits_of_the_levels() -> None:
    values = values_of(CODES.view(1, 40, 25))
    assert torch.equal(codes_of(values), CODES.view(1, 40, 25))
    for channel, levels in zip(values.unbind(1), LEVELS, strict=True):
        half = levels // 2
        assert channel.unique().tolist() == [digit / half for digit in range(-half, levels - half)]
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(values.to(dtype).float(), values)
    assert not is_masked(values).any()
    assert is_masked(torch.full((1, 4, 2, 2), MASKED)).all()
    assert values_of(torch.tensor([1])).flatten().tolist() == [-0.75, -1, -1, -1]  # the first digit is the least


def test_quantization_reaches_every_level_keeps_zero_and_passes_gradients() -> None:
    grid = torch.linspace(-4, 4, 2001).view(1, 1, -1, 1).expand(1, 4, -1, 1).clone().requires_grad_()
    values = quantized(grid)
    for channel, levels in zip(values[0], LEVELS, strict=True):
        assert len(channel.unique()) == levels
        assert (channel.diff(dim=0) >= 0).all()
    assert not quantized(torch.zeros(1, 4, 1, 1)).any()
    values.sum().backward()
    half, offset = 3.5 * (1 - 1e-3), 0.5  # of 8 levels: tanh(z + artanh(offset / half)) half - offset, over 4
    slope = (1 - torch.tanh(grid[0, 0] + math.atanh(offset / half)) ** 2) * half / 4
    torch.testing.assert_close(grid.grad[0, 0], slope.detach())  # type: ignore[index]


# --- the sampler


@pytest.mark.parametrize("side", [8, 12, 16, 24, 32])
def test_the_order_is_that_of_the_reference(side: int, golden: dict[str, np.ndarray]) -> None:
    assert np.array_equal(halton_order(side), golden[f"order_{side}"])
    assert np.array_equal(np.sort(halton_order(side)), np.arange(side * side))


@pytest.mark.parametrize(("side", "steps"), [(8, 8), (8, 12), (16, 32), (32, 64)])
def test_the_schedule_is_that_of_the_reference(side: int, steps: int, golden: dict[str, np.ndarray]) -> None:
    assert unmasked_after(side * side, steps) == golden[f"counts_{side}_{steps}"].tolist()


def test_a_third_of_the_positions_is_not_one_too_few_by_rounding(golden: dict[str, np.ndarray]) -> None:
    """1 - 2 / π arccos(1 / 2) is a third: 192 of 576, and 191 in the reference's float32."""
    differing = np.array(unmasked_after(576, 32)) - golden["counts_24_32"]
    assert np.flatnonzero(differing).tolist() == [15]
    assert (unmasked_after(576, 32)[15], differing[15]) == (192, 1)


def test_each_step_unmasks_a_position_and_the_last_one_all() -> None:
    for positions in (4, 9, 64):
        for steps in range(1, positions + 1):
            counts = unmasked_after(positions, steps)
            assert counts[-1] == positions
            assert min(np.diff([0, *counts])) >= 1


@pytest.mark.parametrize(
    ("name", "steps", "cfg_scale", "temperature"),
    [("plain", 8, 1.0, 1.0), ("guided", 12, 2.5, 1.0), ("cool", 16, 1.75, 0.8)],
)
def test_chains_are_those_of_the_reference(
    name: str, steps: int, cfg_scale: float, temperature: float, golden: dict[str, np.ndarray]
) -> None:
    of_token, of_label, of_place = normal(10, NUM_CODES + 1, 16), normal(11, 11, 16), normal(12, 64, 16)
    out = 0.3 * normal(13, 16, NUM_CODES)

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens = torch.where(is_masked(x), NUM_CODES, codes_of(x)).flatten(1)
        hidden = 4 * of_token[tokens].mean(1)[:, None] + of_label[y][:, None] + of_place
        return (hidden @ out).mT.unflatten(2, (8, 8))

    model = guided(network, torch.tensor([0, 3, 7, 9]), 10, cfg_scale, None, whole_output=True)
    chain = TOKENS.chain(1000, SamplerChoice("halton", temperature=temperature), steps)
    made = chain.run(model, normal(1, 4, 4, 8, 8), None, None)
    assert np.array_equal(codes_of(made).numpy(), golden[name])


def test_codes_are_drawn_by_their_probabilities() -> None:
    logits, count = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0]), 20_000
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    codes = drawn(logits.expand(count, 1, 5), uniforms.unsqueeze(1), 2.0).flatten()
    expected = count * torch.softmax(logits.double() / 2, 0)
    assert chisquare(codes.bincount(minlength=5), expected).statistic < 0.01  # of a grid, not of draws: nearly exact
    assert drawn(logits.expand(1, 1, 5), torch.ones(1, 1, dtype=torch.float64), 1.0).item() == 4
    assert drawn(logits.expand(1, 1, 5), torch.zeros(1, 1, dtype=torch.float64), 1.0).item() == 0


def test_a_chain_over_the_exact_conditionals_draws_from_the_distribution() -> None:
    """Of two positions with equal codes, 0 with probability 0.8 and 7 otherwise: the second follows the first."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        codes, known = codes_of(x), ~is_masked(x)
        logits = torch.full((len(x), NUM_CODES, 2, 2), -torch.inf)
        logits[:, 0], logits[:, 7] = math.log(0.8), math.log(0.2)
        for row in range(len(x)):
            if known[row].any():
                logits[row] = -torch.inf
                logits[row, codes[row][known[row]][0]] = 0.0
        return logits

    start = torch.randn(600, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    codes = codes_of(TOKENS.chain(1000, SamplerChoice("halton"), 4).run(network, start, None, None)).flatten(1)
    assert (codes == codes[:, :1]).all()
    assert abs((codes[:, 0] == 0).float().mean() - 0.8) < 3 * math.sqrt(0.8 * 0.2 / 600)


def test_a_sample_depends_on_its_seed_and_index_alone() -> None:
    torch.manual_seed(0)
    model = build_model(small())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    chain = ChainConfig(sampler="halton", num_sampling_steps=8, cfg_scale=2.0, guidance_channels=None)
    sampler = LatentSampler(model, chain, 1000)
    both, alone = sampler([1, 3, 0], 5, [0, 7, 9]), sampler([3], 5, [7])
    assert torch.equal(both[1:2], alone)
    assert not torch.equal(sampler([3], 5, [8]), alone)
    assert not torch.equal(sampler([2], 5, [7]), alone)
    assert not is_masked(both).any()
    cold = LatentSampler(model, chain.model_copy(update={"temperature": 1e-300}), 1000)
    assert torch.equal(cold([3], 5, [7]), cold([3], 5, [8]))


# --- the objective


def test_the_masked_share_is_the_arccos_schedule() -> None:
    x, noise = values_of(torch.randint(NUM_CODES, (5, 8, 8))), torch.randn(5, 4, 8, 8)
    t = torch.tensor([0.0, 0.25, 0.5, 0.99, 1.0])
    masked = is_masked(TOKENS.noised(None, x, t, noise))
    expected = [max(1, math.ceil(64 * 2 / math.pi * math.acos(time) - 1e-4)) for time in t.tolist()]
    assert masked.sum((1, 2)).tolist() == expected
    kept = TOKENS.noised(None, x, t, noise).movedim(1, -1)[~masked]
    assert torch.equal(kept, x.movedim(1, -1)[~masked])
    later = is_masked(TOKENS.noised(None, x, TOKENS.cleaner(t, torch.full((5,), 0.2), 1000), noise))
    assert not (later & ~masked).any()


def test_the_loss_is_the_cross_entropy_of_masked_positions() -> None:
    x, noise, t = values_of(torch.randint(NUM_CODES, (3, 8, 8))), torch.randn(3, 4, 8, 8), torch.tensor([0, 0.5, 0.9])
    x_t, logits = TOKENS.noised(None, x, t, noise), torch.randn(3, NUM_CODES, 8, 8)
    losses = TOKENS.losses(None, logits, x, x_t, noise, t, min_snr_gamma=None)
    for row in range(3):
        masked, codes = is_masked(x_t)[row], codes_of(x)[row]
        chosen = logits[row].log_softmax(0).gather(0, codes[None])[0]
        torch.testing.assert_close(losses["cross_entropy"][row], -chosen[masked].sum() / 64 * math.pi / 2)
    unmasked = logits.clone()
    unmasked.movedim(1, -1)[~is_masked(x_t)] = 0.0
    same_loss = TOKENS.losses(None, unmasked, x, x_t, noise, t, min_snr_gamma=None)
    assert torch.equal(same_loss.loss, losses.loss)
    with pytest.raises(ValueError, match="there are 1000 codes, each with a logit"):
        TOKENS.split(logits[:, :4], 4)


# --- what is refused

RECIPE = {"model": "MaskGIT-Tiny", "objective": "masked_tokens", **TOKENS.train_defaults}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_snr_gamma": 5.0}, "no signal-to-noise ratio; set min_snr_gamma to null"),
        ({"timestep_sampler": "logit-normal"}, "set timestep_sampler to uniform"),
        ({"time_shift": 2.0}, "'masked_tokens' has the arccos schedule, whose times are not shifted"),
        ({"align": "self"}, "set align to null"),
        ({"latent_norm": True}, "set latent_norm to false"),
    ],
)
def test_recipes_without_a_meaning_are_refused(fields: dict[str, Any], message: str) -> None:
    check_training(TrainConfig(**RECIPE))
    with pytest.raises(UserError, match=message):
        check_training(TrainConfig(**{**RECIPE, **fields}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sampler": "ddim"}, "'masked_tokens' is sampled by one of halton; set sampler"),
        ({"num_sampling_steps": 65}, r"num_sampling_steps is 65, but .* there are 8 x 8; use at most 64"),
        ({"cfg_scale": 2.0, "guidance_channels": 3}, "set guidance_channels to null"),
        ({"time_shift": 2.0}, "set time_shift to 1"),
        ({"sde_diffusion": "sbdm"}, "only the sampler sde of flow matching"),
        ({"amm_blocks": (1,)}, r"AMM\) was made and measured for diffusion"),
        ({"amm_radius": 2.0}, "set both to null"),
        ({"cache": {"kind": "taylor"}}, "set cache to null"),
        ({"cfg_scale": 2.0, "guidance_channels": None, "guidance_interval": (0.2, 500)}, "ends above 1"),
    ],
)
def test_chains_without_a_meaning_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LatentSampler(build_model(small()), ChainConfig(**{"sampler": "halton", "num_sampling_steps": 8, **fields}), 9)


def test_a_temperature_is_of_masked_tokens_alone() -> None:
    for name in ("epsilon", "flow"):
        model = with_objective(model_config("DiT-Tiny/2", 32, 4), name)
        choice = SamplerChoice(objective_of(name).samplers[0], temperature=0.5)
        with pytest.raises(UserError, match=r"temperature is 0.5, but only masked tokens .* set temperature to 1"):
            objective_of_model(model).check_sampler(choice)
    assert "temperature" not in result_fields(ChainConfig())


def test_models_and_objectives_that_do_not_fit() -> None:
    with pytest.raises(UserError, match=r"its objective is masked_tokens, not flow; set train.objective=masked_tokens"):
        with_objective(small(), "flow")
    with pytest.raises(UserError, match=r"DiT-Tiny/2 predicts numbers and not codes; use one of MaskGIT-S, "):
        with_objective(model_config("DiT-Tiny/2", 32, 4), "masked_tokens")
    with pytest.raises(ValueError, match="latents of 16 channels in patches of 1; its tokens are codes of 4 channels"):
        model_config("MaskGIT-Tiny", 32, 4, latent_channels=16)
    with pytest.raises(UserError, match="must not be normalised"):
        small(latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
    with pytest.raises(UserError, match=r"autoencoder.kind=fsq"):
        small().check_latents({"latent_shape": [4, 8, 8]})
    small().check_latents({"levels": list(LEVELS)})
    assert ModelConfig.from_dict(small().to_dict()) == small()


# --- the model


def test_the_cost_counts_the_products_of_blocks_and_logits() -> None:
    config = model_config("MaskGIT-Tiny", 32, 10)
    tokens, dim, depth = 64, 60, 6
    block = 12 * dim * dim * tokens + 2 * tokens * tokens * dim + 6 * dim * dim
    final = 2 * dim * dim + tokens * dim * NUM_CODES
    assert count_macs(build_model(config)) == depth * block + final
    assert training_flops(config, masked=False) > 5 * count_macs(build_model(config))


def test_the_denoiser_is_exported(tmp_path: Path) -> None:
    chain = ChainConfig(sampler="halton", num_sampling_steps=8, guidance_channels=None)
    save_program(tmp_path / "denoiser.pt2", build_model(small()), chain, 1000)


CONFIG = TrainConfig(
    **RECIPE,
    global_batch_size=16,
    max_steps=60,
    lr=1e-2,
    optimizer="adamw",
    ema_decay=0.9,
    mirror_prob=0.0,
    log_every=30,
    checkpoint_every=30,
    num_to_keep=4,
    holdout=0.0,
)


PLANTED = 100 + 111 * torch.arange(4).view(4, 1, 1)  # the code of each class


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    """Images whose codes are those of their class, stored in half precision."""
    path, labels = tmp_path_factory.mktemp("tokens") / "latents-00000.arrow", np.arange(64) % 4
    values = values_of(PLANTED[labels].expand(-1, 8, 8))
    posterior = torch.stack([values, torch.zeros_like(values)], 1).unsqueeze(1).expand(-1, 2, -1, -1, -1, -1)
    info = LatentInfo("planted", LatentScale(1.0), 32, (4, 8, 8), store="bf16")
    with LatentShardWriter(path, info) as writer:
        writer.write([f"{row:02d}" for row in range(64)], labels, posterior.numpy())
    return LatentDataset([path])


@pytest.fixture(scope="module")
def trained(latents: LatentDataset, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edt_core.training.loop.matmul_rate", lambda *_: 1e9)
        train(CONFIG, small(), latents, LocalContext(folder, num_to_keep=9))
    return folder


def test_a_training_learns_which_codes_there_are_and_draws_them(trained: Path) -> None:
    chain = ChainConfig(sampler="halton", num_sampling_steps=8, guidance_channels=None, temperature=0.5)
    made = codes_of(LatentSampler(ema_model(place(trained, 60)), chain, 1000)([0, 1, 2, 3], 0, range(4)))
    assert torch.isin(made, PLANTED).all()  # four of 1,000


def test_a_resumed_training_equals_the_uninterrupted_one(trained: Path, latents: LatentDataset, tmp_path: Path) -> None:
    resumed = train(CONFIG, small(), latents, cut_back(trained, tmp_path / "copy", 30))
    averages = (ema_model(place(folder, 60)).state_dict() for folder in (tmp_path / "copy", trained))
    assert same(*averages)
    assert resumed.history.rows[-1].keys() >= {"cross_entropy", "loss", "loss_t0", "loss_t3"}
    assert resumed.history.rows[-1]["loss"] < 0.9 * resumed.history.rows[0]["loss"]
