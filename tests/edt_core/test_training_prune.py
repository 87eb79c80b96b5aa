"""Depth pruning: the choices, the gates, the cut model, and what a training on planted blocks leaves out."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edt_core.config import TrainConfig
from edt_core.data.latents import LatentDataset
from edt_core.errors import UserError
from edt_core.models import DiffusionTransformer, ModelConfig, build_model, chosen_amm_blocks, model_config
from edt_core.training.context import LocalContext
from edt_core.training.draws import draw_step
from edt_core.training.loop import TrainState, train
from edt_core.training.prune.cut import cut_weights, kept_blocks, most_likely, shallower
from edt_core.training.prune.gates import (
    SCALE,
    DepthGates,
    GatedModel,
    count_candidates,
    gumbel,
    probabilities,
    temperature,
)
from edt_core.training.prune.groups import Group, counts_of, groups_of
from edt_core.training.prune.measure import losses_of, models_of, seconds_of
from edt_core.training.start.base import Base
from edt_core.training.start.initial import initial_checkpoint
from tests.edt_core.test_training_start import NAMES
from tests.support.trainings import contents, cut_back, place

pytestmark = pytest.mark.usefixtures("quickly", "one_thread")

FIELDS: dict[str, Any] = {
    "masked_loss": False,
    "global_batch_size": 8,
    "max_steps": 12,
    "lr": 2e-3,
    "log_every": 2,
    "checkpoint_every": 4,
    "num_to_keep": 3,
    "timestep_sampler": "uniform",
}


def edt(depths: tuple[int, ...] = (4, 2, 1, 3, 2), **fields: Any) -> ModelConfig:
    config = model_config("EDT-Tiny/2", 32, 4, overrides={"depths": depths}, **fields)
    return replace(config, dims=(16, 20, 24, 20, 16))


def one_width(name: str, dim: int, **overrides: Any) -> ModelConfig:
    return replace(model_config(name, 32, 4, overrides=overrides), dim=dim, num_heads=2)


SHAPES = {
    "edt": edt(),
    "dit": one_width("DiT-Tiny/2", 16, depth=5),
    "mdtv2": one_width("MDTv2-Tiny/2", 16, depth=10, decode_depth=4),
    "uvit": one_width("UViT-Tiny/2", 16, depth=9),
}


def drawn(config: ModelConfig, seed: int = 0) -> DiffusionTransformer:
    """A model none of whose weights is zero, so that every block matters."""
    model, rng = build_model(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=rng))
    return model.eval()


def inputs(config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, config.in_channels, config.latent_size, config.latent_size, generator=torch.manual_seed(1))
    return x, torch.tensor([1, 500, 900]), torch.tensor([0, 2, 3])


def test_groups_stay_within_runs_and_the_last_one_keeps_its_share_rounded_up() -> None:
    groups = groups_of(edt(), (1, 2))
    assert [(group.run, list(group.units), group.keep) for group in groups] == [
        *((0, [0, 1], 1), (0, [2, 3], 1), (1, [0, 1], 1), (2, [0], 1), (3, [0, 1], 1), (3, [2], 1), (4, [0, 1], 1)),
    ]
    assert counts_of(edt(), (1, 2)) == (2, 1, 1, 2, 1)
    assert counts_of(edt(), (2, 3)) == (3, 2, 1, 2, 2)
    assert Group(0, range(2, 5), 2).candidates == ((2, 3), (2, 4), (3, 4))
    assert counts_of(SHAPES["mdtv2"], (1, 2)) == (2, 2), "pairs of the encoder, blocks of the decoder"


def test_what_cannot_be_pruned_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"leaves nothing out of EDT-Tiny/2: .* 1, 1, 1, 1, 1 each.* up\. Prune a model with"
    ):
        groups_of(edt((1, 1, 1, 1, 1)), (1, 2))
    with pytest.raises(UserError, match=r"MaskGIT, whose blocks cannot be left out; .* EDT, DiT, MDTv2, U-ViT"):
        groups_of(model_config("MaskGIT-Tiny", 32, 4, autoencoder_factor=4), (1, 2))
    for keep in ((2, 2), (0, 2), (1, 15)):
        with pytest.raises(ValueError, match=rf"N of M blocks are {keep[0]} of {keep[1]}"):
            TrainConfig(prune=keep, masked_loss=False)
    with pytest.raises(ValueError, match=r"masked_loss is True, but prune is set.* set masked_loss=false"):
        TrainConfig(prune=(1, 2))


def test_gates_are_exactly_zero_and_one_and_have_the_gradient_of_the_softmax() -> None:
    groups = groups_of(edt(), (1, 2))
    gates, tau = DepthGates(groups), 0.7
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        gates.logits.copy_(0.01 * torch.randn(gates.logits.shape, generator=rng))
    noise = gumbel(torch.rand(64, len(gates.logits), generator=rng))
    weights = torch.randn(64, sum(len(group.units) for group in groups), generator=rng)
    values = gates(noise, tau)
    assert set(values.unique().tolist()) == {0.0, 1.0}
    for group, part in zip(groups, values.split([len(group.units) for group in groups], dim=1), strict=True):
        assert part.sum(dim=1).tolist() == [group.keep] * 64
    (values * weights).sum().backward()
    straight = gates.logits.grad
    logits = gates.logits.detach().requires_grad_()
    sizes = [len(group.candidates) for group in groups]
    soft = torch.cat([part.softmax(1) for part in ((SCALE * logits + noise) / tau).split(sizes, dim=1)], dim=1)
    (soft @ gates.options * weights).sum().backward()
    assert straight is not None
    assert torch.allclose(straight, logits.grad, rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]
    assert bool(straight.any())


def test_candidates_are_drawn_as_often_as_their_probabilities_say() -> None:
    """The Gumbel-max trick, at any temperature: 4,000 draws of three candidates."""
    group = Group(0, range(3), 2)
    gates = DepthGates((group,))
    with torch.no_grad():
        gates.logits.copy_(torch.tensor([0.5, 0.2, 0.3]).log() / SCALE)
    noise = gumbel(torch.rand(4000, 3, generator=torch.Generator().manual_seed(0)))
    for tau in (4.0, 0.1):
        left_out = 1 - gates(noise, tau).detach()  # candidate i leaves out unit 2 - i
        assert left_out.mean(dim=0).flip(0).tolist() == pytest.approx([0.5, 0.2, 0.3], abs=0.03)
    assert probabilities(gates.logits.detach(), [3])[0] == pytest.approx([0.5, 0.2, 0.3])


@pytest.mark.parametrize("keep", [(1, 2), (2, 3)])
@pytest.mark.parametrize("family", SHAPES)
def test_the_cut_model_computes_what_the_gated_one_does(family: str, keep: tuple[int, int]) -> None:
    """Bit for bit, with the long skips of the pairs that are left; and its weights are those of the kept blocks."""
    config = SHAPES[family]
    model, groups, cut = drawn(config), groups_of(config, keep), shallower(config, keep)
    gated, count = GatedModel(model, keep), count_candidates(config, keep)
    with torch.no_grad():
        gated.head.logits.copy_(torch.randn(count, generator=torch.Generator().manual_seed(2)))
    kept = most_likely(groups, gated.head.probabilities())
    other = build_model(cut).eval()
    other.load_state_dict(cut_weights(model.state_dict(), config, cut, kept))
    expected = gated(*inputs(config), torch.zeros(3, count), 0.1)
    assert torch.equal(other(*inputs(config)), expected)
    assert not torch.equal(model(*inputs(config)), expected)
    assert model.predict_block is None
    own = [model.ordered_blocks()[block].state_dict() for block in kept_blocks(config, kept)]
    for mine, left in zip(own, other.ordered_blocks(), strict=True):
        assert all(torch.equal(value, left.state_dict()[name]) for name, value in mine.items())


def test_each_sample_has_its_own_blocks() -> None:
    """A batch of all choices gives each row what a pass with its choice alone gives."""
    config = SHAPES["mdtv2"]
    gated = GatedModel(drawn(config), (1, 2))
    count = count_candidates(config, (1, 2))
    noise = gumbel(torch.rand(3, count, generator=torch.Generator().manual_seed(5)))
    x, t, y = inputs(config)
    together = gated(x, t, y, noise, 1.0)
    assert len(gated.head(noise, 1.0).unique(dim=0)) == 3
    for row in range(3):
        one = slice(row, row + 1)
        assert torch.allclose(gated(x[one], t[one], y[one], noise[one], 1.0), together[one], atol=1e-5)


@pytest.mark.parametrize("family", ["edt", "dit"])
def test_blocks_that_do_nothing_can_be_cut_without_a_change_of_any_bit(family: str) -> None:
    config = SHAPES[family]
    cut, kept = shallower(config, (1, 2)), most_likely(*_first(config))
    model, left = drawn(config), set(kept_blocks(config, most_likely(*_first(config))))
    with torch.no_grad():
        for number, block in enumerate(model.ordered_blocks()):
            if number not in left:
                for parameter in block.get_submodule("adaLN_modulation").parameters():
                    parameter.zero_()  # the gates of both branches among them
    other = build_model(cut).eval()
    other.load_state_dict(cut_weights(model.state_dict(), config, cut, kept))
    assert torch.equal(other(*inputs(config)), model(*inputs(config)))


def _first(config: ModelConfig) -> tuple[tuple[Group, ...], list[list[float]]]:
    groups = groups_of(config, (1, 2))
    return groups, [[1.0] * len(group.candidates) for group in groups]


def test_amm_and_masks_move_with_their_place() -> None:
    """A placement does not depend on which blocks are kept; the published one is of the whole model alone."""
    config = replace(edt(amm_blocks=(0, 3, 4, 9, 11), amm_kernel="cos"), mid_mask_block=2)
    cut = shallower(config, (1, 2))
    assert cut.amm_blocks == (0, 1, 2, 5, 6)
    assert (cut.mid_mask_block, cut.amm_kernel) == (1, "cos")  # type: ignore[attr-defined]
    pairs = shallower(replace(SHAPES["mdtv2"], amm_blocks=(2, 3, 9)), (1, 2))
    assert pairs.amm_blocks == (1, 2, 5)
    small = model_config("EDT-S/2", overrides={"depths": (1, 1, 1, 2, 2)})
    with pytest.raises(UserError, match=r"EDT-S/2 with its 12 blocks, and this one has 7"):
        chosen_amm_blocks(small, "paper", 1.0)
    assert chosen_amm_blocks(model_config("EDT-S/2"), "paper", 1.0) == (7, 10)


def planted() -> Base:
    """A DiT of which blocks 0 and 3 undo a shift of the tokens, and blocks 1 and 2 do nothing."""
    config = one_width("DiT-Tiny/2", 16, depth=4)
    model = build_model(config)
    shift = torch.zeros(16)
    shift[0] = 8.0
    with torch.no_grad():
        for number, block in enumerate(model.blocks):  # type: ignore[arg-type]
            for name in ("mlp.fc2.weight", "mlp.fc2.bias", "adaLN_modulation.1.weight", "adaLN_modulation.1.bias"):
                block.get_parameter(name).zero_()
            if number in (0, 3):
                block.get_parameter("adaLN_modulation.1.bias")[-16:] = 1.0  # the gate of the feed-forward branch
                block.get_parameter("mlp.fc2.bias").copy_(shift)
        model.get_parameter("x_embedder.proj.bias").copy_(-2 * shift)
        model.get_parameter("final_layer.linear.weight")[:, 0] = 1.0
    return Base(config, model.state_dict(), "the base", NAMES)


def fit(folder: Path, dataset: LatentDataset, context: LocalContext | None = None, **fields: Any) -> TrainState:
    base = planted()
    config = TrainConfig(model="DiT-Tiny/2", **{**FIELDS, "prune": (1, 2), **fields})
    start = initial_checkpoint(config, base.config, base, NAMES)[0]
    return train(config, base.config, dataset, context or LocalContext(folder), lambda: start)


def chosen(state: TrainState) -> tuple[tuple[int, ...], ...]:
    assert isinstance(state.aligned, GatedModel)
    return most_likely(groups_of(state.model.config, (1, 2)), state.aligned.head.probabilities())


def test_what_is_left_out_is_the_planted_block_that_does_nothing(dataset: LatentDataset, tmp_path: Path) -> None:
    state = fit(tmp_path, dataset)
    assert chosen(state) == ((0, 3),)
    assert isinstance(state.aligned, GatedModel)
    assert min(max(part) for part in state.aligned.head.probabilities()) > 0.9
    assert "depth_logits.safetensors" in contents(place(tmp_path, 12))
    losses = losses_of(
        TrainConfig(**FIELDS),
        dataset,
        [
            (shallower(state.model.config, (1, 2)), cut_of(kept))
            for kept in (((0, 3),), ((1, 3),), ((0, 2),), ((1, 2),))
        ],
    )
    assert losses[0] == min(losses)


def cut_of(kept: tuple[tuple[int, ...], ...]) -> dict[str, Tensor]:
    base = planted()
    return cut_weights(base.weights, base.config, shallower(base.config, (1, 2)), kept)


@pytest.mark.parametrize(
    "options", [{"micro_batch_size": 3}, {"optimizer": "muon", "precision": "bf16", "activation_checkpointing": True}]
)
def test_it_resumes_bit_for_bit(options: dict[str, Any], dataset: LatentDataset, tmp_path: Path) -> None:
    fit(tmp_path / "a", dataset, **options)
    fit(tmp_path / "b", dataset, cut_back(tmp_path / "a", tmp_path / "b", 4), **options)
    assert contents(place(tmp_path / "a", 12)) == contents(place(tmp_path / "b", 12))


def test_gumbel_numbers_depend_on_seed_step_and_sample_alone() -> None:
    """So any number of ranks draws the same; the temperature falls from 4 to 0.1."""
    config, shape = TrainConfig(**{**FIELDS, "prune": (1, 2)}), SHAPES["dit"]
    whole = draw_step(config, 3, shape)
    part = draw_step(config, 3, shape, slice(2, 5))
    assert whole.gumbel is not None
    assert part.gumbel is not None
    assert whole.gumbel.shape == (8, count_candidates(shape, (1, 2)))
    assert torch.equal(whole.gumbel[2:5], part.gumbel)
    assert torch.equal(whole.rows(slice(2, 5)).gumbel, part.gumbel)  # type: ignore[arg-type]
    assert not torch.equal(whole.gumbel, draw_step(config, 4, shape).gumbel)  # type: ignore[arg-type]
    assert [temperature(step, 12) for step in (0, 11)] == pytest.approx([4.0, 0.1])
    assert part.tau == temperature(3, 12)
    assert draw_step(TrainConfig(**FIELDS), 3, shape).gumbel is None


def test_both_models_are_timed() -> None:
    config = SHAPES["dit"]
    cut = shallower(config, (1, 2))
    weighted = [(each, drawn(each).state_dict()) for each in (config, cut)]
    assert all(0 < seconds < 60 for seconds in seconds_of(models_of(TrainConfig(), weighted)))


def test_every_choice_of_a_group_is_a_candidate_once() -> None:
    for keep, size in combinations(range(1, 6), 2):
        candidates = Group(0, range(size), keep).candidates
        assert len(set(candidates)) == len(candidates)
        assert {len(units) for units in candidates} == {keep}
