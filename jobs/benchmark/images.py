"""Images a second of preprocess."""

import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from edt_core.config import PreprocessConfig, SourceConfig
from edt_core.errors import UserError
from edt_core.progress import Silent
from edt_core.store.artifact import Artifact, ArtifactWriter, Source
from edt_core.store.folder import Folder
from jobs.benchmark.table import Row, timed


def photos_in(folder: Path) -> list[Path]:
    """The JPEG files below a folder. Raises UserError if there are none."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise UserError(
            f"no JPEG files below {folder}; use a folder of photos, or leave --images out to measure synthetic ones"
        )
    return paths


def made_photos(folder: Path, number: int = 64) -> list[Path]:
    """Synthetic JPEG files of 500 x 375 px with the spectrum of photos."""
    from PIL import Image

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(number):
        layers = [Image.fromarray(rng.integers(0, 256, (375 // s, 500 // s, 3), dtype=np.uint8)) for s in (5, 25, 75)]
        sizes = [np.asarray(layer.resize((500, 375), Image.Resampling.BICUBIC), np.float32) for layer in layers]
        Image.fromarray(np.mean(sizes, axis=0).astype(np.uint8)).save(folder / f"{i}.jpg", quality=92)
    return sorted(folder.iterdir())


def linked_folder(photos: list[Path], root: Path, number: int, classes: int = 10) -> Source:
    """An image folder of `number` links to the photos, `classes` classes."""
    from jobs.stages.preprocess import image_source

    for k in range(classes):
        (root / f"class{k}").mkdir(parents=True)
    for i, photo in enumerate(islice(cycle(photos), number)):
        (root / f"class{i % classes}" / f"{i:07d}{photo.suffix}").symlink_to(photo.resolve())
    return image_source(SourceConfig(kind="image_folder", path=str(root)))


def pillow_loop(paths: list[Path], out: Path, size: int, **save: Any) -> float:
    """Images a second of a plain loop: open, ADM crop, save, one by one in one process."""
    from PIL import Image

    out.mkdir()
    started = time.perf_counter()
    for i, path in enumerate(paths):
        image = Image.open(path).convert("RGB")
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image.crop((left, top, left + size, top + size)).save(out / f"{i}.img", **save)
    return len(paths) / (time.perf_counter() - started)


def bench_preprocess(work: Path, photos: list[Path], number: int) -> list[Row]:
    """Images a second of two Ray workers at 256 px, beside the plain loop in the same format and in Pillow's PNG."""
    from edt_core.data.images import SAVE_OPTIONS

    source = linked_folder(photos, work / "source", number)
    config = PreprocessConfig(image_size=256, images_per_shard=max(1, number // 60))
    run_preprocess(PreprocessConfig(image_size=32, images_per_shard=max(1, number // 8)), source, work / "warm")
    paths = [
        Path(source.location) / f"class{i % 10}" / f"{i:07d}{photos[i % len(photos)].suffix}" for i in range(number)
    ]
    part = paths[: max(1, number // 3)]
    same = pillow_loop(part, work / "loop-same", 256, format="WEBP", **SAVE_OPTIONS["webp"])
    seconds: list[float] = []
    with timed(seconds):
        run_preprocess(config, source, work / "ours")
    ours = number / seconds[0]
    again = pillow_loop(part, work / "loop-again", 256, format="WEBP", **SAVE_OPTIONS["webp"])
    default = pillow_loop(part[: len(part) // 3], work / "loop-png", 256, format="PNG")
    loop = (same + again) / 2  # before and after, because the machine's speed drifts
    return [
        Row(
            "preprocess, 2 workers",
            f"{ours:.0f}/s",
            f"Pillow loop, same format {loop:.0f}/s",
            ours / loop,
            "at least 1.9",
        ),
        Row("preprocess, 2 workers", f"{ours:.0f}/s", f"Pillow loop, its default PNG {default:.0f}/s", ours / default),
    ]


def run_preprocess(config: PreprocessConfig, source: Source, out: Path) -> Artifact:
    """The images artifact of a source, made in a folder."""
    from jobs.stages.preprocess import STAGE

    return execute(STAGE, config, out, source=source)


def execute(stage: Any, config: Any, out: Path, **inputs: Any) -> Artifact:
    """The artifact of a stage in a folder, made without progress reports."""
    identity = stage.fingerprint(config, {role: item.fingerprint for role, item in inputs.items()})
    artifact: Artifact = stage.execute(config, inputs, ArtifactWriter(Folder.at(out), stage.kind, identity), Silent())
    return artifact
