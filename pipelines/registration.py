"""A trained model as a registered version: its diffusers folder as a logged model, and the tags that tell of it."""

import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edt_core.artifact import Artifact, canonical_json, sha256_json
from edt_core.environment import code_version
from edt_core.errors import UserError
from edt_core.schema import CLASSES_NAME
from jobs.registry_files import DIGEST_TAG, DIGESTS, PIPELINE, digests_text, folder_digests, stored_problems
from pipelines.catalog import Catalog, artifact_tags
from pipelines.config import PromoteConfig
from pipelines.promotion import METRIC_TAG, PROTOCOL_FIELDS_TAG, PROTOCOL_TAG, Decision
from pipelines.registry import DECISION_TAG, GATE_TAG, add_version, find_version, settle

COST_TAG = "edt.cost."
COSTS = ("model", "image_size", "parameters", "macs", "steps", "images_seen", "training_flops", "device_hours")
_MOST_TEXT = 20_000  # characters of a tag; MLflow keeps 100,000 and MySQL 65,535


@dataclass(frozen=True)
class Entry:
    """The artifacts behind one version."""

    images: Artifact
    autoencoder: Artifact
    checkpoint: Artifact
    features: Artifact
    evaluation: Artifact


def promote(catalog: Catalog, run_id: str, name: str, config: PromoteConfig, entry: Entry) -> Decision:
    """Register the model of `entry` as a version of `name`, move `candidate`, and `champion` if it passes the gate.

    A version that stands for the same checkpoint and evaluation is found again, with its decision as it was: where it
    was rolled back since, it stays so. Raises UserError where the evaluation lacks the metric that decides.
    """
    measured = entry.evaluation.counts["metrics"]
    if config.metric not in measured:
        raise UserError(f"promote.metric {config.metric!r} was not measured; choose from {', '.join(sorted(measured))}")
    version = find_version(catalog, name, identity_of(entry, config))
    if version is None:
        version = register(catalog, run_id, name, config, entry)
    if DECISION_TAG in version.tags:
        return Decision.from_json(version.tags[DECISION_TAG])
    return settle(catalog, version, config, f"run {run_id}", lambda: stored_problems(catalog.client, version))


def entry_of(made: Mapping[str, Artifact]) -> Entry:
    """The entry out of a branch's artifacts by role."""
    return Entry(**{field.name: made[field.name] for field in fields(Entry)})


def registered(catalog: Catalog, name: str, config: PromoteConfig, entry: Entry) -> tuple[Decision, str] | None:
    """What was decided of the model of `entry`, and the MLflow run that registered it; None where none did."""
    version = find_version(catalog, name, identity_of(entry, config))
    if version is None or DECISION_TAG not in version.tags:
        return None
    return Decision.from_json(version.tags[DECISION_TAG]), str(version.run_id)


def identity_of(entry: Entry, config: PromoteConfig) -> dict[str, str]:
    """The tags that two registrations of one model have in common and nothing else has."""
    return {
        "edt.checkpoint": entry.checkpoint.fingerprint,
        "edt.evaluation": entry.evaluation.fingerprint,
        "edt.promote": f"{config.metric} {'lower' if config.lower_is_better else 'higher'}",
    }


def register(catalog: Catalog, run_id: str, name: str, config: PromoteConfig, entry: Entry) -> Any:
    """Log the diffusers folder as an MLflow model of the run, and register it. Returns the version.

    Where another driver has registered the same model meanwhile, its version is returned and this logged model removed.
    """
    import mlflow

    import pipelines.pyfunc_model as code

    mlflow.set_tracking_uri(catalog.tracking_uri)
    with tempfile.TemporaryDirectory() as folder, mlflow.start_run(run_id=run_id), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that no example came with the model: the signature is stated
        pipeline, digests = Path(folder) / PIPELINE, Path(folder) / DIGESTS
        write_pipeline(pipeline, entry)
        digests.write_bytes(digests_text(folder_digests(pipeline)))
        files = {DIGEST_TAG: sha256(digests.read_bytes()).hexdigest()}
        info = mlflow.pyfunc.log_model(
            name=name,
            python_model=str(code.__file__),
            artifacts={"pipeline": str(pipeline), "digests": str(digests)},
            pip_requirements=[f"edt-pipeline=={version('edt-pipeline')}"],
            signature=_signature(),
            params={"architecture": str(entry.checkpoint.counts["model"])},
            metadata={"edt.checkpoint": entry.checkpoint.fingerprint},
            step=int(entry.checkpoint.counts["steps"]),
        )
    tags = version_tags(catalog.client.get_run(run_id).data.tags, config, entry) | files
    made = add_version(catalog, name, info.model_uri, run_id, tags, identity_of(entry, config), info.model_id)
    if made.source != info.model_uri:
        catalog.client.delete_logged_model(info.model_id)
    return made


def version_tags(run_tags: Mapping[str, str], config: PromoteConfig, entry: Entry) -> dict[str, str]:
    """What is recorded of a version: metrics with their protocol, what it was made from, and the gate it goes through.

    With these alone it can be found, compared, checked and promoted, without its run or its store.
    """
    counts = entry.evaluation.counts
    metrics = {f"{METRIC_TAG}{key}": repr(float(value)) for key, value in counts["metrics"].items()}
    protocol = canonical_json(counts["protocol"])
    spent = {**entry.images.counts, **entry.checkpoint.counts}
    tags = {
        **artifact_tags(entry.checkpoint),
        "edt.code_version": code_version(),
        "edt.evaluation.uri": entry.evaluation.folder.uri,
        "edt.evaluation.digest": entry.evaluation.manifest.digest,
        "edt.images": entry.images.fingerprint,
        "edt.images.digest": entry.images.manifest.digest,
        "edt.autoencoder": entry.autoencoder.fingerprint,
        "edt.source": run_tags.get("edt.source", ""),
        **{f"{COST_TAG}{key}": str(spent[key]) for key in COSTS if key in spent},
        PROTOCOL_TAG: sha256_json(counts["protocol"]),
        PROTOCOL_FIELDS_TAG: protocol if len(protocol) <= _MOST_TEXT else "",
        GATE_TAG: canonical_json(config.model_dump(mode="json")),
    }
    return {key: value for key, value in {**tags, **metrics}.items() if value}


def _signature() -> Any:
    """Labels in, images out, and the parameters that `predict` takes."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    return ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.int64), (-1,))]),
        outputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3))]),
        params=ParamSchema(
            [
                ParamSpec("seed", "long", 0),
                ParamSpec("num_inference_steps", "long", 0),
                ParamSpec("cfg_scale", "double", 0.0),
            ]
        ),
    )


def write_pipeline(folder: Path, entry: Entry) -> None:
    """The diffusers folder of a trained model: EMA weights, autoencoder, scheduler, class names."""
    from edt_core.autoencoder import load_autoencoder
    from edt_core.pipeline import PROTOCOL, save_pipeline
    from edt_core.training.checkpoint import ema_model
    from jobs.autoencoder import FOLDER

    sampling = entry.features.manifest.config
    save_pipeline(
        folder,
        ema_model(entry.checkpoint.directory(entry.checkpoint.counts["final"])),
        load_autoencoder(entry.autoencoder.directory(FOLDER)),
        num_timesteps=entry.checkpoint.manifest.config["num_timesteps"],
        classes=entry.images.read_json(CLASSES_NAME),
        protocol={key: sampling[key] for key in PROTOCOL},
    )
