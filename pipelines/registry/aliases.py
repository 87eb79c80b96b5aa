"""The registry: unique versions, the aliases `candidate` and `champion`, and the record of their moves."""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from edt_core.environment import utc
from edt_core.errors import UserError
from edt_core.printing.redaction import redacted, redacted_values
from jobs.models.names import STD_TAG
from jobs.models.registry_files import stored_problems, title
from pipelines.config.schema import PromoteConfig
from pipelines.registry.gate import Decision, Remeasured, decide, metrics_of, run_checks
from pipelines.tracking.catalog import Catalog, paged, retried

CANDIDATE, CHAMPION = "candidate", "champion"
GATE_TAG, DECISION_TAG = "edt.gate", "edt.decision"  # the gate's configuration and its decision
BEFORE_TAG = "edt.champion_before"  # of a champion: the version to roll back to, "" for none
PROMOTED_TAG, ROLLED_BACK_TAG = "edt.promoted", "edt.rolled_back"  # when and by what
TRAININGS_TAG = "edt.trainings"  # of a model trained with several seeds: metrics by seed, its own first
EVALUATIONS_TAG = "edt.trainings.evaluations"  # fingerprints of the evaluations of those trainings
# The model that samples were guided away from: its artifact, and of another training its place and its checkpoint.
GUIDE_TAG, GUIDE_FROM_TAG, GUIDE_CHECKPOINT_TAG = "edt.guide", "edt.guide_from", "edt.guide_checkpoint"
PARENT_TAG = "edt.ema_of"  # of a version with averaged weights: the version that they are of
QUANTIZED_TAG = "edt.quantized."  # facts of a quantised version, by name
QUANTIZED_OF_TAG = f"{QUANTIZED_TAG}of"  # the version that it was made from
CHAIN_TAG, CHAIN_OF_TAG = "edt.chain", "edt.chain_of"  # other default settings; the version with the same weights
_ATTEMPTS = 10
_MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # no such model, no such alias


def settle(
    catalog: Catalog,
    version: Any,
    config: PromoteConfig,
    by: str,
    files: Callable[[], list[str]],
    again: Remeasured | None = None,
) -> Decision:
    """Decide on a registered version, move the aliases, and record both. Safe to repeat after a crash at any point.

    `again`: the champion, measured by the protocol of the version.
    """
    before = champion_before(catalog, version)
    decision = decide(version, config, before, run_checks(config, version, files), again=again)
    move_alias(catalog, version, CANDIDATE)
    if decision.became_champion:
        crown(catalog, version, decision.champion_before, by)
    # Last: a version without its decision is not yet settled, and a rerun continues with it.
    set_tags(catalog, version, {DECISION_TAG: decision.to_json()})
    return decision


def promote_version(catalog: Catalog, version: Any, force: bool = False) -> Decision:
    """Run the gate again for a registered version, against the present champion. `force` skips the gate.

    Only if the version becomes champion, the alias moves and the decision is recorded.
    """
    before = champion(catalog, version.name)
    if before is not None and before.version == version.version:
        raise UserError(f"{title(version)} is the champion already")
    config = gate_of(version)
    checks = run_checks(config, version, lambda: stored_problems(catalog.client, version))
    earlier = version.tags.get(DECISION_TAG)
    again = Decision.from_json(earlier).remeasured if earlier else None
    decision = decide(version, config, before, checks, force, again)
    if decision.became_champion:
        by = f"edt models promote{' --force' if decision.forced else ''}"
        crown(catalog, version, decision.champion_before, by)
        set_tags(catalog, version, {DECISION_TAG: decision.to_json()})
    return decision


def rollback(catalog: Catalog, name: str) -> tuple[Any, Any]:
    """Move the alias `champion` back to the previous champion. Returns the champion until now and the previous one.

    Raises UserError if there is no champion, or no previous one.
    """
    present = champion(catalog, name)
    if present is None:
        raise UserError(f"{name} has no champion to roll back; `edt models list --name {name}` shows its versions")
    number = present.tags.get(BEFORE_TAG)
    if not number:
        raise UserError(f"{title(present)} is the first champion; there is no previous one to roll back to")
    previous = version_at(catalog, name, number)
    if previous is None:
        raise UserError(
            f"cannot roll back {title(present)}: the previous champion, version {number} of {name}, was deleted"
        )
    set_tags(catalog, present, {ROLLED_BACK_TAG: f"{utc()} to version {number}"})
    move_alias(catalog, previous, CHAMPION)
    # A version that is not champion has no predecessor; a second rollback continues from the previous champion.
    retried(lambda: catalog.client.delete_model_version_tag(name, present.version, BEFORE_TAG), _ATTEMPTS)
    return present, previous


def alone(store: str, name: str) -> AbstractContextManager[object]:
    """The lock for moving the aliases of a model, shared by all processes that use a local store."""
    from edt_core.store.folder import Folder
    from edt_core.store.store import Store

    folder = Folder.at(store)
    if folder.local is not None and not folder.local.is_dir():
        return nullcontext()
    return Store(folder).lock("promote", name)


def crown(catalog: Catalog, version: Any, before: str | None, by: str) -> None:
    """Make a version champion. Record the previous champion first: it must be recorded when the alias moves."""
    set_tags(catalog, version, {BEFORE_TAG: before or "", PROMOTED_TAG: f"{utc()} by {by}"})
    move_alias(catalog, version, CHAMPION)


def champion(catalog: Catalog, name: str) -> Any | None:
    """The version with the alias `champion`, or None. Raises MLflow's other errors."""
    return _or_none(lambda: catalog.client.get_model_version_by_alias(name, CHAMPION))


def version_at(catalog: Catalog, name: str, number: str) -> Any | None:
    """A registered version by its number, or None."""
    return _or_none(lambda: catalog.client.get_model_version(name, number))


def gate_of(version: Any) -> PromoteConfig:
    """The gate that a version was registered with. Older versions record only the metric and its direction."""
    if text := version.tags.get(GATE_TAG):
        return PromoteConfig.model_validate(json.loads(text))
    metric, _, sense = version.tags.get("edt.promote", "").partition(" ")
    if metric not in metrics_of(version):
        origin = "imported, or not registered by edt"
        if STD_TAG in version.tags:
            beside = f"edt evaluate {version.tags[PARENT_TAG]} OUT --sweep ema=off,{version.tags[STD_TAG]}"
            origin = f"made by `edt ema`. Compare it with the version that it is made from: `{beside} ...`"
        if QUANTIZED_OF_TAG in version.tags:
            origin = f"made by `edt quantize` of {version.tags[QUANTIZED_OF_TAG]} without metrics"
        if CHAIN_OF_TAG in version.tags:
            origin = (
                f"made by `edt models set-chain` of {version.tags[CHAIN_OF_TAG]}. Use it by its number; `edt evaluate` "
                "measures it"
            )
        raise UserError(f"{title(version)} has no recorded metric to decide by: it was {origin}")
    return PromoteConfig(metric=metric, lower_is_better=sense != "higher")


def add_version(
    catalog: Catalog,
    name: str,
    source: str,
    run_id: str | None,
    tags: Mapping[str, str],
    identity: Mapping[str, str],
    model_id: str | None = None,
) -> Any:
    """Create the version of `identity`, or return the one that another driver created at the same time.

    The second driver sees the first version, which has the lower number, and deletes its own. This also removes the
    duplicate of a call that was repeated because its answer was lost.
    """
    client = catalog.client
    _ensure_model(catalog, name)
    all_tags = redacted_values({**tags, **identity})

    def create() -> Any:
        return client.create_model_version(name, source, run_id=run_id, model_id=model_id, tags=all_tags)

    version = retried(create, _ATTEMPTS)
    first = find_version(catalog, name, identity)
    if first is None or int(first.version) >= int(version.version):
        return version
    retried(lambda: client.delete_model_version(name, version.version), _ATTEMPTS)
    return first


def find_version(catalog: Catalog, name: str, identity: Mapping[str, str]) -> Any | None:
    """The first version with these tags, or None."""
    conditions = " and ".join(f"tags.`{key}` = '{value}'" for key, value in identity.items())
    versions = search(catalog, f"name = '{name}' and {conditions}")
    return min(versions, key=lambda version: int(version.version), default=None)


def search(catalog: Catalog, mlflow_filter: str) -> list[Any]:
    """All versions that match a filter of MLflow."""
    request = partial(catalog.client.search_model_versions, mlflow_filter, 1000)
    return list(paged(lambda token: retried(lambda: request(page_token=token))))


def move_alias(catalog: Catalog, version: Any, alias: str) -> None:
    """Point an alias of the registered model at a version."""
    retried(lambda: catalog.client.set_registered_model_alias(version.name, alias, version.version), _ATTEMPTS)


def set_tags(catalog: Catalog, version: Any, tags: Mapping[str, str]) -> None:
    """Set tags of a registered version. Credentials in the values are redacted."""
    for key, value in tags.items():
        call = partial(catalog.client.set_model_version_tag, version.name, version.version, key, redacted(value))
        retried(call, _ATTEMPTS)


def champion_before(catalog: Catalog, version: Any) -> Any | None:
    """The champion to compare a version with: the previous one if this version already has the alias."""
    present = champion(catalog, version.name)
    if present is None or present.version != version.version:
        return present
    number = present.tags.get(BEFORE_TAG)
    return version_at(catalog, version.name, number) if number else None


def _or_none(call: Callable[[], Any]) -> Any | None:
    from mlflow.exceptions import MlflowException

    try:
        return call()
    except MlflowException as error:
        if error.error_code in _MISSING:
            return None
        raise


def _ensure_model(catalog: Catalog, name: str) -> None:
    from mlflow.exceptions import MlflowException

    def create() -> None:
        try:
            catalog.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    retried(create, _ATTEMPTS)
