"""`edt distill`: a student of the champion, its lineage, its gate beside the teacher, and what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edt_core.config import ChainConfig, DistillConfig
from edt_core.errors import UserError
from edt_core.pipeline import EDTPipeline
from edt_core.store.folder import Folder
from edt_core.store.store import Store
from pipelines.config.guide import PipelineSampleConfig
from pipelines.config.schema import PromoteConfig
from pipelines.outcome import Outcome
from pipelines.registry.aliases import champion
from pipelines.registry.distilled.teacher_record import TEACHER_TAG, Measurement, TeacherRecord
from pipelines.registry.garbage import roots
from pipelines.registry.gate import Decision, run_checks
from pipelines.registry.lineage import lineage
from pipelines.reproduce import restored
from pipelines.retrain.student import Request, _check_guidance, prepare, student_name
from pipelines.tracking.catalog import Catalog
from pipelines.tracking.runs import read_record
from tests.support.pipelines import quiet
from tests.support.small import MODEL, copy_store, edt

STUDENT = f"{MODEL}-2-steps"
TINY = ("--steps", "2", "--set", "train.max_steps=3", "--set", "train.checkpoint_every=3")


@pytest.fixture(scope="module")
def place(first: Outcome, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a store with one version, the champion."""
    folder = tmp_path_factory.mktemp("distill") / "edt-store"
    copy_store(store, folder)
    return folder


@pytest.fixture(scope="module")
def distilled(place: Path) -> dict[str, Any]:
    """The outcome of `edt distill`, as JSON."""
    from tests.support.local_ray import local_ray_train

    with local_ray_train():
        done = edt("distill", f"{MODEL}@champion", *TINY, "--store", str(place), "--json")
    assert done.returncode == 0, done.stderr
    outcome: dict[str, Any] = json.loads(done.stdout)
    return outcome


def catalog_of(place: Path) -> Catalog:
    return Catalog.open(Folder.at(place), "test")


def test_a_student_is_registered_beside_its_teacher_s_values(distilled: dict[str, Any], place: Path) -> None:
    """Train, sample and evaluate run for the student, and sample and evaluate for its teacher in two steps."""
    assert distilled["failures"] == {}
    catalog = catalog_of(place)
    version = catalog.client.get_model_version(STUDENT, "1")
    teacher = TeacherRecord.of(version)
    assert teacher is not None
    assert teacher.location == f"models:/{MODEL}/1"
    assert teacher.few is not None
    assert teacher.own is not None
    assert (teacher.few.sampler, teacher.few.steps, teacher.few.calls) == ("ddim", 2, 4)
    assert (teacher.own.sampler, teacher.own.steps, teacher.own.calls) == ("ancestral", 3, 6)
    its_own = catalog.client.get_model_version(MODEL, "1").tags
    assert teacher.own.evaluation == its_own["edt.evaluation"], "what its own run measured is reused"
    names = {"train", "sample", "evaluate", "report"}
    assert distilled["executed"] == len(names) + 2
    decision = Decision.from_json(version.tags["edt.decision"])
    passed = {check.name: check.passed for check in decision.checks}
    assert passed["the teacher by the student's number of steps"] == (
        decision.value < teacher.few.metrics["fd_classifier"]
    )
    assert passed["the teacher by its own protocol"], "no limit is set"
    assert decision.became_champion == all(passed.values())


def test_the_student_samples_in_its_steps_without_guidance(distilled: dict[str, Any], place: Path) -> None:
    record = read_record(catalog_of(place), distilled["run_id"])
    features = Store.open(str(place)).find("features", record.steps[f"sample.{STUDENT}"])
    assert features is not None
    chain = features.manifest.config
    assert (chain["sampler"], chain["num_sampling_steps"], chain["cfg_scale"]) == ("ddim", 2, 1.0)
    trained = Store.open(str(place)).find("checkpoint", record.steps[f"train.{STUDENT}"])
    assert trained is not None
    distill = trained.manifest.config["distill"]
    assert (distill["steps"], distill["teacher"]["num_sampling_steps"]) == (2, 4)
    assert distill["teacher"]["cfg_scale"] == 1.75
    assert trained.manifest.config["class_dropout_prob"] == 0.0


def test_its_folder_is_an_ordinary_one(distilled: dict[str, Any], place: Path, tmp_path: Path) -> None:
    """The same parts and scheduler as its teacher's; its protocol has the steps, and its card the teacher's chain."""
    for name in (MODEL, STUDENT):
        pulled = edt("models", "pull", f"{name}/1", str(tmp_path / name), "--store", str(place))
        assert pulled.returncode == 0, pulled.stderr
    own, other = (json.loads((tmp_path / name / "model_index.json").read_text()) for name in (STUDENT, MODEL))
    assert own.keys() == other.keys()
    assert {key for key in own if own[key] != other[key]} == {"protocol"}
    assert (own["protocol"]["num_sampling_steps"], own["protocol"]["cfg_scale"]) == (2, 1.0)
    images: Any = quiet(EDTPipeline.from_pretrained(tmp_path / STUDENT))([0, 1], output_type="pt", return_dict=False)
    assert images[0].shape == (2, 3, 32, 32)
    card = (tmp_path / STUDENT / "README.md").read_text()
    assert "| distill.steps | 2 |" in card
    assert "| distill.teacher.cfg_scale | 1.75 |" in card
    assert "distill" not in (tmp_path / MODEL / "README.md").read_text()


def test_lineage_and_garbage_collection_follow_the_teacher(distilled: dict[str, Any], place: Path) -> None:
    catalog = catalog_of(place)
    teacher = champion(catalog, MODEL)
    assert teacher is not None
    base = teacher.tags["edt.checkpoint"]
    nodes = lineage(catalog, f"{STUDENT}/1", Folder.at(place)).nodes
    assert nodes[base].kind == "checkpoint"
    (start,) = (node for node in nodes.values() if node.uri == f"models:/{MODEL}/1")
    assert start.inputs == {"checkpoint": base}
    assert base in roots(catalog, keep_runs=1, running=False)


@pytest.mark.usefixtures("training_here")
def test_the_report_compares_and_a_second_run_reuses_everything(distilled: dict[str, Any], place: Path) -> None:
    page = Path(distilled["models"][STUDENT]["report"]).read_text()
    for text in (
        "Beside its teacher",
        f"models:/{MODEL}/1",
        "2 steps of ddim, 4 calls",
        "3 steps of ancestral, 6 calls",
    ):
        assert text in page
    again = edt("distill", MODEL, *TINY, "--store", str(place))
    assert again.returncode == 0, again.stderr
    assert " 0 run, 0 failed" in again.stdout
    assert f"{STUDENT} version 1" in again.stdout
    assert "the teacher by its own protocol: fd_classifier " in " ".join(again.stdout.split())
    plan = edt("distill", MODEL, *TINY, "--store", str(place), "--plan", "--json")
    steps = json.loads(plan.stdout)["steps"]
    assert {step["action"] for step in steps} == {"reuse"}


def test_a_plan_of_another_student_says_what_it_starts_from(first: Outcome, place: Path) -> None:
    done = edt("distill", f"{MODEL}/1", "--steps", "4", "--plan", "--store", str(place))
    assert done.returncode == 0, done.stderr
    assert f"teacher   {MODEL}/1, 4 steps of ddim, guided by 1.75" in done.stdout
    assert f"student   {MODEL}-4-steps, 4 steps, unguided, trained for 4 steps" in done.stdout
    for step in ("sample few-step teacher", "evaluate teacher"):
        assert f"{step} {MODEL}-4-steps" in done.stdout


def test_its_record_is_restored_with_the_teacher(distilled: dict[str, Any], place: Path, tmp_path: Path) -> None:
    catalog = catalog_of(place)
    config, published = restored(read_record(catalog, distilled["run_id"]), catalog, str(tmp_path / "again"))
    assert published.initial[STUDENT].location == f"models:/{MODEL}/1"
    distill = config.train_of(STUDENT).distill
    assert distill is not None
    assert distill.protocol is not None
    assert distill.protocol.num_sampling_steps == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no-such-model", "--steps", "4"), "there is no registered model 'no-such-model'"),
        ((f"{MODEL}/7", "--steps", "4"), "has no version 7"),
        ((MODEL, "--steps", "4", "--name", MODEL), "the student would be a version of"),
        ((MODEL, "--steps", "4", "--teacher-steps", "6"), "is no multiple of the student's 4 steps"),
        ((MODEL, "--steps", "4", "--set", "train.masked_loss=true"), "masked_loss is True, but distill is set"),
        ((MODEL, "--steps", "4", "--set", "train.distill=null"), "train.distill is null"),
        ((MODEL, "--steps", "1"), "should be greater than or equal to 2"),
    ],
)
def test_what_a_person_gets_wrong_is_one_message(
    first: Outcome, place: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = edt("distill", *arguments, "--store", str(place))
    assert done.returncode == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "fields", [{"guide": "step-00000004"}, {"guidance_reference": "confused"}], ids=["autoguidance", "confused"]
)
def test_a_teacher_that_is_guided_by_a_second_network_is_refused(fields: dict[str, Any]) -> None:
    protocol = PipelineSampleConfig(cfg_scale=2.0, **fields)
    (field, value), *_ = fields.items()
    with pytest.raises(UserError, match=rf"m/1 is sampled with sample\.{field} {value}, but a student learns only"):
        _check_guidance(protocol, "m/1")
    with pytest.raises(ValueError, match=r"teacher\.guidance_reference is confused"):
        DistillConfig(steps=2, teacher=ChainConfig(num_sampling_steps=4, guidance_reference="confused"))


def test_a_student_is_not_trained_further_on_images(distilled: dict[str, Any], place: Path) -> None:
    catalog_of(place).client.set_registered_model_alias(STUDENT, "champion", "1")
    done = edt("retrain", STUDENT, "--plan", "--store", str(place))
    assert done.returncode == 2
    assert f"{STUDENT} was distilled from models:/{MODEL}/1" in done.stderr
    assert "`edt distill NAME@champion --steps 2`" in done.stderr


def test_a_student_of_a_student_has_the_first_teacher_s_name_and_its_own_steps(
    distilled: dict[str, Any], place: Path
) -> None:
    assert student_name("edt-s-2-256-16-steps", 8) == "edt-s-2-256-8-steps"
    assert student_name("edt-s-2-256", 8) == "edt-s-2-256-8-steps"
    made = prepare(catalog_of(place), Request(f"{STUDENT}/1", str(place), 4))
    assert made.name == f"{MODEL}-4-steps"
    distill = made.config.train_of(made.name).distill
    assert distill is not None
    assert (distill.teacher.cfg_scale, distill.teacher.num_sampling_steps) == (1.0, 4)


def measured(steps: int, value: float) -> Measurement:
    return Measurement("ddim", steps, 2 * steps, {"fd": value, "accuracy": 1 / value}, "e" * 64, "/store/e")


@pytest.mark.parametrize(
    ("value", "margin", "expected"),
    [
        (9.0, None, [True, True]),
        (10.0, None, [False, True]),
        (9.0, 0.5, [True, False]),
        (5.9, 0.2, [True, True]),
        (6.1, 0.2, [True, False]),
        (4.0, 0.0, [True, True]),
    ],
)
def test_the_gate_compares_with_the_teacher(value: float, margin: float | None, expected: list[bool]) -> None:
    """Of two steps it has 10, by its own protocol 5; as an accuracy, 0.1 and 0.2."""
    record = TeacherRecord("models:/m/1", measured(2, 10.0), measured(50, 5.0))
    lower = PromoteConfig(metric="fd", teacher_margin=margin)
    comparisons = list(record.comparisons(lower, value))
    assert [passed for _, passed, _ in comparisons] == expected
    assert "fd 10 (models:/m/1, 2 steps of ddim, 4 calls)" in comparisons[0][2]

    version = SimpleNamespace(tags={TEACHER_TAG: record.to_json(), "edt.metric.fd": repr(value)})
    assert TeacherRecord.of(version) == record
    checks = run_checks(lower, version, list)
    assert [check.passed for check in checks[-2:]] == expected
    higher = PromoteConfig(metric="accuracy", lower_is_better=False)
    assert [passed for _, passed, _ in record.comparisons(higher, 1 / value)] == [value < 10.0, True]


def test_a_teacher_that_cannot_be_measured_holds_its_student_back() -> None:
    record = TeacherRecord("models:/m/1", problem="its folder is gone")
    ((name, passed, detail),) = record.comparisons(PromoteConfig(metric="fd"), 1.0)
    assert (name, passed) == ("the teacher", False)
    assert detail == "models:/m/1 cannot be measured: its folder is gone"
