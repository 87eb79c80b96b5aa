"""The training loop with the families beside EDT: it learns, goes on, and does not mind how the batch is cut."""

from pathlib import Path

import pytest
import torch

from edt_core.config import TrainConfig
from edt_core.data.latents import LatentDataset
from edt_core.models import ModelConfig
from edt_core.training.context import LocalContext
from edt_core.training.loop import train
from tests.support.cases import suite_of
from tests.support.models import BESIDE_EDT, shallow_config
from tests.support.trainings import contents, cut_back, place, same

pytestmark = pytest.mark.usefixtures("quickly", "one_thread")


def recipe(name: str, **changes: object) -> TrainConfig:
    config = TrainConfig(
        model=name,
        global_batch_size=8,
        max_steps=6,
        lr=2e-3,
        masked_loss=small(name).is_masked,
        ema_decay=0.9,
        log_every=1,
        checkpoint_every=2,
        num_to_keep=5,
    )
    return config.model_copy(update=changes)


def small(name: str) -> ModelConfig:
    """With every kind of block, and few of each."""
    return shallow_config(name)


@pytest.mark.parametrize("name", BESIDE_EDT)
def test_the_loss_falls(name: str, dataset: LatentDataset, tmp_path: Path) -> None:
    config = recipe(name, max_steps=40, checkpoint_every=40, timestep_sampler="uniform", lr=4e-3)
    losses = [row["loss_full"] for row in train(config, small(name), dataset, LocalContext(tmp_path)).history.rows]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])


@pytest.mark.parametrize("name", BESIDE_EDT)
def test_a_resumed_training_equals_an_uninterrupted_one(name: str, dataset: LatentDataset, tmp_path: Path) -> None:
    state = train(recipe(name), small(name), dataset, LocalContext(tmp_path / "whole"))
    resumed = train(recipe(name), small(name), dataset, cut_back(tmp_path / "whole", tmp_path / "copy", 2))
    assert same(resumed.model.state_dict(), state.model.state_dict())
    assert contents(place(tmp_path / "copy", 6)) == contents(place(tmp_path / "whole", 6))


@pytest.mark.parametrize("name", BESIDE_EDT)
@pytest.mark.parametrize("most", suite_of([5], [5, 1]))
def test_any_cut_of_the_batch_trains_the_same(name: str, most: int, dataset: LatentDataset, tmp_path: Path) -> None:
    config = recipe(name, max_steps=3)
    uncut = train(config, small(name), dataset, LocalContext(tmp_path / "uncut"))
    cut = train(recipe(name, max_steps=3, micro_batch_size=most), small(name), dataset, LocalContext(tmp_path / "cut"))
    for ours, whole in zip(cut.model.parameters(), uncut.model.parameters(), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-3, atol=1e-4)


def test_indices_in_the_state_are_not_averaged(dataset: LatentDataset, tmp_path: Path) -> None:
    """MDTv2's published state dict holds the index of its bias table beside the weights."""
    config = recipe("MDTv2-Tiny/2", max_steps=2)
    state = train(config, small("MDTv2-Tiny/2"), dataset, LocalContext(tmp_path))
    (average,) = state.ema.averages
    indices = [name for name in average if name.endswith("relative_position_index")]
    assert len(indices) == 5  # four blocks and the side-interpolater
    for name in indices:
        assert average[name].dtype == torch.int64
        assert torch.equal(average[name], state.model.state_dict()[name])
