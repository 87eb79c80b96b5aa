"""Registration of a trained model: its diffusers folder as a logged model, and the tags of the version."""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from edt_core.environment import code_version
from edt_core.errors import UserError
from edt_core.files.place_names import place_for_others
from edt_core.store.artifact import Artifact, canonical_json, sha256_json
from jobs.models.initial import INIT_CHECKPOINT_TAG, INIT_FROM_TAG, INIT_TAG
from jobs.models.registry_files import DIGEST_TAG, stored_problems
from pipelines.config.schema import PromoteConfig
from pipelines.registry.aliases import (
    DECISION_TAG,
    EVALUATIONS_TAG,
    GATE_TAG,
    GUIDE_CHECKPOINT_TAG,
    GUIDE_FROM_TAG,
    GUIDE_TAG,
    TRAININGS_TAG,
    add_version,
    find_version,
    set_tags,
    settle,
    version_at,
)
from pipelines.registry.distilled.pruned_record import PRUNED_TAG, PrunedRecord
from pipelines.registry.distilled.teacher_record import TEACHER_TAG, TeacherRecord
from pipelines.registry.gate import (
    METRIC_TAG,
    PROTOCOL_FIELDS_TAG,
    PROTOCOL_TAG,
    UNTRAINED_TAG,
    Decision,
    Remeasured,
)
from pipelines.registry.packaging import Entry, Logged, log_pipeline, write_pipeline
from pipelines.tracking.catalog import Catalog
from pipelines.tracking.run_record import artifact_tags

_OPTIONAL = ("untrained", "trainings", "guide", "classifier")
ENTRY_ROLES = tuple(field.name for field in fields(Entry) if field.name not in _OPTIONAL)
COST_TAG = "edt.cost."
OBJECTIVE_TAG = "edt.objective"  # of models that do not predict noise
OVERRIDES_TAG = "edt.model_overrides"  # fields in which the model differs from the one of its name, as JSON
COSTS = ("model", "image_size", "parameters", "macs", "steps", "images_seen", "training_flops", "device_hours")
_MAX_TAG = 20_000  # characters of a tag; the limit of MLflow is 100,000, of MySQL 65,535


def promote(
    catalog: Catalog,
    run_id: str,
    name: str,
    config: PromoteConfig,
    entry: Entry,
    again: Remeasured | None = None,
    teacher: TeacherRecord | None = None,
    pruned: PrunedRecord | None = None,
) -> Decision:
    """Register the model of `entry` as a version of `name`, move `candidate`, and `champion` if it passes the gate.

    An existing version of the same checkpoint and evaluation is reused with its decision, and no alias moves: a
    rollback stays in effect. `again`: the champion, measured by the protocol of the evaluation. `teacher`: of a
    distilled model. `pruned`: of a pruned one. Raises UserError if the evaluation lacks the gate's metric.
    """
    measured = entry.evaluation.counts["metrics"]
    if config.metric not in measured:
        raise UserError(f"promote.metric {config.metric!r} was not measured; choose from {', '.join(sorted(measured))}")
    version = find_version(catalog, name, identity_of(entry, config))
    if version is None:
        version = register(catalog, run_id, name, config, entry)
    _tag_trainings(catalog, version, entry)
    if DECISION_TAG in version.tags:
        return Decision.from_json(version.tags[DECISION_TAG])
    records = {TEACHER_TAG: teacher, PRUNED_TAG: pruned}
    if tags := {tag: record.to_json() for tag, record in records.items() if record is not None}:
        set_tags(catalog, version, tags)
        version = version_at(catalog, name, str(version.version))
    return settle(catalog, version, config, f"run {run_id}", lambda: stored_problems(catalog.client, version), again)


def _tag_trainings(catalog: Catalog, version: Any, entry: Entry) -> None:
    """Tag a version with the trainings of its model, which `edt gc` then keeps. Further seeds may come after it."""
    if not entry.trainings:
        return
    evaluations = [evaluation.fingerprint for evaluation in entry.trainings.values()]
    tags = {TRAININGS_TAG: json.dumps(entry.metrics_of_trainings()), EVALUATIONS_TAG: json.dumps(evaluations)}
    if any(version.tags.get(name) != text for name, text in tags.items()):
        set_tags(catalog, version, tags)


def entry_of(
    artifacts: Mapping[str, Artifact],
    untrained: Artifact | None = None,
    trainings: Mapping[int, Artifact] | None = None,
) -> Entry:
    """The entry with a branch's artifacts, which are given by role, and the evaluation of its untrained model.

    `trainings`: the evaluation of each training by seed, if there are several.
    """
    return Entry(
        **{role: artifacts[role] for role in ENTRY_ROLES},
        untrained=untrained,
        trainings=trainings or {},
        guide=artifacts.get("guide"),
        classifier=artifacts.get("classifier"),
    )


def registered(catalog: Catalog, name: str, config: PromoteConfig, entry: Entry) -> tuple[Decision, str] | None:
    """The earlier decision about the model of `entry` and the MLflow run that registered it, or None."""
    version = find_version(catalog, name, identity_of(entry, config))
    if version is None or DECISION_TAG not in version.tags:
        return None
    return Decision.from_json(version.tags[DECISION_TAG]), str(version.run_id)


def identity_of(entry: Entry, config: PromoteConfig) -> dict[str, str]:
    """The tags that identify a model: registrations with equal values are of the same model."""
    return {
        "edt.checkpoint": entry.checkpoint.fingerprint,
        "edt.evaluation": entry.evaluation.fingerprint,
        "edt.promote": f"{config.metric} {'lower' if config.lower_is_better else 'higher'}",
    }


def source_of(params: Mapping[str, str]) -> str:
    """The kind and location of a run's source images, for its model card."""
    parts = (params.get(f"source.{field}") for field in ("kind", "path"))
    return " ".join(place_for_others(text) for text in parts if text not in (None, "None"))


def register(catalog: Catalog, run_id: str, name: str, config: PromoteConfig, entry: Entry) -> Any:
    """Log the diffusers folder as an MLflow model of the run, and register it. Returns the version.

    If another driver registers the same model meanwhile, its version is returned and this logged model is deleted.
    """
    run = catalog.client.get_run(run_id).data
    counts = entry.checkpoint.counts
    source = source_of(run.params)
    logged = log_pipeline(
        catalog,
        run_id,
        name,
        lambda folder: write_pipeline(folder, name, config, entry, source),
        params={"architecture": str(counts["model"])},
        metadata={"edt.checkpoint": entry.checkpoint.fingerprint},
        step=int(counts["steps"]),
    )
    tags = version_tags(run.tags, config, entry) | _initial_tags(run.tags, name)
    return add_logged(catalog, name, run_id, logged, tags, identity_of(entry, config))


def _initial_tags(run_tags: Mapping[str, str], name: str) -> dict[str, str]:
    """What the training of a model started from and its samples were guided away from, out of the tags of its run."""
    keys = (INIT_TAG, INIT_FROM_TAG, INIT_CHECKPOINT_TAG)
    guide = {key: run_tags[key] for key in (GUIDE_FROM_TAG, GUIDE_CHECKPOINT_TAG) if key in run_tags}
    return {key: run_tags[f"{key}.{name}"] for key in keys if f"{key}.{name}" in run_tags} | guide


def add_logged(
    catalog: Catalog, name: str, run_id: str, logged: Logged, tags: Mapping[str, str], identity: Mapping[str, str]
) -> Any:
    """Register a logged model and return its version.

    If another driver registered this identity before, return its version and delete this logged model.
    """
    tags = {**tags, DIGEST_TAG: logged.digest}
    version = add_version(catalog, name, logged.uri, run_id, tags, identity, logged.model_id)
    if version.source != logged.uri:
        catalog.client.delete_logged_model(logged.model_id)
    return version


def version_tags(run_tags: Mapping[str, str], config: PromoteConfig, entry: Entry) -> dict[str, str]:
    """The record of a version: its metrics and their protocol, its artifacts, its costs, and its gate.

    These tags suffice to find, compare, check and promote the version without its run or its store.
    """
    counts_of_model = entry.checkpoint.counts
    costs = {**entry.images.counts, **counts_of_model}
    overrides = counts_of_model.get("model_overrides")
    tags = {
        **artifact_tags(entry.checkpoint),
        OBJECTIVE_TAG: counts_of_model.get("objective", ""),
        OVERRIDES_TAG: canonical_json(overrides) if overrides else "",
        "edt.code_version": code_version(),
        "edt.images": entry.images.fingerprint,
        "edt.images.digest": entry.images.manifest.digest,
        "edt.autoencoder": entry.autoencoder.fingerprint,
        GUIDE_TAG: "" if entry.guide is None else entry.guide.fingerprint,
        "edt.source": run_tags.get("edt.source", ""),
        **{f"{COST_TAG}{key}": str(costs[key]) for key in COSTS if key in costs},
        **evaluation_tags(config, entry.evaluation),
        **_untrained_tags(config, entry),
    }
    return {key: value for key, value in tags.items() if value}


def evaluation_tags(config: PromoteConfig, evaluation: Artifact) -> dict[str, str]:
    """The record of what was measured: the metrics, their protocol and their artifact, and the gate."""
    counts = evaluation.counts
    protocol = canonical_json(counts["protocol"])
    return {
        "edt.evaluation.uri": evaluation.folder.uri,
        "edt.evaluation.digest": evaluation.manifest.digest,
        PROTOCOL_TAG: sha256_json(counts["protocol"]),
        PROTOCOL_FIELDS_TAG: protocol if len(protocol) <= _MAX_TAG else "",
        GATE_TAG: canonical_json(config.model_dump(mode="json")),
        **{f"{METRIC_TAG}{key}": repr(float(value)) for key, value in counts["metrics"].items()},
    }


def _untrained_tags(config: PromoteConfig, entry: Entry) -> dict[str, str]:
    """The gate's metric of the untrained model and its spread, if they were measured by the version's protocol."""
    if entry.untrained is None or entry.untrained.counts["protocol"] != entry.evaluation.counts["protocol"]:
        return {}
    values = entry.untrained.counts["metrics"]
    names = (config.metric, f"{config.metric}_std")
    return {f"{UNTRAINED_TAG}{name}": repr(float(values[name])) for name in names if name in values}
