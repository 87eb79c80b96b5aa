"""Register a version again with another default chain: the same weights, sampled by settings of `edt pareto`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edt_core.config import recorded_fields
from edt_core.environment import code_version
from edt_core.errors import UserError
from edt_core.files.small_files import read_json
from edt_core.store.artifact import canonical_json
from jobs.models.open import load_model
from jobs.models.registry_files import title
from pipelines.registry.aliases import CHAIN_OF_TAG, CHAIN_TAG, QUANTIZED_TAG, find_version
from pipelines.registry.derived.folder import TAKEN_OVER, write_derived
from pipelines.registry.lookup import quantization_of
from pipelines.registry.packaging import QUANTIZE_EXTRA, log_pipeline
from pipelines.registry.registration import COST_TAG, add_logged
from pipelines.tracking.catalog import Catalog

_OF_ITS_CHAIN = tuple(f"{QUANTIZED_TAG}{name}" for name in ("seconds", "seconds_before", "timed_on"))


def chosen_settings(path: Path, point: str, version: Any) -> dict[str, Any]:
    """The settings of a point in `results.json` of `edt pareto`: a named point, or a setting by its name.

    Raises UserError for a point of another version, a point that they do not have, and a file that is none of these.
    """
    try:
        results = read_json(path)
        named, points = results["named"], {entry["name"]: entry for entry in results["points"]}
        settings = {name: entry["settings"] for name, entry in points.items()}
        first = results["version"]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give results.json of `edt pareto`") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no results.json of `edt pareto`; give the one in its folder") from None
    if (name := named.get(point, point)) not in points:
        known = ", ".join([*named, *(repr(each) for each in points)])
        raise UserError(f"{path} has no point {point!r}; it has {known}")
    own = f"{version.name}/{version.version}"
    measured = points[name].get("version", first)  # of a search in which other models took part
    if measured != own:
        what = str(path) if measured == first else f"the point {point!r} of {path}"
        measured = measured or "a model that is not registered"
        remedy = f"measure {own}" if measured == first else "give that version, or another point"
        raise UserError(f"{what} is of {measured}, not of {own}; {remedy}")
    chosen: dict[str, Any] = settings[name]
    return chosen


def register_chain(catalog: Catalog, parent: Any, settings: Mapping[str, Any]) -> tuple[Any, bool]:
    """The version with the weights of `parent` and these settings of `sample:`, and whether it is new."""
    from edt_core.config import ChainConfig

    fields = {name: value for name, value in settings.items() if name in ChainConfig.model_fields}
    chain = recorded_fields(ChainConfig.model_validate(fields))
    name, own = str(parent.name), f"{parent.name}/{parent.version}"
    identity = {CHAIN_OF_TAG: own, CHAIN_TAG: canonical_json(chain)}
    if (version := find_version(catalog, name, identity)) is not None:
        return version, False
    tags = _tags_of_weights(parent)
    needs = QUANTIZE_EXTRA if quantization_of(parent) else ""
    run_id = catalog.start_run(f"chain {name}", {**tags, **identity})
    logged = log_pipeline(catalog, run_id, name, lambda folder: _write(folder, parent, chain), needs=needs)
    return add_logged(catalog, name, run_id, logged, {**tags, "edt.code_version": code_version()}, identity), True


def _tags_of_weights(parent: Any) -> dict[str, str]:
    """The tags of a version that are true of its weights, whichever settings they are sampled with."""
    kept, parts = (*TAKEN_OVER, "edt.checkpoint"), (COST_TAG, QUANTIZED_TAG)
    tags = {key: text for key, text in parent.tags.items() if key in kept or key.startswith(parts)}
    return {key: text for key, text in tags.items() if key not in _OF_ITS_CHAIN}


def _write(folder: Path, parent: Any, chain: Mapping[str, Any]) -> None:
    """The diffusers folder of the parent with another protocol, and its card."""
    origin = {"made from": f"{title(parent)}, with other sampling settings"}
    write_derived(folder, parent, load_model(f"models:/{parent.name}/{parent.version}"), chain, origin)
