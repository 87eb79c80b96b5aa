"""The plan of image shards in a file: each task reads what it would have been given, and memory stays small."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from edt_core.child_process import child_environment, python_command
from edt_core.data.sources import Listing
from edt_core.data.sources.walk import STAT
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.folder import Folder
from edt_core.store.layout import IMAGE_SHARD
from jobs.stages.reuse.images import EarlierImages
from jobs.stages.reuse.plan_file import PLAN_NAME, ShardPlans, write_plans
from jobs.stages.reuse.siblings import Places

IMAGES, SIZE = 50, 8


def listing(access: Any, remote: bool = False) -> Listing:
    columns: dict[str, Any] = {
        "name": pa.array([b"class/%08d.png" % k for k in range(IMAGES)]),
        "label": pa.array([k % 2 for k in range(IMAGES)], pa.int32()),
        "size": pa.array(range(IMAGES), pa.int64()),
    }
    if access != "file":
        columns["file"] = pa.array([b"file-%03d" % (k // 10) for k in range(IMAGES)]).dictionary_encode()
        columns["offset"] = pa.array(range(IMAGES), pa.int64())
    if remote:
        columns["version"] = pa.array([f"v{k}" for k in range(IMAGES)])
    elif access == "file":
        columns |= {name: pa.array(np.arange(IMAGES, dtype=np.uint64)) for name in STAT}
    return Listing(Folder.at("s3://bucket/x" if remote else "/images"), ("a", "b"), pa.table(columns), access)


def earlier(folder: Path) -> EarlierImages:
    """Of the first 20 images half are in an artifact, and one of these was quarantined."""
    out = ArtifactWriter(Folder.at(folder), "images", "0" * 64)
    for number in range(3):
        out.write_bytes(IMAGE_SHARD.format(number), b"%d" % number)
    artifact: Artifact = out.commit({}, {}, {})
    which = np.where((np.arange(IMAGES) < 20) & (np.arange(IMAGES) % 2 == 0), 0, -1).astype(np.int8)
    row = np.arange(IMAGES, dtype=np.int32)
    row[4] = -1
    digests = np.random.default_rng(0).integers(0, 256, (IMAGES, 32), dtype=np.uint8)
    shard = (np.arange(IMAGES) // 10).astype(np.int32)
    return EarlierImages(Places((artifact,), which, shard, row), {4: "truncated"}, digests)


@pytest.mark.parametrize("access", ["file", "range", "parquet"])
@pytest.mark.parametrize("with_earlier", [False, True])
@pytest.mark.parametrize("remote", [False, True])
def test_a_task_reads_the_plan_that_was_made(access: Any, with_earlier: bool, remote: bool, tmp_path: Path) -> None:
    plans = ShardPlans(listing(access, remote), SIZE, earlier(tmp_path / "artifact") if with_earlier else None)
    assert len(plans) == 7
    planned = write_plans(plans, Folder.at(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [PLAN_NAME]
    for shard, plan in zip(planned, plans, strict=True):
        sent = pickle.dumps(shard)
        assert len(sent) < 4000
        read = pickle.loads(sent).read()
        assert (read.index, read.first, read.name) == (plan.index, plan.first, plan.name)
        assert read.listing.table.equals(plan.listing.table)
        assert (read.listing.root, read.listing.access) == (plan.listing.root, plan.listing.access)
        assert (read.earlier is None) == (plan.earlier is None) == (not with_earlier or plan.first >= 20)
        if read.earlier is not None and plan.earlier is not None:
            assert read.earlier.reasons == plan.earlier.reasons
            assert np.array_equal(read.earlier.digests, plan.earlier.digests)
            assert read.earlier.places.artifacts == plan.earlier.places.artifacts
            for name in ("artifact", "shard", "row"):
                values = getattr(read.earlier.places, name)
                assert np.array_equal(values, getattr(plan.earlier.places, name))
                assert values.dtype == getattr(plan.earlier.places, name).dtype


def test_a_plan_is_read_from_a_store(s3: str) -> None:
    plans = ShardPlans(listing("file"), SIZE)
    planned = write_plans(plans, Folder.at(f"{s3}/images/attempt"))
    assert planned[3].read().listing.table.equals(plans[3].listing.table)


PLAN = """
import hashlib, sys, tempfile
import numpy as np
from edt_core.config import PreprocessConfig, SourceConfig
from edt_core.data.sources import Listing, digest_cache, file_digests, list_source, listing_identity, source_digests
from edt_core.data.sources.walk import below
from edt_core.data.sources.walk.entry import Entry
from edt_core.data.tables import arrow_file, digest_rows, sorting
from edt_core.memory import peak_bytes, reset_peak
from edt_core.store.folder import Folder
from jobs.stages.preprocess import plan_shards
from jobs.stages.reuse.plan_file import write_plans

def walk(root, folder):
    for k in range(1, images // 100 + 1):
        yield Entry(b"%s/%s_%d.JPEG" % (folder, folder, k), False, k, "", (k, k, k, k))

def stats_of(root, names):
    numbers = [int(name[20:-5]) for name in names.to_pylist()]
    return np.repeat(np.array(numbers, np.uint64)[:, None], 5, axis=1)

def digests(listing, work):
    global read
    read += len(listing)
    return (hashlib.sha256(b"%d" % k).digest() for k in range(len(listing)))

# Batches of few rows: what a pass holds of any number of images is the same for the small number as for the large one.
arrow_file.ROWS = sorting.ROWS = file_digests.ROWS = digest_rows.ROWS = digest_cache._ROWS = 1 << 13
arrow_file._HELD, file_digests._LOOKED_UP, sorting._SAMPLE, below._ENTRIES = 1 << 14, 1 << 14, 32, 512
below.walk_disk, digest_cache.stats_of, Listing.convert = walk, stats_of, digests
peaks = []
for images in map(int, sys.argv[2:]):
    for time in ("first", "again"):
        read = 0
        reset_peak()
        listing = list_source(SourceConfig(kind="image_folder", path=sys.argv[1]))
        assert len(listing) == images
        identity = listing_identity(listing, source_digests(listing))
        with tempfile.TemporaryDirectory(dir=sys.argv[1] + "/..") as folder:
            write_plans(plan_shards(listing, PreprocessConfig()), Folder.at(folder))
        peaks.append(peak_bytes())
    assert not read, "what is known is not read"
print(*peaks)
"""
# With fewer than eight batches a pass would not hold as many as it ever does.
FEW, MANY = 400_000, 1_500_000
MIB_PER_MILLION = 64


@pytest.mark.extern
@pytest.mark.skipif(sys.platform != "linux", reason="needs a process's own peak of Linux's /proc")
def test_memory_hardly_grows_with_the_number_of_images(tmp_path: Path) -> None:
    """Listing, digests, identity and plan of a million images more, in a process of their own; none of them exists."""
    for k in range(100):
        (tmp_path / "images" / f"n{k:08d}").mkdir(parents=True)
    command = python_command("-c", PLAN, str(tmp_path / "images"), str(FEW), str(MANY))
    # Large arrays come from the system and go back to it: by default glibc keeps them once it has seen one.
    malloc = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_ARENA_MAX": "2"}
    environment = child_environment({**os.environ, **malloc}, EDT_CACHE_DIR=str(tmp_path / "cache"))
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8", env=environment)
    peaks = list(map(int, done.stdout.split()))
    for time, (few, many) in {"first": (peaks[0], peaks[2]), "again": (peaks[1], peaks[3])}.items():
        assert (many - few) / (MANY - FEW) * 1e6 <= MIB_PER_MILLION << 20, time
