"""A run on a cluster whose nodes are lost and replaced makes what an undisturbed one makes, once."""

import os
from pathlib import Path

import pytest

from edt_core.store.layout import MANIFEST_NAME
from pipelines.outcome import Outcome
from tests.support.cluster import Nodes
from tests.support.processes import wait_for
from tests.support.runs import AMPLE_S, assert_once, digests, digests_of_run, folders
from tests.support.small import MODEL, start_run

pytestmark = [pytest.mark.ray, pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.usefixtures("first")  # before the shared session ends for the cluster
def test_worker_nodes_that_are_removed_in_every_kind_of_step(
    first: Outcome, store: Path, two_nodes: Nodes, tmp_path: Path
) -> None:
    """While it encodes, trains and samples, the older of two worker nodes goes, and another one comes."""
    undisturbed, here = digests_of_run(first, store), tmp_path / "store"
    two_nodes.have(2, num_cpus=2)
    process = start_run(here, RAY_ADDRESS=two_nodes.address)
    removed = 0
    for step in ("encode", f"train {MODEL}", f"sample {MODEL}"):
        folder = here / folders()[step]
        wait_for(lambda: process.poll() is not None or (folder.exists() and any(folder.iterdir())))  # noqa: B023
        assert process.poll() is None, process.communicate()[0]
        two_nodes.lose(two_nodes.workers[0])
        removed += not (folder / MANIFEST_NAME).exists()
        two_nodes.add(num_cpus=2)
    text = process.communicate(timeout=AMPLE_S)[0]
    assert process.returncode == 0, text
    print(f"\n3 nodes removed, {removed} while their step was at work")
    assert digests(here) == undisturbed
    assert_once(here, restarted=True)
    assert os.environ.get("RAY_ADDRESS") is None
