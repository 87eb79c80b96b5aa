"""Training and sampling on a cluster whose nodes go, and with another number of workers after each resume.

What they are compared with is the same training in one process, micro-batch by micro-batch, and the same samples.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edt_core.artifact import Artifact, ArtifactWriter
from edt_core.config import SampleConfig, TrainConfig
from edt_core.data.latents import LatentDataset, LatentInfo, LatentShardWriter
from edt_core.errors import Stopped, UserError
from edt_core.progress import Silent
from edt_core.schema import CHECKPOINT_MANIFEST, CHECKPOINTS
from edt_core.storage import Folder
from edt_core.training.checkpoint import CheckpointManifest, read_manifest
from edt_core.training.context import LocalContext
from edt_core.training.loop import train as loop
from jobs import train
from jobs.cluster import cause_of, use_threads
from tests.jobs.test_train_faults import WORKER, checkpoint_steps
from tests.support.models import classifier_artifact, made_model, opened
from tests.support.processes import descendants, title, wait_for

pytestmark = pytest.mark.ray

STEPS, EVERY = 60, 20
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
DEADLINE_S = 8.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of one node with one CPU; the session that other modules share is put back afterwards."""
    import ray
    from ray.cluster_utils import Cluster

    from jobs.cluster import connect

    shared = ray.is_initialized()
    ray.shutdown()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
        # Ray may try for so long to start workers on a node that is gone: its count of nodes is up to 20 s old.
        patch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "8")
        made = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "include_dashboard": False},
        )
        try:
            connect(made.address)
            yield made
        finally:
            ray.shutdown()
            made.shutdown()
    if shared:
        connect(min_cpus=2)


@pytest.fixture
def second_node(cluster: Any) -> Iterator[Any]:
    """Another node with one CPU; a test may take it away."""
    import ray

    node = cluster.add_node(num_cpus=1)
    with suppress(ValueError):  # none yet; else it starts again, and counts the nodes anew
        ray.kill(ray.get_actor("AutoscalingCoordinator", "AutoscalingCoordinator"), no_restart=False)
    yield node
    if node in cluster.worker_nodes:
        cluster.remove_node(node)


@dataclass
class Paced(Silent):
    """Steps take `step_s` longer, while a file exists; asked to stop while another one does."""

    folder: Path
    step_s: float = 0.0

    def update(self, done: int, total: int, note: str = "", part: int | None = None, detail: str = "") -> None:
        if (self.folder / "slowly").exists():
            time.sleep(self.step_s)

    def stopping(self) -> bool:
        return (self.folder / "stop").exists()


def execute(
    latents: Artifact, folder: Path, progress: Silent, attempt: str = "", previous: tuple[str, ...] = (), **fields: Any
) -> Artifact:
    config = TrainConfig.model_validate({**CONFIG.model_dump(), **fields})
    identity = train.VERB.fingerprint(config, {"latents": latents.fingerprint})
    out = ArtifactWriter(Folder.at(folder), "checkpoint", identity, attempt, previous)
    return train.VERB.execute(config, {"latents": latents}, out, progress)


@dataclass
class Run:
    """A training at work in another thread."""

    result: Future[Artifact]
    folder: Path
    slow: Path

    def at_step(self, step: int) -> None:
        """Wait for a checkpoint of this step or a later one."""
        wait_for(lambda: self.result.done() or max(checkpoint_steps(self.folder), default=0) >= step)
        assert not self.result.done(), self.result.exception()

    def hurry(self) -> None:
        self.slow.unlink()

    def artifact(self) -> Artifact:
        return self.result.result(timeout=300)


@pytest.fixture
def begin(latents_artifact: Artifact, tmp_path: Path) -> Iterator[Callable[[float], Run]]:
    """Starts the training of CONFIG, slowed down by so many seconds a step until it is told to hurry."""
    pool = ThreadPoolExecutor(1)

    def begun(step_s: float) -> Run:
        slow = tmp_path / "slowly"
        slow.touch()
        progress = Paced(tmp_path, step_s)
        return Run(pool.submit(execute, latents_artifact, tmp_path / "out", progress), tmp_path / "out", slow)

    yield begun
    (tmp_path / "slowly").unlink(missing_ok=True)
    pool.shutdown()


def group_nodes() -> list[str]:
    """The node of each worker of the group that trains now."""
    from ray.util import placement_group_table

    live = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
    return [node for group in live for node in group["bundles_to_node_id"].values()]


@dataclass(frozen=True)
class Undisturbed:
    rows: list[dict[str, float]]
    checkpoints: Path


@pytest.fixture(scope="module")
def undisturbed(latents_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The training in this process: a batch of two micro-batches is what two workers have in one each."""
    import torch

    folder, threads = tmp_path_factory.mktemp("undisturbed"), torch.get_num_threads()
    use_threads(CONFIG.num_cpus_per_worker)
    try:
        dataset = LatentDataset(latents_artifact.paths("*.arrow"))
        state = loop(CONFIG, train.config_of(CONFIG.model, latents_artifact.counts), dataset, LocalContext(folder))
    finally:
        torch.set_num_threads(threads)
    return Undisturbed(state.history.rows, folder / CHECKPOINTS)


def assert_same(artifact: Artifact, undisturbed: Undisturbed) -> None:
    """Every row once, and every byte of the regular checkpoints."""
    rows = train.history(artifact)
    assert [row["step"] for row in rows] == list(range(2, STEPS + 1, 2))
    for row, other in zip(rows, undisturbed.rows, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert contents(artifact.directory(CHECKPOINTS)) == contents(undisturbed.checkpoints)
    assert artifact.counts["final"].endswith(str(STEPS))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_node_that_is_lost_in_mid_epoch_costs_no_step(
    cluster: Any, second_node: Any, begin: Callable[[float], Run], undisturbed: Undisturbed
) -> None:
    run = begin(0.1)
    run.at_step(EVERY)
    assert second_node.node_id in group_nodes()
    assert len(group_nodes()) == 2
    cluster.remove_node(second_node, allow_graceful=False)
    run.hurry()
    wait_for(lambda: run.result.done() or (len(group_nodes()) == 1 and second_node.node_id not in group_nodes()))
    assert not run.result.done(), run.result.exception()
    assert_same(run.artifact(), undisturbed)


def test_a_node_that_is_lost_while_sampling_costs_no_sample(cluster: Any, second_node: Any, tmp_path: Path) -> None:
    """One worker a node; the units that the lost one had begun are made by the other."""
    import ray

    from jobs import sample

    model, judge = opened(tmp_path / "model", made_model()), classifier_artifact(tmp_path / "classifier")
    assert model.autoencoder is not None
    inputs = {"checkpoint": model.checkpoint, "autoencoder": model.autoencoder, "classifier": judge}
    config = SampleConfig(num_samples=36, unit_size=3, num_sampling_steps=60, num_workers=2)

    def execute_in(folder: Path) -> Artifact:
        identity = sample.VERB.fingerprint(config, {role: item.fingerprint for role, item in inputs.items()})
        return sample.VERB.execute(config, inputs, ArtifactWriter(Folder.at(folder), "features", identity), Silent())

    def units() -> int:
        return len(list((tmp_path / "out").glob("unit-*.safetensors")))

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(execute_in, tmp_path / "out")
        wait_for(lambda: result.done() or (units() >= 2 and ray.available_resources().get("CPU", 0) == 0))
        assert not result.done(), result.exception()
        cluster.remove_node(second_node, allow_graceful=False)
        survived = result.result(timeout=300)
    assert survived.manifest.digest == execute_in(tmp_path / "again").manifest.digest


def test_before_a_node_is_taken_away_a_checkpoint_is_written(
    cluster: Any, second_node: Any, begin: Callable[[float], Run], undisturbed: Undisturbed
) -> None:
    run = begin(0.4)
    run.at_step(EVERY)
    assert second_node.node_id in group_nodes()
    assert len(group_nodes()) == 2
    deadline = time.monotonic() + DEADLINE_S
    drain(cluster, second_node, DEADLINE_S)
    out_of_turn = wait_for(
        lambda: run.result.done() or [m for m in manifests(run.folder) if not m.regular], deadline - time.monotonic()
    )
    assert not run.result.done(), run.result.exception()
    (saved,) = out_of_turn
    assert saved.step % EVERY
    time.sleep(max(0.0, deadline - time.monotonic()))
    cluster.remove_node(second_node, allow_graceful=False)
    run.hurry()
    wait_for(lambda: run.result.done() or (len(group_nodes()) == 1 and second_node.node_id not in group_nodes()))
    assert not run.result.done(), run.result.exception()
    assert_same(run.artifact(), undisturbed)


def drain(cluster: Any, node: Any, deadline_s: float) -> None:
    """Tell the cluster that a node will be taken away, as a cloud's notice of preemption does."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + deadline_s) * 1000)
    accepted, why = GcsClient(address=cluster.address).drain_node(node.node_id, reason, "a test", deadline_ms)
    assert accepted, why


def manifests(folder: Path) -> list[CheckpointManifest]:
    found = []
    for path in folder.glob(f"{CHECKPOINTS}/*/{CHECKPOINT_MANIFEST}"):
        try:
            found.append(read_manifest(path.read_bytes(), str(path)))
        except FileNotFoundError:  # pruned between the two
            continue
    return found


def test_two_workers_then_one_then_two(
    cluster: Any, second_node: Any, latents_artifact: Artifact, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Three attempts at one step of a workflow, the first two asked to stop."""
    reached = []
    for attempt, workers, previous in (("a1", 2, ()), ("a2", 1, ("a1",))):
        marks = tmp_path / attempt
        marks.mkdir()
        (marks / "slowly").touch()
        (marks / "stop").touch()  # rank 0 looks every two seconds
        with pytest.raises(Stopped, match=f"stopped at step .* of {STEPS}") as stopped:
            execute(latents_artifact, tmp_path / "out", Paced(marks, 0.1), attempt, previous, num_workers=workers)
        reached.append(int(str(stopped.value).split()[3]))
        assert checkpoint_steps(tmp_path / "out" / attempt) >= {reached[-1]}
    assert 0 < reached[0] < reached[1] < STEPS
    artifact = execute(latents_artifact, tmp_path / "out", Silent(), "a3", ("a2", "a1"), num_workers=2)
    assert_same(artifact, undisturbed)


def write_latents(folder: Path, spoilt: int | None = None) -> Artifact:
    """96 made-up latents; those of one row are not finite."""
    posterior = np.random.default_rng(0).normal(size=(96, 2, 2, 4, 8, 8)).astype(np.float32)
    if spoilt is not None:
        posterior[spoilt] = np.nan

    def write(path: Path) -> int:
        with LatentShardWriter(path, LatentInfo("test", 0.5, 32, (4, 8, 8), "images-00000.tar")) as writer:
            writer.write([f"{i:04d}" for i in range(96)], np.arange(96) % 4, posterior)
        return writer.rows

    out = ArtifactWriter(Folder.at(folder), "latents", "f" * 64)
    out.write("latents-00000.arrow", write)
    counts = {"images": 96, "classes": 4, "image_size": 32, "latent_shape": [4, 8, 8], "scaling_factor": 0.5}
    return out.commit({}, {}, {**counts, "autoencoder_digest": "0" * 64})


@pytest.fixture
def workers_seen() -> Iterator[set[int]]:
    """Processes of Ray Train's workers below this one."""
    seen: set[int] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.1):
            seen.update(pid for pid in descendants(os.getpid()) if title(pid).startswith(f"ray::{WORKER}"))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    yield seen
    over.set()
    thread.join()


@pytest.mark.parametrize("kind", ["one worker's batch", pytest.param("every worker's shard", marks=pytest.mark.slow)])
def test_a_users_mistake_is_not_tried_three_times(
    kind: str, cluster: Any, second_node: Any, workers_seen: set[int], tmp_path: Path
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
    with pytest.raises(UserError, match=message) as raised:
        execute(latents, tmp_path / "out", Silent(), num_workers=2, max_failures=3)
    assert cause_of(raised.value) is raised.value
    assert 2 <= len(workers_seen) <= 4, "the workers were started again more than once"
    names = [path.name for path in (tmp_path / "out").rglob(".*")]
    assert not [name for name in names if name.startswith(".verdict")]
