"""A trained model as a registered version: its diffusers folder as a logged model, and the tags that tell of it."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from edt_core.environment import code_version
from edt_core.errors import UserError
from edt_core.files.place_names import place_for_others
from edt_core.store.artifact import Artifact, canonical_json, sha256_json
from jobs.models.registry_files import DIGEST_TAG, stored_problems
from pipelines.config.schema import PromoteConfig
from pipelines.registry.aliases import DECISION_TAG, GATE_TAG, add_version, find_version, settle
from pipelines.registry.gate import METRIC_TAG, PROTOCOL_FIELDS_TAG, PROTOCOL_TAG, Decision
from pipelines.registry.packaging import Entry, Logged, log_pipeline, write_pipeline
from pipelines.tracking.catalog import Catalog
from pipelines.tracking.run_record import artifact_tags

ENTRY_ROLES = tuple(field.name for field in fields(Entry))
COST_TAG = "edt.cost."
OBJECTIVE_TAG = "edt.objective"  # of models that predict something else than noise
COSTS = ("model", "image_size", "parameters", "macs", "steps", "images_seen", "training_flops", "device_hours")
_MOST_TEXT = 20_000  # characters of a tag; MLflow keeps 100,000 and MySQL 65,535


def promote(catalog: Catalog, run_id: str, name: str, config: PromoteConfig, entry: Entry) -> Decision:
    """Register the model of `entry` as a version of `name`, move `candidate`, and `champion` if it passes the gate.

    A version of the same checkpoint and evaluation is found again, with its decision as it was: where it
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
    return Entry(**{role: made[role] for role in ENTRY_ROLES})


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


def source_of(params: Mapping[str, str]) -> str:
    """Where the images of a run came from, as its model card says: what they are, and their place."""
    parts = (params.get(f"source.{field}") for field in ("kind", "path"))
    return " ".join(place_for_others(text) for text in parts if text not in (None, "None"))


def register(catalog: Catalog, run_id: str, name: str, config: PromoteConfig, entry: Entry) -> Any:
    """Log the diffusers folder as an MLflow model of the run, and register it. Returns the version.

    Where another driver has registered the same model meanwhile, its version is returned and this logged model removed.
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
    tags = version_tags(run.tags, config, entry)
    return add_logged(catalog, name, run_id, logged, tags, identity_of(entry, config))


def add_logged(
    catalog: Catalog, name: str, run_id: str, logged: Logged, tags: Mapping[str, str], identity: Mapping[str, str]
) -> Any:
    """The version of a logged model. Where another driver made one of this identity, its, and the logged one goes."""
    tags = {**tags, DIGEST_TAG: logged.digest}
    made = add_version(catalog, name, logged.uri, run_id, tags, identity, logged.model_id)
    if made.source != logged.uri:
        catalog.client.delete_logged_model(logged.model_id)
    return made


def version_tags(run_tags: Mapping[str, str], config: PromoteConfig, entry: Entry) -> dict[str, str]:
    """What is recorded of a version: metrics with their protocol, what it was made from, and the gate it goes through.

    With these alone it can be found, compared, checked and promoted, without its run or its store.
    """
    counts, counts_of_model = entry.evaluation.counts, entry.checkpoint.counts
    metrics = {f"{METRIC_TAG}{key}": repr(float(value)) for key, value in counts["metrics"].items()}
    protocol = canonical_json(counts["protocol"])
    spent = {**entry.images.counts, **counts_of_model}
    tags = {
        **artifact_tags(entry.checkpoint),
        OBJECTIVE_TAG: counts_of_model.get("objective", ""),
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
