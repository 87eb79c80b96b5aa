"""Latents read for training: our reader, a DataLoader over .npy files, and bare numpy."""

import os
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from itertools import count, cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.benchmark.table import Row


def bench_latents(work: Path, rows: int, batch_size: int = 256, seconds: float = 4.0) -> list[Row]:
    """Rows a second, shuffled, one process, warm cache: our reader, DataLoaders over .npy files, and bare numpy.

    Our row is what a training step reads of an image: posterior mean and std, [2, 4, 32, 32], 32 KB in float32 and 16
    KB in float16. The .npy files are those of the authors' code, one of a drawn latent, float32 [1, 4, 32, 32], and one
    of its label; and, for a second comparison, one file of our row in float32 without a label.
    """
    batch_size = min(batch_size, rows)
    values = np.random.default_rng(0).standard_normal((rows, 2, 4, 32, 32), dtype=np.float32)
    shards = {store: _write_shards(work, values, store) for store in ("fp32", "fp16")}
    _write_npy(work / "latents", values[:, :1])
    _write_npy(work / "rows", values)
    _write_npy(work / "labels", np.zeros((rows, 1), np.int64))
    os.sync()  # or the kernel would write 4 GB to the disk during the measurement
    memory = {store: values.reshape(rows, -1).astype(store) for store in ("float32", "float16")}
    with ExitStack() as open_readers:

        def ours(store: str) -> Iterator[Any]:
            return open_readers.enter_context(closing(_batches(shards[store], batch_size)))

        rates = _rates(
            {
                "fp32": ours("fp32"),
                "fp16": ours("fp16"),
                "widened": (batch.posterior.float() for batch in ours("fp16")),
                "authors": _files(work, ("latents", "labels"), rows, batch_size),
                "same": _files(work, ("rows",), rows, batch_size),
                "numpy fp32": _gathered(memory["float32"], batch_size),
                "numpy fp16": _gathered(memory["float16"], batch_size),
            },
            batch_size,
            seconds,
        )
    authors = (".npy files, latent and label", rates["authors"])
    return [
        _row("latents read", rates["fp32"], *authors),
        _row("latents read", rates["fp32"], ".npy files, mean and std in one", rates["same"]),
        _row("latents read", rates["fp32"], "numpy gather from memory", rates["numpy fp32"], "at least 0.5"),
        _row("latents read, fp16", rates["fp16"], *authors, "at least 40"),
        _row("latents read, fp16, widened", rates["widened"], *authors),
        _row("latents read, fp16", rates["fp16"], "numpy gather of fp16", rates["numpy fp16"], "at least 0.5"),
    ]


def _row(what: str, ours: float, against: str, rate: float, target: str = "") -> Row:
    return Row(what, f"{ours:,.0f}/s", f"{against} {rate:,.0f}/s", ours / rate, target)


def _batches(shards: Sequence[Path], batch_size: int) -> Generator[Any, None, None]:
    """Batches as a training takes them, without end."""
    from edt_core.data.latents import LatentDataset
    from edt_core.data.loader import BatchPlan, latent_batches
    from edt_core.data.prefetch import prefetched

    plan = BatchPlan(seed=0, global_batch_size=batch_size, mirror_prob=0.5)
    return prefetched(latent_batches(LatentDataset(shards), plan), 2)


def _files(work: Path, folders: Sequence[str], rows: int, batch_size: int) -> Iterator[Any]:
    """Batches of a DataLoader over .npy files, without end."""
    import torch

    data: Any = _NpyFiles([work / folder for folder in folders], rows)
    loader: Any = torch.utils.data.DataLoader(data, batch_size=batch_size, shuffle=True, drop_last=True)
    return (batch for _ in count() for batch in loader)


def _gathered(memory: NDArray[Any], batch_size: int) -> Iterator[Any]:
    """Batches of rows that numpy takes from memory, without end."""
    rng = np.random.default_rng(1)
    orders = cycle([rng.permutation(len(memory))[:batch_size] for _ in range(200)])
    return (memory[order] for order in orders)


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


def _write_shards(work: Path, values: NDArray[np.float32], store: str) -> list[Path]:
    from edt_core.data.latents import LatentInfo, LatentShardWriter
    from edt_core.data.scale import LatentScale

    paths = []
    for k, rows in enumerate(np.array_split(np.arange(len(values)), 8)):
        info = LatentInfo("benchmark", LatentScale(1.0), 256, (4, 32, 32), f"images-{k:05d}.tar", store)
        paths.append(work / f"{store}-{k:05d}.arrow")
        with LatentShardWriter(paths[-1], info) as writer:
            for cut in np.array_split(rows, max(1, len(rows) // 256)):
                both = np.repeat(values[cut][:, None], 2, axis=1)
                writer.write([f"{i:08d}" for i in cut], np.zeros(len(cut), np.int64), both)
    return paths


def _rates(subjects: Mapping[str, Iterator[Any]], batch_size: int, seconds: float) -> dict[str, float]:
    """Rows a second of each: the best of three stretches, taken in turns, after a warm-up that fills the cache."""
    for batches in subjects.values():
        _rate(batches, batch_size, seconds)
    rounds = [{name: _rate(each, batch_size, seconds / 3) for name, each in subjects.items()} for _ in range(3)]
    return {name: max(one[name] for one in rounds) for name in subjects}


def _rate(batches: Iterator[Any], batch_size: int, seconds: float) -> float:
    started, number = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        next(batches)
        number += 1
    return number * batch_size / (time.perf_counter() - started)
