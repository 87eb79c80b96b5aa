"""The plan of an image artifact: which images each shard has, as one Arrow file of which each task reads its own part.

Columns: those of the listing (see `Listing`, dictionaries as plain values) and, if images of earlier artifacts are
reused, `artifact`, `shard` and `row` (int8, int32, int32: see `Places`), `digest` (binary 32) and `reason` (string). A
record batch is a shard. The file is beside the artifact's shards while they are made, so every task can reach it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np
import pyarrow as pa

from edt_core.data.sources import Listing
from edt_core.data.sources.files import open_file
from edt_core.data.sources.listing import decode_repeats, encode_repeats
from edt_core.data.tables import bytes_column, digests_in
from edt_core.store.artifact import Artifact
from edt_core.store.folder import Folder
from jobs.stages.reuse.image_shard import ShardPlan
from jobs.stages.reuse.images import EarlierImages
from jobs.stages.reuse.siblings import Places

PLAN_NAME = ".plan.arrow"
_PLACES = ("artifact", "shard", "row")
_RELEASE_EVERY = 64  # shards


@dataclass(frozen=True)
class ShardPlans(Sequence[ShardPlan]):
    """The shards of a listing, in order. A plan is cut out of the listing when it is asked for.

    size: images of every shard except the last. earlier: where images are in artifacts that were made before.
    """

    listing: Listing
    size: int
    earlier: EarlierImages | None = None

    def __len__(self) -> int:
        return -(-len(self.listing) // self.size)

    @overload
    def __getitem__(self, index: int) -> ShardPlan: ...
    @overload
    def __getitem__(self, index: slice) -> list[ShardPlan]: ...
    def __getitem__(self, index: int | slice) -> ShardPlan | list[ShardPlan]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        bounds = number * self.size, (number + 1) * self.size
        part = None if self.earlier is None else self.earlier.slice(*bounds)
        is_used = part is not None and part.places.reused.any()
        return ShardPlan(number, bounds[0], self.listing.slice(*bounds), part if is_used else None)


@dataclass(frozen=True)
class PlannedShard:
    """Where the plan of a shard is: all that its task needs to be given.

    artifacts: the earlier ones that have images of the shard, reduced to the files with them; None if there are none.
    """

    folder: Folder
    head: Listing  # of the listing all but its rows and classes, which the plan of a shard does not need
    index: int
    first: int
    artifacts: tuple[Artifact, ...] | None

    def read(self) -> ShardPlan:
        """Read the plan: of a local file by mapping it, of a remote one only the shard's part."""
        with self._opened() as source:
            table = pa.Table.from_batches([pa.ipc.open_file(source).get_batch(self.index)])
        columns = [name for name in table.schema.names if name not in (*_PLACES, "digest", "reason")]
        listing = replace(self.head, table=encode_repeats(table.select(columns)).combine_chunks())
        return ShardPlan(self.index, self.first, listing, self._earlier(table))

    def _opened(self) -> pa.NativeFile:
        if (root := self.folder.local) is not None:
            return pa.memory_map(str(root / PLAN_NAME))
        return pa.PythonFile(open_file(self.folder, PLAN_NAME.encode()), "r")

    def _earlier(self, table: pa.Table) -> EarlierImages | None:
        if self.artifacts is None:
            return None
        artifact, shard, row = (table[name].to_numpy() for name in _PLACES)
        reasons = {k: reason for k, reason in enumerate(table["reason"].to_pylist()) if reason is not None}
        digests = digests_in(table["digest"].combine_chunks())
        return EarlierImages(Places(self.artifacts, artifact, shard, row), reasons, digests)


def write_plans(plans: ShardPlans, folder: Folder) -> list[PlannedShard]:
    """Write the plan file into a folder, shard by shard. Raises UserError if it cannot be written."""
    planned: list[PlannedShard] = []
    empty = plans.listing.slice(0, 0)
    head = replace(empty, classes=())

    def batches() -> Iterator[pa.RecordBatch]:
        for plan in plans:
            artifacts = None if plan.earlier is None else plan.earlier.places.artifacts
            planned.append(PlannedShard(folder, head, plan.index, plan.first, artifacts))
            yield _batch(plan, plans.earlier is not None)
            if len(planned) % _RELEASE_EVERY == 0:
                plans.listing.pages.release()

    with folder.staged(PLAN_NAME) as staged:
        schema = _batch(ShardPlan(0, 0, empty), plans.earlier is not None).schema
        with pa.OSFile(str(staged), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in batches():
                writer.write_batch(batch)
        folder.publish(staged, PLAN_NAME)
    return planned


def _batch(plan: ShardPlan, with_places: bool) -> pa.RecordBatch:
    """The rows of a shard's plan. With places every shard has their columns, also one that reuses nothing."""
    table = decode_repeats(plan.listing.table)
    if with_places:
        number, earlier = len(table), plan.earlier
        for name, kind in zip(_PLACES, (np.int8, np.int32, np.int32), strict=True):
            values = np.zeros(number, kind) if earlier is None else getattr(earlier.places, name)
            table = table.append_column(name, pa.array(values))
        digests = np.zeros((number, 32), np.uint8) if earlier is None else earlier.digests
        table = table.append_column("digest", bytes_column(digests))
        reasons = {} if earlier is None else earlier.reasons
        table = table.append_column("reason", pa.array([reasons.get(k) for k in range(number)], pa.string()))
    return table.combine_chunks().to_batches()[0] if len(table) else pa.RecordBatch.from_pylist([], table.schema)
