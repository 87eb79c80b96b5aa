"""Kills, a full disk and double starts in preprocess, encode and sample: identical files, and only the rest is redone.

The figures of the big run (20 moments each) are in docs/benchmarks.md; the suite itself takes one of the moments.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest

from edt_core.artifact import Artifact, ArtifactWriter
from edt_core.autoencoder import build_autoencoder
from edt_core.config import AutoencoderConfig, EncodeConfig, PreprocessConfig, SampleConfig, Section, SourceConfig
from edt_core.errors import UserError
from edt_core.progress import Silent
from edt_core.storage import Folder
from jobs import encode, preprocess, sample
from jobs.autoencoder import published_artifact
from jobs.cluster import cause_of
from jobs.verb import Input, Verb, image_source
from tests.support.disk import small_tmpfs
from tests.support.models import classifier_artifact, made_model, opened

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

FEW, MANY = 1, 20
NUM_IMAGES = 600
SHARDS = 10  # of each step


@dataclass(frozen=True)
class Step:
    """A verb on real input, and what it makes when nothing goes wrong."""

    verb: Verb
    config: Section
    inputs: dict[str, Input]
    command: tuple[str, ...]  # `python -m jobs.<verb>` with {out} for the folder
    digest: str = ""

    def run(self, out: Path) -> Artifact:
        identity = self.verb.fingerprint(self.config, {role: item.fingerprint for role, item in self.inputs.items()})
        return self.verb.execute(
            self.config, self.inputs, ArtifactWriter(Folder.at(out), self.verb.kind, identity), Silent()
        )

    def start(self, out: Path) -> subprocess.Popen[str]:
        """The same by its command, as a driver of its own on the session's cluster."""
        import ray

        return subprocess.Popen(
            [sys.executable, "-m", *(part.format(out=out) for part in self.command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        )


@pytest.fixture(scope="module")
def steps(photos: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> dict[str, Step]:
    root = tmp_path_factory.mktemp("steps")
    paths = sorted(photos.glob("*/*.JPEG"))[:60]
    for i, path in enumerate(islice(cycle(paths), NUM_IMAGES)):
        (root / "source" / str(i % 3)).mkdir(parents=True, exist_ok=True)
        (root / "source" / str(i % 3) / f"{i:04d}.JPEG").symlink_to(path)
    config = PreprocessConfig(image_size=64, images_per_shard=60)
    command = ("jobs.preprocess", str(root / "source"), "{out}", "--image-size", "64", "--images-per-shard", "60")
    source = image_source(SourceConfig(path=str(root / "source")))
    first = Step(preprocess.VERB, config, {"source": source}, command)
    images = first.run(root / "images")
    build_autoencoder(AutoencoderConfig(downsample_factor=8, base_channels=8), 64).save_pretrained(root / "vae")
    vae = published_artifact(str(root / "vae"), Folder.at(root / "autoencoder"))
    command = ("jobs.encode", str(root / "images"), "{out}", "--autoencoder", str(root / "autoencoder"))
    second = Step(encode.VERB, EncodeConfig(), {"images": images, "autoencoder": vae}, command)
    digests = (images.manifest.digest, second.run(root / "latents").manifest.digest)
    third = sample_step(root / "sample")
    digests = (*digests, third.run(root / "features").manifest.digest)
    return {
        step.verb.name: Step(step.verb, step.config, step.inputs, step.command, digest)
        for step, digest in zip((first, second, third), digests, strict=True)
    }


def sample_step(root: Path) -> Step:
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
    return Step(sample.VERB, config, inputs, command)


@contextmanager
def killing_a_worker(folder: Path, finished: int) -> Iterator[list[int]]:
    """SIGKILL one Ray worker that is at a shard, when `finished` shards of the artifact in the folder are done."""
    killed: list[int] = []
    over = threading.Event()

    def work() -> None:
        while not over.is_set() and not killed:
            done = len(list((folder / ".journal").glob("*.json")))
            if done >= finished and (found := busy_workers()):
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
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return pid == os.getpid()


def inodes(out: Path) -> dict[str, int]:
    """The shards that a killed attempt finished, by the inode that shows whether they are written again."""
    names = (path.name.removesuffix(".json") for path in (out / ".journal").glob("*.json"))
    shards = [name for name in names if name.endswith((".tar", ".arrow", ".safetensors"))]
    return {name: (out / name).stat().st_ino for name in shards if (out / name).exists()}  # the journal comes first


def assert_whole(artifact: Artifact, step: Step) -> None:
    assert artifact.manifest.digest == step.digest
    assert artifact.problems(deep=True) == []


def kill_workers(step: Step, folder: Path, moments: int) -> None:
    hits = 0
    for k in range(moments):
        with killing_a_worker(folder / str(k), random.Random(k).randrange(SHARDS // 2 + 1)) as killed:
            artifact = step.run(folder / str(k))
        hits += len(killed)
        assert_whole(artifact, step)
    assert hits >= moments - moments // 5, f"only {hits} of {moments} kills met a worker at work"


def kill_drivers(step: Step, folder: Path, moments: int) -> None:
    unfinished = 0
    for k in range(moments):
        out = folder / str(k)
        driver = step.start(out)
        wait_for(lambda out=out, driver=driver: any(out.glob(".staging-*")) or driver.poll() is not None)
        time.sleep(random.Random(k).uniform(0, 2.0))
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
        wait_for(lambda: not busy_workers())  # Ray ends the tasks of a driver that is gone
        unfinished += not (out / "manifest.json").exists()
        finished = inodes(out)
        artifact = step.run(out) if not (out / "manifest.json").exists() else Artifact.open(str(out))
        assert_whole(artifact, step)
        assert {name: (out / name).stat().st_ino for name in finished} == finished, "a finished shard was redone"
    assert unfinished >= moments // 2, f"only {unfinished} of {moments} kills came before the end"


def wait_for(ready: Callable[[], Any], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until, "the moment never came"
        time.sleep(0.02)


@pytest.mark.parametrize("verb", ["preprocess", "encode", "sample"])
def test_a_killed_worker_loses_nothing(verb: str, steps: dict[str, Step], tmp_path: Path) -> None:
    kill_workers(steps[verb], tmp_path, FEW)


@pytest.mark.parametrize("verb", ["preprocess", "encode", "sample"])
def test_a_killed_driver_is_gone_on_from(verb: str, steps: dict[str, Step], tmp_path: Path) -> None:
    kill_drivers(steps[verb], tmp_path, FEW)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("verb", ["preprocess", "encode", "sample"])
def test_workers_killed_at_twenty_moments(verb: str, steps: dict[str, Step], tmp_path: Path) -> None:
    kill_workers(steps[verb], tmp_path, MANY)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("verb", ["preprocess", "encode", "sample"])
def test_drivers_killed_at_twenty_moments(verb: str, steps: dict[str, Step], tmp_path: Path) -> None:
    kill_drivers(steps[verb], tmp_path, MANY)


def test_a_step_started_twice_at_once_is_done_once(steps: dict[str, Step], tmp_path: Path) -> None:
    step = steps["preprocess"]
    pair = [step.start(tmp_path / "out") for _ in range(2)]
    outputs = [process.communicate()[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert sum("reused" in output for output in outputs) == 1, outputs
    assert_whole(Artifact.open(str(tmp_path / "out")), step)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 700 kB."""
    with small_tmpfs(tmp_path / "disk", "700k") as folder:
        yield folder


@pytest.mark.parametrize("verb", ["preprocess", "encode"])
def test_a_full_disk_in_mid_shard_is_said_and_got_over(verb: str, steps: dict[str, Step], small_disk: Path) -> None:
    step, out = steps[verb], small_disk / "out"
    with pytest.raises(Exception, match="no space") as caught:
        step.run(out)
    cause = cause_of(caught.value)
    assert isinstance(cause, UserError)
    assert "no space is left on the device" in str(cause)
    assert not (out / "manifest.json").exists()
    wait_for(lambda: not busy_workers())
    finished = inodes(out)
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    assert_whole(step.run(out), step)
    assert {name: (out / name).stat().st_ino for name in finished} == finished
    assert not list(out.rglob(".staging-*"))
