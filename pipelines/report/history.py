"""The registry's records for a report: the version's own record, and the earlier champions.

All of it goes into the report's fingerprint. So only facts that do not change are included: recorded decisions, values,
and times of registration. If an earlier version was deleted, the report is rewritten without it.
"""

import math
from collections.abc import Iterator
from shlex import quote
from typing import Any

from edt_core.config import Section, runtime
from edt_core.environment import utc
from edt_core.store.folder import Folder
from jobs.runtime.tracking import own_uri
from pipelines.registry.aliases import BEFORE_TAG, DECISION_TAG, version_at
from pipelines.registry.gate import Decision, metric_of
from pipelines.registry.lookup import differences, same_protocol
from pipelines.tracking.catalog import Catalog

MOST_CHAMPIONS = 30


class Champion(Section):
    """A version that was champion before the reported one. `value` is of the metric that decided on the reported one.

    `differences`: the differences of the protocols; also empty if only their digests are recorded.
    """

    version: str
    registered: str  # ISO 8601, UTC
    value: float | None  # None if the metric was not measured, or is not finite
    spread: float | None = None
    comparable: bool = True  # has the protocol of the reported version
    differences: tuple[str, ...] = ()


class VersionRecord(Section):
    """The facts about a registered version that are in no artifact. `champions`: oldest first, without itself.

    `lost`: the number of a deleted champion, at which the list of champions ends; "" if the list is complete.
    """

    metric: str  # of the gate
    lower_is_better: bool
    registered: str
    run_id: str  # of the run that registered it
    code_version: str
    champions: tuple[Champion, ...] = ()
    lost: str = ""
    cut: bool = False  # there were more champions than `MOST_CHAMPIONS`
    found_with: str = runtime("")  # options with which `edt` finds the run; not part of the fingerprint


def version_record(catalog: Catalog, decision: Decision, store: str) -> VersionRecord:
    """The record of the version that the decision is about. Raises MLflow's errors."""
    version = version_at(catalog, decision.name, decision.version)
    assert version is not None, f"{decision.name} version {decision.version}"
    champions, deleted = [], ""
    for number, champion in _earlier_champions(catalog, decision):
        if champion is None:
            deleted = number
        else:
            champions.append(_champion(champion, version, decision.metric))
    return VersionRecord(
        metric=decision.metric,
        lower_is_better=decision.lower_is_better,
        registered=_created(version),
        run_id=str(version.run_id or ""),
        code_version=version.tags.get("edt.code_version", ""),
        champions=tuple(reversed(champions[:MOST_CHAMPIONS])),
        lost=deleted,
        cut=len(champions) > MOST_CHAMPIONS,
        found_with=record_options(catalog, store),
    )


def record_options(catalog: Catalog, store: str) -> str:
    """The options of `edt` that select the MLflow of a run: the store that contains it, or the server."""
    folder = Folder.at(store)
    if folder.local is not None and catalog.tracking_uri == own_uri(folder):
        return f"--store {quote(folder.uri)}"
    if catalog.place != catalog.tracking_uri:  # it contains a password
        return '--tracking-uri "$MLFLOW_TRACKING_URI"'
    return f"--tracking-uri {quote(catalog.tracking_uri)}"


def _earlier_champions(catalog: Catalog, decision: Decision) -> Iterator[tuple[str, Any | None]]:
    """The champions before a decision by their records, newest first; None for a deleted one, which ends the list.

    At most `MOST_CHAMPIONS` + 1. A version that became champion twice, by a rollback or by hand, also ends the list,
    because its predecessors are in it already.
    """
    seen, number = {decision.version}, decision.champion_before
    while number and number not in seen and len(seen) <= MOST_CHAMPIONS + 1:
        seen.add(number)
        version = version_at(catalog, decision.name, number)
        yield number, version
        number = None if version is None else _before(version)


def _before(version: Any) -> str | None:
    text = version.tags.get(DECISION_TAG)
    before = Decision.from_json(text).champion_before if text else version.tags.get(BEFORE_TAG)
    return before or None


def _champion(champion: Any, version: Any, metric: str) -> Champion:
    return Champion(
        version=str(champion.version),
        registered=_created(champion),
        value=_finite(metric_of(champion, metric)),
        spread=_finite(metric_of(champion, f"{metric}_std")),
        comparable=same_protocol(champion, version),
        differences=tuple(differences(champion, version)),
    )


def _created(version: Any) -> str:
    return utc(version.creation_timestamp / 1000)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
