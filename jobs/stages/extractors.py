"""Feature networks as inputs of a job: location and digest of their weights, and loading them on a worker."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from edt_core.errors import UserError
from edt_core.evaluation.extractors import EXTRACTORS, TOKEN_SPACES, extractor_spec
from edt_core.files.place_names import typed_path
from edt_core.store.artifact import Artifact, Source
from jobs.stages import classifier
from jobs.stages.autoencoder import MLFLOW_SCHEMES, downloaded

Inputs = Mapping[str, Artifact | Source]


def extractor_source(
    space: str, location: str | None, sha256: str | None = None, tracking_uri: str | None = None
) -> Source:
    """Published weights of a feature space, and their current digest.

    Raises UserError if there are none: the message names the file and where to get it.
    """
    from edt_core.evaluation.extractors.weights import published_weights

    weights = _local_location(location, tracking_uri)
    _, digest = published_weights(space, weights, sha256)
    assert location is not None
    assert weights is not None
    # Every worker can download from a tracking server; the files of a local store have a path.
    from_server = location.startswith(MLFLOW_SCHEMES) and _has_tracking_server()
    return Source(location if from_server or "://" in weights else _absolute(weights), digest)


def load(space: str, item: Artifact | Source, device: str) -> Any:
    """The extractor of a space on a device; on a CPU the features of an image do not depend on the images beside it.

    Raises UserError if the weights have changed since the run started.
    """
    from edt_core.cpu_units import UnitExtractor

    extractor = _loaded(space, item, device)
    return UnitExtractor(extractor) if device == "cpu" else extractor


def load_tokens(inputs: Inputs, device: str) -> Callable[[Any], Any] | None:
    """The network among the inputs whose patches' tokens are stored, from pixels to float32 [n, T, K]; None for none.

    On a CPU the tokens of an image do not depend on the images beside it. Raises UserError as `load`.
    """
    from edt_core.cpu_units import UnitExtractor

    for space in TOKEN_SPACES:
        item = inputs.get(space)
        if isinstance(item, Source):
            load = extractor_spec(space).load_tokens
            assert load is not None
            network = load(_checked_weights(space, item), device)
            extract = UnitExtractor(network) if device == "cpu" else network
            return lambda pixels: extract(pixels)["tokens"]
    return None


def _loaded(space: str, item: Artifact | Source, device: str) -> Any:
    from edt_core.evaluation.extractors import load_extractor

    if isinstance(item, Artifact):
        return load_extractor(space, item.directory(classifier.FOLDER), device)
    return load_extractor(space, _checked_weights(space, item), device)


def _checked_weights(space: str, item: Source) -> str:
    """The place of published weights on this node, whose content is that of the run's start."""
    from edt_core.evaluation.extractors.weights import published_weights

    is_file = len(item.fingerprint) == 64 and not Path(item.location).is_dir()
    stated = item.fingerprint if is_file else None
    path, digest = published_weights(space, _local_location(item.location), stated)
    if digest != item.fingerprint:
        raise UserError(
            f"the weights at {item.location} have sha256 {digest[:12]} on this node, but {item.fingerprint[:12]} where "
            "the run was started; use the same weights on all nodes"
        )
    return path


def spaces_of(inputs: Iterable[str]) -> list[str]:
    """The feature spaces among roles of inputs, in a fixed order."""
    roles = set(inputs)
    return [space for space in EXTRACTORS if space in roles]


def digests_of(inputs: Inputs) -> dict[str, str]:
    """The digest of the extractor of each space among the inputs."""
    networks = {space: inputs[space] for space in spaces_of(inputs)}
    return {
        space: item.manifest.digest if isinstance(item, Artifact) else item.fingerprint
        for space, item in networks.items()
    }


def _has_tracking_server() -> bool:
    import mlflow

    return mlflow.get_tracking_uri().startswith("http")


def _absolute(location: str) -> str:
    """A local path in absolute form, so that workers find it too; a hub id is returned as given."""
    path = typed_path(location)
    return str(path.absolute()) if path.exists() else location


def _local_location(location: str | None, tracking_uri: str | None = None) -> str | None:
    """A local path for an MLflow URI; anything else as given. Raises UserError if MLflow does not have it."""
    if location is None or not location.startswith(MLFLOW_SCHEMES):
        return location
    if tracking_uri is not None:
        import mlflow

        mlflow.set_tracking_uri(tracking_uri)
    path = downloaded(location, "weights")
    files = [file for file in path.rglob("*") if file.suffix in (".pth", ".pt")] if path.is_dir() else [path]
    return str(files[0] if len(files) == 1 else path)
