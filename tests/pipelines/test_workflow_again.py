"""What is done with a finished run: planned again, reproduced from its record, gone on with where a branch failed."""

import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from safetensors.torch import load, save

from edt_core.errors import UserError
from edt_core.store.artifact import ArtifactWriter
from edt_core.store.folder import Folder
from edt_core.store.layout import EMA_WEIGHTS, MANIFEST_NAME
from edt_core.store.store import Store
from pipelines.commands.options import catalog_if_any
from pipelines.config.schema import load_config
from pipelines.outcome import Outcome
from pipelines.plan import PlannedStep, plan
from pipelines.reproduce import Comparison, compare, reproduce
from pipelines.terminal.terminal import Terminal
from pipelines.tracking.catalog import Catalog
from pipelines.tracking.runs import read_record, run_rows, steps_of
from tests.support.small import MODEL, SMALL, copy_store, edt, options, pipeline

pytestmark = pytest.mark.usefixtures("training_here")

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
        for step in (
            *("train", "sample", "evaluate", "untrained sample", "untrained evaluate", "promote", "report"),
            *("sample champion", "evaluate champion"),  # by the new protocol
        )
    }
    assert changed[f"train {MODEL}"] == "lr 0.004 -> 0.25"
    assert changed[f"untrained sample {MODEL}"].startswith("cfg_scale 1.75 -> 3")
    assert "other features" in changed[f"untrained evaluate {MODEL}"]


def test_a_plan_writes_nothing(tmp_path: Path) -> None:
    steps = planned(tmp_path / "nowhere")
    assert {step.why for step in list(steps.values())[:STEPS]} == {"not made yet"}
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
    assert (again.action, again.why.split(";")[0]) == ("resume", "1 finished files are reused")


def test_the_commands_tell_the_same(first: Outcome, store: Path) -> None:
    where = ["--store", str(store)]
    rows = json.loads(edt("plan", *where, "--json", *options("train.lr=0.25")).stdout)
    assert {row["step"]: row["action"] for row in rows}[f"train {MODEL}"] == "run"
    runs = json.loads(edt("runs", *where, "--json").stdout)
    (row,) = (row for row in runs if row["run"] == first.run_id)
    assert (row["status"], row["pipeline"], row["executed"], row["reused"]) == ("FINISHED", "quickstart", 12, 0)
    listed = edt("artifacts", *where, "--kind", "latents").stdout.splitlines()
    assert len(listed) == 2
    assert listed[1].startswith("latents")
    told = edt("gc", "--dry-run", "--keep-runs", "50", "--json", *where).stdout
    going = {item["fingerprint"] for item in json.loads(told)["garbage"] if not item["attempt"]}
    assert not going & set(row["steps"].values())


def test_a_run_is_reproduced_from_its_record_digest_by_digest(first: Outcome, store: Path, tmp_path: Path) -> None:
    done = edt("reproduce", first.run_id, "--store", str(store), "--into", str(tmp_path / "again"), "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == STEPS
    assert [row["step"] for row in rows if not row["equal"] or row["recorded"] != row["now"]] == []
    (made,) = run_rows(Catalog.existing(Folder.at(tmp_path / "again")), None, 2)
    assert (made["status"], made["executed"]) == ("FINISHED", STEPS + 1)  # nothing of it comes from the first store
    catalog = Catalog(first.tracking_uri, "")  # and its registry gets no second version
    assert len(catalog.client.search_model_versions(f"run_id = '{first.run_id}'")) == 1


def compared(first: Outcome, store: Path, steps: Mapping[str, str]) -> dict[str, Comparison]:
    """What the record of the first run says beside artifacts of a store."""
    catalog = Catalog(first.tracking_uri, "")
    rows = compare(read_record(catalog, first.run_id), catalog, Store.open(str(store)), steps)
    return {row.step: row for row in rows}


def test_what_differs_from_the_record_is_told_with_numbers(first: Outcome, resampled: Outcome, store: Path) -> None:
    """Another number of sampling steps makes other samples and other metrics of the same weights."""
    catalog = Catalog(first.tracking_uri, "")
    rows = compared(first, store, steps_of(catalog.client.get_run(resampled.run_id).data.tags))
    sampled, evaluated = rows[f"sample.{MODEL}"], rows[f"evaluate.{MODEL}"]
    assert rows["encode"].equal
    assert rows[f"train.{MODEL}"].equal
    assert not sampled.equal
    assert "files differ by up to" in sampled.how
    assert re.search(r"metrics\.fd_classifier \S+ -> \S+", evaluated.how)


def test_weights_that_differ_are_told_by_how_much(first: Outcome, store: Path, tmp_path: Path) -> None:
    trained = Store.open(str(store)).find("checkpoint", planned(store)[f"train {MODEL}"].fingerprint)
    assert trained is not None
    out = ArtifactWriter(Folder.at(tmp_path / "checkpoint" / trained.fingerprint), "checkpoint", trained.fingerprint)
    moved = f"{trained.counts['final']}/{EMA_WEIGHTS}"
    for entry in trained.manifest.files:
        data = trained.path(entry.path).read_bytes()
        out.write_bytes(entry.path, with_a_weight_moved(data, 0.25) if entry.path == moved else data, entry.rows)
    out.commit(trained.manifest.config, trained.manifest.inputs, trained.counts)
    rows = compared(first, tmp_path, {f"train.{MODEL}": trained.fingerprint})
    differing = rows.pop(f"train.{MODEL}")
    assert not differing.equal
    assert differing.how == f"1 of {len(trained.manifest.files)} files differ by up to 0.25"
    assert {row.how for row in rows.values()} == {"not made"}


def with_a_weight_moved(data: bytes, distance: float) -> bytes:
    """A safetensors file with the first number of its first tensor moved by a distance."""
    tensors = load(data)
    name = min(tensors)
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] += distance
    return save(tensors)


def test_another_code_version_or_other_images_are_refused(
    first: Outcome, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import reproduce as module

    catalog = Catalog(first.tracking_uri, "")
    with Terminal() as terminal, monkeypatch.context() as patch:
        patch.setattr(module, "code_version", lambda: "0123abc")
        with pytest.raises(UserError, match=r"was made by code version .*, but this is 0123abc"):
            reproduce(first.run_id, catalog, str(tmp_path / "code"), terminal)
    with Terminal() as terminal, monkeypatch.context() as patch:
        patch.setattr(module, "prepare_source", lambda *_: type("Other", (), {"fingerprint": "f" * 64})())
        with pytest.raises(UserError, match="are not those of the run"):
            reproduce(first.run_id, catalog, str(tmp_path / "images"), terminal)
    with Terminal() as terminal, pytest.raises(UserError, match="is not empty"):
        reproduce(first.run_id, catalog, str(store), terminal)
    with Terminal() as terminal, pytest.raises(UserError, match="MLflow has no run"):
        reproduce("0" * 32, catalog, str(tmp_path / "none"), terminal)


def test_failed_branches_are_gone_on_with_alone(
    first: Outcome, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three architectures: the EDT, which is there, and a DiT and an MDTv2, whose trainings fail as they begin."""
    branches = ("models.dit={model: DiT-Tiny/2, masked_loss: false}", "models.mdtv2.model=MDTv2-Tiny/2")
    steps = planned(store, *branches)
    blocked = [store / "checkpoint" / steps[f"train {name}"].fingerprint for name in ("dit", "mdtv2")]
    for path in blocked:
        path.write_text("in the way")
    failed = pipeline(store, *branches)
    assert set(failed.failures) == {"train dit", "train mdtv2"}
    assert set(failed.decisions) == {MODEL}
    assert "failed    train dit" in capsys.readouterr().out
    for path in blocked:
        path.unlink()
    again = pipeline(store, *branches)
    assert again.failures == {}
    assert again.decisions.keys() == {MODEL, "dit", "mdtv2"}
    ran = Catalog(first.tracking_uri, "").client.get_run(again.run_id).data.tags["edt.executed"].split(", ")
    assert {name for name in ran if not name.startswith("report")} == {
        f"{step} {model}" for step in ("train", "sample", "evaluate") for model in ("dit", "mdtv2")
    }


def test_dates_of_files_decide_nothing(first: Outcome, store: Path, tmp_path: Path) -> None:
    """As after the clock was set back: every file, and every folder, comes from the year 2100."""
    copy, future = tmp_path / "store", 4102444800
    copy_store(store, copy)
    for path in sorted(copy.rglob("*")):
        if path.suffix != ".db":
            os.utime(path, (future, future))
    assert {step.action for step in planned(copy).values()} == {"reuse"}
    assert time.time() < future


def test_a_manifest_cut_short_is_never_trusted(first: Outcome, store: Path, tmp_path: Path) -> None:
    step = planned(store)["encode"]
    folder = tmp_path / step.kind / step.fingerprint
    shutil.copytree(store / step.kind / step.fingerprint, folder)
    text = (folder / MANIFEST_NAME).read_bytes()
    assert Store.open(str(tmp_path)).find(step.kind, step.fingerprint) is not None
    for length in range(0, len(text), max(1, len(text) // 50)):
        warned: list[str] = []
        (folder / MANIFEST_NAME).write_bytes(text[:length])
        assert Store.open(str(tmp_path)).find(step.kind, step.fingerprint, warned.append) is None, length
        assert "its step runs again" in warned[0]
