"""The subject of an evaluation benchmark: networks with random weights, and the protocol that all sides share."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from edt_core.config import ChainConfig, SampleConfig
from edt_core.evaluation.extractors.inception import InceptionNetwork
from edt_core.models import DiffusionTransformer, ModelConfig, build_model, model_config
from edt_core.store.artifact import Artifact, ArtifactWriter, Source
from edt_core.store.folder import Folder, sha256_file
from edt_core.store.layout import EMA_WEIGHTS, MODEL_CONFIG
from jobs.stages.autoencoder import FOLDER

FULL_STEPS = 250  # of a published evaluation
NUM_TIMESTEPS = 1000
CFG_SCALE, GUIDED_CHANNELS = 1.5, 3


@dataclass(frozen=True)
class EvalSubject:
    """The subject of a benchmark: a named model at an image size, with `num_images` in units of `unit_size`.

    Sampling alone is measured with `batch_size` images. The autoencoder has the channels of Stable Diffusion's.
    """

    model: str = "EDT-S/2"
    image_size: int = 256
    batch_size: int = 8
    num_images: int = 8
    unit_size: int = 4
    steps: int = 20
    autoencoder_channels: tuple[int, ...] = (128, 256, 512, 512)

    @classmethod
    def on(
        cls, device: str, model: str, image_size: int, num_images: int | None = None, scale: float = 1
    ) -> "EvalSubject":
        """A subject that takes some minutes on a device; a `scale` below 1 means fewer images and steps."""
        images, unit, steps = (256, 64, FULL_STEPS) if device == "cuda" else (8, 4, 20)
        images = max(2, int((num_images or images) * min(scale, 1)))
        unit = min(unit, -(-images // 2))  # at least two units, so that their stages overlap
        return cls(model, image_size, 2 * unit, images, unit, max(2, int(steps * min(scale, 1))))

    @property
    def model_config(self) -> ModelConfig:
        return model_config(self.model, self.image_size)

    def sample_config(self, precision: str, device: torch.device) -> SampleConfig:
        return SampleConfig(
            **chain_config(precision, self.steps).model_dump(),
            num_samples=self.num_images,
            unit_size=self.unit_size,
            keep_images=1,  # almost none, as in an evaluation of 50,000 samples, which keeps 100
            num_cpus_per_worker=torch.get_num_threads(),
            num_gpus_per_worker=float(device.type == "cuda"),
        )


def chain_config(precision: str, steps: int) -> ChainConfig:
    """The sampling that the benchmark measures, with this precision and number of steps."""
    return ChainConfig.model_validate(
        {
            "num_sampling_steps": steps,
            "cfg_scale": CFG_SCALE,
            "guidance_channels": GUIDED_CHANNELS,
            "precision": precision,
        }
    )


class Networks(NamedTuple):
    """A model, an AutoencoderKL and an Inception whose norms are not folded."""

    model: DiffusionTransformer
    autoencoder: Any
    inception: InceptionNetwork


def made_model(config: ModelConfig) -> DiffusionTransformer:
    """A model with random weights. Weights that start at zero are drawn too: they make the output zero."""
    model = build_model(config)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def made_networks(subject: EvalSubject) -> Networks:
    """Networks with random weights, equal at each call, in evaluation mode, on the CPU."""
    from diffusers import AutoencoderKL

    levels = len(subject.autoencoder_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inception = made_model(subject.model_config), InceptionNetwork()
        autoencoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=subject.autoencoder_channels,
            layers_per_block=2,
            latent_channels=4,
            sample_size=subject.image_size,
        )
        for module in inception.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    for network in (model, autoencoder, inception):
        network.eval().requires_grad_(False)
    return Networks(model, autoencoder, inception)


def as_inputs(networks: Networks, work: Path) -> dict[str, Artifact | Source]:
    """The networks as inputs of the job, written below `work`."""
    checkpoint = ArtifactWriter(Folder.at(work / "checkpoint"), "checkpoint", "benchmark")
    checkpoint.write_json(f"step/{MODEL_CONFIG}", networks.model.config.to_dict())
    checkpoint.write(f"step/{EMA_WEIGHTS}", partial(save_file, networks.model.state_dict()))
    autoencoder = ArtifactWriter(Folder.at(work / "autoencoder"), "autoencoder", "benchmark")
    networks.autoencoder.save_pretrained(work / "pretrained")
    autoencoder.add_tree(work / "pretrained", FOLDER)
    weights = work / "inception.pth"
    torch.save(networks.inception.state_dict(), weights)
    return {
        "checkpoint": checkpoint.commit({"num_timesteps": NUM_TIMESTEPS}, {}, {"final": "step"}),
        "autoencoder": autoencoder.commit({}, {}, {}),
        "inception": Source(str(weights), sha256_file(weights)),
    }
