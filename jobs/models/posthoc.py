"""The model of a training with averaged weights of another width, made from the snapshots of the training.

See `edt_core.training.posthoc`. The result is a checkpoint artifact, which every command takes as a model.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edt_core.errors import UserError
from edt_core.files.tensor_files import load_tensors
from edt_core.progress import Progress, Silent
from edt_core.store.artifact import Artifact, ArtifactWriter, fingerprint
from edt_core.store.folder import Folder
from edt_core.store.layout import (
    CHECKPOINTS,
    EMA_WEIGHTS,
    MANIFEST_NAME,
    MODEL_CONFIG,
    SNAPSHOTS,
    WIDTH_EMA_WEIGHTS,
)
from edt_core.training.posthoc.profile import Average, Mixture, mixture
from jobs.models.derived import derived_counts, write_model
from jobs.models.names import is_of_mlflow, registered_version, split_name
from jobs.models.open import Opened, artifact_of_run, in_store, is_artifact
from jobs.models.registry_files import title
from jobs.runtime.tracking import mlflow_client
from jobs.stages.stage import alone_in, existing_artifact

if TYPE_CHECKING:
    from torch import Tensor

MAX_ERROR, DOUBTFUL_ERROR = 0.2, 0.05  # of a profile: beyond the first it is refused, beyond the second one is warned
_VERSION = 1
_NEGLIGIBLE = 1e-7  # a coefficient below this is rounding, and its file is not read


@dataclass(frozen=True)
class Training:
    """A training with snapshots: its model, the file of each average, and the version that named it, if one did."""

    opened: Opened
    files: Mapping[Average, str]
    version: Any | None = None

    @property
    def widths(self) -> list[float]:
        """The widths that were tracked, in order."""
        return sorted({average.width for average in self.files})

    def mixture(self, width: float) -> Mixture:
        """The mixture of snapshots for a width at the end of the training. Raises UserError for another range."""
        return mixture(list(self.files), Average(self.opened.checkpoint.counts["steps"], width))

    def rounding(self, parts: Mixture) -> float:
        """How rounding errors of snapshots, if independent, add up in a mixture: in units of one of them."""
        pairs = zip(parts.coefficients.tolist(), self.files.values(), strict=True)
        return math.hypot(*(coefficient for coefficient, name in pairs if name.startswith(f"{SNAPSHOTS}/")))

    def checked_mixture(self, width: float) -> Mixture:
        """The same. Raises UserError if its profile is too far from the one wanted."""
        found = self.mixture(width)
        if found.error > MAX_ERROR:
            raise UserError(
                f"the snapshots of {self.opened.checkpoint.folder.uri} give an average of width {width:g} only with an "
                f"error of {found.error:.0%} of its profile (at most {MAX_ERROR:.0%}): they are of the widths "
                f"{', '.join(f'{own:g}' for own in self.widths)}. Use a width nearer to these (`edt ema MODEL` lists "
                "errors), or train with it among train.ema_widths"
            )
        return found


def training_of(location: str, store: str) -> Training:
    """The training of the model at a location: a registered version, an MLflow run, or a checkpoint artifact.

    The training of a version is looked up where it was made, then in `store`. Raises UserError if it is gone, or has no
    snapshots.
    """
    from edt_core.training.posthoc.snapshots import average_files

    version = None
    if is_of_mlflow(location) and (artifact := artifact_of_run(location)) is not None:
        checkpoint = artifact
    elif is_of_mlflow(location) and split_name(location) is not None:
        version = registered_version(mlflow_client(), location)
        checkpoint = _of_version(version, store)
    elif is_artifact(location):
        checkpoint = Artifact.open(location)
    else:
        raise UserError(
            f"{location} is not a training: give a registered model, the MLflow run of a training, or a checkpoint "
            "artifact"
        )
    opened, files = in_store(checkpoint), average_files(checkpoint)
    if not files:
        raise UserError(
            f"{checkpoint.folder.uri} has no snapshots of averages; train with train.ema_widths=[0.05, 0.1]"
        )
    return Training(opened, files, version)


def _of_version(version: Any, store: str) -> Artifact:
    """The artifact of a version's training, as it was when the version was registered."""
    identity, digest = version.tags.get("edt.checkpoint"), version.tags.get("edt.digest")
    if identity is None:
        raise UserError(f"{title(version)} was not trained by edt, so there are no snapshots of its training")
    places = [version.tags.get("edt.uri"), Folder.at(store).child(f"checkpoint/{identity}").uri]
    for place in filter(None, places):
        if Folder.at(place).exists(MANIFEST_NAME):
            artifact = Artifact.open(place)
            if (artifact.fingerprint, artifact.manifest.digest) == (identity, digest):
                return artifact
    raise UserError(
        f"the checkpoint artifact of {title(version)}, which has the snapshots, is not at {places[0]} as it was "
        "registered; restore that folder, or give its store with --store"
    )


def make_average(
    training: Training, width: float, place: Callable[[str], Folder], progress: Progress | None = None
) -> Artifact:
    """The checkpoint artifact of the model with averaged weights of this width, made or reused.

    It is in the folder `place(fingerprint)`. Raises UserError for a width that the snapshots do not give, and for
    damaged snapshots.
    """
    parts, source = training.checked_mixture(width), training.opened.checkpoint
    config = {
        "num_timesteps": source.manifest.config["num_timesteps"],
        "ema_std": width,
        "training": source.manifest.digest,
    }
    inputs = {"checkpoint": source.fingerprint}
    identity = fingerprint("checkpoint", _VERSION, config, inputs)
    folder = place(identity)
    with alone_in(folder):
        if (existing := existing_artifact(folder, identity)) is not None:
            return existing
        out = ArtifactWriter(folder, "checkpoint", identity)
        out.check_own()
        _write(training, parts, out, progress or Silent())
        counts = {**derived_counts(training.opened), "ema_std": width, "ema_error": round(parts.error, 6)}
        return out.commit(config, inputs, counts)


def _write(training: Training, parts: Mixture, out: ArtifactWriter, progress: Progress) -> None:
    from safetensors.torch import save_file

    checkpoint = training.opened.checkpoint
    if checkpoint.data.local is not None:  # files of a remote store are compared as they are downloaded, one by one
        checkpoint.verify_once(f"*/{WIDTH_EMA_WEIGHTS.replace('{!r}', '*')}", progress)
        checkpoint.verify_once(f"*{EMA_WEIGHTS}", progress)
    weights = _weights(training, parts, progress)
    final = checkpoint.counts["final"]
    config = checkpoint.read_json(f"{final}/{MODEL_CONFIG}")
    write_model(out, final, config, lambda path: save_file(weights, path))


def _weights(training: Training, parts: Mixture, progress: Progress) -> "dict[str, Tensor]":
    """All tensors of the model: those that were not trained are the final ones."""
    from edt_core.training.posthoc.snapshots import reconstructed
    from edt_core.training.start.trainable import merged, unmerged

    checkpoint = training.opened.checkpoint
    counts = checkpoint.counts
    averaged = reconstructed(_files(training, parts, progress))
    weights = load_tensors(checkpoint.path(f"{counts['final']}/{EMA_WEIGHTS}"))
    if "trainable" in counts:  # the final model has the scales of its branches merged
        last = f"{CHECKPOINTS}/{counts['checkpoints'][-1]}"
        weights = unmerged(weights, load_tensors(checkpoint.path(f"{last}/{EMA_WEIGHTS}")))
    if unknown := averaged.keys() - weights.keys():
        raise UserError(
            f"the snapshots of {checkpoint.folder.uri} have tensors that its model does not have "
            f"({', '.join(sorted(unknown)[:3])}): they are of another training"
        )
    if broken := [name for name, value in averaged.items() if not bool(value.isfinite().all())]:
        raise UserError(
            f"the snapshots of {checkpoint.folder.uri} have values that are not finite ({', '.join(broken[:3])}); "
            "with train.ema_snapshot_dtype=fp16, weights above 65,504 overflow"
        )
    return {name: value.contiguous() for name, value in merged({**weights, **averaged}).items()}


def _files(training: Training, parts: Mixture, progress: Progress) -> Iterator[tuple[float, Path]]:
    pairs = zip(parts.coefficients.tolist(), training.files.values(), strict=True)
    used = [(coefficient, name) for coefficient, name in pairs if abs(coefficient) > _NEGLIGIBLE]
    for number, (coefficient, name) in enumerate(used):
        progress.update(number, len(used), "snapshots")
        yield coefficient, training.opened.checkpoint.path(name)
    progress.update(len(used), len(used), "snapshots")
