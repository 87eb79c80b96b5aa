"""Trainings with attention modulation (`train.amm_blocks`), and radii by the grid in every sampler."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edt_core.config import ChainConfig, TrainConfig
from edt_core.data.latents import LatentDataset
from edt_core.errors import UserError
from edt_core.models import ModelConfig, build_model, with_trained_amm
from edt_core.sampling.pipeline_options import PROTOCOL, chain_config
from edt_core.sampling.sampler import LatentSampler
from edt_core.training.align.alignment import alignment_of
from edt_core.training.align.settings import align_settings
from edt_core.training.checkpoint import ema_model
from edt_core.training.context import LocalContext
from edt_core.training.loop import train
from edt_core.training.ranks import Ranks
from edt_core.training.state import initial_state
from edt_core.training.validation.measure import HeldOutLoss
from tests.support.cases import suite_of
from tests.support.models import TINY, made_model, shallow_config
from tests.support.trainings import contents, cut_back, narrow, place, same

pytestmark = pytest.mark.usefixtures("quickly", "one_thread")

CONFIG = TrainConfig(
    model="EDT-Tiny/2",
    global_batch_size=8,
    max_steps=2,
    lr=2e-3,
    ema_decay=0.5,
    log_every=1,
    checkpoint_every=1,
)


def shape_of(name: str) -> ModelConfig:
    return narrow() if name.startswith("EDT") else shallow_config(name)


@pytest.mark.parametrize("name", suite_of(["EDT-Tiny/2", "UViT-Tiny/2"], TINY))
def test_it_is_another_training_that_resumes_bit_for_bit(name: str, dataset: LatentDataset, tmp_path: Path) -> None:
    plain = shape_of(name)
    shape = with_trained_amm(plain, (0, 2))
    config = CONFIG.model_copy(update={"model": name, "masked_loss": plain.is_masked, "amm_blocks": (0, 2)})
    state = train(config, shape, dataset, LocalContext(tmp_path / "a"))
    train(config, shape, dataset, cut_back(tmp_path / "a", tmp_path / "b", 1))
    assert contents(place(tmp_path / "a", 2)) == contents(place(tmp_path / "b", 2))
    without = train(config, plain, dataset, LocalContext(tmp_path / "c"))
    assert not same(without.model.state_dict(), state.model.state_dict())
    assert ema_model(place(tmp_path / "a", 2)).config == shape


def test_activation_checkpointing_and_micro_batches_compute_the_same(dataset: LatentDataset, tmp_path: Path) -> None:
    shape, weights = with_trained_amm(narrow(), (0, 3)), []
    for number, fields in enumerate(({}, {"activation_checkpointing": True, "micro_batch_size": 3})):
        config = CONFIG.model_copy(update=fields)
        weights.append(train(config, shape, dataset, LocalContext(tmp_path / str(number))).model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-4, msg=name)


def test_what_measures_and_what_is_aligned_with_has_it_too() -> None:
    config = CONFIG.model_copy(update={"align": "self"})
    for shape in (narrow(), with_trained_amm(narrow(), (1,))):
        state = initial_state(config, shape)
        alignment = alignment_of(config, align_settings(config, shape), state, torch.device("cpu"))
        assert alignment is not None
        (target,) = alignment.networks
        measuring = HeldOutLoss.__new__(HeldOutLoss)
        measuring.model_config, measuring.config, measuring._model, measuring.ranks = shape, config, None, Ranks()
        for model in (target, measuring._model_with(state.average())):
            modulated = [index for index, attention in enumerate(model.attentions()) if attention.amm is not None]
            assert modulated == list(shape.amm_blocks)


def samples(model: Any, **chain: Any) -> torch.Tensor:
    sampler = LatentSampler(model, ChainConfig(num_sampling_steps=2, **chain), 1000)
    return sampler([0, 1], 0, [0, 1])


def test_a_trained_placement_is_the_model_s_own() -> None:
    model = made_model()
    trained = build_model(with_trained_amm(model.config, (0, 4)))
    trained.load_state_dict(model.state_dict())
    assert torch.equal(samples(trained, amm_blocks="model"), samples(model, amm_blocks=(0, 4)))
    assert torch.equal(samples(trained), samples(model))


def test_a_radius_of_rows_is_another_one_on_each_grid() -> None:
    model = made_model(name="DiT-Tiny/2")  # one grid of 4 x 4 tokens
    by_rows = samples(model, amm_blocks=(1, 3), amm_radius_rows=1)
    assert torch.equal(by_rows, samples(model, amm_blocks=(1, 3), amm_radius=10**0.5 + 1e-9))
    assert not torch.equal(by_rows, samples(model, amm_blocks=(1, 3)))
    own = build_model(replace(model.config, amm_blocks=(1, 3), amm_radius_rows=1))
    own.load_state_dict(model.state_dict())
    assert torch.equal(samples(own, amm_blocks="model"), by_rows)
    assert torch.equal(samples(own, amm_blocks="model", amm_radius_rows=4), samples(model, amm_blocks=(1, 3)))
    hourglass = made_model()
    hourglass.set_amm((0, 2), radius_rows=0)
    within = {a.grid: int((a.amm[0] > 0).sum()) for a in hourglass.attentions() if a.amm is not None}
    assert within == {4: 11, 2: 3}  # of the first token, at most 3 and at most 1 away


def test_a_pipeline_stores_it_and_takes_it_in_a_call() -> None:
    assert "amm_radius_rows" in PROTOCOL
    assert chain_config({"amm_radius_rows": 9}).amm_radius_rows == 9
    with pytest.raises(UserError, match="amm_radius is 2 and amm_radius_rows 9; both set the radius"):
        chain_config({"amm_radius_rows": 9, "amm_radius": 2.0})
