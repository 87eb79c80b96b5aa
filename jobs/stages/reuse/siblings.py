"""Earlier artifacts of the same kind in the same store, and how often rows of theirs are computed again."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from edt_core.store.artifact import Artifact, ArtifactWriter, ManifestError
from edt_core.store.folder import Folder

MOST_SIBLINGS = 4  # that rows are taken from
_CHECKED_SHARE = 0.01  # of the reused rows of a shard that are computed again and compared; at least one


class WrongRowError(Exception):
    """A row of an earlier artifact is not what it would be now. The message says which one, and how it differs."""


def said_by(error: WrongRowError) -> str:
    """The message of an error, without the traceback that Ray adds to one of a task."""
    return str(getattr(error, "cause", error))


def siblings(out: ArtifactWriter, is_usable: Callable[[Artifact], bool]) -> list[Artifact]:
    """The newest committed and usable artifacts of this kind in the store that `out` writes to.

    There are none if `out` writes to a folder outside a store (`<store>/<kind>/<fingerprint>`).
    """
    parent, _, own = out.folder.uri.rpartition("/")
    folder = Folder(parent)
    if folder.name != out.kind or own != out.fingerprint:
        return []
    others: list[Artifact] = []
    for name in folder.names():
        with suppress(ManifestError):
            if name != own and (artifact := Artifact.read(folder.child(name))).fingerprint == name:
                others.append(artifact)
    others.sort(key=lambda artifact: (artifact.manifest.created_at, artifact.fingerprint), reverse=True)
    return list(islice(filter(is_usable, _whole(others)), MOST_SIBLINGS))


def _whole(artifacts: Sequence[Artifact]) -> Iterator[Artifact]:
    return (artifact for artifact in artifacts if not artifact.problems())


def checked_rows(reused: NDArray[np.bool_], fingerprint: str, shard: int) -> NDArray[np.bool_]:
    """Which of the reused rows [n] of a shard are computed again: about 1 %, at least one, drawn from a seed.

    The seed is the new artifact's fingerprint and the number of the shard.
    """
    positions = np.flatnonzero(reused)
    mask = np.zeros(len(reused), np.bool_)
    if len(positions):
        rng = np.random.default_rng([int(fingerprint[:16], 16), shard])
        mask[rng.choice(positions, max(1, round(_CHECKED_SHARE * len(positions))), replace=False)] = True
    return mask


def first_of(wanted: NDArray[np.uint8], digests: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The position of each wanted digest [n, 32] among `digests` [m, 32]; -1 if it is not there."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def column(values: NDArray[np.uint8]) -> pa.Array:
        data = pa.py_buffer(np.ascontiguousarray(values))
        return pa.Array.from_buffers(pa.binary(32), len(values), [None, data])

    if not len(wanted) or not len(digests):
        return np.full(len(wanted), -1, np.int64)
    found = pc.fill_null(pc.index_in(column(wanted), value_set=column(digests)), -1)
    return np.asarray(found).astype(np.int64)
