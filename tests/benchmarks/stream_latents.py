"""Latents streamed from an S3 server: our reader and mosaicml/streaming, on the same rows.

    python -m tests.benchmarks.stream_latents [--shards 48] [--rows 512] [--delay 0.05] [--work FOLDER]

Writes latents of 4 x 32 x 32 in float16 as our Arrow shards and as MDS shards, uploads both to an S3 server on
loopback, and reads them through a link that delays each request by `--delay` seconds and counts the bytes. A row is one
side (mean and std) of an image; both sides are fetched. Each reader starts in a new process with an empty cache:

cold     rows/s of an epoch from the store, and of one without the delay
warm     rows/s of a second epoch, with all shards on the disk
first    seconds from the construction of the reader to its first batch
resume   the same at 90 % of an epoch, with an empty cache
spread   of two rows of a batch, how often they are from one shard (of all rows: once in as many pairs as there are
         shards), and the mean distance of their places in the source, as a share of that of two rows of all
fetched  bytes and requests of the cold epoch, as a share of the bytes of all shards

mosaicml/streaming is measured where it is installed (`pip install mosaicml-streaming`); it asserts nothing.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.benchmark.table import hardware
from tests.support.servers import moto_server
from tests.support.slow_link import slow_link

SHAPE, BATCH, NODES, BLOCK = (4, 32, 32), 256, 4, 3
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass(frozen=True)
class Data:
    """Rows in shards, in a bucket with `ours/` and `mosaic/`."""

    shards: int
    rows: int  # of a shard

    @property
    def total(self) -> int:
        return self.shards * self.rows


def values(data: Data, shard: int) -> NDArray[np.float16]:
    """The rows of a shard: [rows, 2, 2, C, h, h]."""
    return np.random.default_rng(shard).standard_normal((data.rows, 2, 2, *SHAPE), dtype=np.float32).astype(np.float16)


def write_ours(data: Data, folder: Path) -> None:
    from edt_core.data.latents import LatentInfo, LatentShardWriter
    from edt_core.data.scale import LatentScale
    from edt_core.store.artifact import ArtifactWriter
    from edt_core.store.folder import Folder

    out = ArtifactWriter(Folder.at(folder), "latents", "0" * 64)
    for shard in range(data.shards):

        def write(path: Path, shard: int = shard) -> int:
            info = LatentInfo("vae", LatentScale(0.18), 256, SHAPE, f"images-{shard:05d}.tar", "fp16")
            with LatentShardWriter(path, info) as writer:
                first = shard * data.rows
                keys = [f"{row:08d}" for row in range(first, first + data.rows)]
                writer.write(keys, range(first, first + data.rows), values(data, shard).astype(np.float32))
            return data.rows

        out.write(f"latents-{shard:05d}.arrow", write)
    out.commit({}, {}, {})


def write_mosaic(data: Data, folder: Path) -> None:
    from streaming import MDSWriter

    row = {"row": 0, "posterior": np.zeros((2, 2, *SHAPE), np.float16)}
    columns = {"row": "int", "posterior": f"ndarray:float16:{','.join(map(str, row['posterior'].shape))}"}
    size = data.rows * (row["posterior"].nbytes + 16)  # so many rows a shard, about
    with MDSWriter(out=str(folder), columns=columns, size_limit=size) as writer:
        for shard in range(data.shards):
            for place, posterior in enumerate(values(data, shard)):
                writer.write({"row": shard * data.rows + place, "posterior": posterior})


def ours(bucket: str, cache: Path, data: Data, start: int) -> Iterator[NDArray[np.int64]]:
    """The rows of each batch from a step on."""
    from edt_core.data.loader import BatchPlan
    from edt_core.data.prefetch import prefetched
    from edt_core.data.scale import LatentScale
    from edt_core.data.streaming import ShardStream, stream_shards
    from edt_core.store.artifact import Artifact

    os.environ["EDT_CACHE_DIR"] = str(cache)
    artifact = Artifact.read(f"s3://{bucket}/ours")
    stream = ShardStream(artifact, tuple(artifact.entries()), SHAPE, LatentScale(0.18), NODES, BLOCK, "fp16")
    with closing(prefetched(stream_shards(stream, BatchPlan(0, BATCH, 0.5), start), 2)) as batches:
        for batch in batches:
            yield batch.indices


def collated(samples: list[dict[str, Any]]) -> tuple[Any, Any]:
    """Numbers of the rows, and one side of each."""
    import torch

    sides = np.stack([sample["posterior"][:, place % 2] for place, sample in enumerate(samples)])
    return torch.tensor([sample["row"] for sample in samples]), torch.from_numpy(sides)


def mosaic(bucket: str, cache: Path, data: Data, start: int) -> Iterator[NDArray[np.int64]]:
    """The same by `StreamingDataLoader` with one worker, which downloads and decodes beside us."""
    from streaming import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(
        remote=f"s3://{bucket}/mosaic",
        local=str(cache),
        batch_size=BATCH,
        shuffle=True,
        shuffle_algo="py1br",
        shuffle_seed=0,
        num_canonical_nodes=NODES,
        shuffle_block_size=BLOCK * data.rows,
        predownload=2 * BLOCK * data.rows * NODES,
    )
    loader = StreamingDataLoader(
        dataset,
        batch_size=BATCH,
        num_workers=1,
        prefetch_factor=2,
        persistent_workers=True,
        collate_fn=collated,
        multiprocessing_context="fork",
    )
    if start:
        loader.load_state_dict(dataset.state_dict(start * BATCH, from_beginning=True))
    while True:
        for rows, _ in loader:
            yield rows.numpy()


READERS = {"ours": ours, "mosaic": mosaic}
IMPORTS = {"ours": ("edt_core.data.streaming", "s3fs"), "mosaic": ("streaming", "boto3")}  # before the clock starts


def timed(batches: Generator[Any, None, None] | Iterator[Any], count: int) -> tuple[list[Any], float]:
    """So many batches and the seconds that they took."""
    started = time.perf_counter()
    taken = list(islice(batches, count))
    return taken, time.perf_counter() - started


def read(reader: str, bucket: str, endpoint: str, data: Data, start: int, epochs: int) -> dict[str, Any]:
    """Run in a new process: seconds to the first batch, rows/s of each epoch, and the spread of the first one."""
    os.environ |= {**KEYS, "AWS_ENDPOINT_URL": endpoint, "S3_ENDPOINT_URL": endpoint}
    steps = data.total // BATCH
    for name in IMPORTS[reader]:
        import_module(name)
    with tempfile.TemporaryDirectory() as cache:
        batches = READERS[reader](bucket, Path(cache), data, start)
        first, to_first = timed(batches, 1)
        result: dict[str, Any] = {"first": to_first, "rates": []}
        for epoch in range(epochs):
            taken, seconds = timed(batches, steps - (epoch == 0))
            if epoch == 0:
                result |= spread([*first, *taken], data)
                seconds += to_first
            result["rates"].append(steps * BATCH / seconds)
        if isinstance(batches, Generator):
            batches.close()
    return result


def spread(batches: list[NDArray[np.int64]], data: Data) -> dict[str, float]:
    """How far apart in the source the rows of a batch are: over pairs, the share in one shard and the mean distance.

    The distance is a share of that of two rows of all.
    """
    same, distance = [], []
    for rows in batches:
        counts = np.bincount(rows // data.rows)
        same.append((counts * (counts - 1)).sum() / (len(rows) * (len(rows) - 1)))
        distance.append(np.abs(rows[:, None] - rows).mean() / (data.total / 3))
    number = len({row for rows in batches for row in rows.tolist()})
    return {"same_shard": float(np.mean(same)), "distance": float(np.mean(distance)), "rows": number}


def in_new_process(*arguments: Any) -> dict[str, Any]:
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(read, *arguments).result()


def measure(reader: str, bucket: str, server: str, data: Data, delay_s: float) -> dict[str, Any]:
    """All figures of a reader."""
    with slow_link(server, delay_s) as link:
        cold = in_new_process(reader, bucket, link.url, data, 0, 2)
    with slow_link(server, delay_s) as once:
        in_new_process(reader, bucket, once.url, data, 0, 1)
    with slow_link(server, 0.0) as fast:
        near = in_new_process(reader, bucket, fast.url, data, 0, 1)
    with slow_link(server, delay_s) as link:
        resumed = in_new_process(reader, bucket, link.url, data, data.total * 9 // 10 // BATCH, 0)
    return {
        "cold": cold["rates"][0],
        "cold, no delay": near["rates"][0],
        "warm": cold["rates"][1],
        "first": cold["first"],
        "resume": resumed["first"],
        "same shard": cold["same_shard"],
        "distance": cold["distance"],
        "rows of an epoch": cold["rows"],
        "fetched": once.received,
        "requests": once.requests,
    }


def upload(folder: Path, bucket: str, name: str, endpoint: str) -> None:
    import fsspec

    store = fsspec.filesystem("s3", key="key", secret="secret", endpoint_url=endpoint)
    if not store.exists(bucket):
        store.mkdir(bucket)
    store.put(str(folder), f"{bucket}/{name}", recursive=True)


def table(results: Mapping[str, Mapping[str, float]]) -> str:
    lines = [f"| | {' | '.join(results)} |", "|---" * (1 + len(results)) + "|"]
    for name in next(iter(results.values())):
        cells = [result[name] for result in results.values()]
        lines.append(f"| {name} | {' | '.join(f'{cell:,.3g}' if cell < 100 else f'{cell:,.0f}' for cell in cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=48)
    parser.add_argument("--rows", type=int, default=512, help="of a shard")
    parser.add_argument("--delay", type=float, default=0.05, help="seconds of each request")
    parser.add_argument("--work", type=Path, help="a folder for the shards; else a temporary one")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    data = Data(options.shards, options.rows)
    writers = {"ours": write_ours, **({"mosaic": write_mosaic} if find_spec("streaming") else {})}
    results = {}
    with tempfile.TemporaryDirectory(dir=options.work) as work, moto_server() as server:
        for name, write in writers.items():
            folder = Path(work, name)
            write(data, folder)
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            upload(folder, "latents", name, server)
            shutil.rmtree(folder)
            results[name] = measure(name, "latents", server, data, options.delay)
            results[name]["fetched"] /= size
    print(f"{hardware()}\n{asdict(data)}, {NODES} canonical nodes, blocks of {BLOCK}, {options.delay} s a request\n")
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
