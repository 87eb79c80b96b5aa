"""Resident memory of the workers of preprocess and encode."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edt_core.config import EncodeConfig, PreprocessConfig
from edt_core.store.artifact import Artifact
from jobs.benchmark.encode import stored_autoencoder
from jobs.benchmark.images import execute, linked_folder, run_preprocess
from jobs.benchmark.table import Row, mib
from jobs.stages import encode


def bench_memory(work: Path, photos: list[Path], number: int) -> list[Row]:
    """Highest resident memory of any Ray worker over a folder of `number` images, and over a tenth of it."""
    rows = []
    for count in (number // 10, number):
        source = linked_folder(photos, work / f"source-{count}", count)
        with peak_of_workers() as peak:
            images = run_preprocess(PreprocessConfig(image_size=64), source, work / f"images-{count}")
        rows.append(Row(f"memory of a preprocess worker, {count:,} images", mib(peak[0]), "", None, "under 1,536 MiB"))
        vae = _small_autoencoder(work / "autoencoder", 64)
        with peak_of_workers() as peak:
            execute(encode.STAGE, EncodeConfig(), work / f"latents-{count}", images=images, autoencoder=vae)
        rows.append(Row(f"memory of an encode worker, {count:,} images", mib(peak[0]), "", None, "under 1,536 MiB"))
    return rows


@contextmanager
def peak_of_workers(interval_s: float = 0.2) -> Iterator[list[int]]:
    """A list whose item becomes the highest resident bytes (VmHWM) of any Ray worker of this machine so far."""
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(interval_s):
            peak[0] = max([peak[0], *_worker_peaks()])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def _worker_peaks() -> Iterator[int]:
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
        except OSError:  # the process has ended
            continue
        if fields["Name"].strip().startswith("ray::") and "VmHWM" in fields:
            yield int(fields["VmHWM"].split()[0]) << 10


def _small_autoencoder(folder: Path, size: int) -> Artifact:
    """A small autoencoder without fit: its latents do not matter here."""
    from edt_core.autoencoders.autoencoder import build_autoencoder
    from edt_core.config import AutoencoderConfig

    return stored_autoencoder(folder, lambda: build_autoencoder(AutoencoderConfig(base_channels=8), size))
