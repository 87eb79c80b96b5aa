"""Training and sampling on a cluster whose nodes go and come, and with another number of workers after each resume.

What they are compared with is the same training in one process, micro-batch by micro-batch, and the same samples.
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edt_core.config import SampleConfig, TrainConfig
from edt_core.errors import Stopped
from edt_core.progress import Silent
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.folder import Folder
from edt_core.store.layout import CHECKPOINT_MANIFEST, CHECKPOINTS
from edt_core.training.checkpoint import CheckpointManifest, read_manifest
from jobs.stages import sample, train
from tests.support.cluster import Nodes
from tests.support.local_training import checkpoint_steps, contents, trained, trained_here
from tests.support.models import classifier_artifact, made_model, opened
from tests.support.processes import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.timeout(1800)]

STEPS, EVERY = 30, 10
CONFIG = TrainConfig(
    model="EDT-Tiny/2",
    global_batch_size=8,
    micro_batch_size=4,
    max_steps=STEPS,
    log_every=2,
    checkpoint_every=EVERY,
    num_to_keep=10,
    num_workers=(1, 2),
)
AMPLE_S = 1200.0  # more than any of this takes
LOOK_S = 2.5  # a training looks for news at least so often


@dataclass
class Held(Silent):
    """A training that waits after a step until it may go on, and is asked to stop while there is a file.

    The file `until` says after which step it waits, and how long each step takes longer on the way there.
    """

    folder: Path

    def update(self, done: int, total: int, note: str = "", part: int | None = None, detail: str = "") -> None:
        (self.folder / f"step-{done}").touch()
        time.sleep(self._until()[1])
        while done >= self._until()[0]:
            self._note_warning()
            time.sleep(0.02)

    def stopping(self) -> bool:
        return (self.folder / "stop").exists()

    def _until(self) -> tuple[int, float]:
        step, pause_s = (self.folder / "until").read_text().split()
        return int(step), float(pause_s)

    def _note_warning(self) -> None:
        """Whether this worker was told that a node goes; the public call would wait for the other worker."""
        from ray.train.v2._internal.execution.context import get_train_context

        if get_train_context().preemption_context.preemption_info is not None:
            (self.folder / "warned").touch()


@dataclass
class Run:
    """A training at work in another thread."""

    result: Future[Artifact]
    folder: Path
    marks: Path

    def until(self, step: int, seconds: float = 0.0) -> None:
        """Let it go on to a step, for which it takes at least so many seconds."""
        hold(self.marks, step, seconds)

    def reached(self, step: int) -> None:
        """Wait for a checkpoint of this step or a later one."""
        self.wait(lambda: max(checkpoint_steps(self.folder), default=0) >= step)

    def trained(self, step: int) -> None:
        """Wait until it has come to a step or further."""
        self.wait(lambda: any(int(mark.name.split("-")[1]) >= step for mark in self.marks.glob("step-*")))

    def on(self, *nodes: Any) -> None:
        """Wait for a group of one worker on each of these nodes."""
        self.wait(lambda: sorted(group_nodes()) == sorted(node.node_id for node in nodes))

    def wait(self, ready: Callable[[], Any]) -> Any:
        found = wait_for(lambda: self.result.done() or ready())
        assert not self.result.done(), self.result.exception()
        return found


def hold(marks: Path, step: int, seconds: float = 0.0) -> None:
    (marks / "new").write_text(f"{step} {seconds / EVERY}")
    os.replace(marks / "new", marks / "until")


@pytest.fixture
def begin(latents_artifact: Artifact, tmp_path: Path) -> Iterator[Callable[[int], Run]]:
    """Starts the training of CONFIG, which then waits after a step."""
    pool = ThreadPoolExecutor(1)

    def begun(step: int) -> Run:
        hold(tmp_path, step)
        result = pool.submit(trained, CONFIG, latents_artifact, tmp_path / "out", "a1", (), Held(tmp_path))
        return Run(result, tmp_path / "out" / "a1", tmp_path)

    yield begun
    hold(tmp_path, STEPS + 1)
    pool.shutdown()


def group_nodes() -> list[str]:
    """The node of each worker of the group that trains now."""
    from ray.util import placement_group_table

    live = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
    return [node for group in live for node in group["bundles_to_node_id"].values()]


@pytest.fixture(scope="module")
def undisturbed(latents_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The training in this process: a batch of two micro-batches is what two workers have in one each."""
    return trained_here(CONFIG, latents_artifact, tmp_path_factory.mktemp("undisturbed"))


def assert_same(artifact: Artifact, undisturbed: Artifact) -> None:
    """Every row once, and every byte of the regular checkpoints."""
    rows = train.history(artifact)
    assert [row["step"] for row in rows] == list(range(2, STEPS + 1, 2))
    for row, other in zip(rows, train.history(undisturbed), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert contents(artifact.directory(CHECKPOINTS)) == contents(undisturbed.directory(CHECKPOINTS))
    assert artifact.counts["final"].endswith(str(STEPS))


@pytest.fixture
def soon_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train looks every second, not every minute, whether there is room for more workers."""
    import ray.train

    often = partial(ray.train.ScalingConfig, elastic_resize_monitor_interval_s=1.0)
    monkeypatch.setattr(ray.train, "ScalingConfig", often)


def test_what_is_started_beside_the_driver_is_not_on_a_node_that_may_go(two_nodes: Nodes) -> None:
    import ray

    from jobs.runtime.cluster import start_beside

    class Place:
        def node(self) -> str:
            return ray.get_runtime_context().get_node_id()

    two_nodes.have(2)
    places = [start_beside(Place) for _ in range(6)]
    assert set(ray.get([place.node.remote() for place in places])) == {ray.get_runtime_context().get_node_id()}
    for place in places:
        ray.kill(place)


def test_nodes_that_are_taken_away_lost_and_that_come_in_mid_epoch_cost_no_step(
    two_nodes: Nodes,
    soon_resized: None,
    begin: Callable[[int], Run],
    latents_artifact: Artifact,
    undisturbed: Artifact,
    tmp_path: Path,
) -> None:
    """Two workers, one after a notice, two, one without, and after a wish to stop another attempt with one."""
    first, second = two_nodes.have(2)
    run = begin(EVERY + 1)
    run.reached(EVERY)
    run.on(first, second)

    two_nodes.drain(second, AMPLE_S)  # before a node is taken away a checkpoint is written
    run.wait((tmp_path / "warned").exists)
    run.until(2 * EVERY - 1, seconds=2 * LOOK_S)
    (saved,) = run.wait(lambda: [manifest for manifest in manifests(run.folder) if not manifest.regular])
    assert saved.step % EVERY
    two_nodes.lose(second)
    run.until(2 * EVERY + 3)  # the worker that is left finds the other one gone, and ends
    run.on(first)

    run.reached(2 * EVERY)
    third = two_nodes.add()
    run.on(first, third)
    run.until(2 * EVERY + 5)  # both are at work, and not only about to be
    run.trained(2 * EVERY + 5)
    two_nodes.lose(third)
    run.until(2 * EVERY + 7)
    run.on(first)

    (tmp_path / "stop").touch()
    run.until(STEPS + 1, seconds=2 * LOOK_S)
    with pytest.raises(Stopped, match=f"stopped at step .* of {STEPS}") as stopped:
        run.result.result(timeout=AMPLE_S)
    step = int(str(stopped.value).split()[3])
    assert 2 * EVERY < step < STEPS
    assert checkpoint_steps(run.folder) >= {step}
    assert_same(trained_here(CONFIG, latents_artifact, tmp_path / "out", "a2", ("a1",)), undisturbed)


def manifests(folder: Path) -> list[CheckpointManifest]:
    found = []
    for path in folder.glob(f"{CHECKPOINTS}/*/{CHECKPOINT_MANIFEST}"):
        try:
            found.append(read_manifest(path.read_bytes(), str(path)))
        except FileNotFoundError:  # pruned between the two
            continue
    return found


def test_a_node_that_is_lost_while_sampling_costs_no_sample(two_nodes: Nodes, tmp_path: Path) -> None:
    """One worker a node; the units that the lost one had begun are made by the other."""
    import ray

    _, second = two_nodes.have(2)
    model, judge = opened(tmp_path / "model", made_model()), classifier_artifact(tmp_path / "classifier")
    assert model.autoencoder is not None
    inputs = {"checkpoint": model.checkpoint, "autoencoder": model.autoencoder, "classifier": judge}
    config = SampleConfig(num_samples=36, unit_size=3, num_sampling_steps=60, num_workers=2)

    def writer(folder: Path) -> ArtifactWriter:
        identity = sample.STAGE.fingerprint(config, {role: item.fingerprint for role, item in inputs.items()})
        return ArtifactWriter(Folder.at(folder), "features", identity)

    def units() -> int:
        return len(list((tmp_path / "out").glob("unit-*.safetensors")))

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(sample.STAGE.execute, config, inputs, writer(tmp_path / "out"), Silent())
        wait_for(lambda: result.done() or (units() >= 2 and ray.available_resources().get("CPU", 0) == 0))
        assert not result.done(), result.exception()
        two_nodes.lose(second)
        survived = result.result(timeout=AMPLE_S)
    here = sample.Sampler(config, inputs, writer(tmp_path / "again"))
    assert sum(here.work(number)[0] for number in range(12)) == config.num_samples
    again = {path.name: path.read_bytes() for path in (tmp_path / "again").glob("unit-*.safetensors")}
    assert {entry.path: survived.path(entry.path).read_bytes() for entry in survived.entries()} == again


@pytest.mark.slow
def test_two_workers_then_one_then_two(
    two_nodes: Nodes, latents_artifact: Artifact, undisturbed: Artifact, tmp_path: Path
) -> None:
    """Three attempts at one step of a workflow, the first two asked to stop."""
    two_nodes.have(2)
    reached = []
    for attempt, workers, previous in (("a1", 2, ()), ("a2", 1, ("a1",))):
        marks = tmp_path / attempt
        marks.mkdir()
        hold(marks, STEPS + 1, LOOK_S)
        (marks / "stop").touch()
        config = CONFIG.model_copy(update={"num_workers": workers})
        with pytest.raises(Stopped, match=f"stopped at step .* of {STEPS}") as stopped:
            trained(config, latents_artifact, tmp_path / "out", attempt, previous, Held(marks))
        reached.append(int(str(stopped.value).split()[3]))
        assert checkpoint_steps(tmp_path / "out" / attempt) >= {reached[-1]}
    assert 0 < reached[0] < reached[1] < STEPS
    config = CONFIG.model_copy(update={"num_workers": 2})
    assert_same(trained(config, latents_artifact, tmp_path / "out", "a3", ("a2", "a1")), undisturbed)
