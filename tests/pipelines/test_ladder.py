"""Ladders: trainings of several widths under the same numbers of operations, by the ordinary workflow."""

import json
from pathlib import Path

import pytest
import yaml

from edt_core.errors import UserError
from pipelines.config.ladder import cost_rows, flops_of_step
from pipelines.config.schema import PipelineConfig, load_config, recorded_yaml
from tests.support.local_ray import local_ray_train
from tests.support.small import edt

SHIPPED = Path(__file__).parents[2] / "pipelines" / "configs" / "scaling"
MINI = str(SHIPPED / "mini.yaml")


COUNTED = ("mini", "digits-mdtv2-epsilon", "imagenet256-edt")
OTHERS = sorted(path.stem for path in SHIPPED.glob("*.yaml") if path.stem not in COUNTED)


@pytest.mark.parametrize("name", [*COUNTED, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_each_training_uses_its_budget_to_within_a_step(name: str) -> None:
    config = load_config(str(SHIPPED / f"{name}.yaml"))
    rows = cost_rows(config)
    assert len(rows) == len(config.models) == len(config.ladder.rungs)
    for rung, row in zip(config.ladder.rungs, rows, strict=True):
        assert abs(row["flops"] - rung.budget) <= flops_of_step(config, rung.name)
        train = config.train_of(rung.name)
        assert (train.model, train.width, train.seed) == (rung.model, rung.width, rung.seed)
        assert row["flops"] == train.max_steps * flops_of_step(config, rung.name)


def test_a_record_of_a_ladder_is_the_same_configuration(tmp_path: Path) -> None:
    config = load_config(MINI, ["ladder.seeds=[0,1]"])
    assert len(config.models) == 18
    record = tmp_path / "record.yaml"
    record.write_text(recorded_yaml(config))
    assert load_config(str(record)) == config
    assert PipelineConfig.model_validate(yaml.safe_load(record.read_text())) == config


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("ladder.budgets=[1e9,2e9]", r"ladder\.budgets has 2 values, and a fit needs 3"),
        ("ladder.widths=[24,36]", r"ladder\.widths has 2 values, and a fit needs 3"),
        ("ladder.widths=[24,24,36]", "give different values"),
        ("ladder.widths=[24,36,50]", "the width is 50; use a multiple of 12"),
        ("ladder.budgets=[1e3,1e9,2e9]", "has 1e\\+03, but a step of DiT-Tiny/2 of width 24 takes"),
        ("train.max_hours=1", r"train\.max_hours is 1.*leave it out"),
        ("train.seeds=[1, 2]", r"the seeds of a ladder are ladder\.seeds"),
        ("train.holdout=0", r"train\.holdout is 0.*a ladder compares held-out losses"),
    ],
)
def test_a_ladder_that_cannot_be_fitted_is_refused_before_it_starts(assignment: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(MINI, [assignment])


def test_a_configuration_without_a_ladder_is_told(tmp_path: Path) -> None:
    done = edt("scaling", "quickstart", "--store", str(tmp_path))
    assert done.returncode == 2
    assert "quickstart has no ladder" in done.stderr


def test_a_plan_shows_the_cost_first_and_no_registration(tmp_path: Path) -> None:
    planned = edt("plan", MINI, "--store", str(tmp_path))
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.index("9 trainings of") < planned.stdout.index("preprocess")
    rows = json.loads(edt("plan", MINI, "--store", str(tmp_path), "--json").stdout)
    names = [row["step"] for row in rows]
    assert names[-1] == "scaling"
    assert [name for name in names if name.startswith("train ")] == [
        f"train {name}" for name in load_config(MINI).models
    ]
    assert not [name for name in names if "untrained" in name or "promote" in name or "report" in name]


@pytest.mark.slow
def test_a_ladder_runs_by_the_ordinary_workflow_and_is_reused(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    with local_ray_train():
        done = edt("scaling", MINI, "--store", store)
        assert done.returncode == 0, done.stderr
        (manifest,) = (tmp_path / "store" / "scaling").glob("*/manifest.json")
        before = manifest.read_bytes()
        again = edt("scaling", MINI, "--store", store)
    assert again.returncode == 0, again.stderr
    assert "33 steps reused, 0 run" in again.stdout
    assert manifest.read_bytes() == before
    (path,) = (tmp_path / "store" / "scaling").glob("*/*/scaling.json")
    assert str(path) in again.stdout
    points = json.loads(path.read_text())["points"]
    assert len(points) == 9
    assert all(row["loss"] > 0 and 0 <= row["accuracy_classifier"] <= 1 for row in points)
