"""A schedule that retrains while images arrive: its folder grows, its MLflow server goes away, its runs are killed."""

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from edt_core.child_process import child_environment, python_command
from edt_core.config import SourceConfig
from edt_core.data.digits import write_digits
from jobs.stages.preprocess import image_source
from pipelines.schedule import server as scheduler
from pipelines.schedule.record import Schedules, Tick
from pipelines.tracking.catalog import Catalog
from tests.support import small
from tests.support.local_ray import local_ray_train
from tests.support.local_training import is_whole
from tests.support.processes import wait_for
from tests.support.servers import MlflowServer
from tests.support.small import MODEL

NAME, DAY = f"retrain-{MODEL}", timedelta(days=1)
HERE = "tests.support.edt_here"  # `edt` as a process without Ray
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


@dataclass(frozen=True)
class Arrival:
    """The images as they were when a version had to be made of them."""

    source: str
    files: int  # a broken one among them
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
    began: datetime = field(init=False)  # just after the last 3 o'clock before the schedule was recorded

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def catalog(self) -> Catalog:
        return Catalog(self.mlflow.uri, "")

    @property
    def versions(self) -> list[Any]:
        """The registered versions, in order."""
        found = self.catalog.client.search_model_versions(f"name = '{MODEL}'")
        return sorted(found, key=lambda version: int(version.version))

    def arrive(self, count: int, broken: bool = False) -> None:
        """So many images of each class come; with `broken`, one file more that is none."""
        whole = write_digits(self.root / "digits")
        for label in CLASSES:
            (self.images / label).mkdir(parents=True, exist_ok=True)
            paths = [
                path for path in sorted((whole / label).iterdir()) if not (self.images / label / path.name).exists()
            ]
            for path in paths[:count]:
                shutil.copy(path, self.images / label)
        if broken:
            self.broken.append(self.images / "3" / "0000-broken.png")
            self.broken[-1].write_bytes(b"\x89PNG\r\n\x1a\n and no more")
        counts = tuple(sum(path not in self.broken for path in (self.images / label).iterdir()) for label in CLASSES)
        self.arrivals.append(Arrival(self.identity, sum(counts) + len(self.broken), counts))

    @property
    def identity(self) -> str:
        return image_source(SourceConfig(kind="image_folder", path=str(self.images))).fingerprint

    def train_first(self) -> None:
        options = [part for text in (*BASE, f"source.path={self.images}") for part in ("--set", text)]
        words = ("run", "quickstart", "--store", str(self.store), *options)
        if self.module == HERE:  # nobody kills this one: a new process would only import
            with local_ray_train():
                done = small.edt(*words, env=dict(os.environ))
        else:
            command = python_command("-m", self.module, *words)
            done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def record_schedule(self) -> None:
        words = ("schedule", "--retrain", MODEL, "--cron", "0 3 * * *", "--timezone", "UTC", "--no-serve")
        done = small.edt(*words, "--store", str(self.store), cwd=self.root, env=dict(os.environ))
        assert done.returncode == 0, done.stderr
        now = datetime.now(UTC)
        today = now.replace(hour=3, minute=0, second=0, microsecond=0)
        self.began = (today if today <= now else today - DAY) + timedelta(seconds=30)

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

    def outage(self) -> None:
        """A night on which the MLflow server is away; it is back in the morning."""
        self.mlflow.kill()
        assert "MLflow does not answer" in str(self.night().error)
        self.mlflow.start()

    def killed(self) -> None:
        """A night on which the run is killed. Nothing is registered."""
        before = len(self.versions)
        assert "the run was killed by SIGKILL" in str(self.night(self._kill_in_training).error)
        assert len(self.versions) == before

    def _kill_in_training(self) -> None:
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
