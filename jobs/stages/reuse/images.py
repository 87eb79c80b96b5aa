"""Rows of earlier image shards: images whose original and whose preprocessing are unchanged are not decoded again.

Legend: N images of the new artifact, n images of one shard of it. A *position* counts images, quarantined ones
included; a *row* counts the samples of a shard.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edt_core.config import PreprocessConfig
from edt_core.data.sources import UNREADABLE
from edt_core.data.tar_members import TarRows
from edt_core.environment import environment
from edt_core.errors import UserError
from edt_core.files.small_files import parse_json
from edt_core.store.artifact import Artifact, ArtifactWriter, ManifestError
from edt_core.store.layout import IMAGE_MEMBERS, IMAGE_SHARD, JSON_MEMBER, REPORT_OF_SHARD
from jobs.stages.reuse.siblings import WrongRowError, checked_rows, first_of, siblings

_REPORTS = REPORT_OF_SHARD.format("*")
_PIXEL_FIELDS = ("image_size", "image_format", "decoder", "rotate_by_exif")
_LIBRARIES = ("machine", "pillow", "pillow-heif", "pillow-jxl-plugin", "pillow-avif-plugin")
_OPEN_SHARDS = 8
_NONE = -1


@dataclass(frozen=True)
class EarlierImages:
    """Where each of some images is in earlier artifacts. Picklable; a slice holds only what its images need.

    artifact: int8 [n], -1 for an image that is in none. shard, row: int32 [n]; row -1 if it was quarantined there.
    reasons: position -> reason of the quarantine. digests: sha256 of the originals, uint8 [n, 32].
    """

    artifacts: tuple[Artifact, ...]
    artifact: NDArray[np.int8]
    shard: NDArray[np.int32]
    row: NDArray[np.int32]
    reasons: Mapping[int, str]
    digests: NDArray[np.uint8]

    @property
    def reused(self) -> NDArray[np.bool_]:
        """Whether each image is in an earlier artifact, bool [n]."""
        return self.artifact != _NONE

    def slice(self, start: int, stop: int) -> "EarlierImages":
        """Images [start, stop), with the manifests cut down to the files that hold them."""
        part = slice(start, stop)
        artifact, shard = self.artifact[part].copy(), self.shard[part].copy()
        artifacts = tuple(
            _with_files(item, {IMAGE_SHARD.format(number) for number in np.unique(shard[artifact == place])})
            for place, item in enumerate(self.artifacts)
        )
        reasons = {position - start: why for position, why in self.reasons.items() if start <= position < stop}
        return EarlierImages(artifacts, artifact, shard, self.row[part].copy(), reasons, self.digests[part].copy())

    def record(self, shards: Mapping[int, "EarlierImages"], fingerprint: str) -> dict[str, Any]:
        """What a manifest says of the rows that these shards reuse: rows, rows computed again, and rows by artifact."""
        used = np.concatenate([shard.artifact[shard.reused] for shard in shards.values()]) if shards else np.empty(0)
        checked = sum(int(checked_rows(s.reused, fingerprint, number).sum()) for number, s in shards.items())
        by_artifact = {item.fingerprint: int((used == place).sum()) for place, item in enumerate(self.artifacts)}
        return {
            "rows": len(used),
            "checked": checked,
            "from": {name: rows for name, rows in by_artifact.items() if rows},
        }


def _with_files(artifact: Artifact, names: set[str]) -> Artifact:
    files = tuple(entry for entry in artifact.manifest.files if entry.path in names)
    return replace(artifact, manifest=replace(artifact.manifest, files=files))


def pixel_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a preprocess configuration that determine the bytes of one image."""
    names = (*_PIXEL_FIELDS, *(["jpeg_quality"] if config["image_format"] == "jpeg" else []))
    return {name: config[name] for name in names}


def _libraries(found: Mapping[str, str], decoder: str) -> dict[str, str | None]:
    names = (*_LIBRARIES, *(["simplejpeg"] if decoder == "simplejpeg" else []))
    return {name: found.get(name) for name in names}


def earlier_images(
    out: ArtifactWriter, config: PreprocessConfig, version: int, digests: NDArray[np.uint8]
) -> EarlierImages | None:
    """Find images by the sha256 of their originals [N, 32] in earlier artifacts of the store; None if there are none.

    An artifact is used if its step version, the fields that determine one image's bytes and the libraries that decode
    and encode it are the same. The newest artifact that has an image is used for it.
    """
    wanted, here = pixel_fields(config.model_dump(mode="json")), _libraries(environment(), config.decoder)

    def is_usable(artifact: Artifact) -> bool:
        manifest = artifact.manifest
        same = manifest.step_version == version and pixel_fields(manifest.config) == wanted
        return same and _libraries(manifest.environment, config.decoder) == here

    artifacts = siblings(out, is_usable)
    total = len(digests)
    artifact, shard, row = np.full(total, _NONE, np.int8), np.zeros(total, np.int32), np.full(total, _NONE, np.int32)
    reasons: dict[int, str] = {}
    readable = (digests != np.frombuffer(UNREADABLE, np.uint8)).any(axis=1)
    for place, item in enumerate(artifacts):
        try:
            index = _Index.of(item)
        except (UserError, ValueError, KeyError, TypeError):  # damaged: its images are made from the originals
            continue
        missing = np.flatnonzero(readable & (artifact == _NONE))
        at = first_of(digests[missing], index.digests)
        found, at = missing[at >= 0], at[at >= 0]
        artifact[found], shard[found], row[found] = place, index.shard[at], index.row[at]
        for position, entry in zip(found[row[found] == _NONE], at[row[found] == _NONE], strict=True):
            reasons[int(position)] = index.reasons[int(entry)]
    if not (artifact != _NONE).any():
        return None
    return EarlierImages(tuple(artifacts), artifact, shard, row, reasons, digests)


@dataclass(frozen=True)
class _Index:
    """The originals of an artifact: sha256 uint8 [M, 32], shard and row int32 [M], and why some have no row."""

    digests: NDArray[np.uint8]
    shard: NDArray[np.int32]
    row: NDArray[np.int32]
    reasons: dict[int, str]

    @classmethod
    def of(cls, artifact: Artifact) -> "_Index":
        """Read the reports of an artifact. Raises ManifestError for one that differs from the manifest."""
        digests, shards, rows = [np.empty((0, 32), np.uint8)], [np.empty(0, np.int32)], [np.empty(0, np.int32)]
        reasons: dict[int, str] = {}
        first = 0
        for number in count():
            name = REPORT_OF_SHARD.format(IMAGE_SHARD.format(number))
            if not (entries := artifact.entries(name)):
                break
            data = artifact.path(name).read_bytes()
            if hashlib.sha256(data).hexdigest() != entries[0].sha256:
                raise ManifestError(f"{name} of {artifact.folder.uri} differs from its manifest; run its step again")
            report = parse_json(data, name)
            part = np.frombuffer(bytes.fromhex(report["digests"]), np.uint8).reshape(-1, 32)
            written = np.ones(len(part), np.bool_)
            for position, _, reason in report["quarantined"]:
                written[position] = False
                reasons[first + position] = reason
            digests.append(part)
            shards.append(np.full(len(part), number, np.int32))
            rows.append(np.where(written, np.cumsum(written) - 1, _NONE).astype(np.int32))
            first += len(part)
        return cls(np.concatenate(digests), np.concatenate(shards), np.concatenate(rows), reasons)


class EarlierRows:
    """Reads rows of earlier shards; each shard is compared with its digest when it is opened. A context manager."""

    def __init__(self, earlier: EarlierImages) -> None:
        self.earlier = earlier
        self._open: OrderedDict[tuple[int, int], TarRows] = OrderedDict()

    def __enter__(self) -> "EarlierRows":
        return self

    def __exit__(self, *_: object) -> None:
        for rows in self._open.values():
            rows.close()

    def image(self, position: int) -> bytes | None:
        """The encoded image of this position; None if it was quarantined.

        Raises WrongRowError if the shard or its row is not what the artifact says.
        """
        row = int(self.earlier.row[position])
        if row == _NONE:
            return None
        place, shard = int(self.earlier.artifact[position]), int(self.earlier.shard[position])
        try:
            members = self._rows(place, shard)[row]
            sha256 = json.loads(bytes(members[JSON_MEMBER]))["sha256"]
            image = next(bytes(members[name]) for name in IMAGE_MEMBERS.values() if name in members)
        except (OSError, UserError, ValueError, KeyError, IndexError, TypeError, StopIteration) as error:
            raise WrongRowError(self.where(position, f"cannot be read ({error})")) from error
        if sha256 != self.earlier.digests[position].tobytes().hex():
            raise WrongRowError(self.where(position, f"is of the original {sha256[:12]}, not the one in its report"))
        return image

    def where(self, position: int, what: str) -> str:
        """A message about the row of a position, with the artifact it is in."""
        place, shard = int(self.earlier.artifact[position]), int(self.earlier.shard[position])
        uri = self.earlier.artifacts[place].folder.uri
        return f"row {self.earlier.row[position]} of {IMAGE_SHARD.format(shard)} in {uri} {what}"

    def _rows(self, place: int, shard: int) -> TarRows:
        key = place, shard
        if key not in self._open:
            self._open[key] = self._opened(self.earlier.artifacts[place], IMAGE_SHARD.format(shard))
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(key)
        return self._open[key]

    def _opened(self, artifact: Artifact, name: str) -> TarRows:
        (entry,) = artifact.entries(name)
        rows = TarRows(artifact.path(name))
        if hashlib.sha256(rows.data).hexdigest() != entry.sha256:
            rows.close()
            raise ManifestError(f"{name} of {artifact.folder.uri} differs from its manifest; run its step again")
        return rows


def positions_to_read(earlier: EarlierImages, fingerprint: str, shard: int) -> NDArray[np.bool_]:
    """Which originals of a shard are read, bool [n]: those that are in no earlier artifact, and a sample to compare."""
    return ~earlier.reused | checked_rows(earlier.reused, fingerprint, shard)


def shard_slices(earlier: EarlierImages | None, bounds: Sequence[tuple[int, int]]) -> list[EarlierImages | None]:
    """The part of each shard, given its first image and the one after its last; None if it reuses nothing."""
    parts = [None if earlier is None else earlier.slice(*pair) for pair in bounds]
    return [part if part is not None and part.reused.any() else None for part in parts]
