"""A model that a configuration names: what `train.init_from` or `sample.guide` means now, and the model itself."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edt_core.config import TrainConfig
from edt_core.errors import UserError
from edt_core.files.place_names import typed_path
from edt_core.files.small_files import read_json, read_json_object
from edt_core.files.tensor_files import load_tensors
from edt_core.network.answers import check_mlflow
from edt_core.store.artifact import Artifact, Source, sha256_json
from edt_core.store.folder import Folder, sha256_file
from edt_core.store.layout import (
    CHECKPOINT_MANIFEST,
    CLASSES_NAME,
    EMA_WEIGHTS,
    MANIFEST_NAME,
    MODEL_CONFIG,
    MODEL_WEIGHTS,
    OPTIMIZER_STATE,
    TRAIN_STATE,
)
from jobs.models.names import REGISTERED, RUN, STD_TAG, is_of_mlflow, registered_version, split_name
from jobs.models.open import FORMS, INDEX, in_store, is_artifact, of_pipeline, of_released
from jobs.models.registry_files import fetch_version, folder_digests, title, version_facts
from jobs.runtime.tracking import mlflow_client

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from edt_core.models import ModelConfig
    from edt_core.training.start.base import Base

_INIT = "train.init_from"
# Tags of a version: what its training started from (digest, place, checkpoint artifact).
INIT_TAG, INIT_FROM_TAG, INIT_CHECKPOINT_TAG = "edt.init", "edt.init_from", "edt.init_checkpoint"
_STATISTICS = ("latents_mean", "latents_std")  # of a model's configuration
_TRANSFORMER = "transformer/"  # where a diffusers folder has the model
_CONFIG, _EDT = "transformer/config.json", "edt_config"  # and the model's configuration


@dataclass(frozen=True)
class Initial(Source):
    """A model to start from. `location` is where it stays: an alias has become its version, a run its artifact.

    `fingerprint` is the digest of what a training takes of it: weights, class names, and optimizer state where asked.
    `checkpoint` is the fingerprint of the checkpoint artifact that holds it, and `model_config` its configuration, both
    None where they are not known; `averaged` weights were made of that artifact's, and are not in it. `before` is what
    the model itself was started from, where an alias named it and the version says so; its `model_config` is the
    model's, which has the same shapes and statistics. `tracking_uri` is the MLflow that knows it, None for the
    process's own. `named_by` is the field that names it, for messages.
    """

    checkpoint: str | None = field(default=None, compare=False)
    model_config: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    averaged: bool = field(default=False, compare=False)
    before: "Initial | None" = field(default=None, compare=False)
    tracking_uri: str | None = field(default=None, compare=False, repr=False)
    named_by: str = field(default=_INIT, compare=False, repr=False)

    def check(self, config: "ModelConfig", normalise: Callable[[], bool] = lambda: False) -> None:
        """Raise UserError unless the model can be adapted to one of this configuration, as far as that is known yet.

        `normalise`: whether the training normalises the latents. It is called only for a model without statistics,
        which knows no such latents; a released file has none.
        """
        from edt_core.training.start.base import check_fit, not_normalised

        if self.model_config is not None:
            check_fit(self.location, _model_config(self.named_by, self.location, self.model_config), config)
        if (self.model_config or {}).get(_STATISTICS[0]) is None and normalise():
            raise not_normalised(self.location)

    def read(self, config: TrainConfig) -> "Base":
        """The model in memory. Raises UserError if it is gone, or has changed since it was looked up."""
        return replace(_Lookup(config, self.tracking_uri, self.named_by).read(self), digest=self.fingerprint)


def initial_source(config: TrainConfig, tracking_uri: str | None = None) -> Initial | None:
    """What `train.init_from` means at this moment; None where it is null.

    Raises UserError where there is no such model, and where it lacks the raw weights or the optimizer state that the
    configuration asks for.
    """
    return None if config.init_from is None else _Lookup(config, tracking_uri).source(config.init_from)


def named_model(text: str, named_by: str, tracking_uri: str | None = None) -> Initial:
    """The model with averaged weights that the field `named_by` names as `text`, at this moment.

    Raises UserError where there is none.
    """
    return _Lookup(TrainConfig(), tracking_uri, named_by).source(text)


@dataclass(frozen=True)
class _Lookup:
    """The way to a model that a field names: for a training that starts from it, or for its averaged weights."""

    config: TrainConfig
    tracking_uri: str | None
    named_by: str = _INIT

    def source(self, text: str) -> Initial:
        """The model that a text names."""
        path = typed_path(text)
        if is_of_mlflow(text) and (match := RUN.fullmatch(text)):
            return self._artifact(self._artifact_of_run(match[1]))
        if is_of_mlflow(text) and (parts := split_name(text)):
            return self._version(text, *parts)
        if is_artifact(text):
            return self._artifact(Artifact.open(text))
        if (path / CHECKPOINT_MANIFEST).exists():
            return self._checkpoint(path.absolute())
        if (path / INDEX).exists():
            identity = _folder_identity(folder_digests(path), path / INDEX)
            config = read_json_object(path / _CONFIG).get(_EDT) if (path / _CONFIG).exists() else None
            return self._at(str(path.absolute()), identity, None, config)
        if path.is_file():
            return self._at(str(path.absolute()), {"weights": sha256_file(path)})
        raise UserError(f"{self.named_by}: there is no model at {text}; give {FORMS}")

    def read(self, initial: Initial) -> "Base":
        """The model of a source, compared with its fingerprint as it lies there now."""
        path = typed_path(initial.location)
        if match := REGISTERED.fullmatch(initial.location) if is_of_mlflow(initial.location) else None:
            with tempfile.TemporaryDirectory(prefix="edt-") as folder:
                version = self._client().get_model_version(str(match[1]), str(match[3]))
                fetch_version(self._client(), version, Path(folder), need_digests=False)
                return self._read_folder(initial, Path(folder))
        if Folder.at(initial.location).exists(MANIFEST_NAME):
            artifact = Artifact.open(initial.location)
            return self._read_checkpoint(initial, artifact.directory(artifact.counts["final"]), artifact)
        if (path / CHECKPOINT_MANIFEST).exists():
            return self._read_checkpoint(initial, path, _artifact_around(path))
        if (path / INDEX).exists():
            return self._read_folder(initial, path)
        if path.is_file():
            return self._read_released(initial, path)
        raise UserError(f"{self.named_by}: {initial.location} is gone; put it back, or start from another model")

    def _at(
        self,
        location: str,
        identity: Mapping[str, Any],
        checkpoint: str | None = None,
        model_config: Mapping[str, Any] | None = None,
    ) -> Initial:
        if self.named_by == _INIT and (quantization := (model_config or {}).get("quantization")) is not None:
            raise UserError(
                f"{_INIT}: {location} is quantised ({quantization['scheme']}), and quantised weights cannot be "
                "trained; start from the version that it was made from (`edt models show` names it)"
            )
        if "optimizer" not in identity and self.config.init_optimizer == "keep":
            raise UserError(
                f"train.init_optimizer is keep, but {location} has no optimizer state; give a checkpoint of a "
                "training, or set train.init_optimizer=fresh"
            )
        if "raw" not in identity and self.config.init_weights == "raw":
            raise UserError(
                f"train.init_weights is raw, but {location} has averaged weights alone; give a checkpoint of a "
                "training, or set train.init_weights=ema"
            )
        return Initial(
            location,
            sha256_json(identity),
            checkpoint=checkpoint,
            model_config=model_config,
            tracking_uri=self.tracking_uri,
            named_by=self.named_by,
        )

    def _artifact(self, artifact: Artifact) -> Initial:
        """A checkpoint artifact: its final checkpoint. Raises UserError for an artifact of another kind."""
        images = in_store(artifact).images
        final = artifact.counts["final"]
        entries = {entry.path.removeprefix(f"{final}/"): entry.sha256 for entry in artifact.entries(f"{final}/*")}
        config = artifact.read_json(f"{final}/{MODEL_CONFIG}")
        identity = self._checkpoint_identity(entries, images, config)
        return self._at(artifact.folder.uri, identity, artifact.fingerprint, config)

    def _checkpoint(self, folder: Path) -> Initial:
        """A folder of one checkpoint, in an artifact or by itself."""
        from edt_core.training.checkpoint import CheckpointError, check_checkpoint, check_whole

        check_whole(folder)
        try:
            files = check_checkpoint(folder).files
        except CheckpointError as error:
            raise UserError(f"{self.named_by}: {error}; give another checkpoint") from error
        artifact = _artifact_around(folder)
        images = None if artifact is None else in_store(artifact).images
        config = read_json_object(folder / MODEL_CONFIG)
        identity = self._checkpoint_identity(files, images, config)
        checkpoint = None if artifact is None else artifact.fingerprint
        return self._at(str(folder), identity, checkpoint, config)

    def _checkpoint_identity(
        self, files: Mapping[str, str], images: Artifact | None, config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What counts of a checkpoint, by the sha256 of its files, with the statistics of its model's latents."""
        name = "raw" if self.config.init_weights == "raw" and MODEL_WEIGHTS in files else "weights"
        identity: dict[str, Any] = {name: files[MODEL_WEIGHTS if name == "raw" else EMA_WEIGHTS]}
        if self.config.init_optimizer == "keep" and OPTIMIZER_STATE in files:
            identity["optimizer"] = files[OPTIMIZER_STATE]
        identity |= {field: config[field] for field in _STATISTICS if field in config}
        return identity | ({} if images is None else {"classes": _names(images.read_json(CLASSES_NAME))})

    def _version(self, text: str, name: str, alias: str | None, number: str | None) -> Initial:
        """A registered version. Its checkpoint artifact stands in for it where more than its weights is asked for."""
        client = self._client()
        try:
            found = registered_version(client, text)
        except UserError as error:
            raise UserError(f"{self.named_by}: {error}") from error
        checkpoint = found.tags.get("edt.checkpoint")
        if self.config.init_weights == "raw" or self.config.init_optimizer == "keep":
            if STD_TAG in found.tags:  # its training has other weights
                raise UserError(
                    f"{self.named_by}: {text} has averaged weights that `edt ema` made, and neither raw weights nor an "
                    "optimizer's state; start from them with init_weights=ema and init_optimizer=fresh, or name the "
                    "version of the training"
                )
            source = self._artifact(_artifact_of(found))
        else:
            digests, (index, transformer) = version_facts(client, found, (INDEX, _CONFIG))
            place, config = f"models:/{name}/{found.version}", transformer.get(_EDT)
            source = self._at(place, _identity(digests, index), checkpoint, config)
            source = replace(source, averaged=STD_TAG in found.tags)
        if alias is None or INIT_TAG not in found.tags:
            return source
        place, base = found.tags.get(INIT_FROM_TAG, ""), found.tags.get(INIT_CHECKPOINT_TAG)
        before = replace(source, location=place, fingerprint=found.tags[INIT_TAG], checkpoint=base)
        return replace(source, checkpoint=checkpoint, before=before)

    def _artifact_of_run(self, run_id: str) -> Artifact:
        try:
            tags = self._client().get_run(run_id).data.tags
        except Exception as error:
            raise UserError(
                f"{self.named_by}: MLflow has no run {run_id} ({error}); give the run of a train step"
            ) from error
        if tags.get("edt.kind") != "checkpoint" or "edt.uri" not in tags:
            raise UserError(f"{self.named_by}: the run {run_id} made no checkpoint; give the run of a train step")
        return Artifact.open(tags["edt.uri"])

    def _client(self) -> "MlflowClient":
        if self.tracking_uri is None:
            return mlflow_client()
        from mlflow import MlflowClient

        check_mlflow(self.tracking_uri)
        return MlflowClient(self.tracking_uri)

    def _read_checkpoint(self, initial: Initial, folder: Path, artifact: Artifact | None) -> "Base":
        from edt_core.training.checkpoint import check_whole
        from edt_core.training.start.base import Base, SavedOptimizer

        check_whole(folder)

        images = None if artifact is None else in_store(artifact).images
        names = (EMA_WEIGHTS, MODEL_WEIGHTS, OPTIMIZER_STATE)
        files = {name: sha256_file(folder / name) for name in names if (folder / name).exists()}
        config = read_json_object(folder / MODEL_CONFIG)
        identity = self._checkpoint_identity(files, images, config)
        _check_same(initial, identity)
        optimizer = None
        if "optimizer" in identity:
            state = read_json(folder / TRAIN_STATE)
            tensors = load_tensors(folder / OPTIMIZER_STATE)
            optimizer = SavedOptimizer(state["config"]["optimizer"], tensors, state["optimizer_groups"])
        return Base(
            _model_config(self.named_by, initial.location, config),
            load_tensors(folder / (MODEL_WEIGHTS if "raw" in identity else EMA_WEIGHTS)),
            initial.location,
            tuple(identity.get("classes", ())),
            optimizer,
            None if artifact is None else artifact.counts.get("autoencoder_digest"),
            num_timesteps=_timesteps(folder, artifact),
        )

    def _read_folder(self, initial: Initial, folder: Path) -> "Base":
        from edt_core.training.start.base import Base

        _check_same(initial, _folder_identity(folder_digests(folder), folder / INDEX))
        unpacked = of_pipeline(folder, initial.location)
        model = unpacked.model.config, unpacked.model.state_dict()
        return Base(*model, initial.location, unpacked.classes, num_timesteps=unpacked.num_timesteps)

    def _read_released(self, initial: Initial, path: Path) -> "Base":
        from edt_core.training.start.base import Base

        _check_same(initial, {"weights": sha256_file(path)})
        unpacked = of_released(path)
        model = unpacked.model.config, unpacked.model.state_dict()
        return Base(*model, initial.location, num_timesteps=unpacked.num_timesteps)


def _model_config(named_by: str, location: str, values: Mapping[str, Any]) -> "ModelConfig":
    from edt_core.models import ModelConfig

    try:
        return ModelConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise UserError(f"{named_by}: the model configuration of {location} cannot be read ({error})") from error


def _check_same(initial: Initial, identity: Mapping[str, Any]) -> None:
    if sha256_json(identity) != initial.fingerprint:
        raise UserError(
            f"{initial.named_by}: {initial.location} has changed since it was looked up (digest "
            f"{initial.fingerprint[:12]}, now {sha256_json(identity)[:12]}); run again"
        )


def _folder_identity(digests: Mapping[str, str], index: Path) -> dict[str, Any]:
    return _identity(digests, read_json_object(index))


def _identity(digests: Mapping[str, str], index: Mapping[str, Any]) -> dict[str, Any]:
    """What counts of a diffusers folder: the files of its model, and the names of its classes."""
    classes = index.get("classes") or []
    weights = {name: digest for name, digest in digests.items() if name.startswith(_TRANSFORMER)}
    return {"weights": weights, "classes": _names(classes)}


def _names(values: Any) -> list[str]:
    return [str(name) for name in values]


def _timesteps(folder: Path, artifact: Artifact | None) -> int | None:
    """The timesteps of a checkpoint's training; None where neither its artifact nor its state says them."""
    if artifact is not None and "num_timesteps" in artifact.manifest.config:
        return int(artifact.manifest.config["num_timesteps"])
    return int(read_json(folder / TRAIN_STATE)["config"]["num_timesteps"]) if (folder / TRAIN_STATE).exists() else None


def _artifact_around(folder: Path) -> Artifact | None:
    """The artifact that contains a checkpoint's folder: `<artifact>/<attempt>/checkpoints/step-...`."""
    for above in list(folder.resolve().parents)[:3]:
        if (above / MANIFEST_NAME).exists():
            return Artifact.open(str(above))
    return None


def _artifact_of(version: Any) -> Artifact:
    """The checkpoint artifact of a registered version. Raises UserError if it is gone."""
    uri = version.tags.get("edt.uri")
    if uri is None or not Folder.at(uri).exists(MANIFEST_NAME):
        raise UserError(
            f"train.init_from: {title(version)} is registered with averaged weights alone, and its checkpoint artifact "
            f"{uri or ''} is gone; set train.init_weights=ema and train.init_optimizer=fresh"
        )
    return Artifact.open(uri)
