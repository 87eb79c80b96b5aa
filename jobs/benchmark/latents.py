"""Latents read for training: our reader, a DataLoader over .npy files, and bare numpy."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import count, cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.benchmark.table import Row


def bench_latents(work: Path, rows: int, batch_size: int = 256, seconds: float = 4.0) -> list[Row]:
    """Rows a second, shuffled, one process, warm cache: our reader, DataLoaders over .npy files, and bare numpy.

    Our row is what a training step reads of an image: posterior mean and std, float32 [2, 4, 32, 32], 32 KB. The .npy
    files are those of the authors' code, one of a drawn latent, float32 [1, 4, 32, 32], and one of its label; and, for
    a second comparison, one file of our row without a label.
    """
    import torch

    from edt_core.data.latents import LatentDataset
    from edt_core.data.loader import BatchPlan, latent_batches
    from edt_core.data.prefetch import prefetched

    batch_size = min(batch_size, rows)
    values = np.random.default_rng(0).standard_normal((rows, 2, 4, 32, 32), dtype=np.float32)
    shards = _write_shards(work, values)
    _write_npy(work / "latents", values[:, :1])
    _write_npy(work / "rows", values)
    _write_npy(work / "labels", np.zeros((rows, 1), np.int64))
    os.sync()  # or the kernel would write 3 GB to the disk during the measurement

    def files(*folders: str) -> Iterator[Any]:
        data: Any = _NpyFiles([work / folder for folder in folders], rows)
        loader: Any = torch.utils.data.DataLoader(data, batch_size=batch_size, shuffle=True, drop_last=True)
        return (batch for _ in count() for batch in loader)

    rng = np.random.default_rng(1)
    orders = cycle([rng.permutation(rows)[:batch_size] for _ in range(200)])
    memory = values.reshape(rows, -1)
    plan = BatchPlan(seed=0, global_batch_size=batch_size, mirror_prob=0.5)
    with closing(prefetched(latent_batches(LatentDataset(shards), plan), 2)) as batches:
        ours = _rate((batch.posterior for batch in batches), batch_size, seconds)
    authors = _rate(files("latents", "labels"), batch_size, seconds)
    same = _rate(files("rows"), batch_size, seconds)
    bare = _rate((memory[order] for order in orders), batch_size, seconds)
    return [
        _row(ours, ".npy files, latent and label", authors, "at least 40"),
        _row(ours, ".npy files, mean and std in one", same, ""),
        _row(ours, "numpy gather from memory", bare, "at least 0.5"),
    ]


def _row(ours: float, against: str, rate: float, target: str) -> Row:
    return Row("latents read", f"{ours:,.0f}/s", f"{against} {rate:,.0f}/s", ours / rate, target)


class _NpyFiles:
    """A map-style data set of one .npy file a row in each folder."""

    def __init__(self, folders: Sequence[Path], rows: int) -> None:
        self.folders, self.rows = [str(folder) for folder in folders], rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        import torch

        return tuple(torch.from_numpy(np.load(f"{folder}/{index}.npy")) for folder in self.folders)


def _write_npy(folder: Path, values: NDArray[Any]) -> None:
    folder.mkdir()
    for i, value in enumerate(values):
        np.save(folder / f"{i}.npy", value)


def _write_shards(work: Path, values: NDArray[np.float32]) -> list[Path]:
    from edt_core.data.latents import LatentInfo, LatentShardWriter
    from edt_core.data.scale import LatentScale

    paths = []
    for k, rows in enumerate(np.array_split(np.arange(len(values)), 8)):
        info = LatentInfo("benchmark", LatentScale(1.0), 256, (4, 32, 32), f"images-{k:05d}.tar")
        paths.append(work / f"latents-{k:05d}.arrow")
        with LatentShardWriter(paths[-1], info) as writer:
            for cut in np.array_split(rows, max(1, len(rows) // 256)):
                both = np.repeat(values[cut][:, None], 2, axis=1)
                writer.write([f"{i:08d}" for i in cut], np.zeros(len(cut), np.int64), both)
    return paths


def _rate(batches: Iterator[Any], batch_size: int, seconds: float) -> float:
    """Rows a second: the best of three stretches, after a warm-up that reads everything into the cache."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        next(batches)
    best = 0.0
    for _ in range(3):
        started, batches_read = time.perf_counter(), 0
        while time.perf_counter() - started < seconds / 3:
            next(batches)
            batches_read += 1
        best = max(best, batches_read * batch_size / (time.perf_counter() - started))
    return best
