"""The evaluation of a registered version, repeated for a model that is made from it: only the weights differ."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from edt_core.config import SampleConfig
from edt_core.errors import UserError
from edt_core.evaluation.config import EvaluateConfig
from edt_core.evaluation.extractors import PUBLISHED_SPACES
from edt_core.progress import Progress
from edt_core.store.artifact import Artifact, Source
from edt_core.store.folder import Folder
from edt_core.store.store import Store, store_of
from jobs.commands.evaluate_model import make
from jobs.models.open import Opened, in_store, open_model
from jobs.models.registry_files import title
from jobs.stages import evaluate, sample
from jobs.stages.extractors import extractor_source
from pipelines.tracking.catalog import Catalog
from pipelines.tracking.runs import read_record

_KINDS = ("guide", "checkpoint")  # of the artifact with the role of a guide


@dataclass(frozen=True)
class Evaluation:
    """How a version was measured: the inputs of its samples beside the model, and of its metrics beside the samples."""

    features: Artifact
    evaluation: Artifact
    store: Store
    networks: Mapping[str, Artifact | Source]
    references: Mapping[str, Artifact]

    @property
    def autoencoder(self) -> Artifact | None:
        """The autoencoder that decoded the samples."""
        item = self.networks.get("autoencoder")
        return item if isinstance(item, Artifact) else None

    def repeated(self, checkpoint: Artifact, progress: Progress) -> tuple[Artifact, Artifact]:
        """Features and evaluation of another model, reused or made on Ray."""
        sampling = SampleConfig.model_validate(self.features.manifest.config)
        measured = EvaluateConfig.model_validate(self.evaluation.manifest.config)
        inputs = {"checkpoint": checkpoint, **self.networks}
        features = make(sample.STAGE, sampling, inputs, self.store.root, progress)
        return features, make(
            evaluate.STAGE, measured, {"features": features, **self.references}, self.store.root, progress
        )


def evaluation_of(catalog: Catalog, version: Any) -> Evaluation:
    """The evaluation that a version was registered with. Raises UserError if it or an input of it is gone."""
    uri = version.tags.get("edt.evaluation.uri")
    if uri is None:
        raise UserError(
            f"{title(version)} has no evaluation that could be repeated; register the new version without metrics: "
            "--no-metric"
        )
    try:
        evaluation = Artifact.read(uri)
        store = store_of(evaluation.folder, evaluation.manifest.kind, evaluation.fingerprint)
        if store is None:
            raise UserError(f"{uri} is not in a store")
        features = _found(store, "features", evaluation.manifest.inputs["features"])
        networks = {
            role: _network(catalog, version, store, role, identity)
            for role, identity in features.manifest.inputs.items()
            if role != "checkpoint"
        }
        references = {
            role: _found(store, role, identity)
            for role, identity in evaluation.manifest.inputs.items()
            if role != "features"
        }
    except (UserError, OSError) as error:
        raise UserError(
            f"the evaluation of {title(version)} cannot be repeated: {error}. Restore what is missing, or register the "
            "new version without metrics: --no-metric"
        ) from error
    return Evaluation(features, evaluation, store, networks, references)


def trained_checkpoint(version: Any, store: Folder) -> Opened:
    """The checkpoint artifact of the training that made a version, as it was; if it is gone, and for an imported
    version, the registered folder as an artifact of the store.
    """
    uri, digest = version.tags.get("edt.uri"), version.tags.get("edt.digest")
    with suppress(UserError, OSError):
        if uri is not None and (artifact := Artifact.open(uri)).manifest.digest == digest:
            return in_store(artifact)
    return open_model(f"models:/{version.name}/{version.version}", store)


def _network(catalog: Catalog, version: Any, store: Store, role: str, identity: str) -> Artifact | Source:
    """An input of samples: an artifact of the store, or published weights where the run of the version had them."""
    if role not in PUBLISHED_SPACES:
        for kind in _KINDS if role == "guide" else (role,):
            with suppress(UserError):
                return _found(store, kind, identity)
        raise UserError(f"its {role} {identity[:12]} is no longer in {store.root.uri}")
    weights = (read_record(catalog, version.run_id).config.get(role) or {}).get("weights")
    source = extractor_source(role, weights, None, catalog.tracking_uri)
    if source.fingerprint != identity:
        raise UserError(f"{weights} has other weights of {role} than it was measured with; put those back")
    return source


def _found(store: Store, kind: str, identity: str) -> Artifact:
    if (artifact := store.find(kind, identity)) is None:
        raise UserError(f"its {kind} {identity[:12]} is no longer in {store.root.uri}")
    return artifact
