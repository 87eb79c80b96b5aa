"""A run that is killed, doubled, cut off from its disk or from a node loses nothing and makes nothing twice.

Real processes throughout: `edt run` on a small pipeline. The suite takes a few moments of each; `make faults` takes
every step boundary, the middle of every step, and ten double starts. Its figures are in docs/benchmarks.md.
"""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from edt_core.artifact import Artifact
from edt_core.schema import MANIFEST_NAME
from pipelines.artifacts import Store
from pipelines.catalog import Catalog
from pipelines.config import load_config
from pipelines.outcome import Outcome
from pipelines.plan import plan
from tests.support.disk import small_tmpfs
from tests.support.small import MODEL, SMALL, STEPS, start_run

pytestmark = pytest.mark.ray

DEADLINE_S = 300
ORDER = ["preprocess", "autoencoder", "classifier", "reference", "encode", f"untrained train {MODEL}"]
ORDER += [f"untrained sample {MODEL}", f"untrained evaluate {MODEL}"]
ORDER += [f"{step} {MODEL}" for step in ("train", "sample", "evaluate")]
FEW = [("encode", "boundary"), (f"train {MODEL}", "middle"), ("promote", "middle")]
ALL = [(step, where) for step in ORDER for where in ("middle", "boundary")] + [
    ("promote", "middle"),
    ("report", "boundary"),
]


@dataclass
class Chain:
    """One store, a run that is killed again and again, and what was finished at each kill."""

    store: Path
    moment: random.Random
    finished: dict[Path, bytes] = field(default_factory=dict)  # manifests, as they were when they were first seen
    kills: int = 0
    met: int = 0  # kills that came while the step was not finished, of those meant to

    def kill(self, step: str, where: str) -> None:
        """Start the run, and SIGKILL its driver at a moment."""
        process = start_run(self.store)
        try:
            wait_until(lambda: process.poll() is not None or self._reached(step, where))
            if where == "middle" and step in ORDER:
                time.sleep(self.moment.uniform(0, 1.0))
            alive = process.poll() is None
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        self.kills += alive
        self.met += alive and where == "middle" and step in ORDER and not self._finished(step)
        for path in self.store.glob(f"*/*/{MANIFEST_NAME}"):
            self.finished.setdefault(path, path.read_bytes())

    def _reached(self, step: str, where: str) -> bool:
        if step == "promote":  # the version is there, its decision is not yet, or just now
            return count(self.store / "mlflow.db", "model_versions") > 0
        if where == "boundary":
            return self._finished(step)
        identity = f"key = 'edt.fingerprint' AND value = '{self._folder(step).name}'"
        return count(self.store / "mlflow.db", "tags", identity) > 0  # its MLflow run has begun

    def _finished(self, step: str) -> bool:
        if step in ("promote", "report"):
            return bool(list(self.store.glob(f"report/*/{MANIFEST_NAME}")))
        return (self._folder(step) / MANIFEST_NAME).exists()

    def _folder(self, step: str) -> Path:
        return self.store / folders()[step]


def count(database: Path, table: str, where: str = "1") -> int:
    """Rows of a table of MLflow's SQLite file; 0 while there is none."""
    with (
        suppress(sqlite3.Error),
        closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=5)) as open_file,
    ):
        return int(open_file.execute(f"SELECT COUNT(*) FROM {table} WHERE {where}").fetchone()[0])
    return 0


_FOLDERS: dict[str, str] = {}


def folders() -> dict[str, str]:
    """`<kind>/<fingerprint>` of each step, as a plan tells it."""
    if not _FOLDERS:
        for step in plan(load_config("quickstart", SMALL, "/nowhere/edt-store")):
            _FOLDERS[step.step] = f"{step.kind}/{step.fingerprint}"
    return _FOLDERS


def wait_until(ready: Callable[[], bool]) -> None:
    until = time.monotonic() + DEADLINE_S
    while not ready():
        assert time.monotonic() < until, "the moment never came"
        time.sleep(0.02)


def finish(store: Path, **more: str) -> str:
    """Run to the end; returns what it printed."""
    process = start_run(store, **more)
    told = process.communicate(timeout=DEADLINE_S)[0]
    assert process.returncode == 0, told
    assert "Traceback" not in told, told
    return told


def digests(store: Path) -> dict[str, str]:
    """Content digest by kind and fingerprint; the report tells runs and times and is left out."""
    found = Store.open(str(store)).artifacts()
    return {f"{a.manifest.kind}/{a.fingerprint}": a.manifest.digest for a in found if a.manifest.kind != "report"}


def assert_once(store: Path, restarted: bool = False) -> None:
    """Every artifact is whole and was made by one finished MLflow run; one version is registered."""
    database = store / "mlflow.db"
    for path in store.glob(f"*/*/{MANIFEST_NAME}"):
        artifact = Artifact.open(str(path.parent))
        assert artifact.problems(deep=True) == []
        if not restarted:
            assert len([p for p in path.parent.iterdir() if p.is_dir()]) == 1, "a second attempt was made"
        identity = f"key = 'edt.fingerprint' AND value = '{artifact.fingerprint}'"
        made = f"run_uuid IN (SELECT run_uuid FROM tags WHERE {identity})"
        assert count(database, "runs", f"status = 'FINISHED' AND {made}") == 1, artifact.manifest.kind
    assert count(database, "model_versions", "current_stage != 'Deleted_Internal'") == 1


@pytest.fixture(scope="module")
def undisturbed(first: Outcome, store: Path) -> dict[str, str]:
    """Digests of a run that nothing happens to: the one that other modules look at, which was no process of its own."""
    tags = Catalog(first.tracking_uri, "").client.get_run(first.run_id).data.tags
    own = {value for key, value in tags.items() if key.startswith("edt.step.")}
    found = {name: digest for name, digest in digests(store).items() if name.partition("/")[2] in own}
    assert len(found) == STEPS - 1
    return found


def killed_at(moments: list[tuple[str, str]], store: Path) -> Chain:
    chain = Chain(store, random.Random(6))
    for step, where in moments:
        chain.kill(step, where)
    finish(store)
    return chain


def assert_nothing_lost(chain: Chain, undisturbed: dict[str, str]) -> None:
    assert digests(chain.store) == undisturbed
    for path, text in chain.finished.items():
        assert path.read_bytes() == text, f"{path} was made again"
    assert_once(chain.store, restarted=True)


def test_a_driver_that_is_killed_goes_on_to_the_same_digests(undisturbed: dict[str, str], tmp_path: Path) -> None:
    chain = killed_at(FEW, tmp_path / "store")
    assert chain.kills == len(FEW)
    assert_nothing_lost(chain, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_driver_killed_at_every_boundary_and_in_every_step(undisturbed: dict[str, str], tmp_path: Path) -> None:
    chain = killed_at(ALL, tmp_path / "store")
    told = f"{chain.kills} kills of {len(ALL)}, {chain.met} of {len(ORDER)} in the middle of a step"
    print(f"\n{told}; {len(undisturbed)} digests equal")
    assert chain.kills >= len(ALL) - 2  # the last may come when all is done
    assert_nothing_lost(chain, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_same_run_started_twice_at_once_ten_times_over(undisturbed: dict[str, str], tmp_path: Path) -> None:
    for number in range(10):
        store = tmp_path / str(number)
        assert_twice_at_once(store, {})
        assert digests(store) == undisturbed
        shutil.rmtree(store)
        print(f"\n{number + 1} double starts: each artifact once, one version")


def test_the_same_run_started_twice_at_once_on_one_cluster(
    undisturbed: dict[str, str], tmp_path: Path, ray_session: None
) -> None:
    """Both drivers join a cluster that is there: they meet at the actor that holds a fingerprint."""
    import ray

    assert_twice_at_once(tmp_path / "store", {"RAY_ADDRESS": ray.get_runtime_context().gcs_address})
    assert digests(tmp_path / "store") == undisturbed


def assert_twice_at_once(store: Path, env: dict[str, str]) -> None:
    pair = [start_run(store, **env) for _ in range(2)]
    told = [process.communicate(timeout=2 * DEADLINE_S)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], told
    assert_once(store)


@pytest.mark.slow
def test_a_store_that_turns_read_only_and_comes_back(undisturbed: dict[str, str], tmp_path: Path) -> None:
    """First in the middle of a run, where the samples would go; then as a whole, before a run."""
    with small_tmpfs(tmp_path / "disk", "400m") as disk:
        store, samples = disk / "store", disk / "store" / "features"
        samples.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(samples)], check=True)
        try:
            process = start_run(store)
            told = process.communicate(timeout=DEADLINE_S)[0]
        finally:
            subprocess.run(["umount", str(samples)], check=True)
        assert process.returncode == 2, told
        assert f"cannot write to {samples}" in told
        finished = digests(store)
        assert len(finished) == STEPS - 1 - 4  # neither samples nor evaluations, of the trained and the untrained model
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        refused = start_run(store)
        text = refused.communicate(timeout=DEADLINE_S)[0]
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert refused.returncode == 2, text
        assert "cannot write to" in text
        assert "Traceback" not in told + text
        assert finished.items() <= undisturbed.items()
        assert f"{len(finished)} steps reused, " in finish(store)
        assert digests(store) == undisturbed


# Python's clock in every process of a run, workers of Ray included; Ray itself does not start under a preloaded clock.
SET_BACK = """
import time

def back(clock, by):
    return lambda: clock() - by

time.time, time.time_ns = back(time.time, 400 * 86400), back(time.time_ns, 400 * 86400 * 10**9)
gmtime, localtime, strftime = time.gmtime, time.localtime, time.strftime
time.gmtime = lambda seconds=None: gmtime(time.time() if seconds is None else seconds)
time.localtime = lambda seconds=None: localtime(time.time() if seconds is None else seconds)
time.strftime = lambda format, moment=None: strftime(format, time.localtime() if moment is None else moment)
"""


@pytest.mark.slow
def test_a_clock_that_is_set_back_between_runs_decides_nothing(undisturbed: dict[str, str], tmp_path: Path) -> None:
    store = tmp_path / "store"
    chain = Chain(store, random.Random(1))
    chain.kill(f"train {MODEL}", "middle")
    (tmp_path / "sitecustomize.py").write_text(SET_BACK)
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    told = finish(store, PYTHONPATH=paths)
    assert told.count("  reused  ") >= len(chain.finished) - 1
    assert_nothing_lost(chain, undisturbed)
    made = [Artifact.read(str(path.parent)).manifest.created_at for path in store.glob(f"*/*/{MANIFEST_NAME}")]
    assert max(made)[:4] > min(made)[:4], "the clock was not set back"
    assert f"{STEPS} steps reused, 0 run" in finish(store, PYTHONPATH=paths)
    assert f"{STEPS} steps reused, 0 run" in finish(store)


@pytest.fixture
def cluster() -> Iterator[object]:
    """A cluster of three nodes; the session that other modules share is put back afterwards."""
    import ray
    from ray.cluster_utils import Cluster

    from jobs.cluster import connect

    shared = ray.is_initialized()
    ray.shutdown()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "8")
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            yield made
        finally:
            made.shutdown()
    if shared:
        connect(min_cpus=2)


@pytest.mark.slow
def test_worker_nodes_that_are_removed_in_every_kind_of_step(
    cluster: object, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """While it encodes, trains and samples, the older of two worker nodes goes, and another one comes."""
    store, nodes = tmp_path / "store", [cluster.add_node(num_cpus=2) for _ in range(2)]  # type: ignore[attr-defined]
    process = start_run(store, RAY_ADDRESS=cluster.address)  # type: ignore[attr-defined]
    removed = 0
    for step in ("encode", f"train {MODEL}", f"sample {MODEL}"):
        folder = store / folders()[step]
        wait_until(lambda: process.poll() is not None or (folder.exists() and any(folder.iterdir())))  # noqa: B023
        assert process.poll() is None, process.communicate()[0]
        cluster.remove_node(nodes.pop(0), allow_graceful=False)  # type: ignore[attr-defined]
        removed += not (folder / MANIFEST_NAME).exists()
        nodes.append(cluster.add_node(num_cpus=2))  # type: ignore[attr-defined]
    told = process.communicate(timeout=DEADLINE_S)[0]
    assert process.returncode == 0, told
    print(f"\n3 nodes removed, {removed} while their step was at work")
    assert digests(store) == undisturbed
    assert_once(store, restarted=True)
    assert os.environ.get("RAY_ADDRESS") is None
