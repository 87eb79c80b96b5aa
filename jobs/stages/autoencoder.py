"""autoencoder: fit a small AutoencoderKL on image shards, or take a published one; saved by save_pretrained."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from edt_core.config import AutoencoderConfig
from edt_core.errors import UserError
from edt_core.files.place_names import typed_path
from edt_core.network.answers import check_mlflow
from edt_core.progress import Progress, Silent, fit_report
from edt_core.store.artifact import Artifact, ArtifactWriter, Source, sha256_json
from edt_core.store.folder import Folder, sha256_file
from edt_core.store.layout import IMAGE_SHARD, MANIFEST_NAME
from jobs.runtime.cluster import require, use_threads
from jobs.runtime.devices import device_name, kind_of_devices
from jobs.runtime.tracking import mlflow_client
from jobs.stages.stage import DEVICE, Stage, alone_in, existing_artifact

if TYPE_CHECKING:
    from edt_core.data.scale import LatentScale
    from edt_core.models import ModelConfig

FOLDER = "autoencoder"
MLFLOW_SCHEMES = ("models:/", "runs:/", "mlflow-artifacts:/")
IMAGE_SHARDS = IMAGE_SHARD.replace("{:05d}", "*")


def autoencoder(
    config: AutoencoderConfig, inputs: Mapping[str, Any], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    """Fit an autoencoder on image shards, or store a published one.

    The images are `inputs["images"]`, the published one is `inputs["published"]`. Raises UserError if the published one
    cannot be loaded, or its factor or channels are not those of the configuration.
    """
    if config.pretrained:
        return _take_published(config, inputs.get("published") or published_source(config), out)
    require("the fit", CPU=config.num_cpus, GPU=config.num_gpus)
    task = ray.remote(num_cpus=config.num_cpus, num_gpus=config.num_gpus)(_fit)
    return ray.get(task.remote(config, dict(inputs), out, progress))


def _fit(
    config: AutoencoderConfig, inputs: Mapping[str, Artifact], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    from edt_core.autoencoders.autoencoder import autoencoder_facts, fit_autoencoder
    from edt_core.data.shards import load_images
    from edt_core.precision import use_precision

    use_threads(config.num_cpus)
    use_precision("fp32")
    images = inputs["images"]
    pixels, _ = load_images(images.paths(IMAGE_SHARDS), images.counts["images"], config.max_images)

    report = fit_report(progress, config.steps, "mse", 4)
    device = device_name(config.num_gpus)
    model, facts = fit_autoencoder(config, pixels, device, report)
    _store(model, out)
    counts = {**autoencoder_facts(model), **facts, "images": len(pixels), "source": "fitted"}
    return {**counts, DEVICE: kind_of_devices([device])}


def published_source(config: AutoencoderConfig, tracking_uri: str | None = None) -> Source | None:
    """The autoencoder that `pretrained` means at this moment: an alias may move, and a folder may be rewritten.

    The fingerprint is the digest of a local folder's files, the version of a registered model, or the hub id itself:
    use a hub id whose content does not change. None if the autoencoder is fitted. Raises UserError if MLflow does not
    have it.
    """
    location = config.pretrained
    if location is None:
        return None
    if location.startswith(MLFLOW_SCHEMES):
        import mlflow

        if tracking_uri is not None:
            mlflow.set_tracking_uri(tracking_uri)
        version = _registered(location)
        return Source(version, version)
    folder = typed_path(location).absolute()
    if not folder.is_dir():
        return Source(location, location)
    digests = {path.relative_to(folder).as_posix(): sha256_file(path) for path in folder.rglob("*") if path.is_file()}
    return Source(str(folder), sha256_json(digests))


def published_artifact(location: str, folder: Folder) -> Artifact:
    """The published autoencoder at a hub id, local folder or MLflow URI as an artifact in `folder`; made on first use.

    Raises UserError if there is none at the location.
    """
    from edt_core.autoencoders.autoencoder import autoencoder_facts, load_autoencoder

    path = typed_path(location)
    location = str(path.resolve()) if path.is_dir() else location  # each folder has one name in the records
    facts = autoencoder_facts(load_autoencoder(resolve(location)))
    config = AutoencoderConfig(
        pretrained=location,
        downsample_factor=facts["downsample_factor"],
        latent_channels=facts["latent_channels"],
    ).published()
    published = published_source(config)
    assert published is not None
    identity = STAGE.fingerprint(config, {"published": published.fingerprint})
    refusal = f"contains another autoencoder than {location}; do not mix their latents, use another folder"
    with alone_in(folder):
        if (existing := existing_artifact(folder, identity, refusal)) is not None:
            return existing
        return STAGE.execute(config, {"published": published}, ArtifactWriter(folder, STAGE.kind, identity), Silent())


def _registered(location: str) -> str:
    """`models:/NAME/VERSION` of a `models:/NAME@ALIAS`; other URIs have a fixed meaning and are returned as given."""
    from mlflow.exceptions import MlflowException

    name, _, alias = location.removeprefix("models:/").partition("@")
    if not alias and "/" not in name and not name.startswith("m-"):  # m-... is the id of a logged model
        raise UserError(
            f"{location} names no version of an autoencoder; give models:/{name}@champion or models:/{name}/NUMBER"
        )
    if not alias:
        return location
    client = mlflow_client()
    try:
        return f"models:/{name}/{client.get_model_version_by_alias(name, alias).version}"
    except MlflowException as error:
        raise UserError(f"MLflow has no autoencoder at {location} ({error}); look it up in the registry") from error


def _take_published(config: AutoencoderConfig, published: Source | None, out: ArtifactWriter) -> dict[str, Any]:
    from edt_core.autoencoders.autoencoder import autoencoder_facts, load_autoencoder

    assert config.pretrained is not None
    assert published is not None
    exact = published.fingerprint if config.pretrained.startswith(MLFLOW_SCHEMES) else config.pretrained
    model = load_autoencoder(resolve(published.location))
    facts = autoencoder_facts(model)
    stated = {"downsample_factor": config.downsample_factor, "latent_channels": config.latent_channels}
    if differing := {name: facts[name] for name, value in stated.items() if facts[name] != value}:
        raise UserError(
            f"the autoencoder {config.pretrained} has {differing}, but the configuration says {stated}; set these "
            "fields of `autoencoder:` to the values of the autoencoder"
        )
    _store(model, out)
    return {**facts, "source": exact}


def resolve(location: str) -> str:
    """A local folder for an MLflow URI; hub ids and local folders are returned as given."""
    if not location.startswith(MLFLOW_SCHEMES):
        return location
    folder = downloaded(location, "autoencoder")
    configs = sorted(folder.rglob("config.json"), key=lambda path: ("vae" not in path.parts, len(path.parts)))
    if not configs:
        raise UserError(f"{location} is not a diffusers model: it contains no config.json")
    return str(configs[0].parent)


def read_autoencoder(location: str) -> Any:
    """The autoencoder of an artifact, local diffusers folder, hub id or MLflow URI, in memory. Raises UserError."""
    from edt_core.autoencoders.autoencoder import load_autoencoder

    if not Folder.at(location).exists(MANIFEST_NAME):
        return load_autoencoder(resolve(location))
    artifact = Artifact.open(location)
    if artifact.manifest.kind != "autoencoder":
        raise UserError(
            f"{location} is an artifact of kind {artifact.manifest.kind}, but an autoencoder is needed here"
        )
    return load_autoencoder(artifact.directory(FOLDER))


def stored_scale(artifact: Artifact) -> "LatentScale":
    """The scale of an autoencoder artifact's latents.

    It is read from the configuration: the counts of older artifacts contain only the scaling factor.
    """
    from edt_core.autoencoders.kinds import KINDS

    settings = artifact.read_json(f"{FOLDER}/config.json")
    return KINDS[settings["_class_name"]].scale({**settings, **artifact.counts})


def check_trained_scale(counts: Mapping[str, Any], scale: "LatentScale", what: str, remedy: str) -> None:
    """Raise UserError unless the counts of latents or of a checkpoint have the scale of the autoencoder's latents.

    Older versions ignored shift_factor, latents_mean and latents_std: samples of such a model would be decoded wrong.
    """
    from edt_core.data.scale import LatentScale

    stated = LatentScale.of({**counts, "scaling_factor": scale.scaling_factor})
    if stated != scale:
        raise UserError(
            f"{what} was made with {stated.beyond_factor() or 'scaling_factor alone'}, but its autoencoder has "
            f"{scale.beyond_factor() or 'scaling_factor alone'} (older versions ignored shift_factor, latents_mean and "
            f"latents_std); {remedy}"
        )


def check_checkpoint_scale(checkpoint: Artifact, source: Artifact) -> None:
    """Raise UserError unless a model was trained on latents of the same scale as those of its autoencoder artifact."""
    if checkpoint.counts["autoencoder_digest"] is None:  # imported: its files do not state it
        return
    remedy = f"remove the artifacts of its latents and {checkpoint.folder.uri}, encode and train again"
    check_trained_scale(checkpoint.counts, stored_scale(source), "the model", remedy)


def check_decoder(config: "ModelConfig", decoder: Any) -> None:
    """Raise UserError if the latents of an autoencoder do not have the factor and channels of a model."""
    from edt_core.autoencoders.autoencoder import autoencoder_facts

    facts = autoencoder_facts(decoder)
    factor, channels = facts["downsample_factor"], facts["latent_channels"]
    if (factor, channels) != (config.autoencoder_factor, config.in_channels):
        raise UserError(
            f"the autoencoder has factor {factor} and {channels} latent channels, but {config.name} was made for "
            f"factor {config.autoencoder_factor} and {config.in_channels} channels; use the autoencoder of its training"
        )


def downloaded(location: str, what: str) -> Path:
    """A local copy of the files at an MLflow URI. Raises UserError, which names `what`, if there are none."""
    import mlflow

    check_mlflow(mlflow.get_tracking_uri())
    try:
        return Path(mlflow.artifacts.download_artifacts(location))
    except Exception as error:
        raise UserError(f"MLflow has no {what} at {location} ({error}); look it up in the registry") from error


def _store(model: Any, out: ArtifactWriter) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, safe_serialization=True)
        out.add_tree(Path(folder), FOLDER)


STAGE = Stage("autoencoder", "autoencoder", 1, AutoencoderConfig, autoencoder, roles=("images",))
