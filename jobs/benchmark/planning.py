"""Time and memory of listing and planning very many images."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edt_core.child_process import child_environment, python_command
from edt_core.config import PreprocessConfig, SourceConfig
from edt_core.memory import peak_bytes, reset_peak, resident_bytes
from edt_core.printing.console import say
from edt_core.store.folder import Folder
from jobs.benchmark.table import Row, mib

CLASSES = 1000
_DIGITS = len(b"n00000000/n00000000_")
_LINKS = 50_000  # names of one file; ext4 allows 65,000


class Planned(NamedTuple):
    """What a plan took. before: resident bytes when it began, libraries included; peak: the most during it."""

    seconds: float
    before: int
    peak: int
    shards: int


def make_paths(root: Path, number: int, classes: int = CLASSES) -> None:
    """Files named like those of ImageNet in class folders: links to few files, which are made in seconds."""
    origin = root.with_name(f"{root.name}-origin")
    origin.mkdir(parents=True)
    made = 0
    for k in range(classes):
        folder = root / f"n{k:08d}"
        folder.mkdir(parents=True)
        for i in range(number // classes):
            if made % _LINKS == 0:
                current = str(origin / f"{made}")
                os.close(os.open(current, os.O_CREAT))
            os.link(current, f"{folder}/n{k:08d}_{i}.JPEG")
            made += 1


@contextmanager
def synthetic_files(images: int) -> Iterator[None]:
    """While it lasts, each class folder that is walked has its share of `images` files, none of which exists.

    Their names are those of `make_paths`; size and times are made of a file's number.
    """
    from edt_core.data.sources import digest_cache
    from edt_core.data.sources.walk import below
    from edt_core.data.sources.walk.entry import Entry

    walk_disk, stats_of = below.walk_disk, digest_cache.stats_of

    def walk(root: bytes, folder: bytes) -> Iterator[Entry]:
        for k in range(1, images // CLASSES + 1):
            yield Entry(b"%s/%s_%d.JPEG" % (folder, folder, k), False, k, "", (k, k, k, k))

    def stats(root: Path, names: Any) -> Any:
        numbers = [int(name[_DIGITS:-5]) for name in names.to_pylist()]
        return np.repeat(np.array(numbers, np.uint64)[:, None], 5, axis=1)

    below.walk_disk, digest_cache.stats_of = walk, stats
    try:
        yield
    finally:
        below.walk_disk, digest_cache.stats_of = walk_disk, stats_of


def make_classes(root: Path) -> None:
    """The class folders, empty."""
    for k in range(CLASSES):
        (root / f"n{k:08d}").mkdir(parents=True, exist_ok=True)


def plan_synthetic(work: Path, images: int) -> Planned:
    """List that many files that do not exist and write the plan of their shards, in a process of its own."""
    make_classes(work / "classes")
    return plan_in_child(work / "classes", images)


def plan_in_child(root: Path, synthetic: int = 0) -> Planned:
    """List a folder and write the plan of its shards, in a process of its own."""
    command = python_command("-m", "jobs.benchmark.planning", str(root), str(synthetic))
    done = subprocess.run(command, check=True, capture_output=True, encoding="utf-8", env=child_environment())
    return Planned(*json.loads(done.stdout))


def measure(root: Path) -> Planned:
    """List a folder and write the plan of its shards, in this process."""
    from edt_core.data.sources import list_source
    from jobs.stages.preprocess import plan_shards
    from jobs.stages.reuse.plan_file import write_plans

    reset_peak()
    before, started = resident_bytes(), time.perf_counter()
    listing = list_source(SourceConfig(kind="image_folder", path=str(root)))
    with tempfile.TemporaryDirectory(dir=root.parent) as folder:
        plans = write_plans(plan_shards(listing, PreprocessConfig()), Folder.at(folder))
    return Planned(time.perf_counter() - started, before, peak_bytes(), len(plans))


def bench_planning(work: Path, number: int, classes: int = CLASSES) -> list[Row]:
    """Seconds and highest memory of listing `number` files in class folders and planning their shards."""
    make_paths(work / "paths", number, classes)
    planned = plan_in_child(work / "paths")
    what = f"planning {number:,} paths into {planned.shards} shards"
    return [
        Row(what, f"{planned.seconds:.1f} s", "", None, "under 60 s"),
        Row(f"{what}, memory", mib(planned.peak), f"before it {mib(planned.before)}", None, "under 2,048 MiB"),
    ]


if __name__ == "__main__":
    synthetic = int(sys.argv[2])
    with synthetic_files(synthetic) if synthetic else nullcontext():
        say(json.dumps(measure(Path(sys.argv[1]))))
