"""Registered versions and MLflow runs by name: NAME@ALIAS, NAME/VERSION, or NAME for its champion."""

import re
from typing import TYPE_CHECKING, Any

from edt_core.errors import UserError
from edt_core.files.place_names import typed_path
from edt_core.printing.suggestions import suggestions

if TYPE_CHECKING:
    from mlflow import MlflowClient

REGISTERED = re.compile(r"(?:models:/)?([\w.-]+)(?:@([\w.-]+)|/(\d+))?")
RUN = re.compile(r"(?:runs:/)?([0-9a-f]{32})/?")
STD_TAG = "edt.ema_std"  # of a version with averaged weights that `edt ema` made: their width
_CHAMPION = "champion"
_CHECKPOINT_FILES = (".pt", ".pth", ".ckpt", ".safetensors", ".bin")
_MOST = 1000  # registered models that are compared with a mistyped name
_WHERE = (
    "If it is in another MLflow, set MLFLOW_TRACKING_URI or --tracking-uri, for example sqlite:///edt-store/mlflow.db"
)


def is_of_mlflow(location: str) -> bool:
    """Whether a location can be a registered version or a run of MLflow: a name of one, and no file or folder here."""
    match = RUN.fullmatch(location) or REGISTERED.fullmatch(location)
    return match is not None and not location.endswith(_CHECKPOINT_FILES) and not typed_path(location).exists()


def split_name(location: str) -> tuple[str, str | None, str | None] | None:
    """(name, alias, number) of a registered version; None for other text. A name alone means its champion."""
    if (match := REGISTERED.fullmatch(location)) is None:
        return None
    name, alias, number = match.groups()
    return name, alias or (None if number else _CHAMPION), number


def registered_version(client: "MlflowClient", location: str) -> Any:
    """The registered version of a location that `split_name` can split. Raises UserError with the nearest names."""
    parts = split_name(location)
    assert parts is not None, location
    name, alias, number = parts
    try:
        return client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, str(number))
    except Exception as error:  # whatever MLflow raises
        raise _not_found(client, location, error) from error


def _not_found(client: "MlflowClient", location: str, error: Exception) -> UserError:
    """What is registered instead of a version that there is not; MLflow's own words if it does not answer."""
    missing = f"MLflow at {client.tracking_uri} has no model {location}"
    name, alias, number = split_name(location) or ("", None, None)
    try:
        models = {model.name: dict(model.aliases) for model in client.search_registered_models(max_results=_MOST)}
    except Exception:
        return UserError(f"{missing} ({error}). {_WHERE}")
    if name not in models:
        return UserError(f"{missing}; {_sentence(suggestions(name, models, 'models'))} {_WHERE}")
    if alias is not None:
        return UserError(f"{missing}; {_sentence(suggestions(alias, models[name], f'aliases of {name}'))} {_WHERE}")
    return UserError(f"{missing}: there is no version {number}. `edt models list --name {name}` lists its versions")


def _sentence(text: str) -> str:
    return text if text.endswith("?") else f"{text}."
