"""Write a checkpoint artifact that is made from another model: its two files, and its counts."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edt_core.store.artifact import ArtifactWriter
from edt_core.store.layout import EMA_WEIGHTS, MODEL_CONFIG

if TYPE_CHECKING:
    from jobs.models.open import Opened

_OF_THE_TRAINING = ("checkpoints", "best", "ema_snapshots")  # counts of files that the new artifact does not have


def write_model(
    out: ArtifactWriter, final: str, config: Mapping[str, Any], write_weights: Callable[[Path], None]
) -> None:
    """Write the two files that sampling needs, into the folder `final` of an artifact."""
    out.write_bytes(f"{final}/{MODEL_CONFIG}", json.dumps(config, indent=1, sort_keys=True).encode())
    out.write(f"{final}/{EMA_WEIGHTS}", write_weights)


def write_modulated(opened: "Opened", amm: Mapping[str, Any], out: ArtifactWriter) -> dict[str, Any]:
    """Write the model with other `amm_...` fields in its configuration; return the counts of the artifact.

    Fields that are absent from a configuration at their defaults stay so. Its placement is not what it was trained
    with.
    """
    checkpoint, final = opened.checkpoint, opened.checkpoint.counts["final"]
    config = {**checkpoint.read_json(f"{final}/{MODEL_CONFIG}"), "amm_radius_rows": None, **amm}
    config = {name: value for name, value in config.items() if name != "amm_in_training"}
    if config["amm_radius_rows"] is None:
        del config["amm_radius_rows"]
    write_model(out, final, config, lambda path: _copy(checkpoint.path(f"{final}/{EMA_WEIGHTS}"), path))
    return derived_counts(opened)


def derived_counts(opened: "Opened") -> dict[str, Any]:
    """The counts of an artifact that is made from a model, with the current location of its autoencoder and images."""
    checkpoint = opened.checkpoint
    counts = {name: value for name, value in checkpoint.counts.items() if name not in _OF_THE_TRAINING}
    beside = {"autoencoder": opened.autoencoder, "images": opened.images}
    return {
        **counts,
        "origin": checkpoint.folder.uri,
        "beside": {role: [a.folder.uri, a.manifest.digest] for role, a in beside.items() if a is not None},
    }


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
