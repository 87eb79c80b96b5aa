"""`edt tune`: the space, the trials of a search, their results, and searches that are stopped, fail and diverge."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import pytest
import yaml

from edt_core.errors import UserError
from edt_core.store.manifest import Manifest
from edt_core.store.store import Store
from pipelines.config.schema import given_values, load_config
from pipelines.engine.step import StepTask, run_step
from pipelines.studies.tune import run
from pipelines.studies.tune.render import as_markdown, draw, next_yaml
from pipelines.studies.tune.result import Results, Row
from pipelines.studies.tune.search import Search, search_of
from pipelines.studies.tune.space import Parameter, parse_space, points
from pipelines.studies.tune.trials import Trials
from pipelines.tracking.catalog import Catalog
from tests.support.local_ray import local_ray_train
from tests.support.small import copy_store, edt, options

RATE = Parameter("lr", "log", (1e-4, 1e-2))
DECAY = Parameter("weight_decay", "choice", (0, 0.01))


# --- the space and its points


def test_a_space_is_read_and_its_fields_are_in_order() -> None:
    texts = ["train.weight_decay=choice:0,1e-2", "train.lr=log:1e-4..1e-2", "train.warmup_steps=linear:0..50"]
    space = parse_space(texts)
    assert space == (RATE, Parameter("warmup_steps", "linear", (0, 50), whole=True), DECAY)
    assert parse_space([str(parameter) for parameter in space]) == space
    assert parse_space(["train.optimizer=choice:adan,adamw"])[0].values == ("adan", "adamw")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], r"--param is missing.*train\.lr=log:1e-4\.\.1e-2"),
        (["train.lr"], r"takes FIELD=KIND:VALUES.*got 'train\.lr'"),
        (["train.lr=between:1..2"], "takes FIELD=KIND:VALUES"),
        (["lr=log:1..2"], r"a search is over fields of train; write train\.lr"),
        (["train.lrr=log:1..2"], r"fields of train; did you mean train\.lr"),
        (["sample.cfg_scale=log:1..2"], "fields of train; "),
        (["train.lr=log:1e-2..1e-4"], r"range 1e-2\.\.1e-4 has no values"),
        (["train.lr=log:0..1"], "begins above 0, and got 0; use linear"),
        (["train.lr=log:1e-4"], r"log takes two numbers.*got '1e-4'"),
        (["train.lr=linear:1..inf"], "has no values"),
        (["train.warmup_steps=linear:0..1.5"], r"whole numbers, and got 0\.\.1\.5"),
        (["train.weight_decay=choice:0"], "at least 2 different values, and got '0'"),
        (["train.weight_decay=choice:0,0.0"], "at least 2 different values"),
        (["train.weight_decay=choice:0,[1"], "is no list of values"),
        (["train.lr=log:1..2", "train.lr=log:3..4"], r"train\.lr is given twice"),
        (["train.max_steps=choice:1,2"], "--steps or --budget; leave it out"),
        (["train.width=choice:24,48"], "have the width --width"),
        (["train.seed=choice:0,1"], "the same seed"),
        (["train.objective=choice:epsilon,flow"], "losses that cannot be compared"),
        (["train.num_workers=choice:1,2"], "does not change what is trained"),
    ],
)
def test_a_wrong_space_is_one_message(texts: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_space(texts)


@pytest.mark.parametrize("space", [(RATE,), (RATE, DECAY), (replace(RATE, kind="linear"), DECAY)])
def test_more_points_begin_with_those_of_fewer_and_are_spread_evenly(space: tuple[Parameter, ...]) -> None:
    many = points(space, 32, seed=3)
    assert points(space, 7, seed=3) == many[:7]
    assert points(space, 7, seed=4) != many[:7]
    assert all(1e-4 <= point["lr"] <= 1e-2 for point in many)
    quarters = [_share(space[0], point["lr"]) // 0.25 for point in many]
    assert all(6 <= quarters.count(quarter) <= 10 for quarter in range(4)), "32 points, 8 a quarter"


def _share(parameter: Parameter, value: float) -> float:
    """Where a value is in a range, from 0 to 1."""
    low, high = parameter.values
    return log(value / low) / log(high / low) if parameter.kind == "log" else (value - low) / (high - low)


def test_a_space_of_few_values_is_tried_as_a_whole_and_no_further() -> None:
    space = parse_space(["train.weight_decay=choice:0,0.1,0.2", "train.warmup_steps=linear:1..2"])
    found = {tuple(point.values()) for point in points(space, 6, 0)}
    assert found == {(steps, decay) for steps in (1, 2) for decay in (0, 0.1, 0.2)}
    with pytest.raises(UserError, match=r"--trials is 7, but the space has 6 different points; use at most 6"):
        points(space, 7, 0)


# --- the trials


GIVEN = {
    "train.model": "DiT-Tiny/2",
    "train.masked_loss": "false",
    "train.holdout": "0.16",
    "train.global_batch_size": "16",
    "train.validate_every": "4",
    "models.edt-tiny-digits-32": "{lr: 1.0e-3}",
}


def given(**more: str) -> dict[str, Any]:
    """The values of a configuration whose model has a rate of its own."""
    return given_values("quickstart", [f"{name}={value}" for name, value in {**GIVEN, **more}.items()])


def search(values: Mapping[str, Any] | None = None, **changed: Any) -> Search:
    arguments = {"space": (RATE,), "model": None, "width": 24, "count": 4, "steps": 40, **changed}
    return search_of(values or given(), **arguments)


def test_trials_are_the_recipe_at_the_narrow_width_and_one_budget() -> None:
    fields = {"ema_decay": "[0.9999, 0.5]", "num_workers": "[1, 4]", "seeds": "[5, 6]", "validate_every": "null"}
    found = search(given(**{f"train.{name}": value for name, value in fields.items()}))
    rates = set()
    for trial in found.trials:
        train = found.config.train_of(trial.name)
        assert (train.width, train.mup_base_width, train.max_steps, train.seed) == (24, 24, 40, 5)
        assert (train.ema_decay, train.num_workers, train.validate_every) == (0.75, 1, 4)
        assert trial.steps == 40
        rates.add(train.lr)
    assert rates == {point["lr"] for point in points((RATE,), 4, 0)}
    assert found.flops == 4 * found.trials[0].flops
    assert found.config.name == "quickstart-tune"


def test_a_budget_in_operations_gives_each_trial_its_steps() -> None:
    batches = Parameter("global_batch_size", "choice", (16, 32))
    with pytest.raises(UserError, match="different budgets; give --budget"):
        search(space=(batches,), count=2)
    found = search(space=(batches,), count=2, steps=None, budget=2e10)
    steps = {trial.point["global_batch_size"]: trial.steps for trial in found.trials}
    assert steps[16] == pytest.approx(2 * steps[32], abs=1)
    assert all(trial.flops == pytest.approx(2e10, rel=0.02) for trial in found.trials)


def test_the_next_configuration_has_the_values_on_top_of_all_others_and_the_base_width(tmp_path: Path) -> None:
    found = search(given(**{"train.width": "96"}))
    results = Results(found, (Row(found.trials[0], "finished", 0.5),))
    path = tmp_path / "next.yaml"
    path.write_text(next_yaml(results))
    config = load_config(str(path))
    train = config.train_of("edt-tiny-digits-32")
    assert (train.lr, train.mup_base_width, train.width) == (found.trials[0].point["lr"], 24, 96)
    assert train.max_steps == load_config("quickstart").train.max_steps
    assert "0.5 at width 24 after 40 steps" in path.read_text()


@pytest.mark.parametrize(
    ("values", "changed", "message"),
    [
        ({}, {"steps": None}, "needs one budget: give --steps"),
        ({}, {"budget": 1e9}, "needs one budget"),
        ({}, {"steps": None, "budget": 10.0}, "--budget is 10, but one step takes"),
        ({}, {"width": 480}, r"--width is 480, more than the \d+ of edt-tiny-digits-32"),
        ({}, {"width": 25}, "mup_base_width is no width of this model"),
        ({}, {"model": "edt-tiny-digit"}, "did you mean edt-tiny-digits-32"),
        ({"models": "{a: {}, b: {}}"}, {}, "has 2 models: choose one with --model a"),
        ({"ladder": "{budgets: [1e9, 2e9, 3e9]}"}, {}, "has a ladder"),
        ({"train.warmup_steps": "40"}, {}, "warmup_steps is 40, but trial-00 has 40 steps"),
        ({"train.init_from": "m@champion"}, {}, "the weights of another width do not fit"),
        ({"train.model": "UViT-Tiny/2"}, {}, "other initial weights than muP is known for"),
        ({}, {"space": (Parameter("ema_decay", "linear", (0.5, 1.5)),), "seed": 1}, "ema_decay is 1"),
    ],
)
def test_a_search_that_cannot_be_is_refused(values: dict[str, str], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        search(given(**values), **changed)


# --- the results


def results(*losses: float | None) -> Results:
    """A search over the rate whose trials have these losses, in the order of their rates; None: it diverged."""
    found = search(count=len(losses))
    order = sorted(range(len(losses)), key=lambda place: found.trials[place].point["lr"])
    rows = [Row(trial, "diverged") for trial in found.trials]
    for place, loss in zip(order, losses, strict=True):
        if loss is not None:
            rows[place] = Row(found.trials[place], "finished", loss, "f" * 64, ((20, loss + 1), (40, loss)))
    return Results(found, tuple(rows))


@pytest.mark.parametrize(
    ("losses", "edge"),
    [
        ((3.0, 2.0, 1.0, 2.0), None),
        ((3.0, 2.0, 1.5, 1.0), r"is the highest that was tried.*--param train\.lr=log:0\.0001\.\.0\.1"),
        ((1.0, 2.0, 3.0, None), r"is the lowest that was tried.*--param train\.lr=log:1e-05\.\.0\.01"),
        ((3.0, 2.0, 1.0, None), None),  # what diverged was tried
        ((1.0, 2.0), None),
        ((None, None, None), None),
    ],
)
def test_a_best_value_at_the_edge_is_said(losses: tuple[float | None, ...], edge: str | None) -> None:
    found = results(*losses)
    (text,) = found.edges() or [""]
    assert (edge is None) == (text == "")
    if edge is not None:
        assert re.search(edge, text)
        assert text[1:] in as_markdown(found)


def test_trials_without_a_loss_are_counted_and_stay_in_the_table() -> None:
    found = results(3.0, 1.0, 2.0, None)
    failed = replace(found, rows=(*found.rows, Row(replace(found.rows[0].trial, name="trial-04"), "failed")))
    text = as_markdown(failed)
    assert "1 of 5 trials diverged" in text
    assert "1 of 5 trials failed, so the search is incomplete: trial-04 (train.lr " in text
    assert found.complete
    assert not failed.complete
    table = [line.split(" | ") for line in text.splitlines() if line.startswith("| trial-")]
    assert [cells[-1].rstrip(" |") for cells in table] == ["**1**", "2", "3", "diverged", "failed"]
    stored = json.loads(failed.as_json())
    assert (stored["diverged"], stored["failed"], stored["best"]["loss"]) == (1, 1, 1.0)


def test_of_equal_losses_the_first_trial_is_best_and_equal_results_have_equal_bytes() -> None:
    found = results(1.0, 1.0, 1.0)
    assert found.best is found.rows[0]
    assert found.as_json() == results(1.0, 1.0, 1.0).as_json()


def test_the_picture_is_drawn_for_every_kind_of_field_and_outcome(tmp_path: Path) -> None:
    space = (*parse_space(["train.optimizer=choice:adan,adamw"]), RATE)
    found = search(space=space, count=3)
    rows = (Row(found.trials[0], "finished", 1.0, curve=((1, 2.0), (2, 1.0))), Row(found.trials[1], "diverged"))
    draw(Results(found, rows), tmp_path / "losses.png")
    draw(Results(found, ()), tmp_path / "none.png")
    assert (tmp_path / "losses.png").read_bytes()[:4] == b"\x89PNG" == (tmp_path / "none.png").read_bytes()[:4]


# --- searches


class Here(Trials):
    """Trials that run in this process, one after another, until the one that is killed."""

    killed: str | None = None
    fails: str | None = None

    def add(self, task: StepTask, inputs: Mapping[str, Any]) -> Any:
        import ray

        if task.name == self.killed:
            raise KeyboardInterrupt
        return ray.remote(_fail if task.name == self.fails else run_step).remote(task, inputs)

    def start(self, at_once: int) -> None:
        assert at_once == 1


def _fail(task: StepTask, inputs: Mapping[str, Any]) -> None:
    raise RuntimeError("no more memory")


RATES = "train.lr=choice:1e-6,3e-3,1e30"


def tune(folder: Path, store: Path, *more: str) -> Any:
    words = ("--width", "24", "--trials", "3", "--steps", "12", "--tflops", "1", "--at-once", "1", "--param", RATES)
    fields = options(*(f"{name}={value}" for name, value in GIVEN.items()))
    return edt("tune", "quickstart", *words, *fields, "--store", str(store), "--out", str(folder), *more)


def checkpoints(store: Path) -> dict[str, Manifest]:
    return Store.open(str(store)).manifests("checkpoint")


@pytest.mark.usefixtures("first")
def test_a_killed_search_is_resumed_and_gives_the_same_result(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "Trials", Here)
    for name in ("whole", "parts"):
        copy_store(store, tmp_path / name)
    before = checkpoints(tmp_path / "parts")
    with local_ray_train():
        done = tune(tmp_path / "out", tmp_path / "whole", "--yes")
        assert done.returncode == 0, done.stdout + done.stderr
        monkeypatch.setattr(Here, "killed", "train trial-02")
        with pytest.raises(KeyboardInterrupt):
            tune(tmp_path / "again", tmp_path / "parts", "--yes")
        first = checkpoints(tmp_path / "parts")
        assert not (tmp_path / "again").exists()
        monkeypatch.setattr(Here, "killed", None)
        resumed = tune(tmp_path / "again", tmp_path / "parts", "--yes")
        assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert first.keys() - before.keys(), "the kill came before the first trial ended"
    after = checkpoints(tmp_path / "parts")
    assert all(after[name] == manifest for name, manifest in first.items())
    assert (tmp_path / "again" / "results.json").read_bytes() == (tmp_path / "out" / "results.json").read_bytes()
    _check_found(tmp_path / "out", done.stdout)
    _check_recorded(tmp_path / "whole")


def _check_found(folder: Path, text: str) -> None:
    """The better of the two rates that can be trained is the best, and the third is counted."""
    stored = json.loads((folder / "results.json").read_text())
    assert stored["best"]["values"] == {"lr": 3e-3}
    losses = {trial["values"]["lr"]: trial["loss"] for trial in stored["trials"]}
    assert losses[3e-3] < losses[1e-6]
    assert losses[1e30] is None
    assert all(len(trial["curve"]) >= 3 for trial in stored["trials"] if trial["loss"])
    assert "1 of 3 trials diverged" in text
    following = yaml.safe_load((folder / "next.yaml").read_text())
    assert following["models"]["edt-tiny-digits-32"] == {"lr": 3e-3, "mup_base_width": 24}
    assert (folder / "losses.png").stat().st_size > 10_000


def _check_recorded(store: Path) -> None:
    """Each trial is a run of MLflow with its parameters and its curve; the search is their parent."""
    catalog = Catalog.existing(Store.open(str(store)).root)
    experiment = catalog.client.get_experiment_by_name("quickstart-tune")
    assert experiment is not None
    runs = catalog.client.search_runs([experiment.experiment_id])
    (parent,) = [each for each in runs if "edt.search" in each.data.tags]
    trials = {each.data.params["lr"]: each for each in runs if "lr" in each.data.params}
    assert {rate: each.info.status for rate, each in trials.items()} == {
        "1e-06": "FINISHED",
        "0.003": "FINISHED",
        "1e+30": "FAILED",
    }
    assert {each.data.tags["mlflow.parentRunId"] for each in trials.values()} == {parent.info.run_id}
    assert len(catalog.client.get_metric_history(trials["0.003"].info.run_id, "holdout_loss")) >= 3
    assert parent.info.status == "FINISHED"
    assert (parent.data.metrics["trials"], parent.data.metrics["diverged"]) == (3, 1)
    assert parent.data.tags["edt.best.lr"] == "0.003"
    done = edt("reproduce", parent.info.run_id, "--store", str(store))
    assert done.returncode == 2
    assert "is a search of edt tune" in done.stderr


@pytest.mark.usefixtures("first")
def test_a_failed_trial_leaves_the_search_incomplete(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "Trials", Here)
    monkeypatch.setattr(Here, "fails", "train trial-00")
    copy_store(store, tmp_path / "store")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "next.yaml").write_text("of an earlier search")
    with local_ray_train():
        done = tune(tmp_path / "out", tmp_path / "store", "--trials", "2", "--yes")
    assert done.returncode == 1
    assert "error: train trial-00: RuntimeError: no more memory" in done.stdout
    assert "1 of 2 trials failed, so next.yaml was not written; rerun the command" in done.stdout
    assert not (tmp_path / "out" / "next.yaml").exists()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["failed"] == 1


def test_the_cost_is_shown_first_and_nothing_starts_without_a_yes(tmp_path: Path) -> None:
    done = tune(tmp_path / "out", tmp_path / "store")
    assert done.returncode == 2
    assert "nothing was started; add --yes to start it" in done.stderr
    assert "3 trials of " in done.stdout
    assert "at 1e12 FLOPs a second; data steps that are missing come on top" in done.stdout
    assert done.stdout.count("trial-0") == 3
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "out").exists()


def test_a_search_without_held_out_images_is_refused(tmp_path: Path) -> None:
    for holdout in ("0", "auto"):
        done = tune(tmp_path / "out", tmp_path / "store", "--set", f"train.holdout={holdout}", "--yes")
        assert done.returncode == 2
        assert "none of the 400 images is held out" in done.stderr
        assert "--set train.holdout=0.1" in done.stderr
    assert not (tmp_path / "store").exists()
