"""A small diffusers pipeline folder whose images depend on the label."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edt_core.autoencoders.autoencoder import build_autoencoder
from edt_core.config import AutoencoderConfig
from edt_core.models import model_config
from edt_core.pipeline import EDTPipeline, save_pipeline
from edt_core.training.state import initial_model


def small_pipeline(folder: Path, name: str = "EDT-Tiny/2", seed: int = 0, **protocol: Any) -> Path:
    """A folder of a model of four classes a to d, sampled in four steps with guidance; the folder."""
    edt = initial_model(model_config(name, 32, 4), 0)
    with torch.no_grad():  # the final layer starts at zero: without this every label gives one image
        for parameter in edt.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    vae = build_autoencoder(AutoencoderConfig(downsample_factor=4, base_channels=8), 32)
    fields = {"num_sampling_steps": 4, "cfg_scale": 2.0, **protocol}
    save_pipeline(folder, edt.eval(), vae, num_timesteps=1000, classes="abcd", protocol=fields)
    return folder


def quiet(pipeline: EDTPipeline) -> EDTPipeline:
    """The pipeline without a progress bar."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tensors(pipeline: EDTPipeline) -> Iterator[Tensor]:
    """All weights and buffers."""
    for module in (pipeline.transformer, pipeline.vae):
        yield from (*module.parameters(), *module.buffers())
