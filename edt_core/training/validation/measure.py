"""The loss on held-out images during a training, of the averaged weights.

Each measurement uses the same images, and for each of them the same latent, timesteps and noise, which depend on its
sha256 alone: measurements can be compared between steps, and between models with the same data set, autoencoder and
scale of the latents. It draws no random numbers of the training.

Images are processed in units of 8, each with all of its timesteps, and a unit belongs to one rank. So the bits do not
depend on the number of ranks.

Legend: M measured images, m those of this rank (filled up to whole units), K timesteps of an image, C latent channels,
h latent height and width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edt_core.data.holdout import Holdout
from edt_core.data.latents import LatentDataset
from edt_core.data.scale import LatentScale, model_scale
from edt_core.data.streaming import ShardStream
from edt_core.data.subsets import share
from edt_core.diffusion import objective_of
from edt_core.diffusion.timesteps import middle_timesteps
from edt_core.errors import UserError
from edt_core.models import DiffusionTransformer, ModelConfig, build_model
from edt_core.store.digests import listing
from edt_core.training.draws import to_device
from edt_core.training.ranks import Ranks
from edt_core.training.speed.arithmetic import set_arithmetic
from edt_core.training.validation.overfitting import HELD_OUT_LOSS

if TYPE_CHECKING:
    from edt_core.config import TrainConfig

TIMESTEPS = 8  # of each image
_UNIT = 8  # images
_SEED = 0  # the same for all trainings
_LATENT = -1  # in place of a timestep: the draw of an image's latent
_STEP_PASSES = 3  # a forward and backward pass takes about as long as three forward passes
_TIME_SHARE = 0.01


def validation_interval(config: TrainConfig, measured: int) -> int:
    """Steps between two measurements of so many images: `validate_every`, or else for about 1 % of the time.

    The latter is a multiple of `log_every`.
    """
    if config.validate_every is not None:
        return config.validate_every
    passes = config.global_batch_size * config.passes * _STEP_PASSES
    steps = measured * TIMESTEPS / passes / _TIME_SHARE
    return math.ceil(steps / config.log_every) * config.log_every


class HeldOutLoss:
    """Measures the loss of a training's averaged weights on the held-out rows of `dataset`, which has all rows.

    The loss is the mean squared error of the prediction, without weights, with labels and without masks. `every` is the
    number of steps between two measurements, `images` that of images. Raises UserError for latents that are not finite.
    """

    def __init__(
        self,
        config: TrainConfig,
        model_config: ModelConfig,
        dataset: LatentDataset | ShardStream,
        holdout: Holdout,
        ranks: Ranks,
    ) -> None:
        self.config, self.model_config, self.ranks = config, model_config, ranks
        self.images = len(holdout.measured)
        self.every = validation_interval(config, self.images)
        units = -(-self.images // _UNIT)
        cuts = [share(units, rank, ranks.world_size) for rank in range(ranks.world_size)]
        self._sizes = [(cut.stop - cut.start) * _UNIT for cut in cuts]
        mine = cuts[ranks.rank]
        places = np.arange(mine.start * _UNIT, mine.stop * _UNIT) % self.images
        self._digests = holdout.digests[places]
        scale = model_scale(model_config, dataset.scale)
        self._latents, self._labels = _read(dataset, holdout.measured[places], self._digests, scale)
        self._objective = objective_of(config.objective)
        self._noise_keys = middle_timesteps(TIMESTEPS, config.num_timesteps)  # of every objective: continuous times too
        self._times = self._objective.measured_times(TIMESTEPS, config.num_timesteps)
        self._schedule = self._objective.schedule(config.num_timesteps)
        self._model: DiffusionTransformer | None = None

    @torch.no_grad()
    def measure(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean loss, and that of each timestep, of a model with these weights, the same on all ranks. Collective.

        The names are `holdout_loss`, and `holdout_loss_t0` to `holdout_loss_t7` from the least noise.
        """
        model, device = self._model_with(weights), self.ranks.device
        parts = [torch.empty(TIMESTEPS, 0, device=device)]
        parts += [self._unit_losses(model, slice(at, at + _UNIT)) for at in range(0, len(self._labels), _UNIT)]
        losses = self.ranks.gather(torch.cat(parts, dim=1), self._sizes)[:, : self.images].double().cpu().numpy()
        means = losses.mean(axis=1).tolist()
        return {
            HELD_OUT_LOSS: sum(means) / TIMESTEPS,
            **{f"{HELD_OUT_LOSS}_t{k}": mean for k, mean in enumerate(means)},
        }

    def _model_with(self, weights: Mapping[str, Tensor]) -> DiffusionTransformer:
        """A model that shares the memory of these weights."""
        model = self._model
        if model is None:
            with torch.random.fork_rng(devices=[]):  # its initial weights are not used
                model = build_model(self.model_config)
            model.eval().requires_grad_(False)
            set_arithmetic(model, self.config)
        model.load_state_dict(weights, assign=True)
        self._model = model.to(self.ranks.device)  # buffers that are not in a state dict
        return self._model

    def release(self) -> None:
        """Let go of the weights, which nobody else has where the averages are divided among ranks."""
        if self._model is not None:
            shapes = {name: torch.empty_like(value, device="meta") for name, value in self._model.state_dict().items()}
            self._model.load_state_dict(shapes, assign=True)

    def _unit_losses(self, model: DiffusionTransformer, places: slice) -> Tensor:
        """The losses float32 [K, 8] of some of this rank's images."""
        device, objective, count = self.ranks.device, self._objective, places.stop - places.start
        noise = to_device(
            _noise(self._digests[places], self._noise_keys, self._latents.shape[1:]).flatten(0, 1), device
        )
        x_start = to_device(self._latents[places], device).repeat_interleave(TIMESTEPS, dim=0)
        labels = to_device(self._labels[places], device).repeat_interleave(TIMESTEPS)
        t = to_device(torch.from_numpy(self._times), device).repeat(count)
        x_t = objective.noised(self._schedule, x_start, t, noise)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            output = model(x_t, t, labels)
        losses = objective.losses(self._schedule, output.float(), x_start, x_t, noise, t, min_snr_gamma=None)
        return losses[objective.terms[0]].float().view(count, TIMESTEPS).T


def _read(
    dataset: LatentDataset | ShardStream, rows: NDArray[np.int64], digests: NDArray[np.uint8], scale: LatentScale
) -> tuple[Tensor, Tensor]:
    """Scaled latents float32 [m, C, h, h], a draw from the posterior of each image, and labels int64 [m]."""
    if isinstance(dataset, LatentDataset):
        stored, labels = dataset.gather(rows, np.zeros(len(rows), np.bool_))
        numbers, shape = dataset.info.numbers, dataset.info.latent_shape
    else:
        stored, labels = dataset.gather(rows)
        numbers, shape = dataset.numbers, dataset.latent_shape
    posterior = numbers.widened(stored)
    finite = np.isfinite(posterior).all(axis=(1, 2, 3, 4))
    if bad := [str(row) for row in np.unique(rows[~finite])]:
        names = listing(bad, ", ")
        raise UserError(f"{len(bad)} held-out latents are not finite (rows {names}); encode the images again")
    mean, std = torch.from_numpy(posterior).unbind(1)
    draw = _noise(digests, np.array([_LATENT]), shape)[:, 0]
    return scale.to_model(mean + std * draw), torch.from_numpy(labels)


def _noise(digests: NDArray[np.uint8], timesteps: NDArray[np.int64], shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Standard normal numbers float32 [n, k, *shape], of each of n images at each of k timesteps."""
    out = torch.empty(len(digests), len(timesteps), *shape)
    source = torch.Generator()
    for of_image, digest in zip(out, digests, strict=True):
        words = np.ascontiguousarray(digest).view(">u4").tolist()
        for values, timestep in zip(of_image, timesteps.tolist(), strict=True):
            state = np.random.SeedSequence([_SEED, timestep - _LATENT, *words]).generate_state(1, np.uint64)
            source.manual_seed(int(state[0] >> np.uint64(1)))
            values.normal_(generator=source)
    return out
