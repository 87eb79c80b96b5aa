"""The step `validate` in a pipeline: off by default, and made beside a finished run with nothing else made anew."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from edt_core.evaluation.confusion import Accuracy
from edt_core.store.artifact import Artifact
from edt_core.store.store import Store
from pipelines.commands.options import catalog_if_any
from pipelines.config.check import problems
from pipelines.config.schema import load_config
from pipelines.diff import differences, made_anew, outline, read_side
from pipelines.outcome import Outcome
from pipelines.plan import plan
from pipelines.report.page import render_report
from pipelines.report.validation import MOST_CELLS, MOST_ROWS, validation_view
from pipelines.reproduce import compare
from pipelines.tracking.catalog import Catalog
from pipelines.tracking.runs import read_record, steps_of
from tests.support.reports import numbers, validation, whole_report_data
from tests.support.small import MODEL, SMALL, STEPS, copy_store, edt, options, pipeline

ON = "validation.enabled=true"
STEP = f"validate {MODEL}"


# --- what a configuration says


def test_a_configuration_without_it_has_the_steps_that_it_had() -> None:
    before, after = outline(load_config("quickstart")), outline(load_config("quickstart", [ON]))
    assert after == {**before, STEP: after[STEP]}
    assert STEP not in before


def test_a_comparison_knows_the_step_that_it_adds() -> None:
    sides = read_side("quickstart"), read_side("quickstart", None, (ON,))
    (found,) = differences(*sides)
    assert (found.field, found.a, found.b, found.steps) == ("validation.enabled", False, True, (STEP,))
    assert made_anew(*sides) == [STEP]
    (other,) = differences(sides[1], read_side("quickstart", None, (ON, "validation.confidence=0.9")))
    assert other.steps == (STEP,)
    (cores,) = differences(sides[1], read_side("quickstart", None, (ON, "validation.num_cpus=2")))
    assert cores.steps == ()


def test_without_a_classifier_it_is_refused_by_one_message() -> None:
    other = ("extractors=[inception]", "promote.metric=fid", "evaluate.allow_rank_deficient=true")
    (problem,) = problems("quickstart", (*other, ON))
    assert "validation.enabled is true, but extractors is ['inception']" in problem.problem
    assert "add classifier to extractors, or set validation.enabled=false" in problem.problem
    assert problems("quickstart", other) == []
    done = edt("run", "quickstart", *(part for text in (*other, ON) for part in ("--set", text)))
    assert done.returncode == 2
    assert done.stderr.count("validation.enabled is true") == 1


# --- what a run makes


@pytest.fixture(scope="module")
def copied(first: Outcome, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished store of the session, to write to."""
    copy = tmp_path_factory.mktemp("validated") / "edt-store"
    copy_store(store, copy)
    return copy


@pytest.fixture(scope="module")
def validated(copied: Path) -> Outcome:
    """The pipeline run again, now with the step."""
    from tests.support.local_ray import local_ray_train

    actions = {step.step: step.action for step in planned(copied)}
    assert {name for name, action in actions.items() if action != "reuse"} == {STEP, f"report {MODEL}"}
    with local_ray_train():
        return pipeline(copied, ON)


def planned(store: Path) -> list[Any]:
    return plan(load_config("quickstart", [*SMALL, ON], str(store)), catalog_if_any(str(store)))


def of_kind(store: Path, kind: str) -> list[Artifact]:
    return [artifact for artifact in Store.open(str(store)).artifacts() if artifact.manifest.kind == kind]


def test_it_is_made_beside_a_finished_run_and_found_again(validated: Outcome, copied: Path) -> None:
    assert (validated.failures, validated.executed, validated.reused) == ({}, 2, STEPS - 1)
    assert validated.decisions[MODEL].version == "1"  # the model is registered once
    assert {step.action for step in planned(copied)} == {"reuse"}
    rows = {step.step: step for step in planned(copied)}
    (made,) = of_kind(copied, "validation")
    assert rows[STEP].fingerprint == made.fingerprint
    assert made.problems(deep=True) == []


def test_its_numbers_are_those_of_evaluation_and_classifier(validated: Outcome, copied: Path) -> None:
    """Both count the same samples, and the same real images."""
    (made,), (judge,) = of_kind(copied, "validation"), of_kind(copied, "classifier")
    _, after = validated.metrics[MODEL]
    metrics = made.counts["metrics"]
    assert metrics["conditional_accuracy"] == pytest.approx(after["accuracy_classifier"])
    assert metrics["real_conditional_accuracy"] == pytest.approx(judge.counts["holdout_accuracy"])
    assert metrics["conditional_accuracy_low"] < metrics["conditional_accuracy"] < metrics["conditional_accuracy_high"]
    assert (made.counts["samples"], made.counts["real_images"]) == (40, judge.counts["holdout"])
    facts = made.read_json("validation.json")
    assert [row["name"] for row in facts["classes"]] == [str(digit) for digit in range(10)]
    assert sum(row["samples"]["images"] for row in facts["classes"]) == 40


def test_mlflow_has_its_metrics_and_the_record_its_step(validated: Outcome, copied: Path) -> None:
    (made,) = of_kind(copied, "validation")
    catalog = Catalog(validated.tracking_uri, "")
    run = catalog.client.get_run(str(made.manifest.mlflow_run_id))
    assert run.data.tags["edt.step"] == STEP
    for name, value in made.counts["metrics"].items():
        assert run.data.metrics[f"metrics.{name}"] == pytest.approx(value)
    tags = catalog.client.get_run(validated.run_id).data.tags
    assert tags["edt.executed"] == f"report {MODEL}, {STEP}"
    rows = {
        row.step: row
        for row in compare(read_record(catalog, validated.run_id), catalog, Store.open(str(copied)), steps_of(tags))
    }
    assert rows[f"validate.{MODEL}"].equal  # `edt reproduce` compares it as any other
    garbage = json.loads(edt("gc", "--dry-run", "--json", "--store", str(copied)).stdout)["garbage"]
    assert made.fingerprint not in {item["fingerprint"] for item in garbage}


def test_the_report_shows_every_class(validated: Outcome, copied: Path) -> None:
    page = validated.reports[MODEL].path("report.html").read_text()
    (made,) = of_kind(copied, "validation")
    section = page.partition('<section id="validation"')[2].partition("</section>")[0]
    assert f"{100 * made.counts['metrics']['conditional_accuracy']:.1f}\N{NO-BREAK SPACE}%" in section
    assert section.count('<tr><th scope="row">') == 10
    assert section.count("<picture>") == 2
    assert '<a href="#validation">' in page


def test_a_run_without_it_leaves_the_report_as_it_was(first: Outcome, store: Path) -> None:
    page = first.reports[MODEL].path("report.html").read_text()
    assert "#validation" not in page
    assert "validation" not in first.reports[MODEL].manifest.config["config_yaml"]
    told = json.loads(edt("plan", "--json", "--store", str(store), *options()).stdout)
    assert {row["action"] for row in told} == {"reuse"}


# --- what the report makes of many classes


def test_of_many_classes_the_worst_are_shown() -> None:
    many = validation(1000, {17: 0.9, 500: 0.3, 999: 0.6})
    view = validation_view(many)
    assert [row.number for row in view.rows[:4]] == [17, 999, 500, 0]
    assert len(view.rows) == MOST_ROWS
    assert view.rows[0].mistaken_for == (("class <16> $x", 9),)
    assert (view.matrix, view.sampled, view.classes) == (None, 1000, 1000)
    few = validation_view(validation(MOST_CELLS, {3: 0.5}))
    assert few.matrix is not None
    assert few.matrix.light != few.matrix.dark
    assert f"{10 * MOST_CELLS - 5} of {10 * MOST_CELLS} samples on the diagonal" in few.matrix.description


def test_names_of_classes_are_text_in_the_page() -> None:
    page = render_report(whole_report_data(validation=validation(3, {1: 0.5})))
    assert "class &lt;1&gt; $x" in page
    assert "class <1>" not in page
    drawings = [base64.b64decode(text).decode() for text in re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", page)]
    assert any("recognized as their own class" in drawing for drawing in drawings)
    assert render_report(whole_report_data(validation=validation(3, {1: 0.5}))) == page


def test_a_class_without_samples_is_counted_and_not_listed() -> None:
    found = validation(4, {1: 0.5})
    found.facts["classes"][2]["samples"] = numbers(Accuracy(0, 0))
    view = validation_view(found)
    assert [row.number for row in view.rows] == [1, 0, 3]
    assert (view.sampled, view.classes) == (3, 4)
    page = render_report(whole_report_data(validation=found))
    assert "1 of 4 classes have no samples." in " ".join(page.split())
