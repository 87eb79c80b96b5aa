"""What is done with a finished run: planned again, reproduced from its record, gone on with where a branch failed."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from edt_core.artifact import ArtifactWriter
from edt_core.errors import UserError
from edt_core.schema import KINDS
from edt_core.storage import Folder
from pipelines.catalog import Catalog
from pipelines.commands.options import catalog_if_any
from pipelines.config import load_config
from pipelines.outcome import Outcome
from pipelines.plan import PlannedStep, plan
from pipelines.reproduce import reproduce
from pipelines.terminal import Terminal
from tests.pipelines.conftest import pipeline
from tests.support.small import MODEL, SMALL, options, start

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

STEPS = 11  # up to the evaluations; the promotion and the report follow


def planned(store: Path, *assignments: str) -> dict[str, PlannedStep]:
    config = load_config("quickstart", [*SMALL, *assignments], str(store))
    return {step.step: step for step in plan(config, catalog_if_any(str(store)))}


def test_a_plan_reuses_what_is_there_and_says_who_made_it(first: Outcome, store: Path) -> None:
    steps = planned(store)
    assert [step.action for step in steps.values()] == (STEPS + 2) * ["reuse"]
    assert steps.pop(f"promote {MODEL}").run_id == first.run_id
    tags = Catalog(first.tracking_uri, "").client.get_run(first.run_id).data.tags
    for name, step in steps.items():
        assert tags[f"edt.step.{name.replace(' ', '.')}"] == step.fingerprint
        made = Catalog(first.tracking_uri, "").client.get_run(str(step.run_id))
        assert made.data.tags["edt.step"] == name


def test_a_plan_names_the_field_that_changed(first: Outcome, store: Path) -> None:
    steps = planned(store, "train.lr=0.25", "sample.cfg_scale=3")
    changed = {name: step.why for name, step in steps.items() if step.action != "reuse"}
    assert set(changed) == {
        f"{step} {MODEL}"
        for step in ("train", "sample", "evaluate", "untrained sample", "untrained evaluate", "promote", "report")
    }
    assert changed[f"train {MODEL}"] == "lr 0.004 -> 0.25"
    assert changed[f"untrained sample {MODEL}"].startswith("cfg_scale 1.75 -> 3")
    assert "other features" in changed[f"untrained evaluate {MODEL}"]


def test_a_plan_writes_nothing(tmp_path: Path) -> None:
    steps = planned(tmp_path / "nowhere")
    made_before = {f"no {kind} was made here before" for kind in KINDS if kind != "report"}
    assert {step.why for step in list(steps.values())[:STEPS]} == made_before
    assert [step.action for step in steps.values()] == (STEPS + 2) * ["run"]
    assert list(tmp_path.iterdir()) == []


def test_a_plan_tells_what_is_gone_on_with(first: Outcome, store: Path, tmp_path: Path) -> None:
    """As after a SIGKILL while it sampled: a finished unit with its entry in the journal, and no manifest."""
    step = planned(store, "sample.seed=77")[f"sample {MODEL}"]
    assert step.action == "run"
    folder = store / step.kind / step.fingerprint
    ArtifactWriter(Folder.at(folder), step.kind, step.fingerprint, "first").write_bytes("unit-00000.safetensors", b"x")
    again = planned(store, "sample.seed=77")[f"sample {MODEL}"]
    shutil.rmtree(folder)
    assert (again.action, again.why.split(";")[0]) == ("resume", "1 finished files are taken over")


def test_the_commands_tell_the_same(first: Outcome, store: Path) -> None:
    process = start("plan", "--store", str(store), "--json", *options("train.lr=0.25"))
    rows = json.loads(process.communicate()[0])
    assert {row["step"]: row["action"] for row in rows}[f"train {MODEL}"] == "run"
    runs = json.loads(start("runs", "--store", str(store), "--json").communicate()[0])
    (row,) = (row for row in runs if row["run"] == first.run_id)
    assert (row["status"], row["pipeline"], row["executed"], row["reused"]) == ("FINISHED", "quickstart", 12, 0)
    listed = start("artifacts", "--store", str(store), "--kind", "latents").communicate()[0].splitlines()
    assert len(listed) == 2
    assert listed[1].startswith("latents")
    told = start("gc", "--dry-run", "--keep-runs", "50", "--json", "--store", str(store)).communicate()[0]
    going = {item["fingerprint"] for item in json.loads(told) if not item["attempt"]}
    assert not going & set(row["steps"].values())


def test_a_run_is_reproduced_from_its_record_digest_by_digest(first: Outcome, tmp_path: Path) -> None:
    catalog = Catalog(first.tracking_uri, "")
    with Terminal() as terminal:
        outcome, rows = reproduce(first.run_id, catalog, str(tmp_path / "again"), terminal)
    assert outcome.failures == {}
    assert len(rows) == STEPS
    assert [row.step for row in rows if not row.equal] == []
    assert outcome.tracking_uri != first.tracking_uri  # the registry of the record gets no second version
    assert len(catalog.client.search_model_versions(f"run_id = '{first.run_id}'")) == 1


def test_what_differs_from_the_record_is_told_with_numbers(
    first: Outcome, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another learning rate stands for whatever makes results differ: other weights, other metrics."""
    from pipelines import reproduce as module
    from pipelines.artifacts import Store
    from pipelines.runs import read_record, steps_of

    catalog = Catalog(first.tracking_uri, "")
    record = read_record(catalog, first.run_id)
    other = pipeline(store, "train.lr=0.003")
    steps = steps_of(catalog.client.get_run(other.run_id).data.tags)
    rows = {row.step: row for row in module.compare(record, catalog, Store.open(str(store)), steps)}
    assert rows["encode"].equal
    assert rows[f"untrained.sample.{MODEL}"].equal
    trained, evaluated = rows[f"train.{MODEL}"], rows[f"evaluate.{MODEL}"]
    assert not trained.equal
    assert "files differ by up to" in trained.how
    assert "metrics.fd_classifier" in evaluated.how


def test_another_code_version_or_other_images_are_refused(
    first: Outcome, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import reproduce as module

    catalog = Catalog(first.tracking_uri, "")
    with Terminal() as terminal, monkeypatch.context() as patch:
        patch.setattr(module, "code_version", lambda: "0123abc")
        with pytest.raises(UserError, match=r"was made by code version .*, and this is 0123abc"):
            reproduce(first.run_id, catalog, str(tmp_path / "code"), terminal)
    with Terminal() as terminal, monkeypatch.context() as patch:
        patch.setattr(module, "prepare_source", lambda *_: type("Other", (), {"fingerprint": "f" * 64})())
        with pytest.raises(UserError, match="are not those of the run"):
            reproduce(first.run_id, catalog, str(tmp_path / "images"), terminal)
    with Terminal() as terminal, pytest.raises(UserError, match="is not empty"):
        reproduce(first.run_id, catalog, str(store), terminal)
    with Terminal() as terminal, pytest.raises(UserError, match="MLflow has no run"):
        reproduce("0" * 32, catalog, str(tmp_path / "none"), terminal)


def test_a_failed_branch_is_gone_on_with_alone_and_sizes_train_side_by_side(
    first: Outcome, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three architectures: an EDT, a DiT and an MDTv2."""
    dit, mdt = "models.dit={model: DiT-Tiny/2, masked_loss: false}", "models.mdtv2.model=MDTv2-Tiny/2"
    branches = (dit, mdt, "models.lost.lr=0.007")
    blocked = store / "checkpoint" / planned(store, *branches)["train lost"].fingerprint
    blocked.write_text("in the way")
    failed = pipeline(store, *branches)
    assert set(failed.failures) == {"train lost"}
    assert set(failed.decisions) == {MODEL, "dit", "mdtv2"}
    assert "failed    train lost" in capsys.readouterr().out
    blocked.unlink()
    again = pipeline(store, *branches)
    assert again.failures == {}
    assert again.decisions.keys() == {MODEL, "dit", "mdtv2", "lost"}
    ran = Catalog(first.tracking_uri, "").client.get_run(again.run_id).data.tags["edt.executed"].split(", ")
    assert {name for name in ran if not name.startswith("report")} == {"train lost", "sample lost", "evaluate lost"}
    one, other = (_training(failed, name) for name in ("dit", "mdtv2"))
    assert max(one[0], other[0]) < min(one[1], other[1]), "the two trainings had one CPU each and did not overlap"


def _training(outcome: Outcome, model: str) -> tuple[int, int]:
    """When a training's MLflow run began and ended, in ms."""
    client = Catalog(outcome.tracking_uri, "").client
    experiment = client.get_run(outcome.run_id).info.experiment_id
    (run,) = client.search_runs([experiment], f"tags.`edt.step` = 'train {model}' and attributes.status = 'FINISHED'")
    return run.info.start_time, run.info.end_time


def test_dates_of_files_decide_nothing(first: Outcome, store: Path) -> None:
    """As after the clock was set back: every file, and every folder, comes from the year 2100."""
    future = 4102444800
    for path in sorted(store.rglob("*")):
        if path.suffix != ".db":
            os.utime(path, (future, future))
    assert {step.action for step in planned(store).values()} == {"reuse"}
    assert time.time() < future


@pytest.mark.parametrize("cut", range(0, 100, 2))
def test_a_manifest_cut_short_is_never_trusted(first: Outcome, store: Path, tmp_path: Path, cut: int) -> None:
    from edt_core.schema import MANIFEST_NAME
    from pipelines.artifacts import Store

    step = planned_once(store)["encode"]
    folder = tmp_path / step.kind / step.fingerprint
    shutil.copytree(store / step.kind / step.fingerprint, folder)
    text = (folder / MANIFEST_NAME).read_bytes()
    warned: list[str] = []
    assert Store.open(str(tmp_path)).find(step.kind, step.fingerprint) is not None
    (folder / MANIFEST_NAME).write_bytes(text[: len(text) * cut // 100])
    assert Store.open(str(tmp_path)).find(step.kind, step.fingerprint, warned.append) is None
    assert "its step runs again" in warned[0]


_PLANNED: dict[Path, Any] = {}


def planned_once(store: Path) -> dict[str, PlannedStep]:
    if store not in _PLANNED:
        _PLANNED[store] = planned(store)
    return _PLANNED[store]
