"""What the registry tells a report: the version's own record, and the champions that were before it.

All of it goes into the report's fingerprint. So only what stays is taken: decisions as they were recorded, values, and
times of registration; a version that was deleted since is missed, and the report is rewritten.
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
    """A version that was champion before the one reported on. `value` is of the metric that decided on the latter.

    `differences`: what was measured differently; also empty where nobody recorded that in words.
    """

    version: str
    registered: str  # ISO 8601, UTC
    value: float | None  # None where the metric was not measured, or is no number
    spread: float | None = None
    comparable: bool = True  # measured by the protocol of the version reported on
    differences: tuple[str, ...] = ()


class VersionRecord(Section):
    """What of a registered version no artifact says. `champions`: oldest first, without the version itself.

    `lost` is the number of the champion, deleted since, that ends the line; "" where the line is whole.
    """

    metric: str  # that decided
    lower_is_better: bool
    registered: str
    run_id: str  # of the run that registered it
    code_version: str
    champions: tuple[Champion, ...] = ()
    lost: str = ""
    cut: bool = False  # there were more champions than `MOST_CHAMPIONS`
    found_with: str = runtime("")  # options with which `edt` finds the run: where that lies does not change the report


def version_record(catalog: Catalog, decision: Decision, store: str) -> VersionRecord:
    """The record of the version that was decided on. What MLflow raises is raised."""
    version = version_at(catalog, decision.name, decision.version)
    assert version is not None, f"{decision.name} version {decision.version}"
    line, lost = [], ""
    for number, found in _line(catalog, decision):
        if found is None:
            lost = number
        else:
            line.append(_champion(found, version, decision.metric))
    return VersionRecord(
        metric=decision.metric,
        lower_is_better=decision.lower_is_better,
        registered=_created(version),
        run_id=str(version.run_id or ""),
        code_version=version.tags.get("edt.code_version", ""),
        champions=tuple(reversed(line[:MOST_CHAMPIONS])),
        lost=lost,
        cut=len(line) > MOST_CHAMPIONS,
        found_with=record_options(catalog, store),
    )


def record_options(catalog: Catalog, store: str) -> str:
    """The options of `edt` that name the MLflow of a run: the store that has it inside, or the server."""
    folder = Folder.at(store)
    if folder.local is not None and catalog.tracking_uri == own_uri(folder):
        return f"--store {quote(folder.uri)}"
    if catalog.place != catalog.tracking_uri:  # a password is in it
        return '--tracking-uri "$MLFLOW_TRACKING_URI"'
    return f"--tracking-uri {quote(catalog.tracking_uri)}"


def _line(catalog: Catalog, decision: Decision) -> Iterator[tuple[str, Any | None]]:
    """The champions before a decision as each was recorded, newest first; None for one that was deleted.

    One more than `MOST_CHAMPIONS` at most. A version that came back, by a rollback or by hand, ends the line: what was
    before it has been told.
    """
    seen, number = {decision.version}, decision.champion_before
    while number and number not in seen and len(seen) <= MOST_CHAMPIONS + 1:
        seen.add(number)
        found = version_at(catalog, decision.name, number)
        yield number, found
        number = None if found is None else _before(found)


def _before(version: Any) -> str | None:
    text = version.tags.get(DECISION_TAG)
    before = Decision.from_json(text).champion_before if text else version.tags.get(BEFORE_TAG)
    return before or None


def _champion(found: Any, version: Any, metric: str) -> Champion:
    return Champion(
        version=str(found.version),
        registered=_created(found),
        value=_finite(metric_of(found, metric)),
        spread=_finite(metric_of(found, f"{metric}_std")),
        comparable=same_protocol(found, version),
        differences=tuple(differences(found, version)),
    )


def _created(version: Any) -> str:
    return utc(version.creation_timestamp / 1000)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
