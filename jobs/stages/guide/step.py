"""guide: the averaged weights of the model that samples are guided away from, as an artifact of their own.

So every worker reads them as those of a checkpoint, and the guide stays as it was when the samples were drawn.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from edt_core.config import GuideConfig, TrainConfig
from edt_core.errors import UserError
from edt_core.progress import Progress
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.layout import EMA_WEIGHTS, MODEL_CONFIG, STEP_PREFIX
from jobs.stages.sample import averaged_model
from jobs.stages.stage import Stage

if TYPE_CHECKING:
    from edt_core.models import DiffusionTransformer
    from edt_core.training.start.base import Base

FOLDER = "guide"


class NamedModel(Protocol):
    """What fills the role `model`."""

    def read(self, config: TrainConfig) -> "Base":
        """The model in memory. Raises UserError if it is unavailable."""


def guide(config: GuideConfig, inputs: Mapping[str, Any], out: ArtifactWriter, progress: Progress) -> dict[str, Any]:
    """Copy the averaged weights of `inputs["model"]`, or those of an earlier step of `inputs["checkpoint"]`.

    Raises UserError if the training did not keep the checkpoint of that step, or the model is gone or has changed.
    """
    import json

    from safetensors.torch import save_file

    from edt_core.models import count_macs, count_parameters

    model, num_timesteps = _model_of(config, inputs)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    text = json.dumps(model.built_config.to_dict(), indent=1, sort_keys=True)
    out.write_bytes(f"{FOLDER}/{MODEL_CONFIG}", text.encode())
    out.write(f"{FOLDER}/{EMA_WEIGHTS}", lambda path: save_file(weights, path))
    return {
        "model": model.config.name,
        **model.config.objective_record(),
        "num_timesteps": num_timesteps,
        "parameters": count_parameters(model),
        "macs": count_macs(model),
        "final": FOLDER,
    }


def _model_of(config: GuideConfig, inputs: Mapping[str, Any]) -> "tuple[DiffusionTransformer, int | None]":
    """The model, and the timesteps of its training, None if they are not known."""
    from edt_core.models import build_model

    if config.step is not None:
        checkpoint: Artifact = inputs["checkpoint"]
        check_kept(checkpoint, config.step)
        return averaged_model(checkpoint, "cpu", config.step), checkpoint.manifest.config["num_timesteps"]
    base = inputs["model"].read(TrainConfig())
    model = build_model(base.config)
    model.load_state_dict(dict(base.weights))
    return model, base.num_timesteps


def check_kept(checkpoint: Artifact, step: int) -> None:
    """Raise UserError unless a training has the checkpoint of a step, and more steps than it."""
    from edt_core.training.checkpoint import checkpoint_name

    name, kept = checkpoint_name(step), [str(name) for name in checkpoint.counts["checkpoints"]]
    if name not in kept or step >= checkpoint.counts["steps"]:
        earlier = [other for other in kept if int(other.removeprefix(STEP_PREFIX)) < checkpoint.counts["steps"]]
        raise UserError(
            f"sample.guide is {name}, but the training of {checkpoint.counts['steps']} steps has no such earlier "
            f"checkpoint; it kept {', '.join(earlier) or 'none'}. Name one of these, or set train.keep_every to a "
            "number of steps that divides it"
        )


STAGE = Stage("guide", "guide", 1, GuideConfig, guide, roles=(), optional=("model", "checkpoint"))
