"""An EDT as a diffusers pipeline: the folder that is registered, pulled, and loaded elsewhere.

`EDTPipeline.from_pretrained(folder)`, or `DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder,
trust_remote_code=True)`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from edt_core.alignment import align_weights
from edt_core.autoencoder import decode_to_pixels
from edt_core.config import ChainConfig
from edt_core.data.scale import LatentScale, scale_of
from edt_core.errors import UserError
from edt_core.generation import LatentSampler
from edt_core.models import DiffusionTransformer, ModelConfig, build_model

PROTOCOL = tuple(ChainConfig.model_fields)  # the fields of a sampling configuration that a pipeline keeps
_PIPELINE_FILE = "pipeline.py"
_PIPELINE_CODE = (
    '"""The class of this folder."""\n\nfrom edt_core.pipeline import EDTPipeline\n\n__all__ = ["EDTPipeline"]\n'
)


class EDTTransformer(ModelMixin, ConfigMixin):
    """A model that diffusers can store: its ModelConfig as the diffusers config, its weights below `edt.`."""

    @register_to_config
    def __init__(self, edt_config: dict[str, Any]) -> None:
        super().__init__()
        self.edt = build_model(ModelConfig.from_dict(edt_config))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """latents [N, C, h, h], timesteps [N], labels [N] -> noise and variance [N, 2C, h, h]."""
        output: Tensor = self.edt(x, t, y)
        return output


class EDTPipelineOutput(BaseOutput):
    """`images`: PIL images, or uint8 [N, S, S, 3] with output_type="np"."""

    images: list[Image.Image] | NDArray[np.uint8]


class EDTPipeline(DiffusionPipeline):
    """Class labels -> images, with the sampler the model was evaluated with."""

    def __init__(
        self,
        transformer: EDTTransformer,
        vae: AutoencoderKL | AutoencoderTiny,
        scheduler: DDPMScheduler,
        classes: list[str] | None = None,
        protocol: dict[str, Any] | None = None,
        class_counts: list[int] | None = None,
        latent_scale: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check_scale(vae, latent_scale)
        align_weights(transformer)  # diffusers maps their files
        align_weights(vae)
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        # A folder of an older version has fewer fields; they get the values that were fixed then.
        kept = chain_config(protocol or {}).model_dump(mode="json")
        counts = None if class_counts is None else list(class_counts)
        self.register_to_config(classes=list(classes or []), protocol=kept, class_counts=counts)
        if latent_scale is not None:
            self.register_to_config(latent_scale=dict(latent_scale))

    @torch.no_grad()
    def __call__(
        self, class_labels: Sequence[int], *, seed: int = 0, output_type: str = "pil", **protocol: Any
    ) -> EDTPipelineOutput:
        """One image a label. Image i is a function of (seed, i, label), whatever else is in the call.

        `protocol`: fields of ChainConfig, as sampler, cfg_scale or amm_blocks, with num_inference_steps for
        num_sampling_steps; what is not given is as the model was evaluated. Raises UserError for labels that the
        model does not have, and for options that do not exist or do not fit.
        """
        if "num_inference_steps" in protocol:  # diffusers' name
            protocol["num_sampling_steps"] = protocol.pop("num_inference_steps")
        chain = chain_config({**self.config.protocol, **protocol})
        sampler = LatentSampler(self.transformer.edt, chain, self.scheduler.config.num_train_timesteps)
        latents = sampler(class_labels, seed, range(len(class_labels)))
        pixels = decode_to_pixels(self.vae, latents)
        return EDTPipelineOutput(images=pixels if output_type == "np" else [Image.fromarray(p) for p in pixels])


def _check_scale(vae: AutoencoderKL | AutoencoderTiny, trained: Mapping[str, Any] | None) -> None:
    """Raise UserError unless the latents of a model are centred as its autoencoder's configuration says.

    `trained` is what `save_pipeline` wrote of that. Folders of versions that ignored it have nothing.
    """
    scale = scale_of(vae)
    if LatentScale.of({**(trained or {}), "scaling_factor": scale.scaling_factor}) == scale:
        return
    if trained is None:
        raise UserError(
            f"the autoencoder of this pipeline has {scale.beyond_factor()}, which the version that trained the model "
            "ignored: decoded with it, its images would be wrong. Remove these settings from vae/config.json to "
            "decode as the model was trained, or train it again"
        )
    raise UserError(
        f"the model was trained on latents with {dict(trained)}, and the autoencoder of this pipeline has "
        f"{scale.record()}; use the autoencoder of its training"
    )


def chain_config(fields: Mapping[str, Any]) -> ChainConfig:
    """A sampling protocol from its fields. Raises UserError for fields that do not exist or do not fit."""
    if unknown := sorted(set(fields) - set(PROTOCOL)):
        raise UserError(f"unknown options {unknown}; known: {', '.join(PROTOCOL)}, num_inference_steps")
    try:
        return ChainConfig.model_validate(dict(fields))
    except ValidationError as error:
        raise UserError("\n".join(_problem(problem) for problem in error.errors())) from error


def _problem(problem: Any) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    return f"option {problem['loc'][0]!r}: {message} (got {problem['input']!r})"


def save_pipeline(
    folder: Path,
    edt: DiffusionTransformer,
    vae: AutoencoderKL | AutoencoderTiny,
    *,
    num_timesteps: int,
    classes: Sequence[str],
    protocol: dict[str, Any],
    class_counts: Sequence[int] | None = None,
) -> None:
    """Write a diffusers pipeline folder: transformer, vae, scheduler, class names, and how the model was sampled.

    `class_counts` [K]: images of each class in the training, where that is known.
    """
    transformer = EDTTransformer(edt_config=edt.built_config.to_dict())
    transformer.edt.load_state_dict(edt.state_dict())
    scheduler = DDPMScheduler(
        num_train_timesteps=num_timesteps,
        beta_schedule="linear",
        beta_start=0.0001 * 1000 / num_timesteps,
        beta_end=0.02 * 1000 / num_timesteps,
        variance_type="learned_range",
        clip_sample=False,
    )
    counts = None if class_counts is None else list(class_counts)
    scale = scale_of(vae)
    centred = None if scale.is_plain else scale.record()
    pipeline = EDTPipeline(transformer, vae, scheduler, list(classes), protocol, counts, centred)
    pipeline.save_pretrained(folder, safe_serialization=True)
    # What DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder) imports.
    (folder / _PIPELINE_FILE).write_text(_PIPELINE_CODE, encoding="utf-8")
