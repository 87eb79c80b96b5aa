"""The end of a training that learns which blocks to keep: the model without the others, and the record of the cut."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edt_core.config import TrainConfig
from edt_core.files.tensor_files import load_tensors
from edt_core.progress import Progress
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.layout import DEPTH_LOGITS, EMA_WEIGHTS, MODEL_CONFIG, MODEL_WEIGHTS
from jobs.stages.training.latents import open_latents

if TYPE_CHECKING:
    from edt_core.models import ModelConfig
    from edt_core.training.checkpoint import Checkpoint

PRUNED = "pruned"  # the folder of the cut model, beside the checkpoints of the training that chose the cut


@dataclass(frozen=True)
class Cut:
    """The cut model: its folder in the artifact, its configuration, and the record of the cut for the counts."""

    final: str
    model_config: "ModelConfig"
    record: Mapping[str, Any]


def write_pruned(
    config: TrainConfig,
    model_config: "ModelConfig",
    initial: "Checkpoint",
    final: Path,
    latents: Artifact,
    out: ArtifactWriter,
    progress: Progress,
) -> Cut:
    """Leave out of the model that the training started from what its last checkpoint, in `final`, chose to leave out.

    The weights of the kept blocks are those that the training started from: its own changes to them only took the place
    of the fine-tuning, which comes next. Raises UserError if the latents cannot be read.
    """
    from safetensors.torch import save_file

    from edt_core.training.prune.cut import cut_weights, kept_blocks, most_likely, shallower
    from edt_core.training.prune.gates import probabilities
    from edt_core.training.prune.groups import groups_of

    assert config.prune is not None, "a training that prunes"
    groups = groups_of(model_config, config.prune)
    logits = load_tensors(final / DEPTH_LOGITS)["logits"]
    chances = probabilities(logits, [len(group.candidates) for group in groups])
    kept, cut = most_likely(groups, chances), shallower(model_config, config.prune)
    whole = initial.tensors[MODEL_WEIGHTS]
    weights = {name: value.contiguous() for name, value in cut_weights(whole, model_config, cut, kept).items()}
    out.write(f"{PRUNED}/{EMA_WEIGHTS}", lambda path: save_file(weights, path))
    text = json.dumps(cut.to_dict(), indent=1, sort_keys=True)
    out.write_bytes(f"{PRUNED}/{MODEL_CONFIG}", text.encode())
    shares = [
        {
            "run": group.run,
            "units": list(group.units),
            "kept": [unit for unit in group.units if unit in kept[group.run]],
            "probability": max(values),
            # The probability of each unit to be kept.
            "importance": [
                sum(value for value, units in zip(values, group.candidates, strict=True) if unit in units)
                for unit in group.units
            ],
        }
        for group, values in zip(groups, chances, strict=True)
    ]
    record = {
        "keep": list(config.prune),
        "blocks": model_config.num_blocks,
        "kept_blocks": list(kept_blocks(model_config, kept)),
        "groups": shares,
        **_measured(config, latents, progress, [(model_config, whole), (cut, weights)]),
    }
    return Cut(PRUNED, cut, record)


def _measured(config: TrainConfig, latents: Artifact, progress: Progress, weighted: list[Any]) -> dict[str, Any]:
    """Parameters, multiply-accumulates, seconds of a forward pass and loss, each before and right after the cut."""
    from edt_core.data.latents import LatentDataset
    from edt_core.models import count_macs
    from edt_core.training.prune.measure import losses_of, models_of, seconds_of

    models = models_of(config, weighted)
    values: dict[str, Any] = {
        "parameters": [sum(value.numel() for value in model.parameters()) for model in models],
        "macs": [count_macs(model) for model in models],
        "seconds_of_a_pass": seconds_of(models),
        "device": next(models[0].parameters()).device.type,
    }
    del models
    dataset = open_latents(config, latents, progress) if config.reader == "arrow" else None
    if isinstance(dataset, LatentDataset):
        values["loss"] = losses_of(config, dataset, weighted)
    return values
