"""The options of a pipeline call: fields of a sampling configuration, diffusers' names for them, and noise.

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

PROTOCOL = tuple(ChainConfig.model_fields)  # the fields of a sampling configuration that a pipeline stores
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_SAME = {"num_inference_steps": "num_sampling_steps", "guidance_scale": "cfg_scale"}  # diffusers' name -> field
_NOT_SUPPORTED = {
    "callback_on_step_end": "there are no callbacks between steps, only a progress bar (set_progress_bar_config)",
    "eta": "sampler='ddim' draws no noise (eta 0), sampler='ancestral' draws noise of the learned variance",
    "height": "the model makes images of one size, see pipeline.transformer.edt.config.image_size",
    "negative_prompt": "the model is conditioned on classes; guidance_scale moves images away from no class",
    "num_images_per_prompt": "repeat a label for each image, as in class_labels=[3, 3]",
    "prompt": "the model is conditioned on classes; use class_labels, indices of pipeline.config.classes",
    "width": "the model makes images of one size, see pipeline.transformer.edt.config.image_size",
}


def call_chain(
    protocol: Mapping[str, Any],
    guidance_scale: float | None,
    num_inference_steps: int | None,
    options: Mapping[str, Any],
) -> ChainConfig:
    """The sampling configuration of a call: the pipeline's protocol, overridden by the call's options.

    Raises UserError for unknown or invalid options, and for an option passed by both its names.
    """
    for name, remedy in _NOT_SUPPORTED.items():
        if name in options:
            raise UserError(f"the option {name} of diffusers is not supported: {remedy}")
    arguments = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    if twice := [name for name in arguments if _SAME[name] in options]:
        raise UserError(f"{twice[0]} and {_SAME[twice[0]]} are names of the same option; use one of them")
    if isinstance(guidance_scale, Real) and 0 <= guidance_scale < 1:
        arguments["guidance_scale"] = 1.0  # in diffusers, values up to 1 mean no guidance
    renamed = {_SAME[name]: name for name in arguments}
    return chain_config({**protocol, **options, **{_SAME[name]: value for name, value in arguments.items()}}, renamed)


def chain_config(fields: Mapping[str, Any], renamed: Mapping[str, str] | None = None) -> ChainConfig:
    """A sampling protocol from its fields. Raises UserError for unknown or invalid fields.

    `renamed`: field -> the name that the user passed it by.
    """
    if unknown := sorted(set(fields) - set(PROTOCOL)):
        raise UserError(f"unknown options {unknown}; known: {', '.join((*PROTOCOL, *sorted(_SAME)))}")
    try:
        return ChainConfig.model_validate(dict(fields))
    except ValidationError as error:
        raise UserError("\n".join(_problem(problem, renamed or {}) for problem in error.errors())) from error


def _problem(problem: Any, renamed: Mapping[str, str]) -> str:
    message: str = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:  # of several fields together, which the message names
        return message
    name = problem["loc"][0]
    return f"option {renamed.get(name, name)!r}: {message} (got {problem['input']!r})"


def check_output_type(output_type: Any) -> None:
    """Raise UserError for an unknown output type."""
    if output_type not in OUTPUT_TYPES:
        raise UserError(f"output_type is {output_type!r}; use one of {', '.join(map(repr, OUTPUT_TYPES))}")


@dataclass(frozen=True)
class CallNoise:
    """The noise of one call: of a seed, or drawn from generators as in diffusers; `start` replaces the initial noise.

    `shape` is that of the batch, [N, C, h, h]. With one generator for the batch an image's noise depends on the batch.
    """

    seed: int
    generator: Generators
    start: Tensor | None
    shape: tuple[int, int, int, int]
    device: torch.device

    def initial(self) -> Tensor:
        """The chain's start, float32 [N, C, h, h]."""
        if self.start is not None:
            return self.start.to(self.device, torch.float32)
        return self._seed_noise().initial() if self.generator is None else self._draw()

    @contextmanager
    def _draw_ahead(self) -> Iterator[Callable[[int], Tensor]]:
        yield lambda _step: self._draw()

    def ahead(self, count: int) -> AbstractContextManager[Callable[[int], Tensor]]:
        """Context with a function for the noise of steps 0..count - 1, float32 [N, C, h, h], called in order."""
        return self._seed_noise().ahead(count) if self.generator is None else self._draw_ahead()

    def generators(self) -> Generators:
        """The generators for a diffusers scheduler: without `generator` one for each image, by seed and position."""
        if self.generator is not None:
            return self.generator
        seeds = [np.random.SeedSequence(self.seed, spawn_key=(i,)).generate_state(1)[0] for i in range(self.shape[0])]
        return [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def _seed_noise(self) -> SampleNoise:
        return SampleNoise(self.seed, range(self.shape[0]), self.shape[1:], self.device)

    def _draw(self) -> Tensor:
        noise: Tensor = randn_tensor(self.shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return noise


def call_noise(
    seed: int | None,
    generator: Generators,
    latents: Tensor | None,
    shape: tuple[int, int, int, int],
    device: torch.device,
) -> CallNoise:
    """The noise of a call, for a batch of `shape` [N, C, h, h]. Raises UserError for invalid arguments."""
    if seed is not None and generator is not None:
        raise UserError(f"seed is {seed} and generator is set too; use one of them")
    return CallNoise(
        _valid_seed(seed), _valid_generator(generator, shape[0]), _valid_start(latents, shape), shape, device
    )


def _valid_seed(seed: Any) -> int:
    try:
        number = 0 if seed is None else operator.index(seed)
    except TypeError:
        number = -1
    if number < 0 or isinstance(seed, bool):
        raise UserError(f"seed is {seed!r}; use an integer of at least 0")
    return number


def _valid_generator(generator: Any, count: int) -> Generators:
    several = isinstance(generator, list | tuple)
    generators = list(generator) if several else [generator]
    if generator is not None and not all(isinstance(one, torch.Generator) for one in generators):
        kinds = sorted({type(one).__name__ for one in generators})
        raise UserError(f"generator is {', '.join(kinds)}; use a torch.Generator, or a list with one for each image")
    if several and len(generators) != count:
        raise UserError(f"{len(generators)} generators for {count} images; use one for each image, or a single one")
    return generators if several else generator


def _valid_start(latents: Any, shape: tuple[int, ...]) -> Tensor | None:
    if latents is None:
        return None
    if not isinstance(latents, Tensor) or tuple(latents.shape) != shape or not latents.is_floating_point():
        kind = f"{latents.dtype} {list(latents.shape)}" if isinstance(latents, Tensor) else type(latents).__name__
        raise UserError(
            f"latents is {kind}; use the noise that the images start from, a floating-point tensor of {list(shape)}"
        )
    return latents
