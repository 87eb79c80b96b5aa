"""edt config: everything that is wrong at once, and what a change makes anew, held against the plan of a run."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edt_core.errors import UserError
from jobs.commands.options import field_names, meant_by
from pipelines.cli import app
from pipelines.config.check import problems
from pipelines.config.schema import PipelineConfig, as_yaml, config_names, load_config
from pipelines.diff import ABSENT, Side, differences, made_anew, outline, read_side
from pipelines.outcome import Outcome
from tests.support.small import MODEL, options

TRAINED = {f"{step} {MODEL}" for step in ("train", "sample", "evaluate", "promote")}


def invoke(*arguments: str) -> tuple[int, str]:
    """Exit code and output of a command in this process."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit | UserError)
    return result.exit_code, result.output if not isinstance(result.exception, UserError) else str(result.exception)


def changed(*assignments: str) -> dict[str, set[str]]:
    """Field -> the steps that a change of the quickstart makes anew."""
    found = differences(read_side("quickstart"), read_side("quickstart", None, assignments))
    return {difference.field: set(difference.steps) for difference in found}


def test_every_problem_is_told_with_its_line_and_the_field_that_was_meant(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "name: bad\nsource: {kind: digits}\npreprocess: {image_siz: 32}\nlr: 3\n"
        "train:\n  max_step: 5\n  lr: -1\n  num_workers: many\nmodels: {a: {}}\n"
    )
    found = {problem.field: problem for problem in problems(str(path))}
    assert {name: problem.line for name, problem in found.items()} == {
        "preprocess.image_siz": 3,
        "lr": 4,
        "train.max_step": 6,
        "train.lr": 7,
        "train.num_workers": 8,
    }
    assert found["preprocess.image_siz"].meant == ("preprocess.image_size",)
    assert found["train.max_step"].meant == ("train.max_steps",)
    assert "train.lr" in found["lr"].meant
    assert "greater than 0" in found["train.lr"].problem
    code, told = invoke("config", "validate", str(path), "quickstart")
    assert code == 2
    assert f"{path}: 5 problems" in told
    assert "quickstart: ok" in told
    assert len(json.loads(invoke("config", "validate", str(path), "--json")[1])) == 5


def test_what_an_assignment_says_has_no_line_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(as_yaml(load_config("quickstart")))
    (problem,) = problems(str(path), ["train.lr=-1"])
    assert (problem.field, problem.line) == ("train.lr", None)


def test_sizes_that_do_not_fit_are_told_of_every_model() -> None:
    found = problems("quickstart", ["preprocess.image_size=36", "models.b={model: DiT-Tiny/2, masked_loss: false}"])
    assert ["EDT-Tiny/2" in found[0].problem, "DiT-Tiny/2" in found[1].problem, len(found)] == [True, True, 2]


@pytest.mark.parametrize("name", config_names())
def test_what_ships_is_valid(name: str) -> None:
    assert problems(name) == []


@pytest.mark.parametrize(("text", "message"), [("a: [", "is not YAML"), ("- 1", "a mapping"), ("", "a mapping")])
def test_files_that_are_no_configuration(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    code, told = invoke("config", "validate", str(path), str(tmp_path / "absent.yaml"))
    assert code == 2
    assert message in told
    assert "cannot read the configuration file" in told


def test_names_of_fields_lead_to_each_other() -> None:
    assert {"train.max_steps", "source.path", "models"} <= set(field_names(PipelineConfig))
    assert meant_by("trian.max_steps", PipelineConfig) == ("train.max_steps",)
    assert meant_by("qqqqqqqq", PipelineConfig) == ()


def test_a_change_makes_its_step_anew_and_all_that_rest_on_it() -> None:
    assert changed("train.lr=0.5") == {"train.lr": TRAINED}
    assert changed("train.checkpoint_every=7", "store=/elsewhere") == {"train.checkpoint_every": set(), "store": set()}
    assert changed("promote.margin=0.5") == {"promote.margin": {f"promote {MODEL}"}}
    steps = set(outline(load_config("quickstart")))
    assert changed("preprocess.image_size=64") == {"preprocess.image_size": steps}
    assert changed("source.limit=100") == {"source.limit": steps}
    judged = changed("classifier.steps=7")["classifier.steps"]
    assert {"classifier", "reference", f"sample {MODEL}"} <= judged
    assert not {f"train {MODEL}", f"untrained train {MODEL}", "encode"} & judged


def test_a_change_that_fits_only_with_others_is_told_by_what_all_of_them_make_anew() -> None:
    assert changed("train.global_batch_size=1", "train.num_workers=1") == {
        "train.global_batch_size": TRAINED,
        "train.num_workers": set(),
    }


def test_a_model_under_another_name_is_trained_no_more_than_once() -> None:
    config = load_config("quickstart")
    other = config.model_copy(update={"models": {"other": {}}})
    sides = Side("a", config), Side("b", other)
    assert {d.field: (d.a, d.b) for d in differences(*sides)} == {
        f"models.{MODEL}": ({}, ABSENT),
        "models.other": (ABSENT, {}),
    }
    assert made_anew(*sides) == ["promote other"]


def test_one_configuration_alone_is_refused_and_the_same_twice_has_no_difference() -> None:
    assert "nothing to compare quickstart with" in invoke("config", "diff", "quickstart")[1]
    assert invoke("config", "diff", "quickstart", "quickstart") == (0, "no differences\n")
    assert "no configuration 'quick'" in invoke("config", "diff", "quickstart", "quick")[1]


def test_shown_whole_as_yaml_and_json_and_listed(tmp_path: Path) -> None:
    path = tmp_path / "whole.yaml"
    path.write_text(invoke("config", "show", "quickstart", "--set", "train.lr=0.5")[1])
    assert load_config(str(path)) == load_config("quickstart", ["train.lr=0.5"])
    assert json.loads(invoke("config", "show", "quickstart", "--json")[1])["train"]["max_steps"] == 500
    assert [row["name"] for row in json.loads(invoke("config", "list", "--json")[1])] == config_names()


def test_a_run_is_compared_by_its_record(first: Outcome, store: Path) -> None:
    """With what it was run as it has no difference but the store; with another rate, its training is made anew."""
    given = [*options("train.lr=0.5"), "--store", str(store), "--tracking-uri", first.tracking_uri]
    code, told = invoke("config", "diff", first.run_id, "quickstart", *given, "--json")
    assert code == 0, told
    found = {row["field"]: set(row["steps"]) for row in json.loads(told)}
    assert {field for field in found if field != "store"} == {"train.lr"}
    assert found["train.lr"] == TRAINED
    missing = invoke("config", "diff", "0" * 32, "quickstart", "--store", str(store))[1]
    assert "MLflow has no run 0000" in missing
