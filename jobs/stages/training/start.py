"""The start of a training that begins with a model: a checkpoint of step 0 in the attempt."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edt_core.config import TrainConfig
from edt_core.errors import UserError
from edt_core.files.tensor_files import load_tensors
from edt_core.progress import Progress
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.cache import local_directory
from edt_core.store.layout import CHECKPOINT_MANIFEST, CLASSES_NAME, EMA_WEIGHTS, MODEL_CONFIG, MODEL_WEIGHTS
from jobs.stages.holdout.split import check_images

if TYPE_CHECKING:
    from edt_core.models import ModelConfig
    from edt_core.training.checkpoint import Checkpoint
    from edt_core.training.start.base import Base

INITIAL = ".initial"  # gone when the artifact is committed
MERGED = "merged"  # the folder of an ordinary model, where checkpoints hold few of its tensors


class InitialModel(Protocol):
    """What fills the role `init`."""

    location: str
    model_config: Mapping[str, Any] | None  # None for a released file, which states no statistics of its latents

    def read(self, config: TrainConfig) -> "Base":
        """The model in memory. Raises UserError if it is unavailable."""


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint artifact of the same pipeline as the model to start from. It fills the role `init`.

    `classes` are the names of its classes.
    """

    artifact: Artifact
    classes: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """The artifact's."""
        return self.artifact.fingerprint

    @property
    def location(self) -> str:
        """Where the artifact is."""
        return self.artifact.folder.uri

    @property
    def model_config(self) -> Mapping[str, Any]:
        """The model's configuration."""
        values: Mapping[str, Any] = self.artifact.read_json(f"{self.artifact.counts['final']}/{MODEL_CONFIG}")
        return values

    def read(self, config: TrainConfig) -> "Base":
        """The averaged weights, in memory."""
        from edt_core.models import ModelConfig
        from edt_core.training.start.base import Base

        counts, timesteps = self.artifact.counts, self.artifact.manifest.config["num_timesteps"]
        weights = load_tensors(self.artifact.path(f"{counts['final']}/{EMA_WEIGHTS}"))
        facts = self.location, self.classes, None, counts["autoencoder_digest"], self.fingerprint, timesteps
        return Base(ModelConfig.from_dict(self.model_config), weights, *facts)


def with_initial(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The inputs with a model to start from in the place of a checkpoint artifact."""
    if not isinstance(trained := inputs.get("init"), Artifact):
        return inputs
    names = tuple(map(str, inputs["images"].read_json(CLASSES_NAME))) if "images" in inputs else ()
    return {**inputs, "init": TrainedModel(trained, names)}


def check_start(config: TrainConfig, given: bool) -> None:
    """Raise UserError for fields about the model to start from if there is none (`given`: whether there is one)."""
    usual = {"init_weights": "ema", "init_optimizer": "fresh", "trainable": "all", "distill": None, "prune": None}
    name = next((name for name, value in usual.items() if getattr(config, name) != value), None)
    if given or name is None:
        return
    if name == "distill":
        raise UserError(
            "train.distill is set, but train.init_from is not, so there is no teacher; set train.init_from to a "
            "trained model, or use `edt distill`"
        )
    if name == "prune":
        raise UserError(
            "train.prune is set, but train.init_from is not, so there is no model to prune; set train.init_from to a "
            "trained model, or use `edt prune`"
        )
    raise UserError(
        f"train.{name} is {getattr(config, name)}, but train.init_from is not set, so the training starts from random "
        f"weights; set train.init_from, or leave out train.{name}"
    )


def initial_of(
    config: TrainConfig, model_config: "ModelConfig", inputs: Mapping[str, Any], progress: Progress
) -> "Checkpoint":
    """The checkpoint of step 0 of a training from `inputs["init"]`; says which classes are new and which are dropped.

    Raises UserError if that model does not fit the latents.
    """
    from edt_core.training.start.initial import initial_checkpoint

    base = inputs["init"].read(config)
    images, latents = inputs.get("images"), inputs["latents"]
    if images is not None:
        check_images(images, latents)
    names = () if images is None else tuple(images.read_json(CLASSES_NAME))
    checkpoint, rows = initial_checkpoint(config, model_config, base, names)
    if rows.new or rows.dropped:
        known = base.classes or rows.dropped
        why = (
            ""
            if known
            else "; its class names are not known (a registered version, or a checkpoint in its store, has them)"
        )
        progress.warn(f"{base.origin}: {rows}{why}")
    if not rows.new and (images is None or not base.classes):
        progress.warn(f"{base.origin}: class names are not known on both sides, so its class rows are taken in order")
    digest = latents.counts.get("autoencoder_digest")
    if base.autoencoder_digest not in (None, digest):
        progress.warn(f"{base.origin} was trained on the latents of another autoencoder than {latents.folder.uri}")
    return checkpoint


def write_initial(checkpoint: "Checkpoint", out: ArtifactWriter) -> None:
    """Put the checkpoint of step 0 where the workers of this attempt read it."""
    from edt_core.training.checkpoint import write_checkpoint

    write_checkpoint(checkpoint, lambda name, write_to: out.write(f"{INITIAL}/{name}", write_to))


def read_initial(out: ArtifactWriter) -> "Checkpoint":
    """The checkpoint of step 0 that `write_initial` left. Raises UserError if there is none."""
    from edt_core.training.checkpoint import load_checkpoint

    folder = out.data.child(INITIAL)
    if not folder.exists(CHECKPOINT_MANIFEST):  # it was not needed, since there was a checkpoint, which is damaged now
        raise UserError(f"{out.data.uri} has no whole checkpoint any more; run again to begin from train.init_from")
    return load_checkpoint(local_directory(folder))


def write_merged(initial: "Checkpoint", final: Path, model_config: "ModelConfig", out: ArtifactWriter) -> str:
    """The ordinary model of a training of few parameters: its base with the final averages, scales merged.

    Returns the folder in the artifact, with the two files that a model is sampled from.
    """
    from safetensors.torch import save_file

    from edt_core.training.start.trainable import merged

    whole = {name: value.float() if value.is_floating_point() else value for name, value in _weights(initial).items()}
    weights = merged({**whole, **load_tensors(final / EMA_WEIGHTS)})
    ready = {name: value.contiguous() for name, value in weights.items()}
    out.write(f"{MERGED}/{EMA_WEIGHTS}", lambda path: save_file(ready, path))
    text = json.dumps(model_config.to_dict(), indent=1, sort_keys=True)
    out.write_bytes(f"{MERGED}/{MODEL_CONFIG}", text.encode())
    return MERGED


def _weights(checkpoint: "Checkpoint") -> Mapping[str, Any]:
    return checkpoint.tensors[MODEL_WEIGHTS]


def trained_parameters(config: TrainConfig, model_config: "ModelConfig") -> dict[str, Any]:
    """What the counts of a training of few parameters say of them; empty for a training of all."""
    from edt_core.training.start.trainable import count_trained

    if config.trainable == "all":
        return {}
    return {"trainable": config.trainable, "trained_parameters": count_trained(config, model_config)}


def remove_initial(out: ArtifactWriter) -> None:
    """Remove it from an attempt that is done."""
    out.discard(INITIAL)
