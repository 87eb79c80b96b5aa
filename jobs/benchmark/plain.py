"""A plain evaluation to compare ours with: sampling as DiT's and EDT's authors do, and the usual way to measure.

Legend: N images, C latent channels, h side of the latents.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from edt_core.acceptance.authors import plain_model
from edt_core.autoencoders.kinds import scale_of
from edt_core.data.scale import model_scale
from edt_core.diffusion import Schedule, linear_schedule, sampling_schedule
from edt_core.evaluation.extractors.inception import SPATIAL_CHANNELS, tf1_resize
from edt_core.models import DiffusionTransformer
from edt_core.precision import use_precision
from jobs.benchmark.networks import CFG_SCALE, GUIDED_CHANNELS, NUM_TIMESTEPS, EvalSubject, Networks
from jobs.benchmark.table import timed


def plain_precision(device: torch.device) -> str:
    """The precision of the authors' sampling: on a GPU they turn TF32 on."""
    return "fp32" if device.type == "cpu" else "tf32"


class Stages(NamedTuple):
    """Seconds of each stage alone, for all images."""

    sampling: float
    decoding: float
    features: float

    def __str__(self) -> str:
        names = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._asdict().items())
        return f"{names} s alone"


def of_all(seconds: Sequence[float], units: float) -> Stages:
    """Seconds of one unit in each stage, times the number of units."""
    return Stages(*(units * duration for duration in seconds))


class PlainEvaluation:
    """The way of DiT's and EDT's authors, and the usual way to measure samples: sequential and eager.

    A plain model and chain write each image as a PNG. A second pass reads every PNG back, one at a time, for an
    unmodified Inception. In float32; on a GPU with TF32, as the authors. All features end in one npz.
    """

    def __init__(self, work: Path, subject: EvalSubject, networks: Networks, device: torch.device) -> None:
        self.work, self.subject, self.device = work, subject, device
        self.precision = plain_precision(device)
        self.runs = itertools.count()
        schedule = sampling_schedule(linear_schedule(NUM_TIMESTEPS), subject.steps)
        self.chain = PlainChain(plain_model(networks.model).to(device).eval(), schedule)
        self.autoencoder, self.inception = networks.autoencoder.to(device), networks.inception.to(device)
        # The spatial features are not used here, but the network requires their kernels.
        branch = self.inception.get_submodule("Mixed_6d.branch1x1.conv")
        self.inception.spatial_kernel = branch.get_parameter("weight")[:SPATIAL_CHANNELS]

    def __call__(self) -> None:
        """Write a PNG of every image, and their features."""
        self._run(self.subject.num_images)

    def stages(self) -> Stages:
        """The seconds of each stage of one unit, times the number of units."""
        unit = self.subject.unit_size
        return of_all(self._run(unit), self.subject.num_images / unit)

    def _run(self, count: int) -> list[float]:
        """Seconds of sampling, of decoding and writing, and of reading and features."""
        use_precision(self.precision)
        folder = self.work / str(next(self.runs))
        folder.mkdir(parents=True)
        sampling: list[float] = []
        decoding: list[float] = []
        features: list[float] = []
        for batch in _batches(count, self.subject.unit_size):
            with timed(sampling):
                latents = self._sample(batch)
            with timed(decoding):
                self._write(folder, batch, latents)
        with timed(features):
            arrays = [self.features(_read(folder, batch)) for batch in _batches(count, self.subject.unit_size)]
            np.savez(folder / "features.npz", features=np.concatenate(arrays))
        return [sum(sampling), sum(decoding), sum(features)]

    def _sample(self, batch: range) -> Tensor:
        config = self.chain.model.config
        shape = (len(batch), config.in_channels, config.latent_size, config.latent_size)
        labels = torch.tensor([index % config.num_classes for index in batch], device=self.device)
        latents = self.chain(torch.randn(shape, device=self.device), labels)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # only for the measurement
        return latents

    @torch.no_grad()
    def _write(self, folder: Path, batch: range, latents: Tensor) -> None:
        scale = model_scale(self.chain.model.config, scale_of(self.autoencoder))
        images = self.autoencoder.decode(scale.to_raw(latents)).sample
        levels = torch.clamp(127.5 * images + 128.0, 0, 255).permute(0, 2, 3, 1).to("cpu", dtype=torch.uint8).numpy()
        for index, pixels in zip(batch, levels, strict=True):
            Image.fromarray(pixels).save(folder / f"{index:06d}.png")

    @torch.no_grad()
    def features(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [N, S, S, 3] -> [N, 2048]."""
        images = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).contiguous()
        pooled, _, _ = self.inception((tf1_resize(images) - 128) / 128)
        features: NDArray[np.float32] = pooled.cpu().numpy()
        return features


class PlainChain:
    """The ancestral chain with guidance as DiT's authors write it: both halves of the batch go through every step.

    The coefficients of a step are looked up by sample, from tables that are copied to the device each time.
    """

    def __init__(self, model: DiffusionTransformer, schedule: Schedule) -> None:
        self.model, self.schedule = model, schedule
        ab, ab_before, betas = schedule.alphas_cumprod, schedule.alphas_cumprod_prev, schedule.betas
        self.from_x, self.from_eps = np.sqrt(1 / ab), np.sqrt(1 / ab - 1)
        self.mean_of_start = betas * np.sqrt(ab_before) / (1 - ab)
        self.mean_of_x = (1 - ab_before) * np.sqrt(1 - betas) / (1 - ab)

    @torch.no_grad()
    def __call__(self, initial: Tensor, labels: Tensor, draw: Callable[[Tensor], Tensor] = torch.randn_like) -> Tensor:
        """Latents [N, C, h, h] from noise of that shape and labels [N]; draw(x) is the noise of a step, like x."""
        null = torch.full_like(labels, self.model.config.num_classes)
        x, y = torch.cat([initial, initial]), torch.cat([labels, null])
        for index in reversed(range(self.schedule.num_timesteps)):
            x = self._step(x, torch.tensor([index] * len(x), device=x.device), y, draw)
        return x.chunk(2)[0]

    def _step(self, x: Tensor, t: Tensor, y: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
        """x_{t-1} of x_t, with the variance that the model learned (Ho 2020, algorithm 2)."""
        eps, v = self._guided(x, t, y).chunk(2, dim=1)
        least = _at(self.schedule.posterior_log_variance_clipped, t, x)
        most = _at(np.log(self.schedule.betas), t, x)
        share = (v + 1) / 2
        log_variance = share * most + (1 - share) * least
        start = _at(self.from_x, t, x) * x - _at(self.from_eps, t, x) * eps
        mean = _at(self.mean_of_start, t, x) * start + _at(self.mean_of_x, t, x) * x
        is_not_last = (t != 0).float().view(-1, 1, 1, 1)
        return mean + is_not_last * torch.exp(0.5 * log_variance) * draw(x)

    def _guided(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The model on the first half of x with and without its labels, [2N, 2C, h, h]; both halves are guided."""
        half = x[: len(x) // 2]
        timesteps = torch.tensor(self.schedule.timestep_map, device=t.device)[t]
        output: Tensor = self.model(torch.cat([half, half]), timesteps, y)
        eps, rest = output[:, :GUIDED_CHANNELS], output[:, GUIDED_CHANNELS:]
        conditional, unconditional = eps.chunk(2)
        pushed = unconditional + CFG_SCALE * (conditional - unconditional)
        return torch.cat([torch.cat([pushed, pushed]), rest], dim=1)


def _at(table: NDArray[np.float64], t: Tensor, like: Tensor) -> Tensor:
    """The entries of a table at t, [N], in the shape of `like`."""
    return torch.from_numpy(table).to(t.device)[t].float().view(-1, 1, 1, 1).expand(like.shape)


def _batches(count: int, size: int) -> list[range]:
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def _read(folder: Path, batch: range) -> NDArray[np.uint8]:
    return np.stack([np.asarray(Image.open(folder / f"{index:06d}.png")) for index in batch])
