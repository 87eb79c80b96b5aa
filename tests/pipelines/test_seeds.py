"""`train.seeds`: one model trained with several seeds is one entry, with mean and spread over the trainings."""

import json
from pathlib import Path

import pytest

from edt_core.errors import UserError
from edt_core.store.store import Store
from pipelines.commands.options import catalog_if_any
from pipelines.config.schema import load_config
from pipelines.diff import outline
from pipelines.outcome import Outcome
from pipelines.plan import plan
from pipelines.registry.garbage import registered_roots
from pipelines.setup.disk import disk_needs
from pipelines.setup.dry_run import training_needs
from pipelines.tracking.catalog import Catalog
from tests.support.local_ray import local_ray_train
from tests.support.small import MODEL, SMALL, STEPS, copy_store, edt, pipeline

SEEDS = "train.seeds=[0, 7]"
ADDED = {f"seed 7 {step} {MODEL}" for step in ("train", "sample", "evaluate")}


# --- what a configuration says


def test_each_training_is_the_one_of_its_seed_alone() -> None:
    """So a training of one seed is reused when others are added, in any order."""
    several = outline(load_config("quickstart", [SEEDS]))
    alone = {seed: outline(load_config("quickstart", [f"train.seed={seed}"])) for seed in (0, 7)}
    assert set(several) == set(alone[0]) | ADDED
    for step in ("train", "sample", "evaluate"):
        assert several[f"{step} {MODEL}"] == alone[0][f"{step} {MODEL}"]
        assert several[f"seed 7 {step} {MODEL}"] == alone[7][f"{step} {MODEL}"]
    turned = outline(load_config("quickstart", ["train.seeds=[7, 0]"]))
    assert turned[f"train {MODEL}"] == alone[7][f"train {MODEL}"]
    one = outline(load_config("quickstart", ["train.seeds=[7]"]))
    assert one == alone[7]


def test_models_may_have_seeds_of_their_own() -> None:
    config = load_config("quickstart", ['models={"a": {"seeds": [1, 2]}, "b": {}}'])
    assert [train.seed for train in config.trainings_of("a")] == [1, 2]
    assert [train.seed for train in config.trainings_of("b")] == [0]


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["train.seeds=[1, 1]"], "seeds is [1, 1]; it must be a list of different numbers"),
        (["train.seeds=[1, 2]", "train.seed=3"], "seed is 3 and seeds is [1, 2]; leave out seed"),
        (["train.seeds=[-1]"], "seeds is [-1]; it must be"),
        (["train.seeds=[1, 2]", "models={m: {seed: 0}}"], "models.m.seed is 0, but train.seeds is [1, 2]"),
    ],
)
def test_seeds_that_mean_nothing_are_refused(assignments: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config("quickstart", assignments)
    assert message in str(refused.value)


def test_one_training_alone_takes_one_seed() -> None:
    from edt_core.config import TrainConfig
    from jobs.stages.train import _check

    with pytest.raises(UserError, match=r"seeds is \[1, 2\], but this is one training"):
        _check(TrainConfig(seeds=(1, 2)), None, None)  # type: ignore[arg-type]


def test_estimates_count_each_training() -> None:
    one, three = load_config("quickstart"), load_config("quickstart", ["train.seeds=[0, 1, 2]"])
    assert "3, one for each seed" in training_needs(three)
    assert "one for each seed" not in training_needs(one)
    small, large = disk_needs(one, 1797, 10), disk_needs(three, 1797, 10)
    assert large["samples"] == 2 * small["samples"]  # of four models, not of two
    assert small["checkpoints"] < large["checkpoints"] < 3 * small["checkpoints"]


# --- what a run makes


@pytest.fixture(scope="module")
def copied(first: Outcome, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished store of the session, to write to."""
    copy = tmp_path_factory.mktemp("seeds") / "edt-store"
    copy_store(store, copy)
    return copy


@pytest.fixture(scope="module")
def repeated(copied: Path) -> Outcome:
    """The finished pipeline run again, now with a second seed."""
    planned = plan(load_config("quickstart", [*SMALL, SEEDS], str(copied)), catalog_if_any(str(copied)))
    assert {step.step for step in planned if step.action == "run"} >= ADDED
    with local_ray_train(), pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return pipeline(copied, SEEDS)


def test_only_the_further_training_runs_and_the_version_stays(repeated: Outcome, first: Outcome) -> None:
    assert (repeated.failures, repeated.executed, repeated.reused) == ({}, 4, STEPS - 1)
    assert repeated.decisions[MODEL].version == first.decisions[MODEL].version == "1"
    trainings = repeated.trainings[MODEL]
    assert list(trainings) == [0, 7]
    assert trainings[0] == repeated.metrics[MODEL][1] == first.metrics[MODEL][1]
    assert trainings[7]["fd_classifier"] != trainings[0]["fd_classifier"]


def test_the_registry_has_the_spread(repeated: Outcome, copied: Path) -> None:
    tags = Catalog(repeated.tracking_uri, "").client.get_model_version(MODEL, "1").tags
    recorded = json.loads(tags["edt.trainings"])
    evaluations = {artifact.fingerprint for artifact in Store.open(str(copied)).artifacts()}
    assert len(kept := set(json.loads(tags["edt.trainings.evaluations"]))) == 2
    assert kept <= evaluations
    assert any(kept <= roots for roots in registered_roots(Catalog(repeated.tracking_uri, "")))  # `edt gc` keeps them
    values = [recorded[seed]["fd_classifier"] for seed in ("0", "7")]
    assert values == [repeated.trainings[MODEL][seed]["fd_classifier"] for seed in (0, 7)]
    shown = edt("models", "show", f"{MODEL}/1", "--store", str(copied)).stdout
    assert "trainings" in shown
    spread = abs(values[0] - values[1]) / 2**0.5
    text = f"{sum(values) / 2:.4g} ± {spread:.2g}"
    assert text in shown
    page = repeated.reports[MODEL].path("report.html").read_text()
    assert "Over 2 trainings" in page
    assert text in page


def test_the_end_of_a_run_shows_the_spread(repeated: Outcome, capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.commands.workflow import show_outcome
    from pipelines.terminal.terminal import Terminal

    with Terminal() as terminal:
        show_outcome(repeated, terminal)
    assert "over 2 trainings (seeds 0, 7):" in capsys.readouterr().out
    assert list(repeated.to_dict()["models"][MODEL]["trainings"]) == [0, 7]
