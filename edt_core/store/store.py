"""The store: artifacts at `<root>/<kind>/<fingerprint>/manifest.json`, with one sub-folder per attempt."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edt_core.errors import UserError
from edt_core.store.artifact import Artifact, ArtifactWriter, ManifestError, journalled
from edt_core.store.contents import stamped_name
from edt_core.store.folder import Folder
from edt_core.store.layout import KINDS, MANIFEST_NAME
from edt_core.store.manifest import Manifest

if TYPE_CHECKING:
    from filelock import ReadWriteLock

_BUSY_S = 2.0  # between two calls while a lock is held by another process


def store_of(folder: Folder, kind: str, fingerprint: str) -> "Store | None":
    """The store that an artifact's folder `<store>/<kind>/<fingerprint>` is in; None for a folder outside a store."""
    root, separator, rest = folder.uri.rpartition(f"/{kind}/{fingerprint}")
    return Store(Folder(root)) if separator and not rest else None


@dataclass(frozen=True)
class Store:
    """All artifacts below one folder or URI. Picklable."""

    root: Folder

    @classmethod
    def open(cls, location: str) -> "Store":
        """The store at a folder or URI, created if missing. Raises UserError if it is not writable."""
        store = cls(Folder.at(location))
        store.root.check_writable()
        return store

    def folder(self, kind: str, fingerprint: str) -> Folder:
        return self.root.child(f"{kind}/{fingerprint}")

    def find(self, kind: str, fingerprint: str, warn: Callable[[str], None] = lambda message: None) -> Artifact | None:
        """The committed artifact, or None. A damaged artifact counts as missing, with a warning."""
        folder = self.folder(kind, fingerprint)
        if not folder.exists(MANIFEST_NAME):
            return None
        try:
            artifact = Artifact.open(folder)
            if artifact.fingerprint != fingerprint:
                raise ManifestError(f"{folder.uri} contains the artifact {artifact.fingerprint}: it was moved")
            return artifact
        except ManifestError as error:
            warn(f"not reusing a damaged artifact; its step runs again: {error}")
            return None

    def writer(self, kind: str, fingerprint: str) -> ArtifactWriter:
        """A writer for a new attempt, which can reuse files that earlier attempts finished."""
        folder = self.folder(kind, fingerprint)
        return ArtifactWriter(folder, kind, fingerprint, stamped_name(), tuple(_attempts(folder)))

    def begun(self, kind: str, fingerprint: str) -> set[str]:
        """Names of the files that earlier attempts at an artifact finished, which its step can reuse."""
        folder = self.folder(kind, fingerprint)
        return {name for attempt in _attempts(folder) for name in journalled(folder.child(attempt))}

    @contextmanager
    def lock(self, kind: str, fingerprint: str, busy: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Held while a step runs: of two Ray sessions that share a local store, one computes and the other waits.

        The operating system releases it when its process ends. A remote store has no lock: one manifest wins. `busy` is
        called every few seconds while another process holds it.
        """
        from filelock import FileLock, Timeout

        if (root := self.root.local) is None:
            yield
            return
        folder = root / ".locks"
        folder.mkdir(exist_ok=True)
        lock, patience = FileLock(folder / f"{kind}-{fingerprint}.lock"), 0.0
        while True:
            try:
                lock.acquire(timeout=patience)
                break
            except Timeout:
                busy()
                patience = _BUSY_S
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Held while a workflow runs on a local store, so that its artifacts are not removed. Workflows share it."""
        from filelock import Timeout

        if (lock := self._users()) is None:
            yield
            return
        try:
            with lock.read_lock():
                yield
        except Timeout as error:
            raise UserError(f"{self.root.uri} is being cleaned by `edt gc`; rerun when it is done") from error

    @contextmanager
    def to_itself(self) -> Iterator[None]:
        """Held while a local store is cleaned. Raises UserError while a workflow runs on it."""
        from filelock import Timeout

        if (lock := self._users(timeout=0)) is None:
            yield
            return
        try:
            with lock.write_lock():
                yield
        except Timeout as error:
            raise UserError(
                f"a run is in progress in {self.root.uri} and needs its artifacts; rerun `edt gc` when it has ended"
            ) from error

    def _users(self, timeout: float = 60) -> "ReadWriteLock | None":
        from filelock import ReadWriteLock

        if (root := self.root.local) is None:
            return None
        (root / ".locks").mkdir(exist_ok=True)
        return ReadWriteLock(root / ".locks" / "users.db", timeout=timeout, is_singleton=False)

    def committed(self, kind: str) -> Iterator[Artifact]:
        """The artifacts of a kind by their manifests alone; damaged, unfinished and moved ones are left out."""
        for name in self.root.child(kind).names():
            with suppress(ManifestError):
                artifact = Artifact.read(self.folder(kind, name))
                if artifact.fingerprint == name:
                    yield artifact

    def manifests(self, kind: str) -> dict[str, Manifest]:
        """The manifests of a kind by the name of their folder, without damaged or unfinished ones."""
        manifests = {}
        for name in self.root.child(kind).names():
            with suppress(ManifestError):
                manifests[name] = Artifact.read(self.folder(kind, name)).manifest
        return manifests

    def artifacts(self) -> Iterator[Artifact]:
        """Every committed artifact that is not damaged."""
        for kind in KINDS:
            for fingerprint in self.root.child(kind).names():
                if artifact := self.find(kind, fingerprint):
                    yield artifact


def _attempts(folder: Folder) -> list[str]:
    return sorted((name for name in folder.names() if name != MANIFEST_NAME and not name.startswith(".")), reverse=True)
