"""Rows of earlier image shards: images whose original and whose preprocessing are unchanged are not decoded again.

Legend: N images of the new artifact, n images of one shard of it, quarantined ones included.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edt_core.config import PreprocessConfig
from edt_core.data.sources import UNREADABLE
from edt_core.data.tar_members import TarRows
from edt_core.environment import environment
from edt_core.errors import UserError
from edt_core.store.artifact import Artifact, ArtifactWriter, ManifestError
from edt_core.store.layout import IMAGE_MEMBERS, IMAGE_SHARD, JSON_MEMBER
from jobs.stages.reuse.lookup import Lookup
from jobs.stages.reuse.siblings import NONE, Places, WrongRowError, checked_rows, siblings

_PIXEL_FIELDS = ("image_size", "image_format", "decoder", "rotate_by_exif")
_LIBRARIES = ("machine", "pillow", "pillow-heif", "pillow-jxl-plugin", "pillow-avif-plugin")
_OPEN_SHARDS = 8


@dataclass(frozen=True)
class EarlierImages:
    """Where each of some images is in earlier artifacts. `places.row` is -1 for an image that was quarantined there.

    reasons: position -> reason of the quarantine. digests: sha256 of the originals, uint8 [n, 32].
    """

    places: Places
    reasons: Mapping[int, str]
    digests: NDArray[np.uint8]

    def slice(self, start: int, stop: int) -> "EarlierImages":
        """Images [start, stop)."""
        places = self.places.slice(start, stop, IMAGE_SHARD)
        reasons = {position - start: why for position, why in self.reasons.items() if start <= position < stop}
        return EarlierImages(places, reasons, self.digests[start:stop].copy())


def pixels_of(artifact: Artifact) -> dict[str, Any]:
    """What determines the bytes of one image of an image artifact: step version, fields, versions of libraries."""
    manifest = artifact.manifest
    return _pixels(manifest.step_version, manifest.config, manifest.environment)


def _pixels(version: int, config: Mapping[str, Any], libraries: Mapping[str, str]) -> dict[str, Any]:
    fields = (*_PIXEL_FIELDS, *(["jpeg_quality"] if config["image_format"] == "jpeg" else []))
    names = (*_LIBRARIES, *(["simplejpeg"] if config["decoder"] == "simplejpeg" else []))
    return {
        "step_version": version,
        **{name: config[name] for name in fields},
        **{name: libraries.get(name) for name in names},
    }


def earlier_images(
    out: ArtifactWriter,
    config: PreprocessConfig,
    version: int,
    keys: NDArray[np.uint8],
    by_version: bool = False,
) -> EarlierImages | None:
    """Find images in earlier artifacts of the store by keys, uint8 [N, 32]; None if there are none.

    The keys are the sha256 of their originals or, `by_version`, digests of their names, sizes and version tokens.

    An artifact is used if its step version, the fields that determine one image's bytes and the libraries that decode
    and encode it are the same. For each image the newest artifact that has it is used.
    """
    wanted = _pixels(version, config.model_dump(mode="json"), environment())
    artifacts = siblings(out, lambda artifact: pixels_of(artifact) == wanted)
    total, unreadable = len(keys), np.frombuffer(UNREADABLE, np.uint8)
    digests = np.zeros_like(keys) if by_version else keys
    artifact, shard, row = np.full(total, NONE, np.int8), np.zeros(total, np.int32), np.full(total, NONE, np.int32)
    reasons: dict[int, str] = {}
    readable = (keys != unreadable).any(axis=1)
    quarantined: dict[int, tuple[int, int, bytes, str]] = {}
    for index, item in enumerate(artifacts):
        if (lookup := Lookup.read(item, by_version)) is None:  # a damaged one
            continue
        for found in lookup.find(keys, readable & (artifact == NONE)):
            has_row = found.row != NONE
            places = found.places[has_row]
            artifact[places], shard[places], row[places] = index, found.shard[has_row], found.row[has_row]
            if by_version:
                digests[places] = found.digests[has_row]
            for k in np.flatnonzero(~has_row).tolist():
                if by_version and (found.digests[k] == unreadable).all():
                    continue  # what could not be read then is read again
                about = index, int(found.shard[k]), found.digests[k].tobytes(), lookup.reasons[int(found.position[k])]
                quarantined.setdefault(int(found.places[k]), about)
    # Images that an artifact has quarantined and none has.
    for place, (index, number, digest, reason) in sorted(quarantined.items()):
        if artifact[place] == NONE:
            artifact[place], shard[place], reasons[place] = index, number, reason
            if by_version:
                digests[place] = np.frombuffer(digest, np.uint8)
    if not (artifact != NONE).any():
        return None
    return EarlierImages(Places(tuple(artifacts), artifact, shard, row), reasons, digests)


class EarlierRows:
    """Reads rows of earlier shards; compares each shard with its digest when it opens it. A context manager."""

    def __init__(self, earlier: EarlierImages) -> None:
        self.earlier, self.places = earlier, earlier.places
        self._open: OrderedDict[tuple[int, int], TarRows] = OrderedDict()

    def __enter__(self) -> "EarlierRows":
        return self

    def __exit__(self, *_: object) -> None:
        for rows in self._open.values():
            rows.close()

    def image(self, position: int) -> bytes | None:
        """The encoded image of this position; None if it was quarantined.

        Raises WrongRowError if the shard or its row differs from what the artifact states.
        """
        row = int(self.places.row[position])
        if row == NONE:
            return None
        try:
            members = self._rows(int(self.places.artifact[position]), int(self.places.shard[position]))[row]
            sha256 = json.loads(bytes(members[JSON_MEMBER]))["sha256"]
            image = next(bytes(members[name]) for name in IMAGE_MEMBERS.values() if name in members)
        except (OSError, UserError, ValueError, KeyError, IndexError, TypeError, StopIteration) as error:
            raise WrongRowError(self.where(position, f"cannot be read ({error})")) from error
        if sha256 != self.earlier.digests[position].tobytes().hex():
            raise WrongRowError(self.where(position, f"is of the original {sha256[:12]}, not the one in its report"))
        return image

    def where(self, position: int, problem: str) -> str:
        """A message about the row of a position."""
        return self.places.where(position, IMAGE_SHARD, problem)

    def _rows(self, index: int, shard: int) -> TarRows:
        key = index, shard
        if key not in self._open:
            self._open[key] = _verified(self.places.artifacts[index], IMAGE_SHARD.format(shard))
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(key)
        return self._open[key]


def _verified(artifact: Artifact, name: str) -> TarRows:
    """The rows of a shard. Raises ManifestError if its bytes differ from the manifest."""
    (entry,) = artifact.entries(name)
    rows = TarRows(artifact.path(name))
    if hashlib.sha256(rows.data).hexdigest() != entry.sha256:
        rows.close()
        raise ManifestError(f"{name} of {artifact.folder.uri} does not match its manifest; run its step again")
    return rows


def positions_to_read(earlier: EarlierImages, fingerprint: str, shard: int) -> NDArray[np.bool_]:
    """Which originals of a shard are read, bool [n]: those in no earlier artifact, and the sample to compare."""
    reused = earlier.places.reused
    return ~reused | checked_rows(reused, fingerprint, shard)
