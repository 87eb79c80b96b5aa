"""Kills, a full disk and a double start in train: the weights, files and history of an undisturbed training.

Drivers are real ones, `python -m jobs.train` with a Ray session each, and victims are found below them in /proc. The
suite takes one moment a victim; the slow tests take twenty, drawn over the life of the victim.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edt_core.artifact import Artifact
from edt_core.config import TrainConfig
from edt_core.data.latents import LatentDataset
from edt_core.schema import CHECKPOINT_MANIFEST, CHECKPOINTS, HISTORY_NAME, MANIFEST_NAME, STEP_PREFIX
from jobs import train
from jobs.cluster import use_threads
from tests.support.disk import small_tmpfs
from tests.support.processes import bytes_written, descendants, kill, stat, title, wait_for

pytestmark = pytest.mark.ray

WORKER, CONTROLLER, DRIVER = "RayTrainWorker", "TrainController", "driver"
MANY, KILLS_A_RUN, DEBRIS = 20, 5, (".ray-train", ".verdict", ".staging", ".journal")
_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
RECIPE = {"model": "EDT-Tiny/2", "global_batch_size": 8, "log_every": 2}
STEPS = 90
TWO_WORKERS = {**RECIPE, "max_steps": STEPS, "checkpoint_every": 5, "num_workers": 2, "max_failures": 10}


# --- a driver and what is below it


@dataclass
class Driver:
    """`python -m jobs.train` in a Ray session of its own. `steps_seen` are the checkpoints that were ever there."""

    latents: Artifact
    out: Path
    options: dict[str, Any] = field(default_factory=lambda: TWO_WORKERS)
    steps_seen: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.began = checkpoint_steps(self.out)
        command = [sys.executable, "-m", "jobs.train", self.latents.folder.uri, str(self.out)]
        for name, value in self.options.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with open(self.log_path, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

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

        wait_for(lambda: all(title(pid) in _AGENTS for pid in filter(left, family)), 30, pause=0.1)
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


def checkpoint_steps(out: Path, *, whole: bool = True) -> set[int]:
    """Steps of the checkpoints in a folder."""
    places = out.glob(f"{CHECKPOINTS}/{STEP_PREFIX}*")
    return {int(place.name[len(STEP_PREFIX) :]) for place in places if not whole or is_whole(place)}


def is_whole(place: Path) -> bool:
    return (place / CHECKPOINT_MANIFEST).exists()


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


@dataclass(frozen=True)
class Whole:
    artifact: Artifact
    logs: tuple[str, str]
    seconds: float


@pytest.fixture(scope="module")
def whole(latents_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A training whose command was started twice at once, and not disturbed otherwise."""
    out, began = tmp_path_factory.mktemp("whole") / "out", time.monotonic()
    pair = [Driver(latents_artifact, out) for _ in range(2)]
    try:
        artifacts = [driver.finish() for driver in pair]
    finally:
        for driver in pair:
            driver.close()
    assert artifacts[0] == artifacts[1]
    return Whole(artifacts[0], (pair[0].log, pair[1].log), time.monotonic() - began)


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


def test_a_training_started_twice_at_once_is_done_once(whole: Whole) -> None:
    reused = [log for log in whole.logs if "train: reused, nothing has changed" in log]
    assert len(reused) == 1
    assert "another process is at work in" in reused[0]
    assert "steps" not in reused[0]
    assert [row["step"] for row in train.history(whole.artifact)] == list(range(2, STEPS + 1, 2))
    assert whole.artifact.data.local is not None
    assert debris(whole.artifact.data.local) == []


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


def test_a_driver_then_a_worker_then_a_controller_are_killed(
    whole: Whole, start: Callable[..., Driver], tmp_path: Path
) -> None:
    """The driver and the worker in the middle of a checkpoint; of the last two the same driver recovers by itself."""
    out = tmp_path / "out"
    assert kill_in_mid_checkpoint(start(out), DRIVER, 10)
    assert not (out / MANIFEST_NAME).exists()
    assert max(checkpoint_steps(out)) >= 10

    again = start(out)
    assert kill_in_mid_checkpoint(again, WORKER, 25)
    left = set(again.named(WORKER))  # which Ray Train ends, to start all of them again
    wait_for(lambda: again.ended() or len(set(again.named(WORKER)) - left) == 2)
    assert not again.ended(), again.log
    (controller,) = again.named(CONTROLLER)
    kill(controller)
    artifact = again.finish()
    assert again.log.count("Ray Train's controller was lost") == 1
    assert_same(artifact, whole.artifact)


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
def test_killed_at_twenty_moments(
    victim: str, whole: Whole, latents_artifact: Artifact, start: Callable[..., Driver], tmp_path: Path
) -> None:
    rng, kills, runs = random.Random(victim), 0, 0
    while kills < MANY:
        out, here = tmp_path / f"out-{runs}", 0
        driver = start(out)
        while here < KILLS_A_RUN and not driver.ended():
            moment = rng.uniform(0, LIFE[victim] * whole.seconds)
            if killed_at_random(driver, victim, moment, rng):
                here += 1
                newest = max(checkpoint_steps(out), default=None)
                print(f"{victim}: run {runs}, killed after {moment:.1f} s, newest checkpoint {newest}", flush=True)
                if victim == DRIVER:
                    driver = start(out)
                else:
                    time.sleep(1.0)  # until Ray has seen it
        assert_same(driver.finish(), whole.artifact)
        kills, runs = kills + here, runs + 1
        assert runs <= MANY, f"only {kills} kills in {runs} runs"
    print(f"{victim}: {kills} kills in {runs} runs, an undisturbed one takes {whole.seconds:.0f} s", flush=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("victim", [WORKER, DRIVER])
def test_killed_in_the_middle_of_twenty_checkpoints(
    victim: str, whole: Whole, start: Callable[..., Driver], tmp_path: Path
) -> None:
    kills, runs = 0, 0
    while kills < MANY:
        out = tmp_path / f"out-{runs}"
        driver = start(out)
        for step in range(5, STEPS - 10, STEPS // KILLS_A_RUN):
            if not kill_in_mid_checkpoint(driver, victim, max({step, *checkpoint_steps(out)})):
                break
            kills += 1
            newest = max(checkpoint_steps(out))
            print(f"{victim}: run {runs}, killed while checkpoint after {newest} was written", flush=True)
            if victim == DRIVER:
                driver = start(out)
            else:
                time.sleep(1.0)
        assert_same(driver.finish(), whole.artifact)
        runs += 1
    print(f"{victim}: {kills} kills in {runs} runs", flush=True)


# --- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs that two checkpoints fit on, and a third does not."""
    with small_tmpfs(tmp_path / "disk", "60m") as folder:
        yield folder


def checkpoint_digests(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_disk_that_fills_up_in_mid_checkpoint_is_said_and_got_over(
    latents_artifact: Artifact, start: Callable[..., Driver], small_disk: Path, tmp_path: Path
) -> None:
    out = small_disk / "out"
    options = {**RECIPE, "max_steps": 40, "checkpoint_every": 10, "num_to_keep": 10}
    full = start(out, **options)
    wait_for(full.ended)
    assert full.process.returncode == 2, full.log
    assert "Traceback" not in full.log
    (message,) = [line for line in full.log.splitlines() if line.startswith("error: ")]
    assert "no space is left on the device" in message
    kept = {step: inode(out, step) for step in checkpoint_steps(out)}
    assert sorted(kept) == [10, 20]
    assert not (out / MANIFEST_NAME).exists()

    subprocess.run(["mount", "-o", "remount,size=400m", str(small_disk)], check=True)
    artifact = start(out, **options).finish()
    assert {step: inode(out, step) for step in kept} == kept, "a checkpoint that was whole was written again"
    assert debris(out) == []
    undisturbed(latents_artifact, options, tmp_path / "alone")
    assert checkpoint_digests(artifact.directory(CHECKPOINTS)) == checkpoint_digests(tmp_path / "alone" / CHECKPOINTS)
    assert [row["step"] for row in artifact_rows(artifact)] == list(range(2, 41, 2))


def inode(out: Path, step: int) -> int:
    return (out / CHECKPOINTS / f"{STEP_PREFIX}{step:08d}" / CHECKPOINT_MANIFEST).stat().st_ino


def artifact_rows(artifact: Artifact) -> list[dict[str, float]]:
    assert [entry.rows for entry in artifact.entries(HISTORY_NAME)] == [len(train.history(artifact))]
    return train.history(artifact)


def undisturbed(latents: Artifact, options: dict[str, Any], folder: Path) -> None:
    """The same training of one worker, in this process."""
    import torch

    from edt_core.training.context import LocalContext
    from edt_core.training.loop import train as loop

    config, threads = TrainConfig(**options), torch.get_num_threads()
    use_threads(config.num_cpus_per_worker)
    try:
        dataset = LatentDataset(latents.paths("*.arrow"))
        loop(config, train.config_of(config.model, latents.counts), dataset, LocalContext(folder))
    finally:
        torch.set_num_threads(threads)
