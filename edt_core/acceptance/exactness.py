"""Section A, the training: ranks, copies from page-locked memory, resuming, and the outputs of the authors' code.

Legend: B global batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from edt_core.acceptance import authors
from edt_core.acceptance.options import training
from edt_core.acceptance.rows import Measure, Task, at_most, figure
from edt_core.acceptance.subjects import (
    Setting,
    latent_dataset,
    new_state,
    randomized,
    relative_error,
    step_inputs,
    synchronize,
    train_on,
    trainer_of,
)
from edt_core.data.latents import LatentDataset
from edt_core.data.loader import BatchPlan, latent_batches
from edt_core.data.subsets import share
from edt_core.diffusion import objective_of
from edt_core.models import ModelConfig
from edt_core.precision import use_precision
from edt_core.training.checkpoint import Checkpoint, HostMemory
from edt_core.training.optim import flatten_state, restore_state
from edt_core.training.ranks import Ranks
from edt_core.training.state import TrainState
from edt_core.training.step import accumulate_gradient

_UNIT = "rel. rms"
_WORLDS = (2, 8)
_STALL_CYCLES = 40_000_000  # about 20 ms of a GPU's clock


def tasks(setting: Setting) -> Iterator[Task]:
    """Ranks, copies, resuming, the authors' model."""
    config = setting.model("EDT-S/2")
    yield Task("losses of several ranks", lambda: rank_rows(config, setting.device))
    yield Task("copies to the device", lambda: copy_rows(config, setting), setting.seconds(10))
    yield Task("copy of a checkpoint", lambda: checkpoint_rows(config, setting.device), setting.seconds(5))
    modes = (False, True) if setting.on_gpu else (False,)
    for deterministic in modes:
        name = "resumed training, deterministic algorithms" if deterministic else "resumed training"
        yield Task(name, partial(resume_rows, name, config, setting, deterministic), setting.seconds(8))
    if setting.authors is not None:
        folder = setting.authors
        yield Task("the authors' model", lambda: authors_rows(folder, setting), setting.seconds(5))


def rank_rows(config: ModelConfig, device: torch.device) -> Iterator[Measure]:
    """Losses, and the sum of the gradients, of a step cut into the shares of several ranks, against the whole step."""
    use_precision("fp32")
    options = training(global_batch_size=16, micro_batch_size=16)
    model = randomized(config).train().to(device)
    inputs = step_inputs(options, config, device)
    schedule = objective_of(options.objective).schedule(options.num_timesteps)

    def step(world_size: int) -> tuple[Tensor, Tensor]:
        model.zero_grad(set_to_none=True)
        parts = [
            accumulate_gradient(model, options, schedule, inputs.rows(share(16, rank, world_size)), config.num_classes)
            for rank in range(world_size)
        ]
        gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        return torch.cat(parts, dim=1), torch.cat(gradients)

    losses, gradient = step(1)
    for world_size in _WORLDS:
        own_losses, own_gradient = step(world_size)
        name = f"{config.name} on {world_size} ranks against one"
        yield at_most(f"{name}: losses", relative_error(own_losses, losses), 1e-5, _UNIT)
        yield at_most(f"{name}: gradient", relative_error(own_gradient, gradient), 1e-5, _UNIT)


def checkpoint_rows(config: ModelConfig, device: torch.device) -> Iterator[Measure]:
    """Tensors that the copy of a checkpoint got wrong, behind a busy stream and changed right after the copy."""
    state = new_state(training(global_batch_size=16), config, device)
    own = state.model.state_dict()
    before = {name: tensor.detach().clone() for name, tensor in own.items()}
    if device.type == "cuda":
        torch.cuda._sleep(_STALL_CYCLES)
    copy = HostMemory().copy(Checkpoint(0, {"model": own}, {}, {}, None)).tensors["model"]
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.zero_()
    wrong = sum(not torch.equal(copy[name], tensor.cpu()) for name, tensor in before.items())
    yield at_most(f"wrong tensors of a checkpoint's copy, of {len(before)}", wrong, 0)


def copy_rows(config: ModelConfig, setting: Setting) -> Iterator[Measure]:
    """Batches whose copy to the device is not their content: a buffer was overwritten before its copy was complete."""
    number, rows = setting.count(2000, 40), 16
    dataset = latent_dataset(setting.work, config, setting.count(2048, 64))
    plan = BatchPlan(seed=1, global_batch_size=rows, mirror_prob=0.5, device=setting.device)
    wrong = _wrong_copies(dataset, plan, number)
    yield at_most(f"wrong copies of {number} batches to a busy device", wrong, 0)


def _wrong_copies(dataset: LatentDataset, plan: BatchPlan, number: int) -> int:
    """Copies whose digest differs from that of the host's memory before the copy, while the device is stalled."""
    on_host, on_device = [], []
    with closing(latent_batches(dataset, plan)) as batches:
        for count, batch in enumerate(islice(batches, number)):
            if plan.device.type == "cuda" and count % 50 == 0:
                torch.cuda._sleep(_STALL_CYCLES)
            on_host.append(_digest(batch.posterior))
            on_device.append(_digest(batch.posterior.to(plan.device, non_blocking=True)))
    synchronize(plan.device)
    return int((torch.stack(on_host) != torch.stack(on_device).cpu()).sum())


def _digest(tensor: Tensor) -> Tensor:
    """A sum of all bits, which one changed value changes: int64 []."""
    return tensor.flatten().view(torch.int32).sum(dtype=torch.int64)


def resume_rows(name: str, config: ModelConfig, setting: Setting, deterministic: bool) -> Iterator[Measure]:
    """Weights after 20 steps, against those of 10 steps, a state through files' bytes, and 10 more steps."""
    half = setting.count(10, 2)
    with _algorithms(deterministic):
        whole = _trained(config, setting, (2 * half,))
        resumed = _trained(config, setting, (half, half))
    text = f"{name}: {2 * half} steps against {half} + {half}"
    error = relative_error(resumed, whole)
    if deterministic or not setting.on_gpu:
        yield at_most(text, error, 0, _UNIT)
    else:
        yield figure(text, error, _UNIT, "sums in another order differ: only deterministic algorithms promise bits")


@contextmanager
def _algorithms(deterministic: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _trained(config: ModelConfig, setting: Setting, parts: Sequence[int]) -> Tensor:
    """The weights after a training in parts, each of which starts in a new state with what the one before left."""
    use_precision("fp32")
    options = training(global_batch_size=16, max_steps=sum(parts), ema_decay=0.9)
    dataset = latent_dataset(setting.work, config, setting.count(2048, 64))
    saved: dict[str, bytes] = {}
    step = 0
    for count in parts:
        state = new_state(options, config, setting.device)
        if saved:
            load_state(state, saved, step)
        trainer = trainer_of(options, dataset, state, setting.work, Ranks(device=setting.device))
        train_on(trainer, count)
        saved, step = saved_state(state), state.step
    return torch.cat([parameter.detach().flatten().cpu() for parameter in state.model.parameters()])


def saved_state(state: TrainState) -> dict[str, bytes]:
    """Weights, average, optimizer and timestep sampler as the bytes of safetensors files."""
    times = {name: torch.from_numpy(value) for name, value in state.timesteps.state_dict().items()}
    tensors = {
        "model": state.model.state_dict(),
        "ema": state.ema.averages[0],
        "optimizer": flatten_state(state.optimizer)[0],
        "times": times,
    }
    return {
        name: save({key: value.detach().cpu().contiguous() for key, value in part.items()})
        for name, part in tensors.items()
    }


def load_state(state: TrainState, saved: dict[str, bytes], step: int) -> None:
    """Inverse of `saved_state`."""
    state.model.load_state_dict(load(saved["model"]))
    state.ema.load([load(saved["ema"])])
    groups = flatten_state(state.optimizer)[1]
    for group in groups:
        group["step"] = step
    restore_state(state.optimizer, load(saved["optimizer"]), groups)
    state.timesteps.load_state_dict({name: value.numpy() for name, value in load(saved["times"]).items()})
    state.step = step


@torch.no_grad()
def authors_rows(folder: Path, setting: Setting) -> Iterator[Measure]:
    """The output of the authors' EDT-S with the same weights, without and with AMM in the blocks of their file."""
    from edt_core.models import model_config

    use_precision("fp32")
    config = model_config("EDT-S/2", 256)
    model = randomized(config).to(setting.device).eval()
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 32, 32, generator=rng).to(setting.device)
    t, y = torch.tensor([17, 903]).to(setting.device), torch.tensor([207, 1000]).to(setting.device)
    for suffix, blocks in (("_noAMM", ()), ("", authors.AMM_BLOCKS)):
        theirs = authors.load_model(folder, f"EDT-S/2{suffix}", model).to(setting.device).eval()
        model.set_amm(blocks)
        name = f"EDT-S/2 against the authors' code, AMM in {list(blocks)}"
        yield at_most(f"{name}: output", relative_error(model(x, t, y), theirs(x, t, y)), 1e-5, _UNIT)


def use_deterministic_workspace() -> None:
    """Let cuBLAS be deterministic where it is asked to be. It reads the variable once, so call this before it starts.

    On Hopper, PyTorch uses a workspace of this size anyway.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
