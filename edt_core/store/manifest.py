"""The manifest: the list of an artifact's files, with two checksums.

`digest` covers names, sizes and digests of the files, and identifies the content. `seal` covers everything else in
`manifest.json` and detects edits and flipped bits. Neither is a signature: a deliberate edit can be sealed again.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

from edt_core.errors import UserError
from edt_core.store.layout import KINDS, MANIFEST_VERSION

_SHA256 = re.compile("[0-9a-f]{64}")


class ManifestError(UserError):
    """A manifest, or a file that it lists, differs from what was committed."""


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256_json(value: Any) -> str:
    """Hex sha256 of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def check_name(name: str) -> str:
    """Return a relative path that stays inside its folder, or raise UserError: names may come from untrusted files."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\\" in name or any(part in ("..", ".") for part in parts):
        raise UserError(
            f"the file name {name!r} leads outside its artifact's folder; names must be relative, without '..'"
        )
    return name


def fingerprint(kind: str, version: int, fields: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Identity of a step's result: hash of kind, version, the fields that change it, and its inputs' fingerprints."""
    return sha256_json({"kind": kind, "version": version, "config": fields, "inputs": dict(inputs)})


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact. `rows` counts its samples, None if it has none."""

    path: str
    bytes: int
    sha256: str
    rows: int | None = None


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`. Paths in `files` are relative to `<folder of the manifest>/<attempt>`."""

    kind: str
    fingerprint: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]  # role -> fingerprint
    files: tuple[FileEntry, ...]
    counts: Mapping[str, Any]
    attempt: str = ""
    step_version: int = 1
    duration_s: float = 0.0
    created_at: str = ""
    code_version: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    mlflow_run_id: str | None = None
    schema_version: int = MANIFEST_VERSION
    reused: Mapping[str, Any] | None = None  # rows taken from earlier artifacts: how it was made, not what it is

    @property
    def digest(self) -> str:
        """Content digest: sha256 over names, bytes and digests of the files; equal content gives an equal digest."""
        return sha256_json([[f.path, f.bytes, f.sha256] for f in sorted(self.files, key=lambda f: f.path)])

    def to_json(self) -> str:
        """The text of `manifest.json`, sealed."""
        # Through JSON and back first: a numeric key sorts as a number before, and as text after it is read.
        text = json.dumps({**asdict(self), "digest": self.digest}, allow_nan=False)
        values = json.loads(text)
        if values["reused"] is None:  # as in manifests of versions that did not know it
            del values["reused"]
        return json.dumps({**values, "seal": sha256_json(values)}, indent=1, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "Manifest":
        """Parse and check a manifest. Raises ManifestError if it is truncated, foreign, edited or inconsistent."""
        remedy = "remove it and rerun the step"
        try:
            values = json.loads(text, object_pairs_hook=_without_duplicates)
            version = values["schema_version"]
            if version != MANIFEST_VERSION:
                raise ManifestError(
                    f"{where} has schema version {version!r}, but this version reads {MANIFEST_VERSION}; "
                    "use the version of edt-pipeline that wrote it"
                )
            if values.pop("seal") != sha256_json(values):
                raise ManifestError(
                    f"{where} was changed after it was written: its content does not match its seal; " + remedy
                )
            digest = values.pop("digest")
            values["files"] = tuple(FileEntry(**entry) for entry in values["files"])
            manifest = cls(**values)
            manifest._check(digest)
        except ManifestError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ManifestError(f"{where} is not a valid manifest ({error}); {remedy}") from error
        return manifest

    def _check(self, digest: str) -> None:
        """Raise ValueError unless every part is valid: names and digests become paths on the reader's disk."""
        paths = [entry.path for entry in self.files]
        if self.digest != digest or self.kind not in KINDS or len(set(paths)) != len(paths):
            raise ValueError("its kind, digest and file names do not agree")
        for name in (*paths, *([self.attempt] if self.attempt else [])):
            check_name(name)
        for entry in self.files:
            if not _SHA256.fullmatch(entry.sha256) or type(entry.bytes) is not int or entry.bytes < 0:
                raise ValueError(f"bytes or sha256 of {entry.path} are invalid")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs of a JSON object as a dictionary. Raises ValueError for a repeated key, which could hide an edit."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("it contains a key twice")
    return values
