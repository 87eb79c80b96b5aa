"""Facts from the configuration of a published autoencoder, without its weights."""

from pathlib import Path
from typing import Any

from edt_core.errors import UserError
from edt_core.files.place_names import typed_path
from edt_core.files.small_files import read_json_object
from edt_core.network.hub import hub_is_away
from jobs.models.names import registered_version, split_name
from jobs.models.registry_files import version_facts

_REGISTERED = "models:/"  # begins the location of a registered version


def published_facts(location: str) -> dict[str, Any]:
    """Downsample factor, latent channels and scale of the autoencoder in a local folder or at a hub id.

    Raises UserError if there is none, or it is not supported.
    """
    from edt_core.autoencoders.check import check_config
    from edt_core.autoencoders.kinds import KINDS

    folder = typed_path(location)
    settings = check_config(location, _local_config(folder) if folder.is_dir() else _hub_config(location))
    return KINDS[settings["_class_name"]].facts(settings)


def own_statistics(location: str | None, tracking_uri: str | None = None) -> bool | None:
    """Whether an autoencoder's configuration has statistics of its channels, so that its latents are normalised.

    `location` is None for one that is fitted, which has none. The result is None where the configuration cannot be
    read yet.
    """
    if location is None:
        return False
    try:
        registered = location.startswith(_REGISTERED) and split_name(location) is not None
        facts = _registered_scale(location, tracking_uri) if registered else published_facts(location)
    except (UserError, OSError):
        return None
    return facts.get("latents_mean") is not None


def _registered_scale(location: str, tracking_uri: str | None) -> dict[str, Any]:
    """The scale of the autoencoder in the folder of a registered version."""
    from mlflow import MlflowClient

    from edt_core.autoencoders.kinds import KINDS

    client = MlflowClient(tracking_uri)
    _, (settings,) = version_facts(client, registered_version(client, location), ("vae/config.json",))
    return KINDS[settings["_class_name"]].scale(settings).record()


def _local_config(folder: Path) -> dict[str, Any]:
    from edt_core.autoencoders.check import check_folder

    check_folder(folder)
    try:
        values = read_json_object(folder / "config.json")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} contains no config.json of diffusers; use a folder written by save_pretrained"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} contains no .safetensors; use a folder written by save_pretrained")
    return dict(values)


def _hub_config(hub_id: str) -> dict[str, Any]:
    """The config.json of a hub id, from this machine's cache or from the hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    away = hub_is_away(hub_id)
    try:
        return read_json_object(Path(hf_hub_download(hub_id, "config.json", local_files_only=away)))
    except HFValidationError as error:
        raise UserError(
            f"{hub_id} is neither an existing folder nor a hub id; correct autoencoder.pretrained"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(f"the hub has no {hub_id}, or it is private; correct the id, or set HF_TOKEN") from error
    except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise UserError(
                f"{hub_id} has no config.json, so it is no autoencoder; from a diffusers pipeline use subfolder vae: "
                f"hf download {hub_id} --include 'vae/*' --local-dir FOLDER, and set autoencoder.pretrained=FOLDER/vae"
            ) from error
        raise UserError(
            f"{hub_id} is not in this machine's cache, and the hub does not answer; download it elsewhere and use its "
            "folder, set HTTPS_PROXY, or fit an autoencoder (autoencoder.pretrained=null)"
        ) from error
