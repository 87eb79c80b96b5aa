"""A run on hosts without a shared disk makes what a run on one machine makes, also if hosts are lost while it works.

Each host has disks and a network of its own (tests/support/hosts); the store is a bucket. `make faults` runs them; the
figures are in docs/benchmarks.md.
"""

import shutil
from pathlib import Path

import pytest
import requests

from edt_core.store.store import Store
from pipelines.outcome import Outcome
from tests.support.hosts.cluster import RayHosts, ray_hosts
from tests.support.hosts.run import Run, trainers
from tests.support.local_ray import local_ray_train
from tests.support.runs import digests, digests_of_run
from tests.support.small import MODEL, copy_store, pipeline

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(3600)]

TRAIN = f"train {MODEL}"
STEPS = (
    "preprocess",
    "classifier",
    "reference",
    "autoencoder",
    "encode",
    TRAIN,
    f"sample {MODEL}",
    f"evaluate {MODEL}",
)
HOUR_S = 3600
# A worker on each of two hosts with two CPUs; in one process their parts of a batch are two micro-batches.
LONG = ("train.max_steps=240", "train.checkpoint_every=20", "train.micro_batch_size=24")
LONG += ("train.num_workers=2", "train.num_cpus_per_worker=1.5")


@pytest.fixture(scope="module")
def undisturbed(first: Outcome, store: Path) -> dict[str, str]:
    """Digests of a run on one machine, with its store on the disk."""
    return digests_of_run(first, store)


def assert_same(cluster: RayHosts, text: str, undisturbed: dict[str, str]) -> None:
    """The run made each artifact whole, and one version."""
    assert "Traceback" not in text, text
    assert digests(cluster.store) == undisturbed
    for artifact in Store.open(cluster.store).artifacts():
        assert artifact.problems(deep=True) == []
    uri = cluster.network.environment["MLFLOW_TRACKING_URI"]
    found = requests.get(f"{uri}/api/2.0/mlflow/model-versions/search", timeout=600).json()
    assert [version["name"] for version in found["model_versions"]] == [MODEL]


def test_a_host_that_is_lost_in_a_training_costs_nothing(undisturbed: dict[str, str]) -> None:
    """Three hosts; the one that trains loses its power, and no other takes its place."""
    with ray_hosts(workers=2) as cluster:
        run = Run(cluster, cluster.head)
        cluster.lose(run.training())
        assert not run.finished(TRAIN)
        assert_same(cluster, run.finish(), undisturbed)


@pytest.mark.parametrize(
    ("delay_s", "loss", "clocks"),
    [(0.0, 0.0, (HOUR_S, -HOUR_S)), (0.05, 0.01, (0,))],
    ids=["clocks an hour apart", "50 ms and 1 % loss"],
)
def test_a_host_is_lost_in_every_step(
    delay_s: float, loss: float, clocks: tuple[int, ...], undisturbed: dict[str, str]
) -> None:
    """Three hosts. In each step one that works is lost, and another one comes; their clocks are ahead, behind, ..."""
    with ray_hosts(workers=0, delay_s=delay_s, loss=loss) as cluster:
        for number in range(2):
            cluster.begin(clock_s=clocks[number % len(clocks)])
        run, met = Run(cluster, cluster.head), 0
        for number, step in enumerate(STEPS):
            cluster.lose(run.at_work(step))
            met += not run.finished(step)
            cluster.begin(clock_s=clocks[number % len(clocks)])
        assert_same(cluster, run.finish(), undisturbed)
        made = sorted(artifact.manifest.created_at for artifact in Store.open(cluster.store).artifacts())
        print(f"\n{len(STEPS)} hosts lost, {met} while their step was at work; made from {made[0]} to {made[-1]}")
        assert met > 1


@pytest.fixture(scope="module")
def long(first: Outcome, store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of a run on one machine whose training is LONG."""
    copy = tmp_path_factory.mktemp("long") / "store"
    copy_store(store, copy)
    with local_ray_train():
        return digests_of_run(pipeline(copy, *LONG), copy)


def test_a_head_restarts_while_a_training_runs(long: dict[str, str]) -> None:
    """Ray's fault-tolerant GCS: Redis, on another host, has what the head knew. The training does not notice."""
    if shutil.which("redis-server") is None:
        pytest.skip("the test of a head that restarts needs redis-server (Debian: apt-get install redis-server)")
    with ray_hosts(workers=2, redis=True) as cluster:
        run = Run(cluster, cluster.driver(), *LONG)  # on the head it would end with it
        run.wait(run.newest)
        workers = [trainers(host) for host in cluster.workers]
        assert all(workers), "both hosts train"
        cluster.restart_head()
        reached = run.newest()
        run.wait(lambda: run.newest() > reached)
        assert [trainers(host) for host in cluster.workers] == workers, "the training was started again"
        text = run.finish()
        assert "Traceback" not in text, text
        assert digests(cluster.store) == long


def test_a_driver_is_lost_and_the_clock_of_the_next_one_is_behind(long: dict[str, str]) -> None:
    """By its name the attempt that resumes is two hours older than the one whose checkpoints it takes over."""
    with ray_hosts(workers=2) as cluster:
        host = cluster.driver(clock_s=2 * HOUR_S)
        run = Run(cluster, host, *LONG)
        run.wait(lambda: run.newest() > 20)
        ((first_attempt, reached),) = run.checkpoints().items()
        host.kill()
        again = Run(cluster, cluster.driver(), *LONG)
        attempts = again.wait(again.taken_over)
        older, newer = sorted(attempts)
        assert newer == first_attempt
        assert max(attempts[older]) >= max(reached), "it did not start from a checkpoint of the first"
        text = again.finish()
        assert "Traceback" not in text, text
        assert digests(cluster.store) == long


def test_a_host_whose_disk_is_full_of_cache(undisturbed: dict[str, str]) -> None:
    """One clear message that says which host; the same command finishes once the disk is larger."""
    with ray_hosts(workers=1, EDT_CACHE_DIR="/root/cache", EDT_CACHE_BYTES="10GB") as cluster:
        host = cluster.workers[0]
        host.run("mkdir", "/root/cache")
        host.run("mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", "/root/cache")
        text = Run(cluster, cluster.head).finish(code=2)
        assert "Traceback" not in text, text
        assert f"cannot write to the cache /root/cache on {host.name} (set EDT_CACHE_DIR" in text
        host.run("mount", "-o", "remount,size=1g", "/root/cache")
        assert_same(cluster, Run(cluster, cluster.head).finish(), undisturbed)
