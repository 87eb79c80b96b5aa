"""A pipeline whose training starts from the champion: planned, run, found again, recorded, kept and reproduced."""

from pathlib import Path

import pytest

from edt_core.errors import UserError
from edt_core.store.artifact import Artifact
from edt_core.store.folder import Folder
from edt_core.store.layout import REPORT_NAME
from edt_core.store.store import Store
from jobs.models.initial import INIT_CHECKPOINT_TAG, INIT_FROM_TAG, INIT_TAG
from pipelines.commands.options import catalog_if_any
from pipelines.config.schema import load_config
from pipelines.outcome import Outcome
from pipelines.pipeline import call_steps, prepare_source
from pipelines.plan import PlannedStep, Planner, plan
from pipelines.registry.garbage import roots
from pipelines.registry.lineage import lineage
from pipelines.reproduce import reproduce, restored
from pipelines.terminal.terminal import Terminal
from pipelines.tracking.catalog import Catalog
from pipelines.tracking.runs import read_record
from tests.support.small import MODEL, SMALL, copy_store, pipeline

pytestmark = pytest.mark.usefixtures("training_here")

TRAIN = f"train {MODEL}"
FROM_CHAMPION = f"train.init_from={MODEL}@champion"
FEWER = ("train.max_steps=4", "promote.margin=0.0")


def planned(store: Path, *assignments: str) -> dict[str, PlannedStep]:
    config = load_config("quickstart", [*SMALL, *assignments], str(store))
    return {step.step: step for step in plan(config, catalog_if_any(str(store)))}


@pytest.fixture(scope="module")
def place(first: Outcome, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a store with one version, the champion."""
    folder = tmp_path_factory.mktemp("warm") / "edt-store"
    copy_store(store, folder)
    return folder


@pytest.fixture(scope="module")
def warm(place: Path) -> Outcome:
    """A run that starts from the champion, version 1."""
    from tests.support.local_ray import local_ray_train

    with local_ray_train():
        return pipeline(place, FROM_CHAMPION, *FEWER)


def champion(store: Path, version: str) -> Catalog:
    """Make a version the champion, whatever its metric."""
    catalog = Catalog.open(Folder.at(store), "quickstart")
    catalog.client.set_registered_model_alias(MODEL, "champion", version)
    return catalog


def test_a_plan_says_what_it_starts_from(place: Path) -> None:
    steps = planned(place, FROM_CHAMPION, *FEWER)
    assert steps[TRAIN].action == "run" or steps[TRAIN].why.startswith("made ")
    assert {steps[name].action for name in ("encode", "autoencoder", "reference")} == {"reuse"}
    other = planned(place, FROM_CHAMPION, "train.max_steps=5")[TRAIN]
    assert other.why.endswith(f"; it starts from models:/{MODEL}/1")


def test_the_training_is_one_of_the_champion_and_found_again(warm: Outcome, place: Path) -> None:
    assert not warm.failures
    steps = planned(place, FROM_CHAMPION, *FEWER)
    assert steps[TRAIN].action == "reuse"
    made = Artifact.open(str(place / "checkpoint" / steps[TRAIN].fingerprint))
    assert set(made.manifest.inputs) == {"latents", "init"}
    alone = planned(place, *FEWER)[TRAIN]
    assert (alone.action, alone.fingerprint) != ("reuse", steps[TRAIN].fingerprint)
    again = pipeline(place, FROM_CHAMPION, *FEWER)
    assert (again.executed, again.failures) == (0, {})


def test_a_schedule_does_not_train_on_from_its_own_result(warm: Outcome, place: Path) -> None:
    """The version that the training made is champion now: with the same images nothing is done again."""
    version = str(warm.decisions[MODEL].version)
    catalog = champion(place, version)
    try:
        steps = planned(place, FROM_CHAMPION, *FEWER)
        assert {name: step.action for name, step in steps.items() if step.action != "reuse"} == {}
        later = planned(place, FROM_CHAMPION, "train.max_steps=5")[TRAIN]
        assert later.why.endswith(f"; it starts from models:/{MODEL}/{version}")  # another training goes on from it
        pinned = planned(place, f"train.init_from={MODEL}/{version}", *FEWER)[TRAIN]
        assert pinned.action == "run"  # a person who names the version means it
    finally:
        catalog.client.set_registered_model_alias(MODEL, "champion", "1")


def test_the_record_names_the_base_and_lineage_and_gc_follow_it(first: Outcome, warm: Outcome, place: Path) -> None:
    catalog = Catalog.open(Folder.at(place), "quickstart")
    tags = catalog.client.get_run(warm.run_id).data.tags
    base = tags[f"{INIT_CHECKPOINT_TAG}.{MODEL}"]
    assert base == read_record(catalog, first.run_id).steps[TRAIN.replace(" ", ".")]
    assert tags[f"{INIT_FROM_TAG}.{MODEL}"] == f"models:/{MODEL}/1"
    version = catalog.client.get_model_version(MODEL, str(warm.decisions[MODEL].version))
    assert version.tags[INIT_TAG] == tags[f"{INIT_TAG}.{MODEL}"]
    assert version.tags[INIT_CHECKPOINT_TAG] == base
    assert base in roots(catalog, keep_runs=1, running=False)
    nodes = lineage(catalog, f"{MODEL}/{version.version}", Folder.at(place)).nodes
    initial = nodes[version.tags[INIT_TAG]]
    assert (initial.uri, initial.inputs) == (f"models:/{MODEL}/1", {"checkpoint": base})
    assert nodes[base].kind == "checkpoint"


def test_its_record_restores_the_version_and_not_the_alias(warm: Outcome, place: Path, tmp_path: Path) -> None:
    catalog = champion(place, str(warm.decisions[MODEL].version))
    try:
        record = read_record(catalog, warm.run_id)
        config, published = restored(record, catalog, str(tmp_path / "again"))
        assert published.initial[MODEL].location == f"models:/{MODEL}/1"
        planner = Planner(Store(Folder.at(tmp_path / "again")))
        with Terminal(to_stderr=True) as terminal:
            call_steps(planner, config, prepare_source(config.source, Folder.at(tmp_path), terminal), published)
        assert planner.steps[TRAIN].fingerprint == record.steps[TRAIN.replace(" ", ".")]
        assert published.initial[MODEL].read(config.train_of(MODEL)).classes == tuple("0123456789")
    finally:
        catalog.client.set_registered_model_alias(MODEL, "champion", "1")


def test_a_plan_says_from_which_training_a_longer_one_goes_on(place: Path) -> None:
    constant = ("train.lr_schedule=constant", "train.max_steps=4")
    done = pipeline(place, *constant)
    assert not done.failures
    short = planned(place, *constant)[TRAIN]
    longer = planned(place, "train.lr_schedule=constant")[TRAIN]
    assert (short.action, longer.action) == ("reuse", "resume")
    assert longer.why.startswith(f"resume from {short.fingerprint[:12]} at step 4; max_steps 4 -> 8")


def test_what_cannot_fit_is_refused_by_the_plan(place: Path) -> None:
    with pytest.raises(UserError, match=r"models:/.*/1 \(EDT-Tiny/2\) does not fit DiT-Tiny/2"):
        planned(place, FROM_CHAMPION, "train.model=DiT-Tiny/2", "train.masked_loss=false")
    with pytest.raises(UserError, match=r"train.init_optimizer is keep, but train.init_from is not set"):
        planned(place, "train.init_optimizer=keep")
    with pytest.raises(UserError, match=r"has no model nobody@champion"):
        planned(place, "train.init_from=nobody@champion")


def test_no_untrained_model_is_made_beside_it(warm: Outcome, place: Path) -> None:
    assert not any(name.startswith("untrained") for name in planned(place, FROM_CHAMPION, *FEWER))
    before, _ = warm.metrics[MODEL]
    assert before is None
    assert warm.to_dict()["models"][MODEL]["untrained"] is None
    assert "the training started from another model" in warm.reports[MODEL].path(REPORT_NAME).read_text()


def test_the_whole_run_is_reproduced_from_its_record(warm: Outcome, place: Path, tmp_path: Path) -> None:
    """Reused steps are made again; the model that the training started from is taken as recorded."""
    with Terminal(to_stderr=True) as terminal:
        again, comparisons = reproduce(
            warm.run_id, Catalog.existing(Folder.at(place)), str(tmp_path / "again"), terminal, other_code=True
        )
    assert not again.failures
    made = {comparison.step for comparison in comparisons}
    assert made >= {f"{step}.{MODEL}" for step in ("train", "sample", "evaluate")}
    assert [comparison.as_row() for comparison in comparisons if not comparison.equal] == []
