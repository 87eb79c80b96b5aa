"""Artifacts: files and the manifest that makes them trustworthy.

A step writes its files into an attempt folder and `manifest.json` last. A reader trusts nothing that no manifest names.
While a step is under way each finished file has a journal entry (`.journal/<name>.json`, with bytes and sha256), so
that a later attempt at the same fingerprint can take over what was finished.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from edt_core.environment import code_version, environment
from edt_core.errors import UserError
from edt_core.schema import KINDS, MANIFEST_NAME, MANIFEST_VERSION
from edt_core.storage import Folder, sha256_file

JOURNAL = ".journal"


class ManifestError(UserError):
    """A manifest, or what it names, is not as it was committed."""


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256_json(value: Any) -> str:
    """Hex sha256 of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def check_name(name: str) -> str:
    """A relative path that stays inside its folder, or ValueError: names come from files we did not write."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\\" in name or any(part in ("..", ".") for part in parts):
        raise UserError(f"the file name {name!r} leaves its artifact's folder; names are relative, without '..'")
    return name


def fingerprint(kind: str, version: int, fields: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Identity of what a step makes: kind, version, the fields that change the result, and its inputs' fingerprints."""
    return sha256_json({"kind": kind, "version": version, "config": fields, "inputs": dict(inputs)})


@dataclass(frozen=True)
class Source:
    """What a pipeline starts from: a local folder of images and the digest of its content."""

    path: Path
    fingerprint: str


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact. `rows` counts its samples, None where that means nothing."""

    path: str
    bytes: int
    sha256: str
    rows: int | None = None


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` holds. Paths in `files` are relative to `<folder of the manifest>/<attempt>`."""

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

    @property
    def digest(self) -> str:
        """Content digest: sha256 over names, bytes and digests of the files; equal content gives an equal digest."""
        return sha256_json([[f.path, f.bytes, f.sha256] for f in sorted(self.files, key=lambda f: f.path)])

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "digest": self.digest}, indent=1, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "Manifest":
        """Parse and check a manifest. Raises ManifestError where it is cut, foreign or inconsistent."""
        try:
            values = json.loads(text)
            digest = values.pop("digest")
            values["files"] = tuple(FileEntry(**entry) for entry in values["files"])
            manifest = cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ManifestError(
                f"{where} is not a whole manifest ({error}); remove it and run the step again"
            ) from error
        if manifest.schema_version != MANIFEST_VERSION:
            raise ManifestError(
                f"{where} has schema version {manifest.schema_version}, this code reads {MANIFEST_VERSION}; "
                "use the version of edt-pipeline that wrote it"
            )
        if manifest.digest != digest or manifest.kind not in KINDS:
            raise ManifestError(f"{where} does not agree with its own digest; remove it and run the step again")
        for name in (*(entry.path for entry in manifest.files), *([manifest.attempt] if manifest.attempt else [])):
            check_name(name)
        return manifest


@dataclass(frozen=True)
class Artifact:
    """A committed artifact: its folder and its manifest."""

    folder: Folder
    manifest: Manifest

    @classmethod
    def open(cls, location: str | Folder) -> "Artifact":
        """Open a committed artifact and check that its files are there with the bytes stated.

        Raises ManifestError if there is no manifest, it is not whole, or a file is missing or has another size.
        """
        folder = location if isinstance(location, Folder) else Folder.at(location)
        if not folder.exists(MANIFEST_NAME):
            raise ManifestError(
                f"{folder.uri} has no {MANIFEST_NAME}: it is not an artifact, or its step never finished"
            )
        where = f"{folder.uri}/{MANIFEST_NAME}"
        artifact = cls(folder, Manifest.from_json(folder.read_bytes(MANIFEST_NAME), where))
        if problems := artifact.problems():
            raise ManifestError(f"{folder.uri} is damaged: {'; '.join(problems[:10])}; run its step again")
        return artifact

    @property
    def data(self) -> Folder:
        return self.folder.child(self.manifest.attempt)

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def counts(self) -> Mapping[str, Any]:
        return self.manifest.counts

    def entries(self, pattern: str = "*") -> list[FileEntry]:
        """Files whose name matches, in order of name."""
        return sorted((f for f in self.manifest.files if fnmatch(f.path, pattern)), key=lambda f: f.path)

    def path(self, name: str) -> Path:
        """A file as a local path (downloaded if the store is remote). Raises ManifestError if it is not listed."""
        if not any(entry.path == name for entry in self.manifest.files):
            raise ManifestError(f"{self.folder.uri} lists no file {name!r}")
        return self.data.local_copy(name)

    def paths(self, pattern: str = "*") -> list[Path]:
        return [self.data.local_copy(entry.path) for entry in self.entries(pattern)]

    def directory(self, name: str) -> Path:
        """A folder inside the artifact as a local path, all of its listed files in place."""
        entries = self.entries(f"{name}/*")
        if not entries:
            raise ManifestError(f"{self.folder.uri} lists no folder {name!r}")
        paths = [self.data.local_copy(entry.path) for entry in entries]
        below = len(PurePosixPath(entries[0].path).parts) - len(PurePosixPath(name).parts)
        return paths[0].parents[below - 1]

    def read_json(self, name: str) -> Any:
        return json.loads(self.path(name).read_bytes())

    def problems(self, deep: bool = False) -> list[str]:
        """What differs from the manifest: missing and resized files; with `deep`, files whose sha256 differs."""
        found = []
        for entry in self.entries():
            size = self.data.size(entry.path)
            if size is None:
                found.append(f"{entry.path} is missing")
            elif size != entry.bytes:
                found.append(f"{entry.path} has {size} bytes, its manifest says {entry.bytes}")
            elif deep and sha256_file(self.data.local_copy(entry.path)) != entry.sha256:
                found.append(f"{entry.path} has {size} bytes as stated but another sha256")
        return found


@dataclass(frozen=True)
class ArtifactWriter:
    """Where a job puts its files. Picklable: every Ray task of a job writes through a copy of the same writer.

    `folder` will hold the manifest, `attempt` is the sub-folder of this attempt's files ("" for none) and `previous`
    are sub-folders of earlier attempts at the same fingerprint, newest first.
    """

    folder: Folder
    kind: str
    fingerprint: str
    attempt: str = ""
    previous: tuple[str, ...] = ()

    @property
    def data(self) -> Folder:
        return self.folder.child(self.attempt)

    def write(self, name: str, write_to: Callable[[Path], int | None]) -> FileEntry:
        """Create one file whole: `write_to(path)` fills a staged file and returns its number of rows."""
        with self.data.staged(check_name(name)) as staged:
            rows = write_to(staged)
            return self._publish(staged, name, rows)

    def write_json(self, name: str, value: Any) -> FileEntry:
        text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
        return self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, data: bytes, rows: int | None = None) -> FileEntry:
        """Create one file of these bytes."""

        def write_to(path: Path) -> int | None:
            path.write_bytes(data)
            return rows

        return self.write(name, write_to)

    def add_tree(self, source: Path, name: str) -> list[FileEntry]:
        """Copy every file below a local folder to `name/` of the artifact."""
        files = sorted(path for path in source.rglob("*") if path.is_file())

        def copied(path: Path) -> FileEntry:
            inside = f"{name}/{path.relative_to(source).as_posix()}"
            return self.write(inside, lambda target: _copy(path, target))

        return [copied(path) for path in files]

    def recover(self, name: str) -> FileEntry | None:
        """Take over a file that an earlier attempt, or this one before a crash, finished; None if there is none.

        The bytes are digested again: what the journal states but the file no longer holds is not taken.
        """
        for attempt in (self.attempt, *self.previous):
            folder = self.folder.child(attempt)
            entry = self._journalled(folder, name)
            if entry is None or folder.size(name) != entry.bytes:
                continue
            source = folder.local_copy(name)
            if sha256_file(source) != entry.sha256:
                continue
            if attempt == self.attempt:
                return entry
            with self.data.staged(name) as staged:
                _copy(source, staged)
                return self._publish(staged, name, entry.rows)
        return None

    def written(self) -> list[FileEntry]:
        """Files of this attempt that are finished, in order of name."""
        entries = [self._journalled(self.data, name) for name in self._journal_names()]
        if None in entries:
            raise ManifestError(
                f"{self.data.uri}/{JOURNAL} has an entry that is not ours or not whole; run the step again"
            )
        return sorted((entry for entry in entries if entry is not None), key=lambda entry: entry.path)

    def commit(
        self,
        config: Mapping[str, Any],
        inputs: Mapping[str, str],
        counts: Mapping[str, Any],
        *,
        step_version: int = 1,
        started: float | None = None,
        mlflow_run_id: str | None = None,
    ) -> Artifact:
        """Write the manifest, last of all. If another writer committed this fingerprint first, theirs is returned."""
        manifest = Manifest(
            kind=self.kind,
            fingerprint=self.fingerprint,
            config=config,
            inputs=inputs,
            files=tuple(self.written()),
            counts=counts,
            attempt=self.attempt,
            step_version=step_version,
            duration_s=round(time.time() - started, 3) if started else 0.0,
            created_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            code_version=code_version(),
            environment=environment(),
            mlflow_run_id=mlflow_run_id,
        )
        if problems := Artifact(self.folder, manifest).problems():
            raise ManifestError(f"not committing {self.folder.uri}: {'; '.join(problems[:10])}")
        text = manifest.to_json().encode()
        if not self.folder.write_bytes(MANIFEST_NAME, text, exclusive=True):
            try:
                return Artifact.open(self.folder)
            except ManifestError:  # what stands there is damaged, and this attempt is its repair
                self.folder.write_bytes(MANIFEST_NAME, text)
        self.data.remove(JOURNAL)
        return Artifact.open(self.folder)

    def _publish(self, staged: Path, name: str, rows: int | None) -> FileEntry:
        entry = FileEntry(name, staged.stat().st_size, sha256_file(staged), rows)
        self.data.publish(staged, name)
        record = {**asdict(entry), "fingerprint": self.fingerprint}
        self.data.write_bytes(f"{JOURNAL}/{_flat(name)}.json", canonical_json(record).encode())
        return entry

    def _journal_names(self) -> Iterator[str]:
        for name in self.data.child(JOURNAL).names():
            if name.endswith(".json"):
                yield _unflat(name.removesuffix(".json"))

    def _journalled(self, folder: Folder, name: str) -> FileEntry | None:
        try:
            record = json.loads(folder.read_bytes(f"{JOURNAL}/{_flat(name)}.json"))
            same = record.pop("fingerprint") == self.fingerprint
            return FileEntry(**record) if same else None
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None


def _copy(source: Path, target: Path) -> None:
    """A second name for the same bytes where the file system allows it: artifact files never change."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _flat(name: str) -> str:
    """File name as one path component: `%` and `/` percent-encoded."""
    return name.replace("%", "%25").replace("/", "%2F")


def _unflat(name: str) -> str:
    return re.sub("%2F|%25", lambda match: "/" if match[0] == "%2F" else "%", name)
