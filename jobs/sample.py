"""sample: draw labelled images from a checkpoint's EMA weights and keep their features, in units of fixed size.

Sample i has class i mod K, and its noise is a function of (seed, i): neither the number of workers nor the order of
units moves a result. Each unit is one file, so a killed run goes on where it was.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from edt_core.artifact import Artifact, ArtifactWriter
from edt_core.config import SampleConfig
from edt_core.errors import UserError
from edt_core.progress import Progress
from edt_core.schema import FEATURE_UNIT
from jobs import autoencoder, classifier
from jobs.cluster import device_name, pooled, require, use_threads
from jobs.verb import Verb

FEATURE_UNITS = FEATURE_UNIT.replace("{:05d}", "*")


class Sampler:
    """Loads EDT, autoencoder and classifier once, then makes one unit after the other."""

    def __init__(self, config: SampleConfig, inputs: Mapping[str, Artifact], out: ArtifactWriter) -> None:
        from edt_core.autoencoder import load_autoencoder
        from edt_core.classifier import Classifier
        from edt_core.diffusion import linear_schedule, respace
        from edt_core.training.checkpoint import ema_model

        use_threads(config.num_cpus_per_worker)
        self.config, self.out = config, out
        self.device = device_name(config.num_gpus_per_worker)
        checkpoint = inputs["checkpoint"]
        self.model = ema_model(checkpoint.directory(checkpoint.counts["final"]), self.device)
        self.model.set_amm(amm_blocks(config, self.model.config))
        self.autoencoder = load_autoencoder(inputs["autoencoder"].directory(autoencoder.FOLDER), self.device)
        self.classifier = Classifier.load(inputs["classifier"].directory(classifier.FOLDER), self.device)
        timesteps = checkpoint.manifest.config["num_timesteps"]
        self.schedule = respace(linear_schedule(timesteps), config.num_sampling_steps)

    def work(self, unit: int) -> int:
        """Make unit number `unit` unless it is there; returns its number of samples."""
        from safetensors.numpy import save

        name = FEATURE_UNIT.format(unit)
        first = unit * self.config.unit_size
        indices = np.arange(first, min(first + self.config.unit_size, self.config.num_samples))
        if self.out.recover(name) is None:
            self.out.write_bytes(name, save(self._make(indices)), len(indices))
        return len(indices)

    def _make(self, indices: Any) -> dict[str, Any]:
        """Labels, features, probabilities, and the first samples' pixels, of the samples of these indices."""
        import torch

        from edt_core.autoencoder import decode_to_pixels
        from edt_core.classifier import classify
        from edt_core.diffusion import SampleNoise, guided, sample

        config, edt = self.config, self.model.config
        labels = indices % edt.num_classes
        shape = (edt.in_channels, edt.latent_size, edt.latent_size)
        noise = SampleNoise(config.seed, indices.tolist(), shape, self.device)
        y = torch.from_numpy(labels).to(self.device)
        model_fn = guided(self.model, y, edt.num_classes, config.cfg_scale, config.guidance_channels)
        latents = sample(model_fn, noise.initial(), self.schedule, config.sampler, noise=noise)
        pixels = decode_to_pixels(self.autoencoder, latents)
        features, probabilities = classify(self.classifier, pixels)
        kept = pixels[indices < config.keep_images]
        tensors = {"indices": indices, "labels": labels, "features": features, "probabilities": probabilities}
        return tensors | ({"images": kept} if len(kept) else {})


def check_autoencoder(inputs: Mapping[str, Artifact]) -> None:
    """Raise UserError unless the latents that were trained on come from the very autoencoder that will decode.

    An autoencoder that was lost and fitted again has its old fingerprint but may have other weights.
    """
    trained_with = inputs["checkpoint"].counts["autoencoder_digest"]
    if trained_with != (here := inputs["autoencoder"].manifest.digest):
        raise UserError(
            f"the checkpoint was trained on latents of autoencoder {trained_with[:12]}, but this one is {here[:12]}: "
            "it was made anew with other weights; remove the manifests of latents and checkpoint to make them anew"
        )


def amm_blocks(config: SampleConfig, edt: Any) -> tuple[int, ...]:
    """The blocks whose attention is modulated: those given, or the paper's for this model and guidance."""
    from edt_core.models import paper_amm_blocks

    if config.amm_blocks == "paper":
        return paper_amm_blocks(edt.name, config.cfg_scale, edt.image_size)
    return config.amm_blocks


def sample_features(
    config: SampleConfig, inputs: Mapping[str, Artifact], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    """Sample from `inputs["checkpoint"]`, decode with `inputs["autoencoder"]`, extract with `inputs["classifier"]`."""
    check_autoencoder(inputs)
    units = -(-config.num_samples // config.unit_size)
    done = 0
    resources = {"num_cpus": config.num_cpus_per_worker, "num_gpus": config.num_gpus_per_worker}
    require("sample", CPU=config.num_cpus_per_worker, GPU=config.num_gpus_per_worker)
    for _, count in pooled(Sampler, config.num_workers, range(units), config, dict(inputs), out, **resources):
        done += count
        progress.update(done, config.num_samples, "samples")
    return {"samples": done, "units": units, "checkpoint_steps": inputs["checkpoint"].counts["steps"]}


def load_units(features: Artifact) -> dict[str, Any]:
    """Every unit joined in order of sample. Raises UserError unless samples 0..n-1 are there once each, in order."""
    from safetensors.numpy import load_file

    units = [load_file(path) for path in features.paths(FEATURE_UNITS)]
    joined = {
        name: np.concatenate([unit[name] for unit in units if name in unit])
        for name in ("indices", "labels", "features", "probabilities", "images")
        if any(name in unit for unit in units)
    }
    if not np.array_equal(joined["indices"], np.arange(features.counts["samples"])):
        raise UserError(
            f"{features.folder.uri} does not hold samples 0..{features.counts['samples'] - 1} once each and in order; "
            "run sample again"
        )
    return joined


VERB = Verb("sample", "features", 1, SampleConfig, sample_features, roles=("checkpoint", "autoencoder", "classifier"))

if __name__ == "__main__":
    VERB.main()
