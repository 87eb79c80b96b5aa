"""Artifacts: files and the manifest that lists and verifies them.

A step writes its files into an attempt folder and `manifest.json` last. Readers use only files that a manifest lists.
While a step runs, each finished file has a journal entry (`.journal/<name>.json`, with bytes and sha256), so that a
later attempt at the same fingerprint can reuse it.

Opening an artifact compares names and sizes with one listing. Digests are compared by `problems(deep=True)` in the
store, by `verify_once` once on each node, and whenever a remote file is downloaded.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edt_core.environment import code_version, environment, utc
from edt_core.errors import UserError
from edt_core.files.small_files import UnusableFileError, parse_json, read_json
from edt_core.printing.redaction import redacted_values
from edt_core.progress import Progress, Silent
from edt_core.store.digests import compare_digests, compare_sizes, damaged, difference, digest_once, listing
from edt_core.store.folder import Folder, in_threads, is_hidden, is_staged, sha256_file
from edt_core.store.layout import MANIFEST_NAME
from edt_core.store.manifest import (
    FileEntry,
    Manifest,
    ManifestError,
    canonical_json,
    check_name,
    fingerprint,
    sha256_json,
)
from edt_core.store.prefixes import whole_folder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edt_core.config import SourceConfig

__all__ = [
    "Artifact",
    "ArtifactWriter",
    "FileEntry",
    "Manifest",
    "ManifestError",
    "Source",
    "canonical_json",
    "check_name",
    "fingerprint",
    "sha256_json",
]

JOURNAL = ".journal"


@dataclass(frozen=True)
class Source:
    """An input that no step of the pipeline produces: its location, its fingerprint, and for images their selection.

    `images`: the number of listed images, `classes`: the names of their classes in order, both if known. `digests`: the
    sha256 of each image, uint8 [N, 32] in the order of the listing, if the source is local.
    """

    location: str
    fingerprint: str
    selection: "SourceConfig | None" = None
    images: int | None = field(default=None, compare=False)
    classes: tuple[str, ...] = field(default=(), compare=False)
    digests: "NDArray[np.uint8] | None" = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Artifact:
    """A committed artifact: its folder and its manifest."""

    folder: Folder
    manifest: Manifest

    @classmethod
    def read(cls, location: str | Folder) -> "Artifact":
        """Read an artifact's manifest without checking its files. Raises ManifestError.

        A location as text may end with the beginning of the fingerprint.
        """
        folder = location if isinstance(location, Folder) else Folder.at(location)
        try:
            text = folder.read_bytes(MANIFEST_NAME)
        except (FileNotFoundError, NotADirectoryError) as error:
            if isinstance(location, str) and (whole := whole_folder(folder)) is not None:
                return cls.read(whole)
            raise ManifestError(
                f"{folder.uri} has no {MANIFEST_NAME}: it is not an artifact, or its step never finished"
            ) from error
        except UnusableFileError as error:
            raise ManifestError(f"{error}; or remove it and rerun the step") from error
        return cls(folder, Manifest.from_json(text, f"{folder.uri}/{MANIFEST_NAME}"))

    @classmethod
    def open(cls, location: str | Folder) -> "Artifact":
        """Open a committed artifact and check that exactly its files exist, with the sizes in its manifest.

        Raises ManifestError if the manifest is missing or invalid, or a file is missing, has another size, or is extra.
        """
        artifact = cls.read(location)
        if problems := artifact.problems():
            raise damaged(artifact.folder, problems)
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
        """A file as a local path, from this node's cache if the store is remote. Raises ManifestError as `paths`."""
        entries = [entry for entry in self.manifest.files if entry.path == name]
        if not entries:
            raise ManifestError(f"{self.folder.uri} lists no file {name!r}")
        return self._in_place(entries) / name

    def verified_paths(self, entries: Sequence[FileEntry]) -> list[Path]:
        """Some files as local paths, each of whose sha256 was compared with the manifest, once on this node.

        Raises as `paths`.
        """
        root = self._in_place(entries)
        if self.data.local is not None:
            for entry in entries:  # a stamp of its own, so that processes wait only for the same file
                self._digest_once([entry], entry.sha256)
        return [root / entry.path for entry in entries]

    def paths(self, pattern: str = "*", progress: Progress | None = None) -> list[Path]:
        """Matching files as local paths, in order of name.

        Files of a remote store that are not in this node's cache are downloaded in parallel and verified. Raises
        ManifestError if bytes differ from the manifest, UserError if the cache is too small for them.
        """
        entries = self.entries(pattern)
        root = self._in_place(entries, progress)
        return [root / entry.path for entry in entries]

    def directory(self, name: str, files: Collection[str] | None = None) -> Path:
        """A folder inside the artifact as a local path with all of its listed files. Raises as `paths`.

        `files`: names in the folder; of a remote store, only those that are listed of these are downloaded.
        """
        entries = self.entries(f"{name}/*")
        if files is not None:
            entries = [entry for entry in entries if entry.path.removeprefix(f"{name}/") in files]
        if not entries:
            raise ManifestError(f"{self.folder.uri} lists no folder {name!r}")
        return self._in_place(entries) / name

    def _in_place(self, entries: Sequence[FileEntry], progress: Progress | None = None) -> Path:
        """A local folder that contains these files under their names."""
        if (root := self.data.local) is None:
            from edt_core.store.cache import Cache

            return Cache.of_node().view(self.data, entries, self.manifest.digest, progress)
        if missing := [entry.path for entry in entries if not (root / entry.path).exists()]:
            raise damaged(self.folder, [f"{name} is missing" for name in missing])
        return root

    def read_json(self, name: str) -> Any:
        return read_json(self.path(name))

    def problems(self, deep: bool = False, progress: Progress | None = None) -> list[str]:
        """Differences from the manifest: missing, resized and extra files; with `deep`, files whose sha256 differs.

        Remote files are digested as they stream from the store, not from the cache. `progress` counts MiB.
        """
        sizes = self.data.walk()
        if self.data == self.folder:
            sizes.pop(MANIFEST_NAME, None)
        problems, complete = compare_sizes(self.data, self.entries(), sizes)
        if deep:
            differing = compare_digests(self.data, complete, progress or Silent())
            problems += [difference(*pair) for pair in differing.items()]
        return problems

    def verify_once(self, pattern: str = "*", progress: Progress | None = None) -> None:
        """Compare the sha256 of matching files with the manifest, once on each node while they stay unchanged.

        Files of a local or shared file system are digested in threads and stamped in this node's cache; other processes
        on the node wait for the first and then return at once. Files of a remote store are downloaded into this node's
        cache, which verifies them. Raises ManifestError with the files that differ, are missing, or are not in the
        manifest.
        """
        if problems := self.problems():
            raise damaged(self.folder, problems)
        if self.data.local is None:
            self.paths(pattern, progress)
        else:
            self._digest_once(self.entries(pattern), self.manifest.digest, progress)

    def _digest_once(self, entries: Sequence[FileEntry], stamp: str, progress: Progress | None = None) -> None:
        """Compare local files with their sha256, those of one stamp once on this node. Raises ManifestError."""
        if differing := digest_once(self.data, entries, stamp, progress or Silent()):
            remedy = f"remove {self.folder.uri}/{MANIFEST_NAME} and rerun its step"
            raise damaged(self.folder, [difference(*pair) for pair in differing.items()], remedy)


@dataclass(frozen=True)
class ArtifactWriter:
    """Writes the files of an artifact. Picklable: every Ray task of a job uses a copy of the same writer.

    `folder` is for the manifest, `attempt` is the sub-folder of this attempt's files ("" for none), and `previous` are
    sub-folders of earlier attempts at the same fingerprint, newest first.
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
        """Create one file atomically: `write_to(path)` writes a staged file and returns its number of rows."""
        with self.data.staged(check_name(name)) as staged:
            rows = write_to(staged)
            return self._publish(staged, name, rows)

    def write_json(self, name: str, value: Any) -> FileEntry:
        text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
        return self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, data: bytes, rows: int | None = None) -> FileEntry:
        """Create one file with these bytes."""

        def write_to(path: Path) -> int | None:
            path.write_bytes(data)
            return rows

        return self.write(name, write_to)

    def link(self, name: str, source: Path) -> FileEntry:
        """Create one file with the bytes of a local file, hard-linked if possible; its entry has their digest."""
        return self.write(name, lambda target: _copy(source, target))

    def add_tree(self, source: Path, name: str) -> list[FileEntry]:
        """Copy every file below a local folder to `name/` of the artifact, except names that start with a dot."""
        paths = (path for path in source.rglob("*") if path.is_file())
        files = sorted(path for path in paths if not is_hidden(path.relative_to(source).as_posix()))

        def add(path: Path) -> FileEntry:
            inside = f"{name}/{path.relative_to(source).as_posix()}"
            return self.write(inside, lambda target: _copy(path, target))

        return [add(path) for path in files]

    def recover(self, name: str) -> FileEntry | None:
        """Reuse a file that an earlier attempt, or this one before a crash, finished; None if there is none.

        The bytes are digested again: a file that differs from its journal entry is not reused.
        """
        for attempt in (self.attempt, *self.previous):
            folder = self.folder.child(attempt)
            entry = self._journalled(folder, name)
            if entry is None or folder.size(name) != entry.bytes:
                continue
            if attempt == self.attempt:
                if folder.digest(name) == entry.sha256:
                    return entry
                continue
            with self.data.staged(name) as staged:
                if _bring(folder, name, staged) == entry.sha256:
                    return self._publish(staged, name, entry.rows)
        return None

    def discard(self, name: str) -> None:
        """Remove a folder of this attempt's files, journal entries last: until then they identify the files as ours."""
        self.data.remove(name)
        for entry in self.begun(name):
            self.data.remove(f"{JOURNAL}/{_flat(entry)}.json")

    def begun(self, name: str) -> list[str]:
        """Files of this attempt below a folder that have a journal entry: finished, or about to be published."""
        return [entry for entry in self._journal_names() if entry.startswith(f"{name}/")]

    def entries_in(self, name: str) -> dict[str, FileEntry | None]:
        """The journal entries of this attempt's files below a folder; None for a damaged one, or another artifact's."""
        return dict(in_threads(lambda file: self._journalled(self.data, file), self.begun(name)))

    def written(self) -> list[FileEntry]:
        """Files of this attempt that are finished, in order of name."""
        results = in_threads(lambda name: self._journalled(self.data, name), self._journal_names())
        entries = [entry for _, entry in results]
        if None in entries:
            raise ManifestError(
                f"{self.data.uri}/{JOURNAL} has an entry that is damaged or of another artifact; rerun the step"
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
        reused: Mapping[str, Any] | None = None,
        device: str | None = None,
    ) -> Artifact:
        """Write the manifest. If another writer committed this fingerprint first, return its artifact."""
        manifest = Manifest(
            kind=self.kind,
            fingerprint=self.fingerprint,
            config=redacted_values(config),
            inputs=inputs,
            files=tuple(self.written()),
            counts=redacted_values(counts),
            attempt=self.attempt,
            step_version=step_version,
            duration_s=round(time.time() - started, 3) if started else 0.0,
            created_at=utc(),
            code_version=code_version(),
            environment={**environment(), **({} if device is None else {"device": device})},
            mlflow_run_id=mlflow_run_id,
            reused=reused,
        )
        if problems := Artifact(self.folder, manifest).problems():
            raise ManifestError(
                f"not committing {self.folder.uri}, {len(problems)} problems: {listing(problems)}; "
                "rerun the step with an empty folder"
            )
        text = manifest.to_json().encode()
        if not self.folder.write_bytes(MANIFEST_NAME, text, exclusive=True):
            try:
                return Artifact.open(self.folder)
            except ManifestError:  # the existing artifact is damaged, and this attempt replaces it
                self.folder.write_bytes(MANIFEST_NAME, text)
        self.data.remove(JOURNAL)
        self.data.sweep()
        return Artifact.open(self.folder)

    def check_own(self) -> None:
        """Raise UserError if the folder contains files that no earlier run with this fingerprint wrote."""
        ours = {name for name in self._journal_names() if self._journalled(self.data, name)}
        journal = self.data.child(JOURNAL).names()  # the commit removes this folder
        others = {f"{JOURNAL}/{name}" for name in journal if not name.endswith(".json") and not is_staged(name)}
        if foreign := sorted((set(self.data.walk()) - ours) | others):
            raise UserError(
                f"{self.data.uri} contains {len(foreign)} files that this run did not write ({', '.join(foreign[:3])}"
                f"{', ...' if len(foreign) > 3 else ''}): your own, or those of a run with another configuration or "
                "other inputs; give an empty folder"
            )

    def _publish(self, staged: Path, name: str, rows: int | None) -> FileEntry:
        """Write the journal entry, then the file: after a crash in between, a file without entry would look foreign."""
        entry = FileEntry(name, staged.stat().st_size, sha256_file(staged), rows)
        record = {**asdict(entry), "fingerprint": self.fingerprint}
        self.data.write_bytes(f"{JOURNAL}/{_flat(name)}.json", canonical_json(record).encode())
        self.data.publish(staged, name)
        return entry

    def _journal_names(self) -> Iterator[str]:
        return journalled(self.data)

    def _journalled(self, folder: Folder, name: str) -> FileEntry | None:
        try:
            path = f"{JOURNAL}/{_flat(name)}.json"
            record = parse_json(folder.read_bytes(path), path)
            is_own = record.pop("fingerprint") == self.fingerprint
            return FileEntry(**record) if is_own else None
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None


def journalled(attempt: Folder) -> Iterator[str]:
    """Names of the files with a journal entry in an attempt: finished, or about to be published."""
    for name in attempt.child(JOURNAL).names():
        if name.endswith(".json"):
            yield _unflat(name.removesuffix(".json"))


def _copy(source: Path, target: Path) -> None:
    """Hard-link a file if the file system allows it, else copy it: artifact files never change."""
    try:
        os.link(source.resolve(), target)  # a view of the node's cache consists of symbolic links
    except OSError:
        shutil.copyfile(source, target)


def _bring(folder: Folder, name: str, target: Path) -> str:
    """Copy a folder's file to a local path and return the sha256 of its bytes."""
    if (root := folder.local) is None:
        return folder.fetch(name, target)
    _copy(root / name, target)
    return sha256_file(target)


def _flat(name: str) -> str:
    """File name as one path component: `%` and `/` percent-encoded."""
    return name.replace("%", "%25").replace("/", "%2F")


def _unflat(name: str) -> str:
    return re.sub("%2F|%25", lambda match: "/" if match[0] == "%2F" else "%", name)
