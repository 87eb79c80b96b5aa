"""Kills, a full disk and a double start in train: the weights, files and history of an undisturbed training.

Drivers that are killed are real ones, `python -m jobs.train` with a Ray session each, and victims are found below them
in /proc. The undisturbed training is one in this process. The suite takes one moment a victim; the slow tests take
twenty, drawn over the life of the victim.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edt_core.config import TrainConfig
from edt_core.data.latents import LatentInfo, LatentShardWriter
from edt_core.data.scale import LatentScale
from edt_core.errors import UserError
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.folder import Folder
from edt_core.store.layout import CHECKPOINT_MANIFEST, CHECKPOINTS, HISTORY_NAME, MANIFEST_NAME, STEP_PREFIX
from jobs.commands import stage
from jobs.runtime.cluster import cause_of
from jobs.stages import train
from tests.support.disk import small_tmpfs
from tests.support.local_training import checkpoint_steps, contents, is_whole, trained, trained_here
from tests.support.processes import bytes_written, descendants, kill, stat, title, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.timeout(1800)]

WORKER, CONTROLLER, DRIVER = "RayTrainWorker", "TrainController", "driver"
MANY, KILLS_A_RUN, DEBRIS = 20, 5, (".ray-train", ".verdict", ".staging", ".journal")
_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
RECIPE = {"model": "EDT-Tiny/2", "global_batch_size": 8, "micro_batch_size": 4, "log_every": 2}
STEPS, MANY_STEPS = 45, 90
AVERAGES = {"ema_widths": [0.05, 0.1], "ema_snapshots": 12}  # their snapshots are at other steps than checkpoints
TWO_WORKERS = {**RECIPE, **AVERAGES, "max_steps": STEPS, "checkpoint_every": 5, "num_workers": 2, "max_failures": 10}
LONG = {**TWO_WORKERS, "max_steps": MANY_STEPS}
# Ray Train looks after its workers often, and starts no process that watches for nodes about to go.
QUICK = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


# --- a driver and what is below it


@dataclass
class Driver:
    """`python -m jobs.train` in a Ray session of its own. `steps_seen` are the checkpoints that were ever there."""

    latents: Artifact
    out: Path
    options: dict[str, Any] = field(default_factory=lambda: TWO_WORKERS)
    steps_seen: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.begins()
        command = [sys.executable, "-m", "jobs.train", self.latents.folder.uri, str(self.out)]
        command += arguments(self.options)
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | QUICK
        with open(self.log_path, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def begins(self) -> None:
        """What it finds now must not be trained again."""
        self.began = checkpoint_steps(self.out)
        self.steps_seen.clear()

    @property
    def log_path(self) -> Path:
        return self.out.with_name(f"{self.out.name}-{id(self)}.log")

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def ended(self) -> bool:
        self.steps_seen |= checkpoint_steps(self.out)
        return self.process.poll() is not None

    def named(self, name: str) -> list[int]:
        """Processes of Ray's that call themselves so, or this driver's own."""
        if name == DRIVER:
            return [self.process.pid] if self.process.poll() is None else []
        return sorted(pid for pid in descendants(self.process.pid) if title(pid).startswith(f"ray::{name}"))

    def found(self, name: str) -> list[int]:
        """The same, waited for; none if the driver came to its end before."""
        wait_for(lambda: self.ended() or self.named(name), pause=0.1)
        return self.named(name)

    def at_step(self, step: int) -> None:
        """Wait for a whole checkpoint of this step or a later one, or the driver's end."""
        wait_for(lambda: self.ended() or max(checkpoint_steps(self.out), default=0) >= step)

    def kill(self) -> None:
        """SIGKILL, and see that whatever works below the driver does not outlive it for long.

        Two agents of Ray's node outlive it by a minute and have nothing to do with training: they are ended here.
        """
        family = descendants(self.process.pid)
        self.process.kill()
        self.process.wait()

        def left(pid: int) -> bool:
            now = stat(pid)
            return now is not None and now[1] != "Z" and now[2] == family[pid]

        wait_for(lambda: all(title(pid) in _AGENTS for pid in filter(left, family)), pause=0.1)
        for pid in filter(left, family):
            kill(pid)

    def finish(self) -> Artifact:
        """The artifact of a driver that ended well, and went on from what it found."""
        wait_for(self.ended)
        assert self.process.returncode == 0, self.log
        assert "Traceback" not in self.log, self.log
        if self.began:
            again = {step for step in self.steps_seen - self.began if step <= max(self.began)}
            assert not again, f"steps {again} were trained again, there were checkpoints {self.began}"
        return Artifact.open(str(self.out))

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()


def arguments(options: dict[str, Any]) -> list[str]:
    """A configuration on the command line."""
    return [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def writing(out: Path) -> bool:
    """Whether the newest checkpoint is being written at this moment."""
    newest = max(out.glob(f"{CHECKPOINTS}/{STEP_PREFIX}*"), default=None)
    return newest is not None and not is_whole(newest)


@pytest.fixture
def start(latents_artifact: Artifact, tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    """Starts drivers, and sees to their end."""
    drivers: list[Driver] = []

    def started(out: Path, **options: Any) -> Driver:
        drivers.append(Driver(latents_artifact, out, options or TWO_WORKERS))
        return drivers[-1]

    yield started
    for driver in drivers:
        driver.close()


# --- what an undisturbed training makes


@pytest.fixture(scope="module")
def whole(latents_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The training in this process: a batch of two micro-batches is what two workers have in one each."""
    return trained_here(TrainConfig(**TWO_WORKERS), latents_artifact, tmp_path_factory.mktemp("whole"))


@dataclass(frozen=True)
class Timed:
    artifact: Artifact
    seconds: float


@pytest.fixture(scope="module")
def long_whole(latents_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Timed:
    """A longer training by a driver that nothing happens to, and how long that takes."""
    began = time.monotonic()
    driver = Driver(latents_artifact, tmp_path_factory.mktemp("whole") / "out", LONG)
    try:
        return Timed(driver.finish(), time.monotonic() - began)
    finally:
        driver.close()


def assert_same(artifact: Artifact, whole: Artifact) -> None:
    """File by file, the history's rows once each, and nothing else left behind."""
    rows = [row["step"] for row in train.history(artifact)]
    assert rows == [row["step"] for row in train.history(whole)]
    assert len(set(rows)) == len(rows)
    expected = {entry.path: entry.sha256 for entry in whole.entries()}
    assert {entry.path: entry.sha256 for entry in artifact.entries()} == expected
    assert artifact.manifest.digest == whole.manifest.digest
    assert artifact.problems(deep=True) == []
    assert artifact.data.local is not None
    assert debris(artifact.data.local) == []


def debris(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob(".*") if path.name.startswith(DEBRIS))


# --- kills


def kill_in_mid_checkpoint(driver: Driver, victim: str, after_step: int) -> bool:
    """SIGKILL the driver, or the worker that writes, while a checkpoint is half written. False if it ended before."""
    driver.at_step(after_step)
    pids = driver.found(victim)
    while pids and not driver.ended():
        if not writing(driver.out):
            time.sleep(0.002)
        elif victim == DRIVER:
            driver.kill()
            return True
        elif killed_while(lambda: writing(driver.out), max(pids, key=bytes_written)):  # only rank 0 writes anything
            return True
    return False


def killed_while(true: Callable[[], bool], pid: int) -> bool:
    """Hold a process, and SIGKILL it if something is still true; else let it go on."""
    try:
        os.kill(pid, signal.SIGSTOP)
        os.kill(pid, signal.SIGKILL if (hit := true()) else signal.SIGCONT)
    except ProcessLookupError:
        return False
    return hit


def test_a_worker_and_a_controller_of_one_training_lose_nothing(
    whole: Artifact, start: Callable[..., Driver], tmp_path: Path
) -> None:
    """Killed drivers, and two at once, are in pipelines/test_faults.py; one of two workers is lost in test_nodes.py."""
    driver = start(tmp_path / "out", **{**TWO_WORKERS, "num_workers": 1})
    lose_worker_and_controller(driver, 10)
    assert_same(driver.finish(), whole)


def lose_worker_and_controller(driver: Driver, after_step: int) -> None:
    """Kill the worker in the middle of a checkpoint, and Ray Train's controller once there is another worker."""
    assert kill_in_mid_checkpoint(driver, WORKER, after_step)
    left = set(driver.named(WORKER))
    wait_for(lambda: driver.ended() or set(driver.named(WORKER)) - left)
    assert not driver.ended(), driver.log
    (controller,) = driver.named(CONTROLLER)
    kill(controller)
    wait_for(lambda: driver.ended() or "Ray Train's controller was lost" in driver.log)
    assert driver.log.count("Ray Train's controller was lost") == 1


@pytest.mark.slow
def test_three_drivers_a_worker_and_a_controller_of_one_training_lose_nothing(
    whole: Artifact, start: Callable[..., Driver], tmp_path: Path
) -> None:
    """Three drivers start at once. The one that trains is killed, and one that waited for it takes its place.

    That one recovers by itself from the loss of its worker and of Ray Train's controller, and the third finds all done.
    The driver and the worker are killed in the middle of a checkpoint.
    """
    out = tmp_path / "out"
    drivers = [start(out, **{**TWO_WORKERS, "num_workers": 1}) for _ in range(3)]
    first = one_that_trains(drivers)
    waiting = [driver for driver in drivers if driver is not first]
    wait_for(lambda: all("another process is working in" in driver.log for driver in waiting))
    assert kill_in_mid_checkpoint(first, DRIVER, 10)
    assert not (out / MANIFEST_NAME).exists()
    assert max(checkpoint_steps(out)) >= 10
    for driver in waiting:
        driver.begins()

    second = one_that_trains(waiting)
    (third,) = (driver for driver in waiting if driver is not second)
    lose_worker_and_controller(second, 25)
    assert_same(second.finish(), whole)
    assert_reused(third)


def one_that_trains(drivers: list[Driver]) -> Driver:
    """The one of several drivers that has workers; there is one at most."""
    training = wait_for(lambda: [driver for driver in drivers if driver.ended() or driver.named(WORKER)], pause=0.1)
    assert not any(driver.ended() for driver in drivers), [driver.log for driver in drivers]
    (driver,) = training
    return driver


def assert_reused(driver: Driver) -> None:
    """It waited for another one, and made no step of its own."""
    wait_for(driver.ended)
    assert driver.process.returncode == 0, driver.log
    assert driver.log.count("train: reused, nothing has changed") == 1
    assert "another process is working in" in driver.log
    assert "steps" not in driver.log


LIFE = {DRIVER: 1.0, CONTROLLER: 0.65, WORKER: 0.45}  # of the time that an undisturbed training takes


def killed_at_random(driver: Driver, victim: str, after_s: float, rng: random.Random) -> bool:
    """SIGKILL one victim so long after it was there; False where the driver ended before."""
    driver.found(victim)
    until = time.monotonic() + after_s
    wait_for(lambda: driver.ended() or time.monotonic() > until)
    if driver.ended() or not (pids := driver.named(victim)):
        return False
    if victim == DRIVER:
        driver.kill()
    else:
        kill(rng.choice(pids))
    return True


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("victim", [WORKER, CONTROLLER, DRIVER])
def test_killed_at_twenty_moments(victim: str, long_whole: Timed, start: Callable[..., Driver], tmp_path: Path) -> None:
    rng, kills, runs = random.Random(victim), 0, 0
    while kills < MANY:
        out, here = tmp_path / f"out-{runs}", 0
        driver = start(out, **LONG)
        while here < KILLS_A_RUN and not driver.ended():
            moment = rng.uniform(0, LIFE[victim] * long_whole.seconds)
            if killed_at_random(driver, victim, moment, rng):
                here += 1
                newest = max(checkpoint_steps(out), default=None)
                print(f"{victim}: run {runs}, killed after {moment:.1f} s, newest checkpoint {newest}", flush=True)
                if victim == DRIVER:
                    driver = start(out, **LONG)
                else:
                    time.sleep(1.0)  # until Ray has seen it
        assert_same(driver.finish(), long_whole.artifact)
        kills, runs = kills + here, runs + 1
        assert runs <= MANY, f"only {kills} kills in {runs} runs"
    print(f"{victim}: {kills} kills in {runs} runs, an undisturbed one takes {long_whole.seconds:.0f} s", flush=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("victim", "shard"), [(WORKER, "none"), (WORKER, "optimizer"), (DRIVER, "none")])
def test_killed_in_the_middle_of_twenty_checkpoints(
    victim: str, shard: str, long_whole: Timed, start: Callable[..., Driver], tmp_path: Path
) -> None:
    kills, runs = 0, 0
    while kills < MANY:
        out = tmp_path / f"out-{runs}"
        driver = start(out, **{**LONG, "shard": shard})
        for step in range(5, MANY_STEPS - 10, MANY_STEPS // KILLS_A_RUN):
            if not kill_in_mid_checkpoint(driver, victim, max({step, *checkpoint_steps(out)})):
                break
            kills += 1
            newest = max(checkpoint_steps(out))
            print(f"{victim}: run {runs}, killed while checkpoint after {newest} was written", flush=True)
            if victim == DRIVER:
                driver = start(out, **{**LONG, "shard": shard})
            else:
                time.sleep(1.0)
        assert_same(driver.finish(), long_whole.artifact)
        runs += 1
    print(f"{victim}: {kills} kills in {runs} runs", flush=True)


# --- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs that two checkpoints fit on, and a third does not."""
    with small_tmpfs(tmp_path / "disk", "60m") as folder:
        yield folder


def test_a_disk_that_fills_up_in_mid_checkpoint_is_said_and_got_over(
    training_here: None,
    latents_artifact: Artifact,
    small_disk: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = small_disk / "out"
    options = {**RECIPE, "max_steps": 40, "checkpoint_every": 10, "num_to_keep": 10}
    with pytest.raises(SystemExit) as ended:
        stage.main(train.STAGE, [latents_artifact.folder.uri, str(out), *arguments(options)])
    text = "".join(capsys.readouterr())
    assert ended.value.code == 2, text
    assert "Traceback" not in text
    (message,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "no space is left on the device" in message
    kept = {step: inode(out, step) for step in checkpoint_steps(out)}
    assert sorted(kept) == [10, 20]
    assert not (out / MANIFEST_NAME).exists()

    subprocess.run(["mount", "-o", "remount,size=400m", str(small_disk)], check=True)
    artifact = trained_here(TrainConfig(**options), latents_artifact, out)
    assert {step: inode(out, step) for step in kept} == kept, "a checkpoint that was whole was written again"
    assert debris(out) == []
    undisturbed = trained_here(TrainConfig(**options), latents_artifact, tmp_path / "alone")
    assert contents(artifact.directory(CHECKPOINTS)) == contents(undisturbed.directory(CHECKPOINTS))
    assert [row["step"] for row in artifact_rows(artifact)] == list(range(2, 41, 2))


def inode(out: Path, step: int) -> int:
    return (out / CHECKPOINTS / f"{STEP_PREFIX}{step:08d}" / CHECKPOINT_MANIFEST).stat().st_ino


def artifact_rows(artifact: Artifact) -> list[dict[str, float]]:
    assert [entry.rows for entry in artifact.entries(HISTORY_NAME)] == [len(train.history(artifact))]
    return train.history(artifact)


# --- a user's mistake


def write_latents(folder: Path, spoilt: int | None = None) -> Artifact:
    """96 made-up latents; those of one row are not finite."""
    posterior = np.random.default_rng(0).normal(size=(96, 2, 2, 4, 8, 8)).astype(np.float32)
    if spoilt is not None:
        posterior[spoilt] = np.nan

    def write(path: Path) -> int:
        with LatentShardWriter(path, LatentInfo("test", LatentScale(0.5), 32, (4, 8, 8), "images-00000.tar")) as writer:
            writer.write([f"{i:04d}" for i in range(96)], np.arange(96) % 4, posterior)
        return writer.rows

    out = ArtifactWriter(Folder.at(folder), "latents", "f" * 64)
    out.write("latents-00000.arrow", write)
    counts = {"images": 96, "classes": 4, "image_size": 32, "latent_shape": [4, 8, 8], "scaling_factor": 0.5}
    return out.commit({}, {}, {**counts, "autoencoder_digest": "0" * 64})


@pytest.fixture
def workers_seen() -> Iterator[set[int]]:
    """Processes of Ray Train's workers below this one that were not there before."""
    before, seen = set(train_workers()), set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.1):
            seen.update(set(train_workers()) - before)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    yield seen
    over.set()
    thread.join()


def train_workers() -> list[int]:
    return [pid for pid in descendants(os.getpid()) if title(pid).startswith(f"ray::{WORKER}")]


@pytest.mark.parametrize("kind", ["one worker's batch", pytest.param("every worker's shard", marks=pytest.mark.slow)])
def test_a_users_mistake_is_not_tried_three_times(
    kind: str, ray_session: None, workers_seen: set[int], tmp_path: Path
) -> None:
    """In the first case one worker raises, and the other waits for it in the middle of a step."""
    if kind == "one worker's batch":
        latents, message = write_latents(tmp_path / "latents", spoilt=50), r"1 latents of step \d+ are not finite"
    else:
        latents, message = write_latents(tmp_path / "latents"), r"latents is damaged, 1 problem: latents-00000\.arrow"
        path = tmp_path / "latents" / "latents-00000.arrow"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    config = TrainConfig(**{**TWO_WORKERS, "max_failures": 3})
    with pytest.raises(UserError, match=message) as raised:
        trained(config, latents, tmp_path / "out")
    assert cause_of(raised.value) is raised.value
    assert 2 <= len(workers_seen) <= 4, "the workers were started again more than once"
    names = [path.name for path in (tmp_path / "out").rglob(".*")]
    assert not [name for name in names if name.startswith(".verdict")]
