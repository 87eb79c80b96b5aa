"""The originals of image artifacts, and where rows made of the same originals are in earlier artifacts."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edt_core.errors import UserError
from edt_core.files.small_files import parse_json
from edt_core.store.artifact import Artifact, ManifestError
from edt_core.store.layout import IMAGE_SHARD, REPORT_OF_SHARD
from jobs.stages.reuse.siblings import NONE, Places, first_of


class Report(NamedTuple):
    """The originals of one shard. `first`: the position of its first among all of the artifact.

    digests, versions: uint8 [n, 32] (see `Originals`); rows: int32 [n]; reasons: by position among all.
    """

    shard: int
    first: int
    digests: NDArray[np.uint8]
    versions: NDArray[np.uint8]
    rows: NDArray[np.int32]
    reasons: dict[int, str]


def reports_of(artifact: Artifact) -> Iterator[Report]:
    """The reports of an image artifact, in order. Raises ManifestError if one differs from the manifest."""
    first = 0
    for number in count():
        name = REPORT_OF_SHARD.format(IMAGE_SHARD.format(number))
        if not (entries := artifact.entries(name)):
            return
        data = artifact.path(name).read_bytes()
        if hashlib.sha256(data).hexdigest() != entries[0].sha256:
            raise ManifestError(f"{name} of {artifact.folder.uri} does not match its manifest; run its step again")
        report = parse_json(data, name)
        digests = np.frombuffer(bytes.fromhex(report["digests"]), np.uint8).reshape(-1, 32)
        stated = np.frombuffer(bytes.fromhex(report.get("versions", "")), np.uint8).reshape(-1, 32)
        written = np.ones(len(digests), np.bool_)
        written[[position for position, _, _ in report["quarantined"]]] = False
        rows = np.where(written, np.cumsum(written) - 1, NONE).astype(np.int32)
        reasons = {first + position: reason for position, _, reason in report["quarantined"]}
        versions = stated if len(stated) == len(digests) else np.zeros_like(digests)
        yield Report(number, first, digests, versions, rows, reasons)
        first += len(digests)


@dataclass(frozen=True)
class Originals:
    """The originals of an image artifact, in order. M: their number.

    digests: sha256, uint8 [M, 32]. versions: of a remote source, digests of name, size and version token, uint8
    [M, 32]; zeros if unknown. shard, row: int32 [M]; row -1 for a quarantined image. reasons: of the quarantined, by
    index.
    """

    digests: NDArray[np.uint8]
    versions: NDArray[np.uint8]
    shard: NDArray[np.int32]
    row: NDArray[np.int32]
    reasons: dict[int, str]

    @classmethod
    def of(cls, artifact: Artifact) -> "Originals":
        """Read the reports of an image artifact. Raises ManifestError if one differs from the manifest."""
        reports = list(reports_of(artifact))
        empty = np.empty((0, 32), np.uint8)
        return cls(
            np.concatenate([empty, *(report.digests for report in reports)]),
            np.concatenate([empty, *(report.versions for report in reports)]),
            np.repeat(np.arange(len(reports), dtype=np.int32), [len(report.digests) for report in reports]),
            np.concatenate([np.empty(0, np.int32), *(report.rows for report in reports)]),
            {position: reason for report in reports for position, reason in report.reasons.items()},
        )

    @classmethod
    def read(cls, artifact: Artifact) -> "Originals | None":
        """The originals of an image artifact, or None if its reports are damaged."""
        try:
            return cls.of(artifact)
        except (UserError, ValueError, KeyError, TypeError, IndexError):
            return None


def row_places(images: Artifact, earlier: Sequence[tuple[Artifact, Artifact]], shard_name: str) -> list[Places | None]:
    """Where rows of each shard of `images` are in earlier artifacts, made of the same originals row by row.

    earlier: (artifact, the image artifact it was made of), the one to prefer first. A shard that reuses nothing has
    None. `shard_name`: the name of the files that contain the rows.
    """
    new = Originals.read(images) if earlier else None
    if new is None:
        return [None] * len(images.entries(IMAGE_SHARD.replace("{:05d}", "*")))
    written = new.row != NONE
    digests, shards = new.digests[written], new.shard[written]
    total = len(digests)
    artifact, shard, row = np.full(total, NONE, np.int8), np.zeros(total, np.int32), np.zeros(total, np.int32)
    for index, (_, source) in enumerate(earlier):
        if (old := Originals.read(source)) is None:
            continue
        has_row = old.row != NONE
        missing = np.flatnonzero(artifact == NONE)
        at = first_of(digests[missing], old.digests[has_row])
        positions, at = missing[at >= 0], at[at >= 0]
        artifact[positions], shard[positions], row[positions] = index, old.shard[has_row][at], old.row[has_row][at]
    whole = Places(tuple(item for item, _ in earlier), artifact, shard, row)
    number = int(new.shard[-1]) + 1 if len(new.shard) else 0
    bounds = np.searchsorted(shards, np.arange(number + 1))
    parts = [whole.slice(int(bounds[k]), int(bounds[k + 1]), shard_name) for k in range(number)]
    return [part if part.reused.any() else None for part in parts]
