"""The registry: a trained model as a registered version, and the aliases `candidate` and `champion`."""

import json
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edt_core.artifact import Artifact, sha256_json
from edt_core.environment import code_version
from edt_core.errors import UserError
from edt_core.schema import CLASSES_NAME
from pipelines.catalog import Catalog, artifact_tags, retried
from pipelines.config import PromoteConfig

CANDIDATE, CHAMPION = "candidate", "champion"


@dataclass(frozen=True)
class Decision:
    """What registering a model led to."""

    name: str
    version: str
    metric: str
    value: float
    champion_before: str | None  # version, None where there was none
    champion_value: float | None  # None also where the champion was measured by another protocol
    became_champion: bool

    def __str__(self) -> str:
        now = f"{self.metric} {self.value:.4g}"
        if self.champion_before is None:
            return f"first champion: {now}"
        if self.champion_value is None:
            return f"candidate only: {now}; champion {self.champion_before} was measured by another protocol"
        against = f"version {self.champion_before} has {self.champion_value:.4g}"
        return f"new champion: {now}, {against}" if self.became_champion else f"candidate only: {now}, {against}"


@dataclass(frozen=True)
class Entry:
    """The artifacts behind one version."""

    images: Artifact
    autoencoder: Artifact
    checkpoint: Artifact
    features: Artifact
    evaluation: Artifact


def promote(catalog: Catalog, run_id: str, name: str, config: PromoteConfig, entry: Entry) -> Decision:
    """Register the model of `entry` as a version of `name`, move `candidate`, and `champion` if the metric is better.

    A version that stands for the same checkpoint and evaluation is found again, with its decision as it was.
    Raises UserError where the evaluation lacks the metric that decides.
    """
    result = entry.evaluation.counts
    if config.metric not in result["metrics"]:
        known_metrics = ", ".join(sorted(result["metrics"]))
        raise UserError(f"promote.metric {config.metric!r} was not measured; choose from {known_metrics}")
    identity = {
        "edt.checkpoint": entry.checkpoint.fingerprint,
        "edt.evaluation": entry.evaluation.fingerprint,
        "edt.promote": f"{config.metric} {'lower' if config.lower_is_better else 'higher'}",
    }
    if (known := _find_version(catalog, name, identity)) is not None:
        return Decision(**json.loads(known.tags["edt.decision"]))
    before = champion(catalog, name)
    number = _register(catalog, run_id, name, entry, identity)
    decision = decide(name, number, config, result, before)
    tag = json.dumps(asdict(decision), sort_keys=True)
    retried(lambda: catalog.client.set_registered_model_alias(name, CANDIDATE, number))
    if decision.became_champion:
        retried(lambda: catalog.client.set_registered_model_alias(name, CHAMPION, number))
    # Last: a version without its decision is not yet promoted, and a rerun registers anew.
    catalog.client.set_model_version_tag(name, number, "edt.decision", tag)
    return decision


def champion(catalog: Catalog, name: str) -> Any | None:
    """The version that carries the alias `champion`, or None. What MLflow raises for other reasons is raised."""
    from mlflow.exceptions import MlflowException

    try:
        return catalog.client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        # Without the model the first code comes, without the alias the second.
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def decide(name: str, version: str, config: PromoteConfig, result: Mapping[str, Any], before: Any | None) -> Decision:
    """Compare `result`, the counts of an evaluation, with the champion's tags: like with like, or not at all."""
    value = float(result["metrics"][config.metric])
    if before is None:
        return Decision(name, version, config.metric, value, None, None, True)
    previous, tag = str(before.version), before.tags.get(f"edt.metric.{config.metric}")
    if tag is None or before.tags.get("edt.protocol") != sha256_json(result["protocol"]):
        return Decision(name, version, config.metric, value, previous, None, False)
    old = float(tag)
    better = value < old if config.lower_is_better else value > old
    return Decision(name, version, config.metric, value, previous, old, better)


def _find_version(catalog: Catalog, name: str, identity: Mapping[str, str]) -> Any | None:
    versions = catalog.client.search_model_versions(f"name = '{name}'")
    same = (v for v in versions if identity.items() <= v.tags.items() and "edt.decision" in v.tags)
    return next(same, None)


def _register(catalog: Catalog, run_id: str, name: str, entry: Entry, identity: Mapping[str, str]) -> str:
    """Log the diffusers folder as an MLflow model of the run, and register it with its metrics as tags."""
    import mlflow

    import pipelines.pyfunc_model as code

    mlflow.set_tracking_uri(catalog.tracking_uri)
    with tempfile.TemporaryDirectory() as folder, mlflow.start_run(run_id=run_id), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that no example came with the model: the signature is stated
        pipeline = Path(folder) / "pipeline"
        write_pipeline(pipeline, entry)
        info = mlflow.pyfunc.log_model(
            name=name,
            python_model=str(code.__file__),
            artifacts={"pipeline": str(pipeline)},
            pip_requirements=[f"edt-pipeline=={version('edt-pipeline')}"],
            signature=_signature(),
            params={"architecture": str(entry.checkpoint.counts["model"])},
            metadata={"edt.checkpoint": entry.checkpoint.fingerprint},
            step=int(entry.checkpoint.counts["steps"]),
        )
    metrics = {f"edt.metric.{key}": repr(float(value)) for key, value in entry.evaluation.counts["metrics"].items()}
    parents = {
        **artifact_tags(entry.checkpoint),
        "edt.code_version": code_version(),
        "edt.protocol": sha256_json(entry.evaluation.counts["protocol"]),
    }
    _ensure_model(catalog, name)
    made = catalog.client.create_model_version(
        name, info.model_uri, run_id=run_id, model_id=info.model_id, tags={**parents, **metrics, **identity}
    )
    return str(made.version)


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


def _ensure_model(catalog: Catalog, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        catalog.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
