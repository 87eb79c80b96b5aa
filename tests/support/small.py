"""A pipeline on real digits that is smaller than the quickstart only in its numbers, as a process of its own."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

EDT = [sys.executable, "-m", "pipelines.cli"]
MODEL = "edt-tiny-digits-32"
SMALL = (
    "autoencoder.steps=8",
    "classifier.steps=20",
    "classifier.feature_dim=16",  # fewer than the samples: a Fréchet distance of fewer is refused
    "train.max_steps=8",
    "train.log_every=4",
    "train.checkpoint_every=4",
    "sample.num_samples=40",
    "sample.num_sampling_steps=3",
    "sample.unit_size=20",
    "train.num_workers=1",  # two of each are tested with the jobs; here every process costs seconds
    "encode.num_workers=1",
    "sample.num_workers=1",
)
STEPS = 12  # preprocess, autoencoder, encode, classifier, reference, 2 x (train, sample, evaluate), report


def environment(**more: str) -> dict[str, str]:
    """Of this process, without what would lead to somebody's cluster or tracking server."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    return {**kept, **more}


def options(*assignments: str) -> list[str]:
    """`--set` for the small pipeline and these assignments."""
    return [part for text in (*SMALL, *assignments) for part in ("--set", text)]


def edt(
    *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """`edt` to its end, in a clean environment unless one is given."""
    return subprocess.run(
        [*EDT, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=env or environment(),
        timeout=timeout,
    )


def start(*arguments: str, **env: str) -> subprocess.Popen[str]:
    """`edt` as a process whose output, errors included, can be read."""
    return subprocess.Popen(
        [*EDT, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(**env)
    )


def start_run(store: Path, *assignments: str, **env: str) -> subprocess.Popen[str]:
    """`edt run quickstart` of the small size."""
    return start("run", "--store", str(store), *options(*assignments), **env)
