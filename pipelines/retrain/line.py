"""The line of a model: its champion, the run that made it, and the training from scratch that the line began with."""

import re
from typing import Any

from edt_core.errors import UserError
from edt_core.printing.suggestions import suggestions
from jobs.models.registry_files import title
from pipelines.registry.aliases import (
    CHAIN_OF_TAG,
    DECISION_TAG,
    GATE_TAG,
    QUANTIZED_OF_TAG,
    champion,
    search,
    version_at,
)
from pipelines.registry.lookup import all_aliases, origin_of
from pipelines.tracking.catalog import Catalog
from pipelines.tracking.runs import Record, read_record, step_tag, workflow_runs
from pipelines.tracking.runs import search as search_runs


def champion_record(catalog: Catalog, name: str, from_scratch: bool = False) -> tuple[Any | None, Record]:
    """The champion of a model and the record of its run. From scratch, the newest run does without a champion.

    Quantised weights cannot be trained: instead of a champion that has such, it is the version that it was made from.
    """
    version = champion(catalog, name)
    if version is not None and (parent := version.tags.get(QUANTIZED_OF_TAG)) is not None:
        version = version_at(catalog, name, parent.rpartition("/")[2]) or version
    if version is None:
        if from_scratch and (run := _newest_run(catalog, name)) is not None:
            return None, read_record(catalog, run)
        raise UserError(_no_champion(catalog, name))
    return version, record_of_version(catalog, version)


def record_of_version(catalog: Catalog, version: Any) -> Record:
    """The record of the run that trained a version. Raises UserError if there is none, or it is unreadable."""
    name = version.name
    if (parent := version.tags.get(QUANTIZED_OF_TAG)) is not None:
        raise UserError(
            f"{title(version)} is quantised, and quantised weights cannot be trained; use {parent}, from which it was "
            "made"
        )
    if (parent := version.tags.get(CHAIN_OF_TAG)) is not None:
        raise UserError(
            f"{title(version)} is {parent} with other sampling settings, which no run trained; use {parent}"
        )
    if origin_of(version) or not version.run_id:
        raise UserError(
            f"{title(version)} was imported: no run of edt has its configuration. Fine-tune it with "
            f"`edt run CONFIG --set train.init_from={name}/{version.version}`"
        )
    try:
        record = read_record(catalog, version.run_id)
    except UserError as error:
        raise UserError(
            f"the configuration of {title(version)} cannot be read: {error}. Run `edt run CONFIG --set "
            f"train.init_from={name}/{version.version}` with your configuration file"
        ) from error
    if name not in (record.config.get("models") or {}):
        raise UserError(
            f"the run {version.run_id} that registered {title(version)} has no model {name!r}, but "
            f"{', '.join(record.config.get('models') or {}) or 'none'}. Run `edt run` with its configuration file"
        )
    return record


def line_start(catalog: Catalog, name: str, version: Any | None, record: Record) -> tuple[Any | None, Record]:
    """The training from scratch that a line of retrainings began with, as far back as versions and runs exist."""
    seen: set[str] = set()
    while version is not None and (number := _initial_version(record, name)) and number not in seen:
        seen.add(number)
        earlier = version_at(catalog, name, number)
        if earlier is None or not earlier.run_id:
            break
        try:
            before = read_record(catalog, earlier.run_id)
        except UserError:
            break
        if name not in (before.config.get("models") or {}):
            break
        version, record = earlier, before
    return version, record


def has_ended(catalog: Catalog, version: Any) -> bool:
    """Whether a run got as far as the report of a version, which comes after its decision.

    A run that was killed records neither what it executed nor what it reused.
    """
    if DECISION_TAG not in version.tags:
        return False
    checkpoint = version.tags.get("edt.checkpoint", "")
    runs = search_runs(catalog, f"tags.`{step_tag(f'train {version.name}')}` = '{checkpoint}'")
    recorded = (run.data.tags.get(key, "").split(", ") for run in runs for key in ("edt.executed", "edt.reused"))
    return any(f"report {version.name}" in names for names in recorded)


def _no_champion(catalog: Catalog, name: str) -> str:
    """Why there is nothing to start from, and the way on."""
    if name not in (known := all_aliases(catalog)):
        hint = suggestions(name, known, "models")
        hint += "" if hint.endswith("?") else "."
        return f"there is no registered model {name!r}; {hint} Train it first: `edt run CONFIG`"
    versions = search(catalog, f"name = '{name}'")
    numbers = sorted((str(v.version) for v in versions), key=int)
    measured = sorted((str(v.version) for v in versions if GATE_TAG in v.tags), key=int)
    if not numbers:
        return f"{name} has no versions; they were deleted. Retrain it with --from-scratch, or train it with `edt run`"
    promote = (
        f"Make one champion with `edt models promote {name}/{measured[-1]} --force`, retrain" if measured else "Retrain"
    )
    return (
        f"{name} has no champion; its versions are {', '.join(numbers[-10:])}. {promote} with --from-scratch, or use "
        "`edt run CONFIG`"
    )


def _newest_run(catalog: Catalog, name: str) -> str | None:
    """The newest finished workflow run that trained a model of this name."""
    tag = step_tag(f"train {name}")
    runs = (run for run in workflow_runs(catalog) if run.info.status == "FINISHED" and tag in run.data.tags)
    return next((str(run.info.run_id) for run in runs), None)


def is_started(record: Record, name: str) -> bool:
    """Whether a run's training of a model started from another model."""
    return bool(_init_from(record, name))


def _init_from(record: Record, name: str) -> str:
    own = record.config["models"].get(name) or {}
    return own.get("init_from", (record.config.get("train") or {}).get("init_from")) or ""


def _initial_version(record: Record, name: str) -> str:
    """The version of this model that a run's training started from; "" if it started from something else.

    The record's tag has the version that an alias named.
    """
    pattern = rf"(?:models:/)?{re.escape(name)}/(\d+)"
    locations = (_init_from(record, name), record.tags.get(f"edt.init_from.{name}", ""))
    match = next((match for text in locations if (match := re.fullmatch(pattern, text))), None)
    return match[1] if match else ""
