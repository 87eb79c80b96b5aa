"""Networks of features as inputs of a job: where their weights are, what they hold, and loading them on a worker."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edt_core.errors import UserError
from edt_core.evaluation.extractors import EXTRACTORS
from edt_core.files.place_names import typed_path
from edt_core.store.artifact import Artifact, Source
from jobs.stages import classifier
from jobs.stages.autoencoder import MLFLOW_SCHEMES, downloaded

Inputs = Mapping[str, Artifact | Source]


def extractor_source(
    space: str, location: str | None, sha256: str | None = None, tracking_uri: str | None = None
) -> Source:
    """Published weights of a feature space, and the digest of what they hold now.

    Raises UserError where there are none: the message says which file it is and where people get it.
    """
    from edt_core.evaluation.extractors.weights import published_weights

    found = _fetched(location, tracking_uri)
    _, digest = published_weights(space, found, sha256)
    assert location is not None
    assert found is not None
    # A tracking server gives them to every worker; what a local store has is a path already.
    fetch_anew = location.startswith(MLFLOW_SCHEMES) and _tracking_server()
    return Source(location if fetch_anew or "://" in found else _absolute(found), digest)


def load(space: str, item: Artifact | Source, device: str) -> Any:
    """The extractor of a space on a device. Raises UserError where the weights are not what they were."""
    from edt_core.evaluation.extractors import load_extractor
    from edt_core.evaluation.extractors.weights import published_weights

    if isinstance(item, Artifact):
        return load_extractor(space, item.directory(classifier.FOLDER), device)
    is_file = len(item.fingerprint) == 64 and not Path(item.location).is_dir()
    stated = item.fingerprint if is_file else None
    path, digest = published_weights(space, _fetched(item.location), stated)
    if digest != item.fingerprint:
        raise UserError(
            f"the weights at {item.location} are {digest[:12]} on this node and {item.fingerprint[:12]} where the run "
            "was started; give all nodes the same ones"
        )
    return load_extractor(space, path, device)


def spaces_of(inputs: Iterable[str]) -> list[str]:
    """The feature spaces among roles of inputs, in a fixed order."""
    given = set(inputs)
    return [space for space in EXTRACTORS if space in given]


def digests_of(inputs: Inputs) -> dict[str, str]:
    """What names the content of the extractor of each space among the inputs."""
    chosen = {space: inputs[space] for space in spaces_of(inputs)}
    return {
        space: item.manifest.digest if isinstance(item, Artifact) else item.fingerprint
        for space, item in chosen.items()
    }


def _tracking_server() -> bool:
    import mlflow

    return mlflow.get_tracking_uri().startswith("http")


def _absolute(location: str) -> str:
    """A local path by its absolute name, so that workers find it too; a hub id stays as it is."""
    path = typed_path(location)
    return str(path.absolute()) if path.exists() else location


def _fetched(location: str | None, tracking_uri: str | None = None) -> str | None:
    """A local path for an MLflow URI; anything else as it is. Raises UserError where MLflow has it not."""
    if location is None or not location.startswith(MLFLOW_SCHEMES):
        return location
    if tracking_uri is not None:
        import mlflow

        mlflow.set_tracking_uri(tracking_uri)
    path = downloaded(location, "weights")
    files = [file for file in path.rglob("*") if file.suffix in (".pth", ".pt")] if path.is_dir() else [path]
    return str(files[0] if len(files) == 1 else path)
