"""An EDT as a diffusers pipeline: the folder that is registered, pulled, and loaded elsewhere.

`EDTPipeline.from_pretrained(folder)`, or `DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder)`.
"""

from collections.abc import Sequence
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
from torch import Tensor

from edt_core.autoencoder import decode_to_pixels
from edt_core.diffusion import SampleNoise, guided, linear_schedule, respace, sample
from edt_core.errors import UserError
from edt_core.models import EDT, ModelConfig, paper_amm_blocks

DEFAULT_PROTOCOL: dict[str, Any] = {
    "num_sampling_steps": 250,
    "sampler": "ancestral",
    "cfg_scale": 1.0,
    "guidance_channels": 3,
    "amm_blocks": [],
}
PROTOCOL = tuple(DEFAULT_PROTOCOL)  # the fields of a sampling configuration that a pipeline keeps
_PIPELINE_FILE = "pipeline.py"
_PIPELINE_CODE = (
    '"""The class of this folder."""\n\nfrom edt_core.pipeline import EDTPipeline\n\n__all__ = ["EDTPipeline"]\n'
)


class EDTTransformer(ModelMixin, ConfigMixin):
    """An EDT that diffusers can store: its ModelConfig as the diffusers config, its weights below `edt.`."""

    @register_to_config
    def __init__(self, edt_config: dict[str, Any]) -> None:
        super().__init__()
        self.edt = EDT(ModelConfig.from_dict(edt_config))

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
        classes: Sequence[str] = (),
        protocol: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(classes=list(classes), protocol={**DEFAULT_PROTOCOL, **(protocol or {})})

    @torch.no_grad()
    def __call__(
        self, class_labels: Sequence[int], *, seed: int = 0, output_type: str = "pil", **protocol: Any
    ) -> EDTPipelineOutput:
        """One image a label. Image i is a function of (seed, i, label), whatever else is in the call.

        `protocol`: num_inference_steps, sampler ("ancestral" or "ddim"), cfg_scale, guidance_channels (None for all)
        and amm_blocks (0-based, or "paper"); what is not given is as the model was evaluated. Raises UserError for
        labels that the model does not have and for unknown options.
        """
        edt = self.transformer.edt.eval()
        wrong = [label for label in class_labels if not 0 <= label < edt.config.num_classes]
        if wrong or not len(class_labels):
            raise UserError(f"class labels {wrong}: the model has 0..{edt.config.num_classes - 1}; give at least one")
        chosen = self._protocol(protocol)
        scale, blocks = chosen["cfg_scale"], chosen["amm_blocks"]
        named = paper_amm_blocks(edt.config.name, scale, edt.config.image_size) if blocks == "paper" else blocks
        edt.set_amm(tuple(named))
        shape = (edt.config.in_channels, edt.config.latent_size, edt.config.latent_size)
        noise = SampleNoise(seed, range(len(class_labels)), shape, self.device)
        y = torch.tensor(list(class_labels), device=self.device)
        model_fn = guided(edt, y, edt.config.num_classes, scale, chosen["guidance_channels"])
        schedule = respace(linear_schedule(self.scheduler.config.num_train_timesteps), chosen["num_sampling_steps"])
        latents = sample(model_fn, noise.initial(), schedule, chosen["sampler"], noise=noise)
        pixels = decode_to_pixels(self.vae, latents)
        return EDTPipelineOutput(images=pixels if output_type == "np" else [Image.fromarray(p) for p in pixels])

    def _protocol(self, given: dict[str, Any]) -> dict[str, Any]:
        """The stored protocol with what was given over it; `num_inference_steps` is diffusers' name of the steps."""
        if "num_inference_steps" in given:
            given = {**given, "num_sampling_steps": given["num_inference_steps"]}
            del given["num_inference_steps"]
        if unknown := sorted(set(given) - set(PROTOCOL)):
            raise UserError(f"unknown options {unknown}; known: {', '.join(PROTOCOL)}, num_inference_steps")
        return {**self.config.protocol, **given}


def save_pipeline(
    folder: Path,
    edt: EDT,
    vae: AutoencoderKL | AutoencoderTiny,
    *,
    num_timesteps: int,
    classes: Sequence[str],
    protocol: dict[str, Any],
) -> None:
    """Write a diffusers pipeline folder: transformer, vae, scheduler, class names, and how the model was sampled."""
    transformer = EDTTransformer(edt_config=edt.config.to_dict())
    transformer.edt.load_state_dict(edt.state_dict())
    scheduler = DDPMScheduler(
        num_train_timesteps=num_timesteps,
        beta_schedule="linear",
        beta_start=0.0001 * 1000 / num_timesteps,
        beta_end=0.02 * 1000 / num_timesteps,
        variance_type="learned_range",
        clip_sample=False,
    )
    pipeline = EDTPipeline(transformer, vae, scheduler, classes, protocol)
    pipeline.save_pretrained(folder, safe_serialization=True)
    # What DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder) imports.
    (folder / _PIPELINE_FILE).write_text(_PIPELINE_CODE)
