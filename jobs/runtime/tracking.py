"""Locate MLflow: the client of this process, and the SQLite file of a local store."""

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from edt_core.errors import UserError
from edt_core.network.answers import check_mlflow
from edt_core.store.folder import Folder

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "mlflow.db"  # in a local store, if no MLflow server is configured
_SQLITE_SCHEME = "sqlite:///"


def mlflow_client() -> "MlflowClient":
    """A client of the MLflow of this process. Raises UserError if it does not answer."""
    import mlflow

    check_mlflow(mlflow.get_tracking_uri())
    return mlflow.MlflowClient()


def own_uri(store: Folder) -> str:
    """The tracking URI of the SQLite file in a local store; "" for a remote store, which has no such file."""
    return "" if (root := store.local) is None else sqlite_uri(root / SQLITE)


def sqlite_uri(path: Path) -> str:
    """The URI of a SQLite file at any path; `sqlite_path` is the inverse.

    SQLAlchemy ends the path at a `?`, and since 2.1 decodes `%20`. Such a path is quoted, slashes included, because
    MLflow creates the folders of the path as written. Raises UserError if no form means this file.
    """
    text = str(path)
    if not {"?", "%"} & set(text):
        return f"{_SQLITE_SCHEME}{text}"
    from sqlalchemy import __version__
    from sqlalchemy.engine import make_url

    for form in (text, quote(text, safe="")):
        if make_url(f"{_SQLITE_SCHEME}{form}").database == text:
            return f"{_SQLITE_SCHEME}{form}"
    raise UserError(
        f"the folder {path.parent} has '?' in its name, and SQLAlchemy {__version__} cannot open a database in such a "
        "folder; rename the folder, or install SQLAlchemy 2.1 or later"
    )


def sqlite_path(uri: str) -> Path | None:
    """The SQLite file that a tracking URI names; None for another kind of URI."""
    if not uri.startswith(_SQLITE_SCHEME):
        return None
    from sqlalchemy.engine import make_url

    return Path(make_url(uri).database or "")
