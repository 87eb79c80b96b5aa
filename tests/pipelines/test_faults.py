"""A run that is killed loses nothing: finished steps are reused, and a training goes on from its checkpoint."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edt_core.artifact import Artifact
from edt_core.schema import MANIFEST_NAME
from pipelines.artifacts import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow]

OPTIONS = [
    "autoencoder.steps=4",
    "classifier.steps=4",
    "train.max_steps=120",
    "train.checkpoint_every=10",
    "sample.num_samples=20",
    "sample.num_sampling_steps=2",
]
DEADLINE_S = 400


def start(store: Path) -> subprocess.Popen[str]:
    settings = [part for text in OPTIONS for part in ("--set", text)]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "run", "quickstart", "--store", str(store), *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def kill_when(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    """SIGKILL the driver at the moment `ready` says so."""
    until = time.monotonic() + DEADLINE_S
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "the moment never came"
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()


def digests(store: Path) -> dict[str, str]:
    """Content digest by kind and fingerprint; the report tells times and is left out."""
    found = Store.open(str(store)).artifacts()
    return {f"{a.manifest.kind}-{a.fingerprint}": a.manifest.digest for a in found if a.manifest.kind != "report"}


def test_a_driver_killed_in_mid_training_goes_on_to_the_same_digests(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0

    def past_a_checkpoint() -> bool:
        return bool(list(killed.glob("checkpoint/*/*/checkpoints/step-00000020/checkpoint.json")))

    kill_when(start(killed), past_a_checkpoint)
    finished = digests(killed)
    assert len(finished) >= 3
    again = start(killed)
    output = again.communicate()[0]
    assert again.returncode == 0, output
    assert output.count("  reused  ") >= len(finished)
    assert digests(killed) == digests(whole)


def test_the_same_run_started_twice_at_once_makes_each_artifact_once(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    pair = [start(tmp_path / "store") for _ in range(2)]
    outputs = [process.communicate()[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    folders = [path.parent for path in (tmp_path / "store").glob(f"*/*/{MANIFEST_NAME}")]
    for folder in folders:
        assert Artifact.open(str(folder)).problems(deep=True) == []
        assert len([path for path in folder.iterdir() if path.is_dir()]) == 1, "a second attempt was made"
    client = MlflowClient(f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}")
    assert len(client.search_model_versions("name = 'edt-tiny-digits-32'")) == 1
