"""autoencoder: fit a small AutoencoderKL on the image shards, or take a published one; both end as save_pretrained."""

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
from jobs.runtime.cluster import device_name, require, use_threads
from jobs.runtime.tracking import mlflow_client
from jobs.stages.stage import Stage, alone_in, made_before

if TYPE_CHECKING:
    from edt_core.data.scale import LatentScale
    from edt_core.models import ModelConfig

FOLDER = "autoencoder"
MLFLOW_SCHEMES = ("models:/", "runs:/", "mlflow-artifacts:/")
IMAGE_SHARDS = IMAGE_SHARD.replace("{:05d}", "*")


def autoencoder(
    config: AutoencoderConfig, inputs: Mapping[str, Any], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    """Store the autoencoder of the configuration, fitted on `inputs["images"]` or taken from `inputs["published"]`.

    Raises UserError where a published one cannot be had, or does not have the stated factor and channels.
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

    use_threads(config.num_cpus)
    images = inputs["images"]
    pixels, _ = load_images(images.paths(IMAGE_SHARDS), images.counts["images"], config.max_images)

    report = fit_report(progress, config.steps, "mse", 4)
    model, facts = fit_autoencoder(config, pixels, device_name(config.num_gpus), report)
    _store(model, out)
    return {**autoencoder_facts(model), **facts, "images": len(pixels), "source": "fitted"}


def published_source(config: AutoencoderConfig, tracking_uri: str | None = None) -> Source | None:
    """What `pretrained` means at this moment: an alias may move, and a folder be rewritten.

    The fingerprint is the digest of a local folder's files, a registered model's version, or a hub id as it is: give a
    hub id that does not change. None where the autoencoder is fitted. Raises UserError where MLflow does not know it.
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
    """The published autoencoder at a hub id, local folder or MLflow URI as an artifact in `folder`; made once.

    Raises UserError where there is none at the location.
    """
    from edt_core.autoencoders.autoencoder import autoencoder_facts, load_autoencoder

    path = typed_path(location)
    location = str(path.resolve()) if path.is_dir() else location  # one folder has one name in the records
    facts = autoencoder_facts(load_autoencoder(resolve(location)))
    config = AutoencoderConfig(
        pretrained=location,
        downsample_factor=facts["downsample_factor"],
        latent_channels=facts["latent_channels"],
    ).published()
    published = published_source(config)
    assert published is not None
    identity = STAGE.fingerprint(config, {"published": published.fingerprint})
    refusal = f"holds another autoencoder than {location}, and their latents do not mix; give another output folder"
    with alone_in(folder):
        if (made := made_before(folder, identity, refusal)) is not None:
            return made
        return STAGE.execute(config, {"published": published}, ArtifactWriter(folder, STAGE.kind, identity), Silent())


def _registered(location: str) -> str:
    """`models:/NAME/VERSION` of a `models:/NAME@ALIAS`; other URIs name one thing for ever and stay."""
    from mlflow.exceptions import MlflowException

    name, _, alias = location.removeprefix("models:/").partition("@")
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
            f"the autoencoder {config.pretrained} has {differing}, the configuration says {stated}; set them under "
            "`autoencoder:` to what it has"
        )
    _store(model, out)
    return {**facts, "source": exact}


def resolve(location: str) -> str:
    """A local folder for an MLflow URI; hub ids and local folders stay as they are."""
    if not location.startswith(MLFLOW_SCHEMES):
        return location
    folder = downloaded(location, "autoencoder")
    configs = sorted(folder.rglob("config.json"), key=lambda path: ("vae" not in path.parts, len(path.parts)))
    if not configs:
        raise UserError(f"{location} holds no diffusers model: no config.json in it")
    return str(configs[0].parent)


def read_autoencoder(location: str) -> Any:
    """The autoencoder of an artifact, local diffusers folder, hub id or MLflow URI, in memory. Raises UserError."""
    from edt_core.autoencoders.autoencoder import load_autoencoder

    if not Folder.at(location).exists(MANIFEST_NAME):
        return load_autoencoder(resolve(location))
    artifact = Artifact.open(location)
    if artifact.manifest.kind != "autoencoder":
        raise UserError(f"{location} holds {artifact.manifest.kind}, and autoencoder is what is needed here")
    return load_autoencoder(artifact.directory(FOLDER))


def stored_scale(artifact: Artifact) -> "LatentScale":
    """The scale of an autoencoder artifact's latents.

    Read from the configuration: counts of older artifacts have the scaling factor alone.
    """
    from edt_core.autoencoders.kinds import KINDS

    settings = artifact.read_json(f"{FOLDER}/config.json")
    return KINDS[settings["_class_name"]].scale({**settings, **artifact.counts})


def check_trained_scale(made: Mapping[str, Any], scale: "LatentScale", what: str, remedy: str) -> None:
    """Raise UserError unless the counts of latents or of a checkpoint state how an autoencoder's latents are centred.

    Older versions ignored shift_factor, latents_mean and latents_std: a model of such latents would be decoded wrong.
    """
    from edt_core.data.scale import LatentScale

    stated = LatentScale.of({**made, "scaling_factor": scale.scaling_factor})
    if stated != scale:
        raise UserError(
            f"{what} was made with {stated.beyond_factor() or 'scaling_factor alone'}, and its autoencoder has "
            f"{scale.beyond_factor() or 'scaling_factor alone'} (older versions ignored shift_factor, latents_mean and "
            f"latents_std); {remedy}"
        )


def check_checkpoint_scale(checkpoint: Artifact, source: Artifact) -> None:
    """Raise UserError unless a model was trained on latents that are centred as those of its autoencoder artifact."""
    if checkpoint.counts["autoencoder_digest"] is None:  # brought from elsewhere: its files do not say
        return
    remedy = f"remove the artifacts of its latents and {checkpoint.folder.uri}, encode and train again"
    check_trained_scale(checkpoint.counts, stored_scale(source), "the model", remedy)


def check_decoder(config: "ModelConfig", decoder: Any) -> None:
    """Raise UserError for an autoencoder whose latents are not those that a model was made for."""
    from edt_core.autoencoders.autoencoder import autoencoder_facts

    facts = autoencoder_facts(decoder)
    found = facts["downsample_factor"], facts["latent_channels"]
    if found != (config.autoencoder_factor, config.in_channels):
        raise UserError(
            f"the autoencoder has factor {found[0]} and {found[1]} latent channels, and {config.name} was made for "
            f"factor {config.autoencoder_factor} and {config.in_channels} channels; give the one of its training"
        )


def downloaded(location: str, what: str) -> Path:
    """What MLflow keeps at a URI, on this machine. Raises UserError, which says `what`, where there is nothing."""
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
