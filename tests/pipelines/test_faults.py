"""A run that is killed, doubled or cut off from its disk loses nothing and makes nothing twice.

Real processes are killed: `edt run` on a small pipeline. The suite kills one in a training and one while it registers;
`make faults` takes every step boundary, the middle of every step, and ten double starts, and loses nodes
(test_lost_nodes.py). Its figures are in docs/benchmarks.md.
"""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from edt_core.store.artifact import Artifact
from edt_core.store.layout import MANIFEST_NAME
from pipelines.outcome import Outcome
from tests.support.clocks import sitecustomize
from tests.support.disk import small_tmpfs
from tests.support.processes import joining, wait_for
from tests.support.runs import AMPLE_S, assert_once, count, digests, digests_of_run, finish, folders, has_tag, versions
from tests.support.small import MODEL, STEPS, copy_store, edt, environment, options, start_run

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.timeout(1800)]

ORDER = ["preprocess", "autoencoder", "classifier", "reference", "encode", f"untrained train {MODEL}"]
ORDER += [f"untrained sample {MODEL}", f"untrained evaluate {MODEL}"]
TRAINED = [f"{step} {MODEL}" for step in ("train", "sample", "evaluate")]
ORDER += TRAINED
ALL = [(step, where) for step in ORDER for where in ("middle", "boundary")] + [
    ("promote", "middle"),
    ("report", "boundary"),
]
OTHER = "edt-tiny-again"  # a model of the same configuration, of which nothing is registered yet


@dataclass
class Chain:
    """One store, a run that is killed again and again, and what was finished at each kill."""

    store: Path
    model: str = MODEL
    env: Mapping[str, str] = field(default_factory=dict)
    moment: random.Random | None = None  # draws how long after the beginning of a step the kill comes
    finished: dict[Path, bytes] = field(default_factory=dict)  # manifests, as they were when they were first seen
    kills: int = 0
    met: int = 0  # kills that came while the step was not finished, of those meant to

    def kill(self, step: str, where: str) -> None:
        """Start the run, and SIGKILL its driver at a moment."""
        process = start_run(self.store, *named(self.model), **self.env)
        try:
            wait_for(lambda: process.poll() is not None or self._reached(step, where))
            if self.moment is not None and where == "middle" and step in ORDER:
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
            return versions(self.store, self.model) > 0
        if where == "boundary":
            return self._finished(step)
        made = f"run_uuid IN (SELECT run_uuid FROM tags WHERE {has_tag('edt.fingerprint', self._folder(step).name)})"
        return count(self.store / "mlflow.db", "runs", f"status = 'RUNNING' AND {made}") > 0

    def _finished(self, step: str) -> bool:
        if step in ("promote", "report"):
            return bool(list(self.store.glob(f"report/*/{MANIFEST_NAME}")))
        return (self._folder(step) / MANIFEST_NAME).exists()

    def _folder(self, step: str) -> Path:
        return self.store / folders()[step]


def named(model: str) -> list[str]:
    """The assignment that registers the one model of the small pipeline under this name."""
    return [f"models={{{model}: {{}}}}"]


def finish_here(store: Path, model: str, **env: str) -> str:
    """Run to the end in this process, on the shared session; returns what it printed."""
    done = edt("run", "--store", str(store), *options(*named(model)), env=environment(**env))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def undisturbed(first: Outcome, store: Path) -> dict[str, str]:
    """Digests of a run that nothing happens to: the one that other modules look at, which was no process of its own."""
    return digests_of_run(first, store)


def assert_nothing_lost(chain: Chain, expected: dict[str, str]) -> None:
    assert digests(chain.store) == expected
    for path, text in chain.finished.items():
        assert path.read_bytes() == text, f"{path} was made again"
    assert_once(chain.store, restarted=True, model=chain.model)


def copy_untrained(store: Path, to: Path) -> None:
    """A copy of a store as it is before the training: neither its artifacts nor finished runs of them."""
    copy_store(store, to)
    with closing(sqlite3.connect(to / "mlflow.db")) as database:
        for step in TRAINED:
            folder = to / folders()[step]
            shutil.rmtree(folder)
            made = f"SELECT run_uuid FROM tags WHERE {has_tag('edt.fingerprint', folder.name)}"
            database.execute(f"UPDATE runs SET status = 'FAILED' WHERE run_uuid IN ({made})")
        database.commit()


def test_a_driver_is_killed_while_it_trains_and_two_at_once_make_the_rest_once(
    first: Outcome, store: Path, tmp_path: Path
) -> None:
    """All on one cluster that is there: the drivers meet at the actor that holds a fingerprint."""
    here, joined = tmp_path / "store", joining()
    copy_untrained(store, here)
    chain = Chain(here, OTHER, joined)
    chain.kill(TRAINED[0], "middle")
    assert (chain.kills, chain.met) == (1, 1)
    assert len(chain.finished) >= STEPS - len(TRAINED)

    begun = count(here / "mlflow.db", "runs")
    process = start_run(here, *named(OTHER), **joined)
    wait_for(lambda: process.poll() is not None or count(here / "mlflow.db", "runs") > begun)
    finish_here(here, OTHER, **joined)
    text = process.communicate(timeout=AMPLE_S)[0]
    assert process.returncode == 0, text
    assert_nothing_lost(chain, digests(store))
    for step in TRAINED[1:]:
        assert len([path for path in (here / folders()[step]).iterdir() if path.is_dir()]) == 1, "made twice"


def test_a_driver_that_is_killed_while_it_registers_registers_one_version(
    first: Outcome, store: Path, tmp_path: Path
) -> None:
    copy_store(store, tmp_path / "store")
    chain = Chain(tmp_path / "store", OTHER)
    chain.kill("promote", "middle")
    assert chain.kills == 1
    assert len(chain.finished) >= STEPS
    finish_here(chain.store, OTHER)
    assert_nothing_lost(chain, digests(store))
    champion = f"alias = 'champion' AND name = '{OTHER}'"
    assert count(chain.store / "mlflow.db", "registered_model_aliases", champion) == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_driver_killed_at_every_boundary_and_in_every_step(undisturbed: dict[str, str], tmp_path: Path) -> None:
    chain = Chain(tmp_path / "store", moment=random.Random(6))
    for step, where in ALL:
        chain.kill(step, where)
    finish(chain.store)
    text = f"{chain.kills} kills of {len(ALL)}, {chain.met} of {len(ORDER)} in the middle of a step"
    print(f"\n{text}; {len(undisturbed)} digests equal")
    assert chain.kills >= len(ALL) - 2  # the last may come when all is done
    assert_nothing_lost(chain, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_same_run_started_twice_at_once_ten_times_over(undisturbed: dict[str, str], tmp_path: Path) -> None:
    for number in range(10):
        store = tmp_path / str(number)
        assert_twice_at_once(store, {})
        assert digests(store) == undisturbed
        shutil.rmtree(store)
        print(f"\n{number + 1} double starts: each artifact once, one version")


@pytest.mark.slow
def test_the_same_run_started_twice_at_once_on_one_cluster(
    undisturbed: dict[str, str], tmp_path: Path, ray_session: None
) -> None:
    """On a new store: they meet at every step."""
    assert_twice_at_once(tmp_path / "store", joining())
    assert digests(tmp_path / "store") == undisturbed


def assert_twice_at_once(store: Path, env: dict[str, str]) -> None:
    pair = [start_run(store, **env) for _ in range(2)]
    texts = [process.communicate(timeout=AMPLE_S)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], texts
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
            text = process.communicate(timeout=AMPLE_S)[0]
        finally:
            subprocess.run(["umount", str(samples)], check=True)
        assert process.returncode == 2, text
        assert f"cannot write to {samples}" in text
        finished = digests(store)
        assert len(finished) == STEPS - 1 - 4  # neither samples nor evaluations, of the trained and the untrained model
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        refused = start_run(store)
        refusal = refused.communicate(timeout=AMPLE_S)[0]
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert refused.returncode == 2, refusal
        assert "cannot write to" in refusal
        assert "Traceback" not in text + refusal
        assert finished.items() <= undisturbed.items()
        assert f"{len(finished)} steps reused, " in finish(store)
        assert digests(store) == undisturbed


@pytest.mark.slow
def test_a_clock_that_is_set_back_between_runs_decides_nothing(undisturbed: dict[str, str], tmp_path: Path) -> None:
    store = tmp_path / "store"
    chain = Chain(store, moment=random.Random(1))
    chain.kill(f"train {MODEL}", "middle")
    (tmp_path / "sitecustomize.py").write_text(sitecustomize(-400 * 86400))
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    text = finish(store, PYTHONPATH=paths)
    assert text.count("  reused  ") >= len(chain.finished) - 1
    assert_nothing_lost(chain, undisturbed)
    made = [Artifact.read(str(path.parent)).manifest.created_at for path in store.glob(f"*/*/{MANIFEST_NAME}")]
    assert max(made)[:4] > min(made)[:4], "the clock was not set back"
    assert f"{STEPS} steps reused, 0 run" in finish(store, PYTHONPATH=paths)
    assert f"{STEPS} steps reused, 0 run" in finish(store)
