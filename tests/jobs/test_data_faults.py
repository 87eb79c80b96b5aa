"""Kills and a full disk in preprocess, encode and sample: identical files, and only the rest is redone.

The figures of the big run (20 moments each) are in docs/benchmarks.md. The suite itself takes one moment for what is
done by Ray tasks (preprocess) and one for what a pool of actors does (encode).
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

import pytest

from edt_core.autoencoders.autoencoder import build_autoencoder
from edt_core.config import AutoencoderConfig, EncodeConfig, PreprocessConfig, SampleConfig, Section, SourceConfig
from edt_core.errors import UserError
from edt_core.progress import Silent
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.folder import Folder
from edt_core.store.layout import MANIFEST_NAME, REPORT_OF_SHARD
from jobs.runtime.cluster import cause_of
from jobs.stages import encode, preprocess, sample
from jobs.stages.autoencoder import published_artifact
from jobs.stages.preprocess import image_source
from jobs.stages.stage import Input, Stage
from tests.support.disk import small_tmpfs
from tests.support.local_ray import local_ray
from tests.support.models import classifier_artifact, made_model, opened
from tests.support.processes import joining, stat, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.usefixtures("ray_session")]

MANY = 20
SHARDS, PER_SHARD = 10, 30  # of each step
VERBS = ("preprocess", "encode", "sample")


@dataclass(frozen=True)
class Step:
    """A verb on real input; `artifact` is what it makes when nothing goes wrong."""

    verb: Stage
    config: Section
    inputs: dict[str, Input]
    command: tuple[str, ...]  # `python -m jobs.<verb>` with {out} for the folder
    artifact: Artifact | None = None

    def run(self, out: Path) -> Artifact:
        identity = self.verb.fingerprint(self.config, {role: item.fingerprint for role, item in self.inputs.items()})
        return self.verb.execute(
            self.config, self.inputs, ArtifactWriter(Folder.at(out), self.verb.kind, identity), Silent()
        )

    def start(self, out: Path) -> subprocess.Popen[str]:
        """The same by its command, as a driver of its own on the session's cluster."""
        return subprocess.Popen(
            [sys.executable, "-m", *(part.format(out=out) for part in self.command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **joining()},
        )


@pytest.fixture(scope="module")
def preprocess_step(photos: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Step:
    root = tmp_path_factory.mktemp("source")
    paths = sorted(photos.glob("*/*.JPEG"))[:60]
    for i, path in enumerate(islice(cycle(paths), SHARDS * PER_SHARD)):
        (root / str(i % 3)).mkdir(parents=True, exist_ok=True)
        (root / str(i % 3) / f"{i:04d}.JPEG").symlink_to(path)
    config = PreprocessConfig(image_size=64, images_per_shard=PER_SHARD)
    options = ("--image-size", "64", "--images-per-shard", str(PER_SHARD))
    source = image_source(SourceConfig(path=str(root)))
    step = Step(preprocess.STAGE, config, {"source": source}, ("jobs.preprocess", str(root), "{out}", *options))
    return undisturbed(step, tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def encode_step(preprocess_step: Step, tmp_path_factory: pytest.TempPathFactory) -> Step:
    root, images = tmp_path_factory.mktemp("autoencoder"), preprocess_step.artifact
    assert images is not None
    build_autoencoder(AutoencoderConfig(downsample_factor=8, base_channels=8), 64).save_pretrained(root / "vae")
    vae = published_artifact(str(root / "vae"), Folder.at(root / "autoencoder"))
    command = ("jobs.encode", images.folder.uri, "{out}", "--autoencoder", str(root / "autoencoder"))
    step = Step(encode.STAGE, EncodeConfig(), {"images": images, "autoencoder": vae}, command)
    return undisturbed(step, tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="module")
def sample_step(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Step:
    return undisturbed(sampling(tmp_path_factory.mktemp("sample")), tmp_path_factory.mktemp("features"))


@pytest.fixture
def step(request: pytest.FixtureRequest) -> Step:
    """The step of a verb, for `parametrize(..., indirect=True)`."""
    found: Step = request.getfixturevalue(f"{request.param}_step")
    return found


def undisturbed(step: Step, folder: Path) -> Step:
    """The step with what it makes, in this process, when nothing goes wrong."""
    with local_ray():
        return replace(step, artifact=step.run(folder))


def sampling(root: Path) -> Step:
    """40 samples in units of 4, with features."""
    model = opened(root, made_model(image_size=64, factor=8), factor=8)
    judge = classifier_artifact(root / "classifier")
    assert model.autoencoder is not None
    inputs = {"checkpoint": model.checkpoint, "autoencoder": model.autoencoder, "classifier": judge}
    config = SampleConfig(num_samples=40, unit_size=4, num_sampling_steps=40, num_workers=2)
    given = [f"--{role}={inputs[role].folder.uri}" for role in ("autoencoder", "classifier")]
    fields = ("num_samples", "unit_size", "num_sampling_steps", "num_workers")
    options = [f"--{name.replace('_', '-')}={getattr(config, name)}" for name in fields]
    command = ("jobs.sample", model.checkpoint.folder.uri, "{out}", *given, *options)
    return Step(sample.STAGE, config, inputs, command)


@contextmanager
def killing_a_worker(folder: Path, finished: int) -> Iterator[list[int]]:
    """SIGKILL one Ray worker that is at a shard, when `finished` shards of the artifact in the folder are done."""
    killed: list[int] = []
    over = threading.Event()

    def work() -> None:
        while not over.is_set() and not killed:
            if finished_shards(folder) >= finished and (found := busy_workers()):
                victim = random.Random(finished).choice(found)
                os.kill(victim, signal.SIGKILL)
                killed.append(victim)
            time.sleep(0.02)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def finished_shards(folder: Path) -> int:
    return len(list((folder / ".journal").glob("*.json")))


def busy_workers() -> list[int]:
    """Processes of this test's Ray session that work on a shard at this moment."""
    found = []
    for status in Path("/proc").glob("[0-9]*/cmdline"):  # `comm` is the main thread's, and an actor may have others
        try:
            name = status.read_text()
        except OSError:
            continue
        if name.startswith(("ray::_shard_task", "ray::_Holder.work")) and is_ours(int(status.parent.name)):
            found.append(int(status.parent.name))
    return sorted(found)


def is_ours(pid: int) -> bool:
    """Whether a process descends from this one: others may have Ray sessions on this machine."""
    while pid not in (0, 1, os.getpid()):
        if (seen := stat(pid)) is None:
            return False
        pid = seen[0]
    return pid == os.getpid()


def inodes(out: Path) -> dict[str, int]:
    """The shards that a killed attempt finished, by the inode that shows whether they are written again.

    Image shards have a report beside them, written after them: one that found the disk full has none, and is redone.
    """
    names = (path.name.removesuffix(".json") for path in (out / ".journal").glob("*.json"))
    shards = [name for name in names if name.endswith((".tar", ".arrow", ".safetensors"))]
    done = [name for name in shards if not name.startswith("images-") or (out / REPORT_OF_SHARD.format(name)).exists()]
    return {name: (out / name).stat().st_ino for name in done if (out / name).exists()}  # the journal comes first


def assert_whole(artifact: Artifact, step: Step) -> None:
    assert step.artifact is not None
    assert artifact.manifest.digest == step.artifact.manifest.digest
    assert artifact.problems(deep=True) == []


def kill_driver(step: Step, out: Path, finished: int, pause_s: float = 0.0) -> bool:
    """SIGKILL a driver when so many shards are done, or the first is begun; True if it had not come to its end."""
    driver = step.start(out)

    def met() -> bool:
        return finished_shards(out) >= finished if finished else any(out.glob(".staging-*"))

    wait_for(lambda: met() or driver.poll() is not None)
    time.sleep(pause_s)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    wait_for(lambda: not busy_workers())  # Ray ends the tasks of a driver that is gone
    return not (out / MANIFEST_NAME).exists()


def assert_continued(step: Step, out: Path, kill: bool = False) -> None:
    """Run a step to its end, from what is there; with a worker killed after the next shard."""
    finished = inodes(out)
    with killing_a_worker(out, finished_shards(out) + 1) if kill else nullcontext([0]) as killed:
        artifact = step.run(out)
    assert killed, "no worker was met at work"
    assert_whole(artifact, step)
    assert {name: (out / name).stat().st_ino for name in finished} == finished, "a finished shard was redone"
    assert not list(out.rglob(".staging-*"))


def test_a_killed_driver_and_a_killed_worker_of_a_pool_lose_nothing(encode_step: Step, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert kill_driver(encode_step, out, finished=2), "it came to its end before"
    assert 1 <= len(inodes(out)) < SHARDS  # of two in the journal, the last may not have been published
    assert_continued(encode_step, out, kill=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("step", VERBS, indirect=True)
def test_workers_killed_at_twenty_moments(step: Step, tmp_path: Path) -> None:
    hits = 0
    for k in range(MANY):
        with killing_a_worker(tmp_path / str(k), random.Random(k).randrange(SHARDS // 2 + 1)) as killed:
            artifact = step.run(tmp_path / str(k))
        hits += len(killed)
        assert_whole(artifact, step)
    assert hits >= MANY - MANY // 5, f"only {hits} of {MANY} kills met a worker at work"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("step", VERBS, indirect=True)
def test_drivers_killed_at_twenty_moments(step: Step, tmp_path: Path) -> None:
    unfinished = 0
    for k in range(MANY):
        out = tmp_path / str(k)
        if kill_driver(step, out, 0, random.Random(k).uniform(0, 1.0)):
            unfinished += 1
            assert_continued(step, out)
        assert_whole(Artifact.open(str(out)), step)
    assert unfinished >= MANY // 2, f"only {unfinished} of {MANY} kills came before the end"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs that some shards of either verb fit on."""
    with small_tmpfs(tmp_path / "disk", "700k") as folder:
        yield folder


def fill_up(step: Step, disk: Path) -> Path:
    """Run a step until its disk is full, and give it more room then."""
    with pytest.raises(Exception, match="no space") as caught:
        step.run(disk / "out")
    cause = cause_of(caught.value)
    assert isinstance(cause, UserError)
    assert "no space is left on the device" in str(cause)
    assert not (disk / "out" / MANIFEST_NAME).exists()
    wait_for(lambda: not busy_workers())  # where they are Ray's
    subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
    return disk / "out"


def test_a_disk_that_fills_up_in_mid_shard_is_said_and_got_over(
    encode_step: Step, small_disk: Path, here: None
) -> None:
    out = fill_up(encode_step, small_disk)
    assert inodes(out), "no shard was finished"
    assert_continued(encode_step, out)


def test_a_disk_that_fills_up_and_then_a_killed_task_lose_nothing(preprocess_step: Step, small_disk: Path) -> None:
    out = fill_up(preprocess_step, small_disk)
    assert inodes(out), "no shard was finished"
    assert_continued(preprocess_step, out, kill=True)
