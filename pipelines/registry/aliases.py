"""The registry: versions without doubles, the aliases `candidate` and `champion`, and who moved them."""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from edt_core.environment import utc
from edt_core.errors import UserError
from edt_core.printing.redaction import redacted, redacted_values
from jobs.models.registry_files import stored_problems, title
from pipelines.config.schema import PromoteConfig
from pipelines.registry.gate import Decision, decide, metrics_of, run_checks
from pipelines.tracking.catalog import Catalog, paged, retried

CANDIDATE, CHAMPION = "candidate", "champion"
GATE_TAG, DECISION_TAG = "edt.gate", "edt.decision"  # the gate's configuration, and what it said
BEFORE_TAG = "edt.champion_before"  # of a champion: the version to roll back to, "" for none
PROMOTED_TAG, ROLLED_BACK_TAG = "edt.promoted", "edt.rolled_back"  # when and by what
_ATTEMPTS = 10
_NONE_OF_IT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # no such model, no such alias


def settle(catalog: Catalog, version: Any, config: PromoteConfig, by: str, files: Callable[[], list[str]]) -> Decision:
    """Decide on a registered version, move the aliases, and record it all. Killed anywhere, it can be done again."""
    decision = decide(version, config, _champion_before(catalog, version), run_checks(config, version, files))
    move_alias(catalog, version, CANDIDATE)
    if decision.became_champion:
        crown(catalog, version, decision.champion_before, by)
    # Last: a version without its decision is not yet settled, and a rerun continues with it.
    set_tags(catalog, version, {DECISION_TAG: decision.to_json()})
    return decision


def promote_version(catalog: Catalog, version: Any, force: bool = False) -> Decision:
    """Let a registered version through the gate again, against the present champion; `force` opens the gate.

    The aliases move, and the decision is recorded, only where it becomes champion.
    """
    before = champion(catalog, version.name)
    if before is not None and before.version == version.version:
        raise UserError(f"{title(version)} is the champion already")
    config = gate_of(version)
    checks = run_checks(config, version, lambda: stored_problems(catalog.client, version))
    decision = decide(version, config, before, checks, force)
    if decision.became_champion:
        by = f"edt models promote{' --force' if decision.forced else ''}"
        crown(catalog, version, decision.champion_before, by)
        set_tags(catalog, version, {DECISION_TAG: decision.to_json()})
    return decision


def rollback(catalog: Catalog, name: str) -> tuple[Any, Any]:
    """Give the alias `champion` back to the version that had it before. Returns the version it left, and that one.

    Raises UserError where there is no champion, or none before it.
    """
    now = champion(catalog, name)
    if now is None:
        raise UserError(f"{name} has no champion to roll back; `edt models list --name {name}` shows its versions")
    number = now.tags.get(BEFORE_TAG)
    if not number:
        raise UserError(f"{title(now)} is the first champion, there is none before it to roll back to")
    before = version_at(catalog, name, number)
    if before is None:
        raise UserError(f"version {number} of {name}, champion before version {now.version}, was deleted")
    set_tags(catalog, now, {ROLLED_BACK_TAG: f"{utc()} to version {number}"})
    move_alias(catalog, before, CHAMPION)
    # It is no longer champion, so nothing is before it; a second rollback continues from the other.
    retried(lambda: catalog.client.delete_model_version_tag(name, now.version, BEFORE_TAG), _ATTEMPTS)
    return now, before


def alone(store: str, name: str) -> AbstractContextManager[object]:
    """Held by the process that moves the aliases of a model, of all that share a local store."""
    from edt_core.store.folder import Folder
    from edt_core.store.store import Store

    folder = Folder.at(store)
    if folder.local is not None and not folder.local.is_dir():
        return nullcontext()
    return Store(folder).lock("promote", name)


def crown(catalog: Catalog, version: Any, before: str | None, by: str) -> None:
    """Make a version champion. What was before is written first: it must be known whenever the alias has moved."""
    set_tags(catalog, version, {BEFORE_TAG: before or "", PROMOTED_TAG: f"{utc()} by {by}"})
    move_alias(catalog, version, CHAMPION)


def champion(catalog: Catalog, name: str) -> Any | None:
    """The version that carries the alias `champion`, or None. What MLflow raises for other reasons is raised."""
    return _or_none(lambda: catalog.client.get_model_version_by_alias(name, CHAMPION))


def version_at(catalog: Catalog, name: str, number: str) -> Any | None:
    """A registered version by its number, or None."""
    return _or_none(lambda: catalog.client.get_model_version(name, number))


def gate_of(version: Any) -> PromoteConfig:
    """The gate that a version was registered with. One from before that was recorded has the metric and its sense."""
    if text := version.tags.get(GATE_TAG):
        return PromoteConfig.model_validate(json.loads(text))
    metric, _, sense = version.tags.get("edt.promote", "").partition(" ")
    if metric not in metrics_of(version):
        raise UserError(
            f"{title(version)} was imported, or not registered by edt: no metric is recorded that could decide"
        )
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
    """Create the version of `identity`, or take the one that another driver created at the same time.

    Whoever comes second sees the first, whose number is lower, and withdraws its own: a lost answer of a server, after
    which the call is repeated, is mended the same way.
    """
    client = catalog.client
    _ensure_model(catalog, name)
    both = redacted_values({**tags, **identity})

    def create() -> Any:
        return client.create_model_version(name, source, run_id=run_id, model_id=model_id, tags=both)

    made = retried(create, _ATTEMPTS)
    first = find_version(catalog, name, identity)
    if first is None or int(first.version) >= int(made.version):
        return made
    retried(lambda: client.delete_model_version(name, made.version), _ATTEMPTS)
    return first


def find_version(catalog: Catalog, name: str, identity: Mapping[str, str]) -> Any | None:
    """The first version with these tags, or None."""
    wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in identity.items())
    found = search(catalog, f"name = '{name}' and {wanted}")
    return min(found, key=lambda version: int(version.version), default=None)


def search(catalog: Catalog, wanted: str) -> list[Any]:
    """All versions that a filter of MLflow lets through."""
    ask = partial(catalog.client.search_model_versions, wanted, 1000)
    return list(paged(lambda token: retried(lambda: ask(page_token=token))))


def move_alias(catalog: Catalog, version: Any, alias: str) -> None:
    """Point an alias of the registered model at a version."""
    retried(lambda: catalog.client.set_registered_model_alias(version.name, alias, version.version), _ATTEMPTS)


def set_tags(catalog: Catalog, version: Any, tags: Mapping[str, str]) -> None:
    """Set tags of a registered version, without credentials in them."""
    for key, value in tags.items():
        call = partial(catalog.client.set_model_version_tag, version.name, version.version, key, redacted(value))
        retried(call, _ATTEMPTS)


def _champion_before(catalog: Catalog, version: Any) -> Any | None:
    """The champion that a version is compared with. Of one that was crowned and not settled, that is the one before."""
    now = champion(catalog, version.name)
    if now is None or now.version != version.version:
        return now
    number = now.tags.get(BEFORE_TAG)
    return version_at(catalog, version.name, number) if number else None


def _or_none(call: Callable[[], Any]) -> Any | None:
    from mlflow.exceptions import MlflowException

    try:
        return call()
    except MlflowException as error:
        if error.error_code in _NONE_OF_IT:
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
