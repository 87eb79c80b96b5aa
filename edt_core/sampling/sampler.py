"""Sampling latents from a model and a chain's configuration; used by jobs, pipelines and benchmarks.

Shapes: N samples, C latent channels, h side of the latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edt_core.diffusion import SampleNoise, SamplerChoice, guided, objective_of_model
from edt_core.diffusion.chain import ModelFn, SwitchedModel
from edt_core.diffusion.guidance import ClassModel, Confused
from edt_core.errors import UserError
from edt_core.models import DiffusionTransformer, ModelConfig, chosen_amm_blocks
from edt_core.models.weight_memo import constant_weights
from edt_core.sampling.cache import FeatureCache

if TYPE_CHECKING:
    from edt_core.config import ChainConfig


class SamplesNotFiniteError(UserError):
    """The result of a chain is infinite or NaN."""


Progress = Callable[[int, int], None]  # (completed steps, total steps)
Classify = Callable[[Tensor], Tensor]  # scaled latents [N, C, h, h] float32 -> probabilities of the classes [N, K]
# (model function, start [N, C, h, h] float32, progress) -> latents, in place of the chain's own sampler
Solver = Callable[[ModelFn | SwitchedModel, Tensor, Progress | None], Tensor]


class Noise(Protocol):
    """The start of a chain, and the noise of its steps, float32 [N, C, h, h] each: a `SampleNoise`, for example."""

    def initial(self) -> Tensor:
        """The chain's start."""

    def ahead(self, count: int) -> AbstractContextManager[Callable[[int], Tensor]]:
        """Context with a function for the noise of steps 0..count - 1, called in order."""


class LatentSampler:
    """A model bound to a chain: labels and indices -> latents.

    With a `guide` the model is guided away from that weaker model instead of from its own prediction without a label;
    the guide's attention is never modulated. Both models are set to evaluation mode.
    `network` is called instead of the model: the same model compiled, or with hooks. It computes on `device`,
    by default that of the model's weights. `guide_network` is called instead of the guide.
    `classify` is the classifier of a chain whose `guidance_reference` is the confused class.
    Raises UserError if the chain, the model and the guide are not compatible.
    """

    def __init__(
        self,
        model: DiffusionTransformer,
        chain: ChainConfig,
        num_timesteps: int,
        guide: DiffusionTransformer | None = None,
        *,
        network: ClassModel | None = None,
        guide_network: ClassModel | None = None,
        device: torch.device | None = None,
        classify: Classify | None = None,
    ) -> None:
        self.model, self.guide, self.chain = model, guide, chain
        self.network: ClassModel = model if network is None else network
        self._guide_network = guide if guide_network is None else guide_network
        self._device, self._classify = device, classify
        self.objective = objective_of_model(model.config)
        check_guidance(chain, model.config, num_timesteps)
        progress = partial(self.objective.progress, num_timesteps=num_timesteps)
        self.growth = None if chain.cfg_power is None else (chain.cfg_power, progress)
        if guide is model:
            raise UserError(
                f"the guide is {model.config.name} itself, which has no effect; use a weaker model as guide"
            )
        if guide is not None:
            check_guide(chain, model.config, guide.config)
        if self._is_confused and classify is None:
            raise UserError(
                "guidance_reference is confused, which needs a classifier, and there is none: use a registered version "
                "that was evaluated so, pass --classifier to `edt evaluate`, or set guidance_reference=null"
            )
        self._schedule = self.objective.schedule(num_timesteps) if self._is_confused else None
        self.steps = self.objective.chain(num_timesteps, SamplerChoice.of(chain), chain.num_sampling_steps)
        self.amm_blocks = resolved_amm_blocks(chain, model.built_config)
        self.caches: list[FeatureCache] = []  # of the last chain: the model's, then the guide's
        self._set_modes()

    def __call__(
        self,
        labels: Sequence[int] | NDArray[np.int64],
        seed: int,
        indices: Sequence[int] | NDArray[np.int64],
        progress: Progress | None = None,
    ) -> Tensor:
        """Scaled latents of the samples of these labels and indices, float32 [N, C, h, h] on the model's device.

        A sample's noise is a function of (seed, index). progress(done, total) is called after each step of the chain.
        Raises UserError for labels that the model does not have, SamplesNotFiniteError for a result that is not finite.
        """
        indices = [int(index) for index in indices]
        noise = SampleNoise(seed, indices, self.latent_shape, self.device)
        return self.from_noise(labels, noise, indices, progress)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """The shape of one sample, (C, h, h)."""
        config = self.model.config
        return config.in_channels, config.latent_size, config.latent_size

    @property
    def device(self) -> torch.device:
        """The device of the chain."""
        return next(self.model.parameters()).device if self._device is None else self._device

    def from_noise(
        self,
        labels: Sequence[int] | NDArray[np.int64],
        noise: Noise,
        indices: Sequence[int],
        progress: Progress | None = None,
        solver: Solver | None = None,
    ) -> Tensor:
        """As calling the sampler, but from any noise. `indices` are for errors only. A solver replaces the chain."""
        y = torch.from_numpy(checked_labels(labels, len(indices), self.model.config.num_classes)).to(self.device)
        self._set_modes()
        self.caches = []
        # The chain itself is not autocast. The outer autocast context keeps the bf16 copies of the weights until its
        # end: without it they would be rebuilt at each step.
        with (
            constant_weights(),
            self._autocast(),
            torch.autocast(self.device.type, enabled=False),
            ExitStack() as stack,
        ):
            latents = self._run(y, noise, progress, solver, stack)
        _check_finite(latents, indices)
        return latents

    def _run(
        self, y: Tensor, noise: Noise, progress: Progress | None, solver: Solver | None, stack: ExitStack
    ) -> Tensor:
        chain, guide = self.chain, None
        model, reference = self._cached(self.network, self.model, stack)
        if self.guide is not None and self._guide_network is not None:
            guide, reference = self._cached(self._guide_network, self.guide, stack)
        model_fn = guided(
            model,
            y,
            self.model.config.num_classes,
            chain.cfg_scale,
            chain.guidance_channels,
            interval=chain.guidance_interval,
            growth=self.growth,
            guide=guide,
            confused=Confused(self._probabilities, reference, guide is not None) if self._is_confused else None,
            whole_output=self.objective.of_tokens,
        )
        initial = noise.initial()
        if solver is not None:
            return solver(model_fn, initial, progress)
        if not self.steps.noises:
            return self.steps.run(model_fn, initial, None, progress)
        with noise.ahead(self.steps.noises) as step_noise:
            return self.steps.run(model_fn, initial, step_noise, progress)

    @property
    def _is_confused(self) -> bool:
        return self.chain.guidance_reference == "confused" and self.chain.cfg_scale != 1.0

    def _probabilities(self, x: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The classifier's probabilities [N, K] for the data that the model's output at (x, t) implies."""
        assert self._classify is not None  # checked where the chain needs it
        return self._classify(self.objective.denoised(self._schedule, output, x, t))

    def _cached(
        self, network: ClassModel, model: DiffusionTransformer, stack: ExitStack
    ) -> tuple[ClassModel, ClassModel]:
        """The network in the chain's precision, with a cache of its own that is attached until the stack's end.

        And the same for calls with labels that change along the chain, which share no features with the others.
        """
        call = self._in_precision(network, model)
        if self.chain.cache is None:
            return call, call
        cache = stack.enter_context(FeatureCache(self.chain.cache).attached(model))
        self.caches.append(cache)

        def cached(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            cache.begin(len(x))
            return call(x, t, y)

        def changing(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            cache.begin(len(x), "reference", y)
            return call(x, t, y)

        return cached, changing

    def _in_precision(self, network: ClassModel, model: DiffusionTransformer) -> ClassModel:
        """The network in the chain's precision; it gets latents in the dtype of its weights."""
        dtype = next(model.parameters()).dtype

        def call(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            with self._autocast():
                output: Tensor = network(x.to(dtype), t, y)
            return output

        return call

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.chain.precision == "bf16")

    def _set_modes(self) -> None:
        """Set evaluation mode and the chain's AMM, since another sampler of the same model may have set its own."""
        radius, rows = resolved_amm_radius(self.chain, self.model.built_config)
        self.model.eval().set_amm(self.amm_blocks, radius=radius, radius_rows=rows, kernel=self.chain.amm_kernel)
        if self.guide is not None:
            self.guide.eval().set_amm(())


def resolved_amm_blocks(chain: ChainConfig, model: ModelConfig) -> tuple[int, ...]:
    """The blocks whose attention is modulated. Raises UserError for a placement that the model does not have."""
    return chosen_amm_blocks(model, chain.amm_blocks, chain.cfg_scale)


def resolved_amm_radius(chain: ChainConfig, model: ModelConfig) -> tuple[float | None, int | None]:
    """`amm_radius` and `amm_radius_rows`: the chain's, or with the model's blocks and neither of them, the model's."""
    if chain.amm_blocks == "model" and chain.amm_radius is None and chain.amm_radius_rows is None:
        return model.amm_radius, model.amm_radius_rows
    return chain.amm_radius, chain.amm_radius_rows


def check_guidance(chain: ChainConfig, model: ModelConfig, num_timesteps: int) -> None:
    """Raise UserError for guided channels that the latents do not have, and for an interval outside the times.

    And for what the model's objective refuses.
    """
    objective_of_model(model).check_chain(chain, model)
    _check_reference(chain, model)
    end_of_time = objective_of_model(model).end_of_time(num_timesteps)
    channels, interval = chain.guidance_channels, chain.guidance_interval
    if chain.cfg_scale != 1.0 and channels is not None and channels > model.in_channels:
        raise UserError(
            f"guidance_channels is {channels}, but the latents of {model.name} have {model.in_channels} channels; "
            f"use up to {model.in_channels}, or null for all"
        )
    if interval is None:
        return
    if interval[0] >= end_of_time:
        raise UserError(
            f"guidance_interval {list(interval)} begins after the last timestep: the model's times are from 0 to below "
            f"{end_of_time:g}; begin below that, or use cfg_scale 1 for no guidance"
        )
    if objective_of_model(model).continuous and interval[1] > end_of_time:
        raise UserError(
            f"guidance_interval {list(interval)} ends above {end_of_time:g}, but the time of {model.name} is from 0 "
            f"(noise) to {end_of_time:g} (data); use an interval within it"
        )


def _check_reference(chain: ChainConfig, model: ModelConfig) -> None:
    """Raise UserError for a confused class of masked tokens, or of a model of one class."""
    if chain.guidance_reference is None:
        return
    if objective_of_model(model).of_tokens:
        raise UserError(
            f"guidance_reference is confused, which classifies the image that a prediction implies, but {model.name} "
            "predicts codes; set guidance_reference=null"
        )
    if model.num_classes < 2:
        raise UserError(
            f"guidance_reference is confused, but {model.name} has one class, which nothing can be confused with; set "
            "guidance_reference=null"
        )


def check_guide(chain: ChainConfig, model: ModelConfig, guide: ModelConfig) -> None:
    """Raise UserError unless a model can be guided away from another one by a chain."""
    if chain.cfg_scale == 1.0:
        raise UserError("a guide with cfg_scale 1 has no effect; set cfg_scale above 1, or leave the guide out")
    check_same_space(model, guide)


def check_same_space(model: ModelConfig, guide: ModelConfig) -> None:
    """Raise UserError, with both values, unless a model and its guide have the same latents, classes and objective."""
    inputs, guide_inputs = _interface(model), _interface(guide)
    if inputs != guide_inputs:
        raise UserError(
            f"the guide {guide.name} takes {guide_inputs}, but {model.name} takes {inputs}; "
            "use a guide that was trained on the same latents and classes"
        )
    own_statistics, statistics = ((c.latents_mean, c.latents_std) for c in (model, guide))
    if own_statistics != statistics:
        raise UserError(
            f"the guide {guide.name} was trained on latents that are normalised by channel in another way than "
            f"those of {model.name}; use a guide that was trained with the same train.latent_norm and latents"
        )
    if (own := model.objective) != (other := guide.objective):
        raise UserError(
            f"the guide {guide.name} predicts {other}, but {model.name} predicts {own}, and guidance "
            "takes the difference of the two; use a guide that was trained with the same train.objective"
        )


def _interface(config: ModelConfig) -> str:
    side = config.latent_size
    return f"latents of {config.in_channels} x {side} x {side} and {config.num_classes} classes"


def checked_labels(labels: Sequence[int] | NDArray[np.int64], count: int, num_classes: int) -> NDArray[np.int64]:
    """Labels as int64 [count]. Raises UserError for invalid labels."""
    array = np.asarray(labels)
    if array.size == 0 or array.ndim != 1 or array.dtype.kind not in "iu":
        raise UserError(
            f"invalid class labels {array.tolist()}; use a list of at least one label in 0..{num_classes - 1}"
        )
    wrong = array[(array < 0) | (array >= num_classes)]
    if wrong.size:
        raise UserError(f"class labels {wrong[:10].tolist()} do not exist; the model has 0..{num_classes - 1}")
    if len(array) != count:
        raise UserError(f"{len(array)} class labels for {count} samples; use one label for each index")
    return array.astype(np.int64)


def _check_finite(latents: Tensor, indices: Sequence[int]) -> None:
    """Raise SamplesNotFiniteError for infinities and NaN. In a chain, the host waits for the device only here."""
    finite = torch.isfinite(latents).flatten(1).all(dim=1).tolist()
    bad = [index for index, good in zip(indices, finite, strict=True) if not good]
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        raise SamplesNotFiniteError(
            f"{len(bad)} of {len(indices)} samples ({shown}) are not finite: the model predicts infinities or NaN for "
            "them; try precision fp32, a lower cfg_scale, or another checkpoint"
        )
