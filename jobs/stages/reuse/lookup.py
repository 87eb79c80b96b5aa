"""Where originals are in an image artifact, by digest: an index that is sorted on the disk and searched in order.

Legend: N images that are looked up, n of them that are found at a time.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from edt_core.data.tables import ROWS, MappedTable, Sorter, bytes_column, digests_in
from edt_core.errors import UserError
from edt_core.store.artifact import Artifact
from jobs.stages.reuse.originals import reports_of

_KEY = pa.binary(32)
_SCHEMA = pa.schema(
    [("key", _KEY), ("digest", _KEY), ("position", pa.int64()), ("shard", pa.int32()), ("row", pa.int32())]
)


class Found(NamedTuple):
    """Images that are in an artifact: their positions among those looked up, and where the first of their bytes is.

    places, position: int64 [n]; shard, row: int32 [n]; digests: sha256 of the originals, uint8 [n, 32].
    """

    places: NDArray[np.int64]
    digests: NDArray[np.uint8]
    position: NDArray[np.int64]
    shard: NDArray[np.int32]
    row: NDArray[np.int32]


class Lookup:
    """The originals of an image artifact by sha256 or, `by_version`, by name, size and version token."""

    def __init__(self, artifact: Artifact, by_version: bool) -> None:
        """Read the reports of the artifact. Raises ManifestError if one differs from the manifest."""
        self.reasons: dict[int, str] = {}  # of the quarantined, by position
        with Sorter(_SCHEMA, "key", "position") as sorter:
            for report in reports_of(artifact):
                position = np.arange(report.first, report.first + len(report.digests))
                columns = [
                    bytes_column(report.versions if by_version else report.digests),
                    bytes_column(report.digests),
                    pa.array(position),
                    pa.array(np.full(len(position), report.shard, np.int32)),
                    pa.array(report.rows),
                ]
                sorter.add(pa.table(columns, schema=_SCHEMA))
                self.reasons |= report.reasons
            self._rows: MappedTable = sorter.finish()

    @classmethod
    def read(cls, artifact: Artifact, by_version: bool) -> "Lookup | None":
        """The originals of an image artifact, or None if its reports are damaged."""
        try:
            return cls(artifact, by_version)
        except (UserError, ValueError, KeyError, TypeError, IndexError):
            return None

    def find(self, keys: NDArray[np.uint8], wanted: NDArray[np.bool_]) -> Iterator[Found]:
        """Those of the wanted images, bool [N], whose key, uint8 [N, 32], is in the artifact. Each is found once."""
        places = np.flatnonzero(wanted)
        starts = _starts(keys)[places]
        order = np.argsort(starts, kind="stable")
        places, starts = places[order], starts[order]
        del order
        last = b""
        for batch in self._rows.batches():
            among = batch.column("key")
            bounds = np.frombuffer(among[0].as_py()[:8] + among[-1].as_py()[:8], ">u8").astype(np.uint64)
            low, high = np.searchsorted(starts, bounds[0], "left"), np.searchsorted(starts, bounds[1], "right")
            for first in range(low, high, ROWS):
                yield from _matched(keys, places[first : min(first + ROWS, high)], batch, last)
            last = among[-1].as_py()


def _matched(keys: NDArray[np.uint8], places: NDArray[np.int64], batch: pa.RecordBatch, last: bytes) -> Iterator[Found]:
    """The images at these places that are in a batch, but not those whose key also ended the batch before."""
    at = pc.fill_null(pc.index_in(bytes_column(keys[places]), value_set=batch.column("key")), -1)
    at = np.asarray(at).astype(np.int64)
    is_new = at >= 0
    if last:
        is_new &= (keys[places] != np.frombuffer(last, np.uint8)).any(axis=1)
    if is_new.any():
        rows = batch.take(pa.array(at[is_new]))
        numbers = (rows.column(name).to_numpy() for name in ("position", "shard", "row"))
        digests = digests_in(rows.column("digest"))
        yield Found(places[is_new], digests, *numbers)


def _starts(keys: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The first 8 bytes of each key as a number in the same order, uint64 [N]."""
    return np.ascontiguousarray(keys[:, :8]).view(">u8").ravel().astype(np.uint64)
