"""Register a model with averaged weights of another width as a version of the model that it is made from.

It has no metrics, so no alias moves: `edt evaluate` measures it under its number.
"""

from pathlib import Path
from typing import Any

from edt_core.environment import code_version
from edt_core.files.place_names import place_for_others
from edt_core.files.tensor_files import load_state
from edt_core.store.artifact import Artifact
from edt_core.store.layout import EMA_WEIGHTS
from jobs.models.names import STD_TAG
from jobs.models.open import load_model
from pipelines.registry.aliases import PARENT_TAG, find_version
from pipelines.registry.derived.folder import TAKEN_OVER, write_derived
from pipelines.registry.packaging import log_pipeline
from pipelines.registry.registration import COST_TAG, add_logged
from pipelines.tracking.catalog import Catalog


def register_average(catalog: Catalog, parent: Any, artifact: Artifact) -> tuple[Any, bool]:
    """The version with the weights of an artifact of `jobs.models.posthoc`, and whether it is new.

    `parent` is the version that named the training. The same width of the same training is one version.
    """
    counts = artifact.counts
    identity = {
        "edt.checkpoint": artifact.manifest.inputs["checkpoint"],
        STD_TAG: repr(counts["ema_std"]),
    }
    name = str(parent.name)
    if (version := find_version(catalog, name, identity)) is not None:
        return version, False
    tags = {key: text for key, text in parent.tags.items() if key in TAKEN_OVER or key.startswith(COST_TAG)}
    tags |= {PARENT_TAG: f"{name}/{parent.version}", "edt.ema_error": repr(counts["ema_error"])}
    run_id = catalog.start_run(f"ema {name}", {**tags, **identity})
    logged = log_pipeline(
        catalog,
        run_id,
        name,
        lambda folder: _write(folder, parent, artifact),
        params={"architecture": str(counts["model"]), "ema_std": counts["ema_std"]},
        step=int(counts["steps"]),
    )
    return add_logged(catalog, name, run_id, logged, {**tags, "edt.code_version": code_version()}, identity), True


def _write(folder: Path, parent: Any, artifact: Artifact) -> None:
    """The diffusers folder of the parent with the new weights, and its card."""
    counts, loaded = artifact.counts, load_model(f"models:/{parent.name}/{parent.version}")
    load_state(loaded.model, artifact.path(f"{counts['final']}/{EMA_WEIGHTS}"))
    origin = {
        "made from": f"version {parent.version} of {parent.name}, without training",
        "averaged weights": f"power-function average of width {counts['ema_std']:g} (arXiv 2312.02696)",
        "error of the profile": f"{counts['ema_error']:.2%}",
        "training": place_for_others(counts["origin"]),
    }
    write_derived(folder, parent, loaded, loaded.protocol, origin)
