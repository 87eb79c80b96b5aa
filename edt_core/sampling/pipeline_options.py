"""What a call of the pipeline takes: fields of a sampling configuration, diffusers' names for them, and noise.

Shapes: N images, C latent channels, h side of the latents.
"""

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from pydantic import ValidationError
from torch import Tensor

from edt_core.config import ChainConfig
from edt_core.diffusion import SampleNoise
from edt_core.errors import UserError
from edt_core.sampling.schedulers import Generators

PROTOCOL = tuple(ChainConfig.model_fields)  # the fields of a sampling configuration that a pipeline keeps
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_SAME = {"num_inference_steps": "num_sampling_steps", "guidance_scale": "cfg_scale"}  # by diffusers' names
_NOT_SUPPORTED = {
    "callback_on_step_end": "nothing is called between steps; a progress bar shows them (set_progress_bar_config)",
    "eta": "sampler='ddim' draws no noise (eta 0), sampler='ancestral' draws that of the learned variance",
    "height": "the model makes images of one size, see pipeline.transformer.edt.config.image_size",
    "negative_prompt": "the model is conditioned on classes; guidance_scale moves images away from no class",
    "num_images_per_prompt": "give a label once for each image, as class_labels=[3, 3]",
    "prompt": "the model is conditioned on classes; give class_labels, indices of pipeline.config.classes",
    "width": "the model makes images of one size, see pipeline.transformer.edt.config.image_size",
}


def call_chain(
    protocol: Mapping[str, Any],
    guidance_scale: float | None,
    num_inference_steps: int | None,
    options: Mapping[str, Any],
) -> ChainConfig:
    """The sampling configuration of a call: the pipeline's protocol, with what is given in place of its fields.

    Raises UserError for options that do not exist or do not fit, and for one option given by two names.
    """
    for name, remedy in _NOT_SUPPORTED.items():
        if name in options:
            raise UserError(f"the option {name} of diffusers is not supported: {remedy}")
    theirs = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
    theirs = {name: value for name, value in theirs.items() if value is not None}
    if twice := [name for name in theirs if _SAME[name] in options]:
        raise UserError(f"{twice[0]} and {_SAME[twice[0]]} are names of one option; give one of them")
    if isinstance(guidance_scale, Real) and 0 <= guidance_scale < 1:
        theirs["guidance_scale"] = 1.0  # for diffusers all up to 1 is no guidance
    renamed = {_SAME[name]: name for name in theirs}
    return chain_config({**protocol, **options, **{_SAME[name]: value for name, value in theirs.items()}}, renamed)


def chain_config(fields: Mapping[str, Any], renamed: Mapping[str, str] | None = None) -> ChainConfig:
    """A sampling protocol from its fields. Raises UserError for fields that do not exist or do not fit.

    `renamed`: what a user calls a field, by the field.
    """
    if unknown := sorted(set(fields) - set(PROTOCOL)):
        raise UserError(f"unknown options {unknown}; known: {', '.join((*PROTOCOL, *sorted(_SAME)))}")
    try:
        return ChainConfig.model_validate(dict(fields))
    except ValidationError as error:
        raise UserError("\n".join(_problem(problem, renamed or {}) for problem in error.errors())) from error


def _problem(problem: Any, renamed: Mapping[str, str]) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    name = problem["loc"][0]
    return f"option {renamed.get(name, name)!r}: {message} (got {problem['input']!r})"


def check_output_type(output_type: Any) -> None:
    """Raise UserError for what is no output type."""
    if output_type not in OUTPUT_TYPES:
        raise UserError(f"output_type is {output_type!r}; use one of {', '.join(map(repr, OUTPUT_TYPES))}")


@dataclass(frozen=True)
class CallNoise:
    """The noise of one call: that of a seed, or drawn from generators as diffusers does; and the start, where given.

    `shape` is that of the batch, [N, C, h, h]. With one generator for the batch an image's noise depends on the batch.
    """

    seed: int
    generator: Generators
    start: Tensor | None
    shape: tuple[int, int, int, int]
    device: torch.device

    def initial(self) -> Tensor:
        """Where the chain starts, float32 [N, C, h, h]."""
        if self.start is not None:
            return self.start.to(self.device, torch.float32)
        return self._seeded().initial() if self.generator is None else self._drawn()

    @contextmanager
    def _drawn_ahead(self) -> Iterator[Callable[[int], Tensor]]:
        yield lambda _step: self._drawn()

    def ahead(self, count: int) -> AbstractContextManager[Callable[[int], Tensor]]:
        """The noises of steps 0..count - 1, float32 [N, C, h, h], asked for in order."""
        return self._seeded().ahead(count) if self.generator is None else self._drawn_ahead()

    def generators(self) -> Generators:
        """What a scheduler of diffusers draws from: without a generator one of each image, by seed and place."""
        if self.generator is not None:
            return self.generator
        seeds = [np.random.SeedSequence(self.seed, spawn_key=(i,)).generate_state(1)[0] for i in range(self.shape[0])]
        return [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def _seeded(self) -> SampleNoise:
        return SampleNoise(self.seed, range(self.shape[0]), self.shape[1:], self.device)

    def _drawn(self) -> Tensor:
        noise: Tensor = randn_tensor(self.shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return noise


def call_noise(
    seed: int | None,
    generator: Generators,
    latents: Tensor | None,
    shape: tuple[int, int, int, int],
    device: torch.device,
) -> CallNoise:
    """The noise of a call, for a batch of `shape` [N, C, h, h]. Raises UserError for what does not fit."""
    if seed is not None and generator is not None:
        raise UserError(f"seed is {seed} and there is a generator as well; give one of them")
    return CallNoise(
        _checked_seed(seed), _checked_generator(generator, shape[0]), _checked_start(latents, shape), shape, device
    )


def _checked_seed(seed: Any) -> int:
    try:
        number = 0 if seed is None else operator.index(seed)
    except TypeError:
        number = -1
    if number < 0 or isinstance(seed, bool):
        raise UserError(f"seed is {seed!r}; give a whole number from 0 on")
    return number


def _checked_generator(generator: Any, count: int) -> Generators:
    several = isinstance(generator, list | tuple)
    given = list(generator) if several else [generator]
    if generator is not None and not all(isinstance(one, torch.Generator) for one in given):
        kinds = sorted({type(one).__name__ for one in given})
        raise UserError(f"generator is {', '.join(kinds)}; give a torch.Generator, or a list with one for each image")
    if several and len(given) != count:
        raise UserError(f"{len(given)} generators for {count} images; give one for each image, or one alone")
    return given if several else generator


def _checked_start(latents: Any, shape: tuple[int, ...]) -> Tensor | None:
    if latents is None:
        return None
    if not isinstance(latents, Tensor) or tuple(latents.shape) != shape or not latents.is_floating_point():
        found = f"{latents.dtype} {list(latents.shape)}" if isinstance(latents, Tensor) else type(latents).__name__
        raise UserError(
            f"latents is {found}; give the noise that the images start from, a floating-point tensor of {list(shape)}"
        )
    return latents
