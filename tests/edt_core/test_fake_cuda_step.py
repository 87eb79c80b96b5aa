"""A step of the training loop on tensors that say they are on a GPU: its copies, and where the host waits.

Everything is that of the loop but the backward pass, which a build for CPUs has not: it puts gradients in place.
"""

from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edt_core.acceptance.subjects import some_steps, trainer_of
from edt_core.config import TrainConfig
from edt_core.data.latents import LatentDataset
from edt_core.diffusion import objective_of
from edt_core.models import build_model
from edt_core.training.ema import EMA
from edt_core.training.optim import make_optimizer
from edt_core.training.ranks import Ranks
from edt_core.training.speed.update import CompiledUpdate
from edt_core.training.state import TrainState
from edt_core.training.trainer import Trainer
from tests.support.cases import suite_of
from tests.support.fake_cuda import CUDA, Event, FakeCuda, fake_cuda, on_cuda, waits
from tests.support.models import shallow_config

BATCH, STEPS = 6, 3
# Latents, the noise of the posterior, dropped labels, noise, labels, timesteps, weights; and masks of two sites.
OF_A_STEP = {"EDT-Tiny/2": 9, "DiT-Tiny/2": 7}


def trainer_on_cuda(config: TrainConfig, dataset: LatentDataset, folder: Path) -> Trainer:
    model = on_cuda(build_model(shallow_config(config.model))).train()
    trained, objective = list(model.parameters()), objective_of(config.objective)
    state = TrainState(
        model=model,
        ema=EMA(model, config.ema_decays),
        optimizer=make_optimizer(config, trained),
        timesteps=objective.times(config.timestep_sampler, config.num_timesteps),
    )
    return trainer_of(config, dataset, state, folder, Ranks(device=CUDA))


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for each wait for an event."""
    found: list[None] = []
    monkeypatch.setattr(torch.cuda, "Event", partial(Event, found))
    monkeypatch.setattr(torch.cuda, "device", lambda _device: nullcontext())
    return found


def give_gradients(mode: FakeCuda, trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward pass that adds to every gradient; and page-locked memory that needs no driver."""

    def backward(loss: Tensor) -> None:
        assert loss.device == CUDA
        for parameter in trainer.state.model.parameters():
            gradient = torch.ones_like(parameter)
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    monkeypatch.setattr(Tensor, "backward", backward)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: mode.page_locked(tensor))


# With masks and without, in micro-batches and whole, waiting before the update and after it. The others pair these.
CASES = [("loss-second-moment", "DiT-Tiny/2", 4), ("uniform", "EDT-Tiny/2", None), ("uniform", "DiT-Tiny/2", None)]


@pytest.mark.parametrize(
    ("sampler", "name", "micro_batch"),
    suite_of(CASES, product(("loss-second-moment", "uniform"), OF_A_STEP, (None, 4))),
)
def test_a_step_of_the_loop_copies_once_to_the_host_and_waits_as_late_as_it_can(
    sampler: str,
    name: str,
    micro_batch: int | None,
    dataset: LatentDataset,
    tmp_path: Path,
    waited: list[None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Uniform timesteps: the result of a step is read in the step after. No copy is from memory that may be paged."""
    fields: dict[str, Any] = {"masked_loss": name.startswith("EDT"), "timestep_sampler": sampler, "max_grad_norm": 1.0}
    config = TrainConfig(model=name, global_batch_size=BATCH, micro_batch_size=micro_batch, max_steps=STEPS, **fields)
    order, waits_before_update = list[int](), sampler == "loss-second-moment"
    with fake_cuda() as mode:
        trainer = trainer_on_cuda(config, dataset, tmp_path)
        give_gradients(mode, trainer, monkeypatch)
        step = trainer.state.optimizer.step
        monkeypatch.setattr(trainer.state.optimizer, "step", lambda: order.append(len(waited)) or step())
        after = []
        for number, (batch, draws) in enumerate(some_steps(trainer, STEPS)):
            before = mode.uploads.copy()
            with waits(mode, "copy to the host"):
                trainer.train_step(batch, draws)
            trainer.state.step += 1
            after.append(len(waited))
            copies = mode.uploads - before
            if number:  # the first one also copies the noise schedule's table
                assert copies == {"page-locked": OF_A_STEP[name]}
        trainer.settle()
    assert order == ([1, 2, 3] if waits_before_update else [0, 0, 1])
    assert after == ([1, 2, 3] if waits_before_update else [0, 1, 2])
    assert len(waited) == STEPS
    assert len(trainer.state.history.pending) == STEPS


def test_a_masked_update_comes_before_the_wait(
    dataset: LatentDataset, tmp_path: Path, waited: list[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second step on, when the optimizer has its state; what is compiled runs here as it is."""
    config = TrainConfig(model="DiT-Tiny/2", masked_loss=False, global_batch_size=BATCH, max_steps=STEPS)
    monkeypatch.setattr(torch, "compile", lambda function, **_options: function)
    with fake_cuda() as mode:
        trainer = trainer_on_cuda(config, dataset, tmp_path)
        give_gradients(mode, trainer, monkeypatch)
        state = trainer.state
        trainer.compiled_update = CompiledUpdate(state.model, state.optimizer, state.ema, masked=True)
        order = []
        (update,) = trainer.compiled_update._updates
        trainer.compiled_update._updates = [lambda *inputs: order.append(len(waited)) or update(*inputs)]
        for batch, draws in some_steps(trainer, STEPS):
            with waits(mode, "copy to the host"):
                trainer.train_step(batch, draws)
            state.step += 1
    blocks = len(order) // 2
    assert order == [1] * blocks + [2] * blocks
    assert len(waited) == STEPS
