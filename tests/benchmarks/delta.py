"""What a changed source costs: `python -m tests.benchmarks.delta WORK [IMAGES] [FILES]`, in WORK, an empty folder.

First the identity of FILES (100,000) files that nobody touched, against reading them. Then IMAGES (20,000) images, of
which 1 % are added, 1 % are removed, and a class is renamed: processor time of identity, preprocess, encode and
reference, against making the same artifacts from nothing, and whether the files are equal. All in this process: what
Ray adds is not counted.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edt_core.autoencoders.autoencoder import build_autoencoder
from edt_core.config import AutoencoderConfig, EncodeConfig, PreprocessConfig, ReferenceConfig, SourceConfig
from edt_core.data.sources import list_source, listing_identity, source_digests
from edt_core.progress import Silent
from edt_core.store.artifact import Artifact
from edt_core.store.folder import Folder
from edt_core.store.store import Store
from jobs.benchmark.images import made_photos
from jobs.benchmark.table import hardware
from jobs.stages import encode, preprocess, reference
from jobs.stages.autoencoder import published_artifact
from jobs.stages.preprocess import image_source
from tests.support.local_ray import local_ray
from tests.support.models import classifier_artifact

CLASSES = 20
SETTLED_S = 2.5  # after which a file that was written may be known again
Times = dict[str, float]


def timed(times: Times, name: str, call: Callable[[], Any]) -> Any:
    """The result of a call; adds its processor time [s], of all threads, to `times`."""
    before = time.process_time()
    result = call()
    times[name] = times.get(name, 0.0) + time.process_time() - before
    return result


def write_images(root: Path, photos: list[bytes], first: int, number: int) -> None:
    """Photos that all differ: bytes after the end of a JPEG file change its digest, not its pixels."""
    for k in range(first, first + number):
        folder = root / f"class{k % CLASSES:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{k:07d}.jpg").write_bytes(photos[k % len(photos)] + b"%d" % k)


def make(store: Path, root: Path, vae: Artifact, judge: Artifact, times: Times) -> list[Artifact]:
    """Images, latents and reference of a source, in a store."""
    source = timed(times, "identity", lambda: image_source(SourceConfig(kind="image_folder", path=str(root))))
    steps: list[tuple[Any, Any, Callable[[list[Artifact]], dict[str, Any]]]] = [
        (preprocess.STAGE, PreprocessConfig(image_size=64), lambda made: {"source": source}),
        (encode.STAGE, EncodeConfig(num_cpus_per_worker=1), lambda made: {"images": made[0], "autoencoder": vae}),
        (reference.STAGE, ReferenceConfig(), lambda made: {"images": made[0], "classifier": judge}),
    ]
    artifacts: list[Artifact] = []
    for stage, config, inputs_of in steps:
        inputs = inputs_of(artifacts)
        identity = stage.fingerprint(config, {role: item.fingerprint for role, item in inputs.items()})
        out = Store.open(str(store)).writer(stage.kind, identity)
        artifacts.append(
            timed(times, stage.name, lambda: stage.execute(config, inputs, out, Silent()))  # noqa: B023  called at once
        )
    return artifacts


def measure(work: Path, number: int) -> None:
    """Print a row for each kind of change."""
    photos = [path.read_bytes() for path in made_photos(work / "photos")]
    build_autoencoder(AutoencoderConfig(downsample_factor=8, base_channels=8), 64).save_pretrained(work / "vae")
    vae = published_artifact(str(work / "vae"), Folder.at(work / "autoencoder"))
    judge = classifier_artifact(work / "judge", CLASSES, 64)
    write_images(work / "images", photos, 0, number)
    time.sleep(SETTLED_S)
    base: Times = {}
    make(work / "store", work / "images", vae, judge, base)
    print(f"\n{number:,} images from nothing: {told(base)}", flush=True)
    part = number // 100

    def removed() -> None:
        for path in sorted((work / "images").glob("*/*.jpg"))[::100]:
            path.unlink()

    changes: dict[str, Callable[[], object]] = {
        f"{part:,} added": lambda: write_images(work / "images", photos, number, part),
        f"{part:,} removed": removed,
        "a class renamed": lambda: (work / "images" / "class03").rename(work / "images" / "zebra"),
    }
    print("| change | from nothing [s] | with the store [s] | share | files equal | rows reused |")
    print("|---|---|---|---|---|---|")
    for name, change in changes.items():
        change()
        time.sleep(SETTLED_S)
        times, whole = Times(), Times()
        found = make(work / "store", work / "images", vae, judge, times)
        os.environ["EDT_CACHE_DIR"] = str(work / "cache-nothing")
        nothing = make(work / "nothing", work / "images", vae, judge, whole)
        os.environ["EDT_CACHE_DIR"] = str(work / "cache")
        same = all(one.manifest.files == other.manifest.files for one, other in zip(found, nothing, strict=True))
        reused = [(artifact.manifest.reused or {}).get("rows", 0) for artifact in found]
        share = sum(times.values()) / sum(whole.values())
        cells = (name, told(whole), told(times), f"{share:.1%}", "yes" if same else "NO", str(reused))
        print(f"| {' | '.join(cells)} |", flush=True)
        for folder in ("nothing", "cache-nothing"):
            shutil.rmtree(work / folder, ignore_errors=True)


def told(times: Times) -> str:
    """The times and their sum."""
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in times.items())
    return f"{sum(times.values()):.2f} ({parts})"


def measure_identity(work: Path, number: int, size: int = 50_000) -> None:
    """Print the time of the identity of untouched files, against reading them."""
    rng = np.random.default_rng(0)
    noise = rng.bytes(size)
    for k in range(number):
        folder = work / "files" / f"class{k % 100:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{k:07d}.jpg").write_bytes(b"%d" % k + noise)
    time.sleep(SETTLED_S)
    times: Times = {}
    walls: Times = {}

    def part(name: str, call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = timed(times, name, call)
        walls[name] = time.perf_counter() - began
        return result

    def listed(folder: str) -> Any:
        return list_source(SourceConfig(kind="image_folder", path=str(work / folder)))

    write_images(work / "few", [noise], 0, CLASSES)
    listed("few")  # imports libraries, which is not part of the work on a file
    listing = part("listing", lambda: listed("files"))
    read = part("reading", lambda: source_digests(listing, again=True))
    known = part("known", lambda: source_digests(listing))
    part("identity", lambda: listing_identity(listing, known))
    assert np.array_equal(read, known)
    print(f"\n{number:,} files of {size:,} bytes, seconds of the processor (and by the clock)")
    for name, seconds in times.items():
        print(f"| {name} | {seconds:.2f} | {walls[name]:.2f} |", flush=True)


def main(work: str, images: str = "20000", files: str = "100000") -> None:
    """Measure both."""
    folder = Path(work).absolute()
    os.environ["EDT_CACHE_DIR"] = str(folder / "cache")
    print(hardware())
    measure_identity(folder, int(files))
    with local_ray():
        measure(folder, int(images))


if __name__ == "__main__":
    main(*sys.argv[1:])
