"""autoencoder: fit a small AutoencoderKL on the image shards, or take a published one; both end as save_pretrained."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from edt_core.artifact import Artifact, ArtifactWriter
from edt_core.config import AutoencoderConfig
from edt_core.errors import UserError
from edt_core.progress import Progress
from edt_core.schema import IMAGE_SHARD
from jobs.cluster import device_name, use_threads
from jobs.verb import Verb

FOLDER = "autoencoder"
IMAGE_SHARDS = IMAGE_SHARD.replace("{:05d}", "*")


def autoencoder(
    config: AutoencoderConfig, inputs: Mapping[str, Artifact], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    """Store the autoencoder of the configuration; `inputs["images"]` are what it is fitted on.

    Raises UserError where a published one cannot be had, or does not have the stated factor and channels.
    """
    work = _take_published if config.pretrained else _fit
    task = ray.remote(num_cpus=config.num_cpus, num_gpus=config.num_gpus)(work)
    return ray.get(task.remote(config, dict(inputs), out, progress))


def _fit(
    config: AutoencoderConfig, inputs: Mapping[str, Artifact], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    from edt_core.autoencoder import autoencoder_facts, fit_autoencoder
    from edt_core.data.shards import load_images

    use_threads(config.num_cpus)
    images = inputs["images"]
    pixels, _ = load_images(images.paths(IMAGE_SHARDS), images.counts["images"], config.max_images)

    def report(step: int, mse: float) -> None:
        progress.update(step, config.steps, f"mse {mse:.4f}")
        if step % 50 == 0 or step == config.steps:
            progress.metrics({"mse": mse}, step)

    model, facts = fit_autoencoder(config, pixels, device_name(config.num_gpus), report)
    _store(model, out)
    return {**autoencoder_facts(model), **facts, "images": len(pixels), "source": "fitted"}


def _take_published(
    config: AutoencoderConfig, inputs: Mapping[str, Artifact], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    from edt_core.autoencoder import autoencoder_facts, load_autoencoder

    assert config.pretrained is not None
    model = load_autoencoder(resolve(config.pretrained))
    facts = autoencoder_facts(model)
    stated = {"downsample_factor": config.downsample_factor, "latent_channels": config.latent_channels}
    if differing := {name: facts[name] for name, value in stated.items() if facts[name] != value}:
        raise UserError(
            f"the autoencoder {config.pretrained} has {differing}, the configuration says {stated}; set them under "
            "`autoencoder:` to what it has"
        )
    _store(model, out)
    return {**facts, "source": config.pretrained}


def resolve(location: str) -> str:
    """A local folder for an MLflow URI; hub ids and local folders stay as they are."""
    if not location.startswith(("models:/", "runs:/", "mlflow-artifacts:/")):
        return location
    import mlflow

    try:
        folder = Path(mlflow.artifacts.download_artifacts(location))
    except Exception as error:
        raise UserError(f"MLflow has no autoencoder at {location} ({error}); look it up in the registry") from error
    configs = sorted(folder.rglob("config.json"), key=lambda path: ("vae" not in path.parts, len(path.parts)))
    if not configs:
        raise UserError(f"{location} holds no diffusers model: no config.json in it")
    return str(configs[0].parent)


def _store(model: Any, out: ArtifactWriter) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, safe_serialization=True)
        out.add_tree(Path(folder), FOLDER)


VERB = Verb("autoencoder", "autoencoder", 1, AutoencoderConfig, autoencoder, roles=("images",))

if __name__ == "__main__":
    VERB.main()
