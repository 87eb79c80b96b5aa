"""Steps of a workflow on Ray: side by side where neither needs the other, and at Ctrl-C.

Who listens stops where it can go on, who does not is left, and the record says so.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from edt_core.config import Section
from edt_core.errors import Stopped, UserError
from edt_core.progress import Progress
from edt_core.store.artifact import ArtifactWriter, Source
from edt_core.store.store import Store
from jobs.stages.stage import Stage
from pipelines.engine.workflow import Workflow
from pipelines.terminal.terminal import Terminal
from pipelines.tracking.catalog import Catalog
from tests.support.small import copy_store

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

LIMIT_S = 600.0  # for what never comes


def listen(config: Section, inputs: Mapping[str, Any], out: ArtifactWriter, progress: Progress) -> dict[str, Any]:
    until = time.monotonic() + LIMIT_S
    for step in range(1, 1_000_000):
        progress.update(step, 1_000_000, "steps", detail=f"loss {1 / step:.3f}")
        if step == 1:
            progress.metrics({"loss": 1.0}, 1)
        if progress.stopping():
            raise Stopped(f"stopped at step {step}")
        if time.monotonic() > until:
            break
        time.sleep(0.01)
    return {}


def linger(config: Section, inputs: Mapping[str, Any], out: ArtifactWriter, progress: Progress) -> dict[str, Any]:
    """Until its source is there."""
    until = time.monotonic() + LIMIT_S
    while not Path(inputs["source"].location).exists() and time.monotonic() < until:
        time.sleep(0.02)
    return {}


def meet(config: Section, inputs: Mapping[str, Any], out: ArtifactWriter, progress: Progress) -> dict[str, Any]:
    """Come to the place that its source names, and wait there for another one."""
    place, until = Path(inputs["source"].location), time.monotonic() + LIMIT_S
    (place / out.fingerprint).touch()
    while len(list(place.iterdir())) < 2:
        assert time.monotonic() < until, "nobody came"
        time.sleep(0.02)
    return {}


def make(config: Section, inputs: Mapping[str, Any], out: ArtifactWriter, progress: Progress) -> dict[str, Any]:
    out.write_bytes("a.bin", b"abc")
    return {"number": 3}


def fail(config: Section, inputs: Mapping[str, Any], out: ArtifactWriter, progress: Progress) -> dict[str, Any]:
    raise UserError("no images")


FAILS = Stage("fails", "images", 1, Section, fail, roles=("source",))
LISTENS = Stage("listens", "images", 1, Section, listen, roles=("source",))
LINGERS = Stage("lingers", "reference", 1, Section, linger, roles=("source",))
MEETS = Stage("meets", "images", 1, Section, meet, roles=("source",))
FOLLOWS = Stage("follows", "latents", 1, Section, make, roles=("images",))
MAKES = Stage("makes", "images", 1, Section, make, roles=("source",))


@pytest.fixture(scope="module")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with MLflow's tables, which take seconds to make."""
    root = tmp_path_factory.mktemp("new") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        Catalog.open(Store.open(str(root)).root, "stopping")
    return root


@pytest.fixture
def workflow(new_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workflow:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    copy_store(new_store, tmp_path / "store")
    store = Store.open(str(tmp_path / "store"))
    return again(store, Catalog.open(store.root, "stopping"))


def again(store: Store, catalog: Catalog) -> Workflow:
    run = catalog.start_run("workflow", {})
    return Workflow(store, catalog, run, Terminal(), connect=lambda: False)


def source(path: str | Path = "somewhere") -> Source:
    return Source(str(path), "5" * 64)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """What lingers ends when this file is there: at the end of the test, and not before."""
    yield tmp_path / "gate"
    (tmp_path / "gate").touch()


def interrupt_when(ready: Callable[[], bool]) -> None:
    """Send this process a SIGINT at the moment `ready` says so."""

    def watch() -> None:
        until = time.monotonic() + LIMIT_S
        while not ready() and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()


def test_steps_that_do_not_need_each_other_are_done_side_by_side(workflow: Workflow, tmp_path: Path) -> None:
    """Each ends only once the other has begun."""
    place = tmp_path / "place"
    place.mkdir()
    steps = [
        workflow.step(name, MEETS, Section(), source=Source(str(place), digest * 64)) for name, digest in ("a1", "b2")
    ]
    assert all(workflow.wait(step) for step in steps)
    assert workflow.failures == {}


def test_what_needs_a_failed_step_is_skipped_and_not_counted_as_failed(
    workflow: Workflow, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = workflow.step("preprocess", FAILS, Section(), source=source())
    encode = workflow.step("encode", FOLLOWS, Section(), images=failing)
    train = workflow.step("train", FOLLOWS, Section(), images=encode)
    assert not workflow.wait(train)
    workflow.wait_all()
    assert list(workflow.culprits()) == ["preprocess"]
    lines = {line.split()[1]: line.split()[0] for line in capsys.readouterr().out.splitlines() if "preprocess" in line}
    assert lines == {"preprocess": "failed", "encode": "skipped", "train": "skipped"}
    assert workflow.terminal.tree.tally() == "0 of 3 steps done, 1 failed, 2 skipped"


def test_who_listens_stops_and_what_waits_for_it_is_not_run(
    workflow: Workflow, gate: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listening = workflow.step("train", LISTENS, Section(), source=source())
    sample = workflow.step("sample", FOLLOWS, Section(), images=listening)
    workflow.step("evaluate", FOLLOWS, Section(), images=sample)
    workflow.step("other", LINGERS, Section(), source=source(gate))
    interrupt_when(lambda: "train" in workflow.interrupts.listening)
    with pytest.raises(Stopped), workflow.interrupts.handled():
        workflow.wait_all()
    assert {name: str(error).split(" at ")[0] for name, error in workflow.where_stopped().items()} == {
        "train": "stopped"
    }
    assert workflow.failures == {}
    out = capsys.readouterr().out
    assert out.count("stopping: training writes a checkpoint first; press Ctrl-C again to stop at once") == 1
    assert out.count("not run, train stopped") == 2
    (run,) = workflow.catalog.client.search_runs([workflow.catalog.experiment_id], "tags.`edt.step` = 'train'")
    assert run.info.status == "KILLED"
    assert run.data.tags["edt.stopped"].startswith("stopped at step")
    assert "edt.error" not in run.data.tags
    assert run.data.metrics == {"loss": 1.0}


def test_where_nobody_listens_an_interrupt_ends_the_wait(workflow: Workflow, gate: Path) -> None:
    workflow.step("other", LINGERS, Section(), source=source(gate))
    before = signal.getsignal(signal.SIGINT)
    interrupt_when(lambda: signal.getsignal(signal.SIGINT) is not before)
    with pytest.raises(KeyboardInterrupt), workflow.interrupts.handled():
        workflow.wait_all()
    assert workflow.stopped == workflow.failures == {}


def test_an_artifact_without_a_whole_record_gets_one_when_it_is_reused(workflow: Workflow) -> None:
    """As after a SIGKILL between the commit and the end of the record."""
    step = workflow.step("makes", MAKES, Section(), source=source())
    assert workflow.wait(step)
    run = step.result().manifest.mlflow_run_id
    assert run is not None
    client = workflow.catalog.client
    for key in ("edt.uri", "edt.digest"):
        client.delete_tag(run, key)
    client.update_run(run, status="RUNNING")
    other = again(workflow.store, workflow.catalog)
    assert other.step("makes", MAKES, Section(), source=source()).reused
    found = client.get_run(run)
    assert found.info.status == "FINISHED"
    assert found.data.tags["edt.digest"] == step.result().manifest.digest


def test_a_step_that_another_run_makes_says_so_and_counts_as_reused(
    workflow: Workflow, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other run holds the step's lock and has its MLflow run open, as while it computes."""
    store, catalog = workflow.store, workflow.catalog
    fingerprint = MAKES.fingerprint(Section(), {"source": source().fingerprint})
    other = catalog.start_run("workflow", {})
    made, waited = threading.Event(), f"being made by run {other[:12]}"

    def compute() -> None:
        with store.lock("images", fingerprint):
            run = catalog.step_run("makes", "images", fingerprint, other)
            held.set()
            made.wait(LIMIT_S)
            out = store.writer("images", fingerprint)
            out.write_bytes("a.bin", b"abc")
            out.commit(config={}, inputs={}, counts={}, step_version=1, mlflow_run_id=run)

    held = threading.Event()
    threading.Thread(target=compute, daemon=True).start()
    assert held.wait(LIMIT_S)
    shown = workflow.terminal.made_elsewhere

    def show(makers: Mapping[str, str]) -> None:
        shown(makers)
        if workflow.terminal.tree.get("makes").note == waited:
            made.set()

    workflow.terminal.made_elsewhere = show  # type: ignore[method-assign]
    step = workflow.step("makes", MAKES, Section(), source=source())
    assert workflow.wait(step)
    out = capsys.readouterr().out
    assert out.count(waited) == 1
    assert f"{fingerprint[:12]}  of run {other[:12]}" in out
    assert workflow.taken == {"makes"}
    assert workflow.terminal.tree.tally() == "1 of 1 steps done, 1 reused"
