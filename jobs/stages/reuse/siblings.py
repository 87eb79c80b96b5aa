"""Rows of earlier artifacts of the same kind in the same store: which artifacts, where each row is, and the sample.

Legend: n rows (or images) of the new artifact or of one of its shards.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edt_core.store.artifact import Artifact, ArtifactWriter, ManifestError
from edt_core.store.store import store_of

MOST_SIBLINGS = 4  # artifacts whose rows are reused
_CHECKED_SHARE = 0.01  # of the reused rows of a shard: computed again and compared; at least one row
NONE = -1


class WrongRowError(Exception):
    """A row of an earlier artifact differs from what would be computed now. The message names the row."""


def message_of(error: WrongRowError) -> str:
    """The message of an error, without the traceback that Ray adds to an error of a task."""
    return str(getattr(error, "cause", error))


@dataclass(frozen=True)
class Places:
    """Where rows are in earlier artifacts. Picklable; a slice contains only what its rows need.

    artifact: int8 [n], the index in `artifacts`; -1 for a row that is in none. shard, row: int32 [n].
    """

    artifacts: tuple[Artifact, ...]
    artifact: NDArray[np.int8]
    shard: NDArray[np.int32]
    row: NDArray[np.int32]

    @property
    def reused(self) -> NDArray[np.bool_]:
        """Whether each row is in an earlier artifact, bool [n]."""
        return self.artifact != NONE

    def part(self, start: int, stop: int) -> "Places":
        """Rows [start, stop) with the arrays of all: for use in this process."""
        part = slice(start, stop)
        return replace(self, artifact=self.artifact[part], shard=self.shard[part], row=self.row[part])

    def slice(self, start: int, stop: int, shard_name: str) -> "Places":
        """Rows [start, stop). The manifests are reduced to the files that contain them, named by `shard_name`."""
        part = slice(start, stop)
        artifact, shard = self.artifact[part].copy(), self.shard[part].copy()
        artifacts = tuple(
            _with_files(item, {shard_name.format(number) for number in np.unique(shard[artifact == index])})
            for index, item in enumerate(self.artifacts)
        )
        return Places(artifacts, artifact, shard, self.row[part].copy())

    def where(self, position: int, shard_name: str, problem: str) -> str:
        """A message about one row: its number, file and artifact, then the problem."""
        uri = self.artifacts[self.artifact[position]].folder.uri
        return f"row {self.row[position]} of {shard_name.format(self.shard[position])} in {uri} {problem}"


def _with_files(artifact: Artifact, names: set[str]) -> Artifact:
    files = tuple(entry for entry in artifact.manifest.files if entry.path in names)
    return replace(artifact, manifest=replace(artifact.manifest, files=files))


def same_device(artifact: Artifact, device: str) -> bool:
    """Whether rows of an artifact may be taken on a device. On a CPU rows of a GPU would show in the last bits."""
    return device != "cpu" or artifact.manifest.environment.get("device", "cpu") == "cpu"


def reuse_record(shards: Mapping[int, Places], fingerprint: str) -> dict[str, Any] | None:
    """The manifest's record of the reused rows: rows, rows computed again, rows by artifact. None without such rows.

    `shards`: the places of each shard that was made, by its number.
    """
    by_artifact: dict[str, int] = {}
    checked = 0
    for number, places in shards.items():
        checked += int(checked_rows(places.reused, fingerprint, number).sum())
        counts = np.bincount(places.artifact[places.reused], minlength=len(places.artifacts))
        for item, rows in zip(places.artifacts, counts.tolist(), strict=True):
            by_artifact[item.fingerprint] = by_artifact.get(item.fingerprint, 0) + rows
    used = {name: rows for name, rows in sorted(by_artifact.items()) if rows}
    return {"rows": sum(used.values()), "checked": checked, "from": used} if used else None


def siblings(out: ArtifactWriter, is_usable: Callable[[Artifact], bool]) -> list[Artifact]:
    """The newest committed and usable artifacts of this kind in the store that `out` writes to.

    There are none if `out` writes to a folder outside a store (`<store>/<kind>/<fingerprint>`).
    """
    store = store_of(out.folder, out.kind, out.fingerprint)
    if store is None:
        return []
    others = [artifact for artifact in store.committed(out.kind) if artifact.fingerprint != out.fingerprint]
    others.sort(key=lambda artifact: (artifact.manifest.created_at, artifact.fingerprint), reverse=True)
    return list(islice(_undamaged(filter(is_usable, others)), MOST_SIBLINGS))


def _undamaged(artifacts: Iterator[Artifact]) -> Iterator[Artifact]:
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


def discard_files(out: ArtifactWriter, names: Sequence[str]) -> None:
    """Remove files of this attempt and of earlier ones at the same artifact, which may contain wrong rows.

    Not those of an attempt that was committed meanwhile, by another cluster on the same store.
    """
    committed = None
    with suppress(ManifestError):
        committed = Artifact.read(out.folder).manifest.attempt
    for attempt in (out.attempt, *out.previous):
        if attempt == committed:
            continue
        for name in names:
            out.folder.child(attempt).remove(name)


def first_of(wanted: NDArray[np.uint8], digests: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The index of each wanted digest [n, 32] among `digests` [m, 32]; -1 if it is missing."""
    import pyarrow.compute as pc

    from edt_core.data.tables import bytes_column

    if not len(wanted) or not len(digests):
        return np.full(len(wanted), NONE, np.int64)
    indices = pc.fill_null(pc.index_in(bytes_column(wanted), value_set=bytes_column(digests)), NONE)
    return np.asarray(indices).astype(np.int64)
