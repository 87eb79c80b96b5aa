"""A run of flow matching on the finished store: what it trains, registers and records."""

import json
from pathlib import Path
from typing import Any

import pytest

from edt_core.pipeline import EDTPipeline
from edt_core.store.folder import Folder
from edt_core.store.store import Store
from pipelines.outcome import Outcome
from pipelines.tracking.catalog import Catalog
from tests.support.pipelines import quiet
from tests.support.small import copy_store, edt, pipeline

NAME = "digits-flow"


@pytest.mark.usefixtures("training_here")
def test_a_run_of_flow_matching_registers_a_model_that_is_sampled_as_it_was_evaluated(
    first: Outcome, store: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "store"
    copy_store(store, copy)
    assignments = (
        "train.objective=flow",
        "train.timestep_sampler=uniform",
        "train.preview_every=8",
        "sample.sampler=heun",
        f"models={{{NAME}: {{}}}}",
    )
    outcome = pipeline(copy, *assignments)
    assert (outcome.failures, outcome.executed, outcome.reused) == ({}, 7, 5)
    (trained,) = (
        item
        for item in Store.open(str(copy)).artifacts()
        if item.counts.get("objective") == "flow" and item.counts.get("steps")
    )
    assert trained.manifest.config["timestep_sampler"] == "uniform"
    page = outcome.reports[NAME].path("report.html").read_text()
    assert "loss by timestep" in page
    assert edt("models", "pull", f"{NAME}/1", str(tmp_path / "model"), "--store", str(copy)).returncode == 0
    assert "the velocity from noise to data (flow matching" in (tmp_path / "model" / "README.md").read_text()
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    assert (index["protocol"]["sampler"], index["protocol"]["num_sampling_steps"]) == ("heun", 3)
    images: Any = quiet(EDTPipeline.from_pretrained(tmp_path / "model"))([0, 1], output_type="pt", return_dict=False)[0]
    assert images.shape == (2, 3, 32, 32)
    version = Catalog.open(Folder.at(copy), "test").client.get_model_version(NAME, "1")
    assert version.tags["edt.objective"] == "flow"
    again = pipeline(copy, *assignments)
    assert (again.executed, again.reused) == (0, 12)
