"""Open a model for a job, from the registry, a training, a diffusers folder, or a released file.

`open_model` returns artifacts: a model that is not a checkpoint artifact becomes one, with only EMA weights and
configuration. `load_model` reads the model into memory instead.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edt_core.errors import UserError
from edt_core.files.place_names import typed_path
from edt_core.files.small_files import read_json, read_json_object
from edt_core.files.tensor_files import check_folder_headers
from edt_core.printing.console import on_one_line
from edt_core.store.artifact import Artifact, ArtifactWriter, fingerprint, sha256_json
from edt_core.store.folder import Folder, sha256_file
from edt_core.store.layout import (
    CHECKPOINT_MANIFEST,
    CHECKPOINTS,
    CLASSES_NAME,
    MANIFEST_NAME,
    TRAIN_STATE,
)
from edt_core.store.prefixes import whole_folder
from jobs.models.derived import write_model
from jobs.models.names import RUN, is_of_mlflow, registered_version, split_name
from jobs.models.registry_files import INDEX, fetch_version
from jobs.runtime.tracking import SQLITE, mlflow_client, own_uri
from jobs.stages import autoencoder
from jobs.stages.stage import alone_in, existing_artifact

if TYPE_CHECKING:
    from edt_core.config import ChainConfig
    from edt_core.evaluation.extractors.classifier import Classifier
    from edt_core.models import DiffusionTransformer
    from edt_core.sampling.latent_classifier import LatentClassifier

_log = logging.getLogger(__name__)
DEFAULT_STORE = "./edt-store"
_VERSION = 1
_COMPONENTS = {"transformer", "guide", "classifier", "vae", "scheduler"}
_LIBRARIES = ("diffusers", "edt_core.pipeline")
FORMS = (
    "a registered model (NAME, NAME@ALIAS or NAME/VERSION), an MLflow run of a training, a checkpoint artifact or one "
    "of its checkpoints/step-... folders, a diffusers folder, or a released checkpoint file"
)


@dataclass(frozen=True)
class Opened:
    """A model and, if known, its autoencoder and the images of its training."""

    checkpoint: Artifact
    autoencoder: Artifact | None
    images: Artifact | None = None


@dataclass(frozen=True)
class Loaded:
    """A model in memory, in evaluation mode, and what is known about its use.

    `classes` are the names of its classes, `protocol` the fields of ChainConfig that it was evaluated with,
    `class_counts` the images of each class in its training, and `guide` and `classifier` those of its folder.
    """

    model: "DiffusionTransformer"
    num_timesteps: int
    autoencoder: Any | None
    classes: tuple[str, ...] = ()
    protocol: Mapping[str, Any] = field(default_factory=dict)
    class_counts: Sequence[int] | None = None
    guide: "DiffusionTransformer | None" = None
    classifier: "Classifier | None" = None

    def classify_by(self, decoder: Any) -> "LatentClassifier | None":
        """The classifier on latents that a decoder decodes; None for a folder without one."""
        from edt_core.sampling.latent_classifier import LatentClassifier

        if self.classifier is None:
            return None
        device = next(self.model.parameters()).device
        return LatentClassifier(decoder, self.classifier.to(device), self.model.config)

    def guide_of(self, chain: "ChainConfig") -> "DiffusionTransformer | None":
        """The guide of a chain: that of the folder, and None without guidance."""
        return None if chain.cfg_scale == 1.0 else self.guide

    @property
    def sampling(self) -> Mapping[str, Any]:
        """The protocol; without one, the default sampler of the model's objective."""
        from edt_core.diffusion import objective_of_model

        return {**objective_of_model(self.model.config).usual_chain, **self.protocol}


@dataclass(frozen=True)
class PlainModel:
    """A model that is not an artifact yet."""

    model: "DiffusionTransformer"
    num_timesteps: int
    steps: int
    digest: str  # of the files it was read from
    origin: str
    autoencoder: Path | None = None
    classes: tuple[str, ...] = ()
    protocol: Mapping[str, Any] = field(default_factory=dict)
    class_counts: Sequence[int] | None = None
    guide: "DiffusionTransformer | None" = None
    classifier: "Classifier | None" = None


def open_model(location: str, work: Folder) -> Opened:
    """The model at a location as artifacts; new artifacts are written to the store `work`.

    Raises UserError if there is no model, or it cannot be read safely.
    """
    with _model_at(location) as model:
        return in_store(model) if isinstance(model, Artifact) else _store_model(model, work)


def load_model(location: str) -> Loaded:
    """The model at a location, in memory. Raises UserError as `open_model`."""
    from edt_core.autoencoders.autoencoder import load_autoencoder

    with _model_at(location) as model:
        if isinstance(model, Artifact):
            return _loaded(in_store(model))
        vae = None if model.autoencoder is None else load_autoencoder(model.autoencoder)
        facts = model.classes, model.protocol, model.class_counts, model.guide, model.classifier
        return Loaded(model.model, model.num_timesteps, vae, *facts)


def use_mlflow(location: str, tracking_uri: str | None, store: str) -> None:
    """Set where models of MLflow are looked up: `tracking_uri`, MLFLOW_TRACKING_URI, or the SQLite file of a store.

    Raises UserError for the name of a model if there is none of these.
    """
    if not (tracking_uri or is_of_mlflow(location)):
        return
    import mlflow

    folder = Folder.at(store)
    if tracking_uri is None and "MLFLOW_TRACKING_URI" not in os.environ and folder.exists(SQLITE):
        tracking_uri = own_uri(folder)
    if tracking_uri:
        mlflow.set_tracking_uri(tracking_uri)
    elif not mlflow.is_tracking_uri_set():
        raise UserError(
            f"there is no model at {location}: no such file or folder, and no registry of models in {store} (no "
            f"{SQLITE}). Set --store or --tracking-uri for a registered model; expected {FORMS}"
        )


def check_model(location: str) -> None:
    """Raise UserError if there is no model at a location. Nothing of the model is read."""
    path = typed_path(location)
    if is_of_mlflow(location):
        _ = artifact_of_run(location) or version_at(location)
        return
    is_here = path.is_file() or any((path / name).exists() for name in (CHECKPOINT_MANIFEST, INDEX))
    if not is_here and not is_artifact(location):
        raise UserError(f"there is no model at {location}; expected {FORMS}")


def is_artifact(location: str) -> bool:
    """Whether an artifact is at a location, whose last part may be the beginning of its fingerprint."""
    folder = Folder.at(location)
    return folder.exists(MANIFEST_NAME) or whole_folder(folder) is not None


@contextmanager
def _model_at(location: str) -> Iterator[Artifact | PlainModel]:
    """The model at a location; the files of a registered version exist only inside the context."""
    path = typed_path(location)
    if is_of_mlflow(location) and (artifact := artifact_of_run(location)) is not None:
        yield artifact
    elif is_of_mlflow(location) and (version := version_at(location)) is not None:
        with _downloaded(version) as folder:
            yield of_pipeline(folder, location)
    elif is_artifact(location):
        yield Artifact.open(location)
    elif (path / CHECKPOINT_MANIFEST).exists():
        yield _of_checkpoint(path)
    elif (path / INDEX).exists():
        yield of_pipeline(path, str(path.absolute()))
    elif path.is_file():
        yield of_released(path)
    else:
        raise UserError(f"there is no model at {location}; expected {FORMS}")


def artifact_of_run(location: str) -> Artifact | None:
    """The checkpoint artifact of a training's MLflow run; None for the name of something else."""
    if (match := RUN.fullmatch(location)) is None:
        return None
    client = mlflow_client()
    try:
        tags = client.get_run(match[1]).data.tags
    except Exception as error:
        raise UserError(
            f"MLflow at {client.tracking_uri} has no model {location} ({error}); set MLFLOW_TRACKING_URI "
            "or --tracking-uri, for example sqlite:///edt-store/mlflow.db"
        ) from error
    if tags.get("edt.kind") != "checkpoint" or "edt.uri" not in tags:
        raise UserError(f"the MLflow run {match[1]} has no checkpoint artifact; use the run of a train step")
    return Artifact.open(tags["edt.uri"])


def version_at(location: str) -> Any | None:
    """The registered version at a location; None for a location of something else."""
    return (
        None
        if not is_of_mlflow(location) or split_name(location) is None
        else registered_version(mlflow_client(), location)
    )


@contextmanager
def _downloaded(version: Any) -> Iterator[Path]:
    """The diffusers folder of a registered version, downloaded and checked."""
    with tempfile.TemporaryDirectory(prefix="edt-") as folder:
        fetch_version(mlflow_client(), version, Path(folder), need_digests=False)
        yield Path(folder)


def _of_checkpoint(folder: Path) -> PlainModel:
    """One checkpoint of a training, checked against its own manifest."""
    from edt_core.training.checkpoint import CheckpointError, check_checkpoint, ema_model

    try:
        manifest = check_checkpoint(folder)
    except CheckpointError as error:
        raise UserError(f"{error}; use another checkpoint") from error
    config = read_json(folder / TRAIN_STATE)["config"]
    return PlainModel(ema_model(folder), config["num_timesteps"], manifest.step, manifest.seal, str(folder.absolute()))


def of_pipeline(folder: Path, origin: str) -> PlainModel:
    """A diffusers folder that `save_pipeline` wrote. Code and pickles in it are not run."""
    from diffusers.utils import logging

    from edt_core.pipeline import EDTPipeline

    logging.disable_progress_bar()
    _check_components(folder)
    for part in (folder, *(path for path in sorted(folder.iterdir()) if path.is_dir())):
        check_folder_headers(part)
    try:
        pipeline = EDTPipeline.from_pretrained(folder, low_cpu_mem_usage=False, use_safetensors=True)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(f"{folder} is not a diffusers folder of an EDT: {str(error).splitlines()[0]}") from error
    if not pipeline.uses_own_samplers(pipeline.scheduler):
        _log.warning(
            "%s: its scheduler, %s, is not used; set the sampler with the option sampler",
            *(folder, type(pipeline.scheduler).__name__),
        )
    digest = sha256_json({p.relative_to(folder).as_posix(): sha256_file(p) for p in folder.rglob("*") if p.is_file()})
    config, guide = pipeline.config, None if pipeline.guide is None else pipeline.guide.edt.eval()
    classifier = None if pipeline.classifier is None else pipeline.classifier.network.eval()
    facts = tuple(config.classes), dict(config.protocol), config.class_counts, guide, classifier
    return PlainModel(pipeline.transformer.edt.eval(), config.num_timesteps, 0, digest, origin, folder / "vae", *facts)


def _check_components(folder: Path) -> None:
    """Raise UserError if the index of a folder names a module other than ours and diffusers': loading would run it.

    diffusers before 0.42 imports any module that the index names, and a component's folder may contain one.
    """
    try:
        index = read_json_object(folder / INDEX)
    except (OSError, ValueError):
        return  # not a pipeline: loading it reports that
    for component in _COMPONENTS & index.keys():
        entry = index[component]
        library = str(entry[0] if isinstance(entry, list) and entry else entry)
        if library not in _LIBRARIES or (folder / component / f"{library}.py").exists():
            raise UserError(
                f"{folder / INDEX} takes {component} from {entry}, but code in a folder is not run; allowed "
                f"modules are {' and '.join(_LIBRARIES)}"
            )


def of_released(path: Path) -> PlainModel:
    """The authors' released file, with the averaged weights if it has them: the authors sample from those."""
    from edt_core.diffusion import objective_words
    from edt_core.models.import_released import read_released_model

    released = read_released_model(path, words=objective_words())
    for note in released.notes:
        _log.warning("%s: %s", on_one_line(str(path)), on_one_line(note))
    return PlainModel(released.model, 1000, 0, sha256_file(path), str(path.absolute()))


def _store_model(plain: PlainModel, work: Folder) -> Opened:
    """The model and its autoencoder as artifacts of the store `work`; existing ones are reused."""
    from safetensors.torch import save_file

    from edt_core.models import count_macs, count_parameters
    from edt_core.training.checkpoint import checkpoint_name

    vae = None if plain.autoencoder is None else _store_autoencoder(plain.autoencoder, plain, work)
    config = {"num_timesteps": plain.num_timesteps}
    final = f"{CHECKPOINTS}/{checkpoint_name(plain.steps)}"

    def write(out: ArtifactWriter) -> dict[str, Any]:
        weights = {name: value.contiguous() for name, value in plain.model.state_dict().items()}
        write_model(out, final, plain.model.config.to_dict(), lambda path: save_file(weights, path))
        return {
            "model": plain.model.config.name,
            **plain.model.config.objective_record(),
            "steps": plain.steps,
            "autoencoder_digest": None if vae is None else vae.manifest.digest,
            **({} if vae is None else autoencoder.stored_scale(vae).beyond_factor()),
            "class_counts": None if plain.class_counts is None else list(plain.class_counts),
            "parameters": count_parameters(plain.model),
            "macs": count_macs(plain.model),
            "final": final,
            "origin": plain.origin,
        }

    return Opened(_once("checkpoint", config, plain.digest, work, write), vae)


def _store_autoencoder(folder: Path, plain: PlainModel, work: Folder) -> Artifact:
    from edt_core.autoencoders.autoencoder import autoencoder_facts, load_autoencoder

    facts = autoencoder_facts(load_autoencoder(folder))

    def write(out: ArtifactWriter) -> dict[str, Any]:
        out.add_tree(folder, autoencoder.FOLDER)
        return {**facts, "source": plain.origin}

    return _once("autoencoder", {}, plain.digest, work, write)


def _once(
    kind: str, config: dict[str, Any], digest: str, work: Folder, write: Callable[[ArtifactWriter], dict[str, Any]]
) -> Artifact:
    """The artifact in a store of content with this digest: reused, or written now."""
    inputs = {"model": digest}
    identity = fingerprint(kind, _VERSION, config, inputs)
    folder = work.child(f"{kind}/{identity}")
    with alone_in(folder):
        if (existing := existing_artifact(folder, identity)) is not None:
            return existing
        out = ArtifactWriter(folder, kind, identity)
        return out.commit(config, inputs, write(out))


def in_store(checkpoint: Artifact) -> Opened:
    """A checkpoint artifact, with its autoencoder and images if they are in the same store."""
    if checkpoint.manifest.kind != "checkpoint":
        raise UserError(
            f"{checkpoint.folder.uri} is an artifact of kind {checkpoint.manifest.kind}, but a model is needed: {FORMS}"
        )
    latents = _parent(checkpoint, "latents")
    if latents is None:
        return Opened(checkpoint, _beside(checkpoint, "autoencoder"), _beside(checkpoint, "images"))
    return Opened(checkpoint, _parent(latents, "autoencoder"), _parent(latents, "images"))


def _loaded(opened: Opened) -> Loaded:
    """The averaged weights of a checkpoint artifact, with the autoencoder and the class names of its training."""
    from edt_core.autoencoders.autoencoder import load_autoencoder
    from edt_core.training.checkpoint import ema_model

    checkpoint, vae, images = opened.checkpoint, opened.autoencoder, opened.images
    if vae is not None:
        autoencoder.check_checkpoint_scale(checkpoint, vae)
    return Loaded(
        ema_model(checkpoint.directory(checkpoint.counts["final"])),
        checkpoint.manifest.config["num_timesteps"],
        None if vae is None else load_autoencoder(vae.directory(autoencoder.FOLDER)),
        () if images is None else tuple(images.read_json(CLASSES_NAME)),
        class_counts=checkpoint.counts.get("class_counts"),
    )


def _parent(artifact: Artifact, kind: str) -> Artifact | None:
    """The input of this kind of an artifact in a store (`<root>/<kind>/<fingerprint>`); None if it is not there."""
    inputs: Mapping[str, str] = artifact.manifest.inputs
    *root, parent, name = artifact.folder.uri.split("/")
    if (parent, name) != (artifact.manifest.kind, artifact.fingerprint) or kind not in inputs:
        return None
    folder = Folder.at("/".join(root)).child(f"{kind}/{inputs[kind]}")
    return Artifact.open(folder) if folder.exists(MANIFEST_NAME) else None


def _beside(checkpoint: Artifact, role: str) -> Artifact | None:
    """The artifact of a role that `derived_counts` recorded, if it exists unchanged."""
    uri, digest = checkpoint.counts.get("beside", {}).get(role, (None, None))
    if uri is None or not Folder.at(uri).exists(MANIFEST_NAME):
        return None
    artifact = Artifact.open(uri)
    return artifact if artifact.manifest.digest == digest else None
