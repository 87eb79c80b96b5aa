"""The steps that make the guide of a training's samples: an earlier checkpoint, or a copy trained on own samples."""

from collections.abc import Mapping

from edt_core.config import GuideConfig, TrainConfig
from jobs.stages import encode, sample, train
from jobs.stages.guide import own_images
from jobs.stages.guide import step as guide
from pipelines.config.guide import OWN_SAMPLES
from pipelines.config.schema import PipelineConfig
from pipelines.engine.step import StepFuture
from pipelines.engine.steps import Steps


def call_guide(
    steps: Steps,
    config: PipelineConfig,
    shared: Mapping[str, StepFuture],
    label: str,
    name: str,
    trained: TrainConfig,
    checkpoint: StepFuture,
) -> dict[str, StepFuture]:
    """The steps of the guide of one training by role, the guide as `guide`; none if its samples have another or none.

    `label`: begins the names of the training's steps.
    """
    if not trained.max_steps:
        return {}
    if config.sample.guide == OWN_SAMPLES:
        return _own_samples(steps, config, shared, label, name, trained, checkpoint)
    if (step := config.sample.guide_step) is None:
        return {}
    earlier = GuideConfig(step=step)
    return {"guide": steps.step(f"{label}guide {name}", guide.STAGE, earlier, checkpoint=checkpoint)}


def _own_samples(
    steps: Steps,
    config: PipelineConfig,
    shared: Mapping[str, StepFuture],
    label: str,
    name: str,
    trained: TrainConfig,
    checkpoint: StepFuture,
) -> dict[str, StepFuture]:
    """SIMS (arXiv 2408.16333, algorithm 1): sample from the model, train a copy on these images, guide away from it."""
    sims, vae = config.sims, shared["autoencoder"]
    drawn = config.sample.own_samples.model_copy(update={"num_samples": sims.num_samples})
    samples = steps.step(f"{label}sample own {name}", sample.STAGE, drawn, checkpoint=checkpoint, autoencoder=vae)
    inputs = {"features": samples, "images": shared["images"]}
    images = steps.step(f"{label}images own {name}", own_images.STAGE, config.preprocess, **inputs)
    latents = steps.step(f"{label}encode own {name}", encode.STAGE, config.encode, images=images, autoencoder=vae)
    of_copy = {"latents": latents, "autoencoder": vae, "init": checkpoint, "images": images}
    copy = steps.step(f"{label}train own {name}", train.STAGE, sims.training_of(trained), **of_copy)
    return {"own_features": samples, "own_images": images, "own_latents": latents, "guide": copy}
