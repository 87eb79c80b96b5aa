"""The loop by itself: a schedule retrains a model while images arrive, and nobody looks after it.

A tick may meet a broken image, an MLflow server that is away, or the death of its run. The run of each tick is a
process. In the suite Ray's calls are done by that process; the slow test has five arrivals, and Ray.
"""

import json
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from edt_core.child_process import child_environment, python_command
from edt_core.config import SourceConfig
from edt_core.data.digits import write_digits
from edt_core.store.artifact import Artifact
from edt_core.store.folder import Folder
from edt_core.store.layout import CLASSES_NAME
from edt_core.store.store import Store
from jobs.stages.preprocess import image_source
from jobs.stages.reuse.originals import Originals
from jobs.stages.reuse.siblings import NONE
from pipelines.registry.aliases import DECISION_TAG
from pipelines.schedule import server as scheduler
from pipelines.schedule.record import UNCHANGED, Schedules, Tick
from pipelines.tracking.catalog import Catalog
from pipelines.tracking.runs import step_tag, workflow_runs
from tests.support import small
from tests.support.local_training import is_whole
from tests.support.processes import wait_for
from tests.support.servers import MlflowServer
from tests.support.small import MODEL

NAME, DAY = f"retrain-{MODEL}", timedelta(days=1)
CLASSES = tuple("0123456789")
FIRST, MORE = 20, 3  # images of each class before the first training, and in each arrival
STEPS = 24  # of the training from scratch; a retraining has a quarter
BASE = (
    *small.SMALL,
    "source.kind=image_folder",
    "source.limit=null",
    "preprocess.max_bad_fraction=0.02",
    f"train.max_steps={STEPS}",
    "train.checkpoint_every=1",
    "train.log_every=1",
)
BY_ROW = ("images", "latents", "reference")  # artifacts that take unchanged rows from earlier ones


@dataclass(frozen=True)
class Arrival:
    """The images as they were when a version had to be made of them."""

    source: str
    counts: tuple[int, ...]  # readable images of each class


@dataclass
class Loop:
    """A folder of images that grows, a store, an MLflow server, and the scheduler's server, for which days pass."""

    root: Path
    module: str  # what runs as `edt` at each tick
    mlflow: MlflowServer
    day: int = 0
    arrivals: list[Arrival] = field(default_factory=list)
    broken: list[Path] = field(default_factory=list)
    ticks: list[Tick] = field(default_factory=list)
    began: datetime = field(
        default_factory=lambda: datetime.now(UTC).replace(hour=3, minute=0, second=30, microsecond=0)
    )

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def catalog(self) -> Catalog:
        return Catalog(self.mlflow.uri, "")

    def arrive(self, count: int, broken: bool = False) -> None:
        """So many images of each class come; with `broken`, one file more that is none."""
        whole = write_digits(self.root / "digits")
        for label in CLASSES:
            (self.images / label).mkdir(parents=True, exist_ok=True)
            for path in sorted((whole / label).iterdir())[:count]:
                path.rename(self.images / label / path.name)
        if broken:
            self.broken.append(self.images / "3" / "0000-broken.png")
            self.broken[-1].write_bytes(b"\x89PNG\r\n\x1a\n and no more")
        counts = tuple(sum(path not in self.broken for path in (self.images / label).iterdir()) for label in CLASSES)
        self.arrivals.append(Arrival(self.identity, counts))

    @property
    def identity(self) -> str:
        return image_source(SourceConfig(kind="image_folder", path=str(self.images))).fingerprint

    def train_first(self) -> None:
        options = [part for text in (*BASE, f"source.path={self.images}") for part in ("--set", text)]
        command = python_command("-m", self.module, "run", "quickstart", "--store", str(self.store), *options)
        done = subprocess.run(
            command, env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        assert done.returncode == 0, done.stdout

    def record_schedule(self) -> None:
        words = ("schedule", "--retrain", MODEL, "--cron", "0 3 * * *", "--timezone", "UTC", "--no-serve")
        done = small.edt(*words, "--store", str(self.store), cwd=self.root, env=dict(os.environ))
        assert done.returncode == 0, done.stderr

    def night(self, meanwhile: Callable[[], None] | None = None) -> Tick:
        """The next day's tick is attended by a server, while something else may happen; returns what it came to."""
        self.day += 1
        now, told = self.began + self.day * DAY, list[str]()
        server = scheduler.Server(Schedules.at(str(self.store)), told.append, 0.02, now=lambda: now)
        began = time.monotonic()
        other = threading.Thread(target=meanwhile) if meanwhile else None
        if other:
            other.start()
        server.attend(NAME)
        if other:
            other.join()
        last = Schedules.at(str(self.store)).state(NAME).last
        assert last is not None, told
        assert (last.tick, last.missed) == (now.replace(second=0), 0)
        assert "Traceback" not in self.log(last)
        self.ticks.append(last)
        print(f"\n{last.tick:%Y-%m-%d}  {last.outcome}  {time.monotonic() - began:.0f} s  {last.error or ''}")
        return last

    def log(self, tick: Tick) -> str:
        return Path(str(tick.log)).read_text()

    def kill_in_training(self) -> None:
        """SIGKILL the process group of the run, once its training has a checkpoint and is not finished."""
        finished = set(self.store.glob("checkpoint/*"))

        def begun() -> bool:
            places = self.store.glob("checkpoint/*/*/checkpoints/step-*")
            return any(is_whole(place) for place in places if place.parents[2] not in finished)

        wait_for(begun)
        running = Schedules.at(str(self.store)).state(NAME).running
        assert running is not None
        assert running.pid is not None
        os.killpg(running.pid, signal.SIGKILL)


@contextmanager
def loop_in(root: Path, module: str, patch: pytest.MonkeyPatch) -> Iterator[Loop]:
    """A loop with its MLflow server, which the runs and the scheduler find in the environment."""
    (root / "mlflow").mkdir()
    mlflow = MlflowServer(root / "mlflow")
    for name, value in (("MLFLOW_TRACKING_URI", mlflow.uri), ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")):
        patch.setenv(name, value)
    patch.delenv("RAY_ADDRESS", raising=False)
    of_edt = scheduler.command
    patch.setattr(scheduler, "command", lambda made: [module if w == "pipelines.cli" else w for w in of_edt(made)])
    mlflow.start()
    try:
        yield Loop(root, module, mlflow)
    finally:
        mlflow.kill()


def assert_outcomes(loop: Loop, *outcomes: str) -> None:
    """Every tick has its outcome, also in MLflow, once; a tick that made a version names its run."""
    assert [tick.outcome for tick in loop.ticks] == list(outcomes)
    catalog = loop.catalog
    experiment = catalog.client.get_experiment_by_name("schedules")
    runs = catalog.client.search_runs([experiment.experiment_id])
    recorded = {run.data.tags["edt.tick"]: run.data.tags for run in runs}
    assert len(recorded) == len(runs) == len(loop.ticks)
    for tick in loop.ticks:
        tags = recorded[tick.tick.isoformat(timespec="seconds")]
        assert (tags["edt.outcome"], tags.get("edt.error"), tags.get("edt.run")) == (tick.outcome, tick.error, tick.run)
        assert (tick.run is not None) == (tick.outcome == "finished")
    assert not Schedules.at(str(loop.store)).state(NAME).unrecorded


def versions_of(loop: Loop) -> list[Any]:
    found = loop.catalog.client.search_model_versions(f"name = '{MODEL}'")
    return sorted(found, key=lambda version: int(version.version))


def assert_decisions(loop: Loop) -> list[dict[str, Any]]:
    """For each arrival one version, made of the images that were there, from the champion of then, rightly decided."""
    versions, store = versions_of(loop), Store(Folder.at(loop.store))
    assert [version.version for version in versions] == [str(k + 1) for k in range(len(loop.arrivals))]
    champion, decisions = "", []
    for version, arrival in zip(versions, loop.arrivals, strict=True):
        tags = version.tags
        decision = json.loads(tags[DECISION_TAG])
        images = store.find("images", tags["edt.images"])
        assert images is not None
        assert tags["edt.source"] == arrival.source == images.manifest.inputs["source"]
        assert tuple(images.read_json(CLASSES_NAME)) == CLASSES
        assert tuple(images.counts["class_counts"]) == arrival.counts
        assert (decision["name"], decision["version"]) == (MODEL, version.version)
        assert (decision["champion_before"] or "") == champion
        assert decision["value"] == float(tags[f"edt.metric.{decision['metric']}"])
        assert (tags.get("edt.init_from"), int(tags["edt.cost.steps"])) == (
            (f"models:/{MODEL}/{champion}", STEPS // 4) if champion else (None, STEPS)
        )
        better = not champion
        if champion:
            again = decision["remeasured"]
            (uri, protocol) = (again["uri"], again["protocol"])
            measured = Artifact.open(Folder.at(uri)).counts["metrics"][decision["metric"]]
            assert (again["version"], protocol) == (champion, tags["edt.protocol"])
            assert decision["champion_value"] == again["metrics"][decision["metric"]] == measured
            better = measured - decision["value"] >= 0.01 * measured
        assert decision["became_champion"] == better
        champion = version.version if better else champion
        decisions.append(decision)
    model = loop.catalog.client.get_registered_model(MODEL)
    assert model.aliases == {"champion": champion, "candidate": versions[-1].version}
    return decisions


def assert_nothing_twice(loop: Loop, killed: int) -> None:
    """Each step was executed by one run and finished once; only the training of a killed run was begun again."""
    catalog = loop.catalog
    executed: Counter[str] = Counter()
    finished: Counter[str] = Counter()
    for run in workflow_runs(catalog):
        steps = [name for name in run.data.tags.get("edt.executed", "").split(", ") if name]
        executed.update(run.data.tags[step_tag(name)] for name in steps)
        children = catalog.client.search_runs([run.info.experiment_id], "tags.`edt.fingerprint` LIKE '%'")
    finished.update(run.data.tags["edt.fingerprint"] for run in children if run.info.status == "FINISHED")
    restarted = [run.data.tags["edt.step"] for run in children if "edt.restarts" in run.data.tags]
    assert {run.info.status for run in children} == {"FINISHED"}
    assert set(executed.values()) == set(finished.values()) == {1}
    assert restarted == [f"train {MODEL}"] * killed
    for artifact in Store(Folder.at(loop.store)).artifacts():
        assert artifact.problems(deep=True) == []
        attempts = [path for path in Path(artifact.folder.local or "").iterdir() if path.is_dir()]
        assert finished[artifact.fingerprint] == 1
        assert len(attempts) == 1 or (artifact.manifest.kind == "checkpoint" and len(attempts) == 2 and killed)


def assert_rows(loop: Loop) -> dict[str, list[tuple[int, int]]]:
    """Of each arrival, only the rows of new images were computed; returns (reused, computed) by kind, in order."""
    store, rows = Store(Folder.at(loop.store)), dict[str, list[tuple[int, int]]]()
    for kind in BY_ROW:
        made = {artifact.counts["images"]: artifact for artifact in store.committed(kind)}
        totals = [sum(arrival.counts) for arrival in loop.arrivals]
        assert sorted(made) == totals, kind
        reused = [(made[total].manifest.reused or {"rows": 0})["rows"] for total in totals]
        assert reused == [0, *totals[:-1]], kind
        rows[kind] = [(old, total - old) for old, total in zip(reused, totals, strict=True)]
    return rows


def assert_nothing_lost(loop: Loop) -> None:
    """The last image artifact has every image; a broken one is listed there, with the reason."""
    images = Store(Folder.at(loop.store)).find("images", versions_of(loop)[-1].tags["edt.images"])
    assert images is not None
    originals = Originals.of(images)
    written = {bytes(digest) for digest in originals.digests[originals.row != NONE]}
    files = [path for path in loop.images.rglob("*") if path.is_file()]
    assert written == {sha256(path.read_bytes()).digest() for path in files if path not in loop.broken}
    quarantined = images.counts["quarantined_images"]
    assert [loop.images / row["path"] for row in quarantined] == loop.broken
    assert all(row["reason"] for row in quarantined)


@pytest.mark.faults
@pytest.mark.extern
def test_one_arrival_meets_a_broken_image_an_outage_and_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with loop_in(tmp_path, "tests.support.edt_here", monkeypatch) as loop:
        loop.arrive(FIRST)
        loop.train_first()
        loop.record_schedule()
        loop.arrive(MORE, broken=True)
        loop.mlflow.kill()
        away = loop.night()
        assert "MLflow does not answer" in str(away.error)
        loop.mlflow.start()
        killed = loop.night(loop.kill_in_training)
        assert "SIGKILL" in str(killed.error)
        assert len(versions_of(loop)) == 1
        loop.night()
        loop.night()
        assert_outcomes(loop, "failed", "failed", "finished", UNCHANGED)
        assert_decisions(loop)
        assert_nothing_twice(loop, killed=1)
        assert_rows(loop)
        assert_nothing_lost(loop)


@pytest.mark.faults
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_five_arrivals_are_five_decisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with loop_in(tmp_path, os.environ.get("LOOP_MODULE", "pipelines.cli"), monkeypatch) as loop:
        loop.arrive(FIRST)
        loop.train_first()
        loop.record_schedule()
        loop.arrive(MORE)
        loop.night()
        loop.arrive(MORE, broken=True)
        loop.night()
        loop.arrive(MORE)
        loop.mlflow.kill()
        loop.night()
        loop.mlflow.start()
        loop.night()
        loop.arrive(MORE)
        loop.night(loop.kill_in_training)
        loop.night()
        loop.arrive(MORE)
        loop.night()
        loop.night()
        show(loop)
        made = ("finished", "finished", "failed", "finished", "failed", "finished", "finished")
        assert_outcomes(loop, *made, UNCHANGED)
        changes = [loop.log(tick) for tick in loop.ticks if tick.outcome == "finished"]
        assert ["+31 -0 images" if k == 1 else "+30 -0 images" for k in range(5)]
        assert changes
        for decision in assert_decisions(loop):
            print(decision)
        assert_nothing_twice(loop, killed=1)
        print(assert_rows(loop))
        assert_nothing_lost(loop)


def show(loop: Loop) -> None:
    """What a person sees of it."""
    for words in (("schedule", "list"), ("runs",), ("models", "list")):
        print(f"\nedt {' '.join(words)}")
        print(small.edt(*words, "--store", str(loop.store), cwd=loop.root, env=dict(os.environ)).stdout)
