"""What an acceptance computes with: models with random weights, steps of a training, synthetic latents, a clock.

Legend: B global batch, C latent channels, h side of the latents.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from edt_core.acceptance.adan import Adan
from edt_core.data.latents import LatentDataset, LatentInfo, LatentShardWriter
from edt_core.data.loader import LatentBatch
from edt_core.data.scale import LatentScale
from edt_core.diffusion import objective_of
from edt_core.models import DiffusionTransformer, ModelConfig, build_model, model_config
from edt_core.training.context import LocalContext
from edt_core.training.draws import StepDraws, draw_step
from edt_core.training.loop import prepared_steps
from edt_core.training.meter import Meter
from edt_core.training.ranks import Ranks
from edt_core.training.state import TrainState, initial_state
from edt_core.training.step import StepInputs
from edt_core.training.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Generator

    from edt_core.config import TrainConfig

_FULL = 0.5  # from this scale on the models are those of the papers


@dataclass
class Setting:
    """The device and the size of an acceptance. `rates` are images/s that a later section compares with."""

    device: torch.device
    scale: float
    work: Path
    authors: Path | None = None
    attention_table: Path | None = None
    rates: dict[str, float] = field(default_factory=dict)

    @property
    def is_full(self) -> bool:
        return self.scale >= _FULL

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def model(self, name: str) -> ModelConfig:
        """A model of the papers at 256 px, or the tiny one of its family at 32 px."""
        if self.is_full:
            return model_config(name, 256)
        return model_config(f"{name.partition('-')[0]}-Tiny/2", 32, 10)

    def count(self, number: int, least: int = 1) -> int:
        """A number of images, turns or steps at this scale."""
        return max(least, round(number * min(self.scale, 1.0)))

    def seconds(self, on_h100: float) -> float:
        """About what a task takes; unknown at a small scale."""
        return on_h100 if self.is_full else 0.0

    def gib(self, at_full_size: float) -> float:
        """Device memory of a task."""
        return at_full_size if self.is_full else 0.1

    @property
    def backend(self) -> str:
        """Of torch.compile; at a small scale the graph alone, without generated code."""
        return "inductor" if self.is_full else "eager"

    def compiled(self, module: Any) -> Any:
        """A module, or a function, compiled."""
        return torch.compile(module, dynamic=False, backend=self.backend)


def synchronize(device: torch.device) -> None:
    """Wait until a device has computed everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, until the device has computed it."""
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - started


def in_turns(
    functions: Mapping[str, Callable[[], object]], turns: int, warm_up: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of each function, called in turns, after some calls to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warm_up + turns):
        for name, function in functions.items():
            duration = timed(function, device)
            if turn >= warm_up:
                seconds[name].append(duration)
    return {name: statistics.median(durations) for name, durations in seconds.items()}


def randomized(config: ModelConfig, seed: int = 0) -> DiffusionTransformer:
    """A model, on the CPU, none of whose weights is zero: a new one predicts zero, whatever it computes before."""
    model = build_model(config)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 0.5 if name.endswith("bias_table") else 0.05
            parameter.copy_(std * torch.randn(parameter.shape, generator=rng))
    return model


def random_model(config: ModelConfig, device: torch.device) -> DiffusionTransformer:
    """A model with random weights made on the device, for its speed: of a large one, seconds faster than on the CPU."""
    with device:
        model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    return model


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Root mean square of the difference, relative to that of the reference.

    Where the reference is 0, as the gradient of the bias of a single token, an equal value has no error.
    """
    exact = reference.detach().double().cpu()
    difference = torch.linalg.vector_norm(value.detach().double().cpu() - exact)
    return 0.0 if float(difference) == 0 else float(difference / torch.linalg.vector_norm(exact))


def latent_dataset(folder: Path, model: ModelConfig, rows: int) -> LatentDataset:
    """A shard of random posteriors that fit a model, made once for each shape and number."""
    shape = (model.in_channels, model.latent_size, model.latent_size)
    path = folder / f"latents-{rows}-{model.in_channels}-{model.latent_size}.arrow"
    if not path.exists():
        info = LatentInfo("random", LatentScale(1.0), model.image_size, shape, "images-00000.tar")
        rng = np.random.default_rng(0)
        with LatentShardWriter(path, info) as writer:
            for first in range(0, rows, 256):
                count = min(256, rows - first)
                values = rng.random((count, 2, 2, *shape), dtype=np.float32)
                names = [f"{first + i:08d}" for i in range(count)]
                writer.write(names, (first + np.arange(count)) % model.num_classes, values)
    return LatentDataset([path])


def step_inputs(config: TrainConfig, model: ModelConfig, device: torch.device) -> StepInputs:
    """Random latents, labels and draws of one step of the global batch, on the device."""
    draws = draw_step(config, 0, model)
    times = objective_of(config.objective).times("uniform", config.num_timesteps)
    rng = torch.Generator().manual_seed(config.seed)
    return StepInputs(
        latents=torch.randn(draws.posterior_noise.shape, generator=rng).to(device),
        labels=(torch.arange(config.global_batch_size) % model.num_classes).to(device),
        timesteps=torch.from_numpy(times.draw(draws.uniforms.numpy()).timesteps).to(device),
        weights=torch.ones(config.global_batch_size, device=device),
        draws=draws.to(device),
    )


def has_library_adan() -> bool:
    """Whether the optimizer is pytorch_optimizer's, not the one of the acceptance."""
    try:
        import pytorch_optimizer
    except ImportError:
        return False
    return bool(pytorch_optimizer)


def new_state(config: TrainConfig, model: ModelConfig, device: torch.device) -> TrainState:
    """The state before the first step; with the acceptance's own Adan where pytorch_optimizer is not installed."""
    if has_library_adan():
        return initial_state(config, model, device)
    options: Any = config
    state = initial_state(replace(options, optimizer="adamw"), model, device)
    state.optimizer = Adan((p for p in state.model.parameters() if p.requires_grad), config.lr)
    return state


def trainer_of(
    config: TrainConfig,
    dataset: LatentDataset,
    state: TrainState,
    work: Path,
    ranks: Ranks,
    network: nn.Module | None = None,
) -> Trainer:
    """The trainer of a state, as the training loop makes it. `network` is the state's model, compiled."""
    return Trainer(
        config=config,
        dataset=dataset,
        context=LocalContext(work / "training", ranks),
        state=state,
        total_steps=config.max_steps,
        last_step=config.max_steps,
        model=state.model if network is None else network,
        schedule=objective_of(config.objective).schedule(config.num_timesteps),
        meter=Meter(config.global_batch_size, ranks.device, 1.0, 1.0),
    )


def some_steps(trainer: Trainer, count: int) -> list[tuple[LatentBatch, StepDraws]]:
    """The batches and draws of the next steps, in the memory that the loop copies from."""
    with closing(cast("Generator[tuple[LatentBatch, StepDraws], None, None]", prepared_steps(trainer))) as steps:
        return list(islice(steps, count))


def train_on(trainer: Trainer, count: int) -> None:
    """Train some steps, as the loop does."""
    for batch, draws in some_steps(trainer, count):
        trainer.train_step(batch, draws)
        trainer.state.step += 1
