"""List, download and check the files of a registered version, without trusting their store.

A version has `digests.json`, {name: sha256}, beside its diffusers folder, and the sha256 of that file is a tag of the
version. So a change of files in the store is detected unless the registry was changed too.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from glob import escape
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from edt_core.errors import UserError
from edt_core.files.small_files import parse_json, read_bounded
from edt_core.store.artifact import canonical_json, check_name
from edt_core.store.digests import listing
from edt_core.store.folder import in_threads, sha256_file

if TYPE_CHECKING:
    from mlflow import MlflowClient

DIGESTS, PIPELINE = "digests.json", "pipeline"  # names below `artifacts/` of the logged model
INDEX = "model_index.json"  # by which diffusers knows a pipeline's folder
DIGEST_TAG = "edt.pipeline_digest"
_ARTIFACTS = "artifacts"  # MLflow's folder for the artifacts of a pyfunc model
_MOST_FILES, _DEEPEST = 10_000, 10  # a listing beyond these limits is not of a model
_DRIVE = re.compile("[A-Za-z]:")


def folder_digests(folder: Path) -> dict[str, str]:
    """Name -> sha256 of every file below a folder. Raises UserError for a link or a special file."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise UserError(f"{path} is a link or a special file; a model's folder may contain only regular files")
        if path.is_file():
            digests[path.relative_to(folder).as_posix()] = sha256_file(path)
    return digests


def digests_text(digests: Mapping[str, str]) -> bytes:
    """The text of `digests.json`."""
    return canonical_json(dict(digests)).encode()


def safe_name(name: str) -> str:
    """A name that stays below its folder on every system, or UserError."""
    check_name(name)
    if str(PurePosixPath(name)) != name or _DRIVE.match(name) or any(ord(letter) < 32 for letter in name):
        raise UserError(f"the file name {name!r} is not a plain relative name")
    return name


def fetch_version(client: "MlflowClient", version: Any, target: Path, need_digests: bool = True) -> None:
    """Download the diffusers folder of a version into `target`, a new or empty folder, and check it.

    Raises UserError that names the files that differ, are missing or extra, or whose names lead out of the folder; and
    for a version without digests if `need_digests`.
    """
    remote = _Remote(client, version)
    names = remote.names()
    digests = _stated_digests(remote, need_digests)
    if digests is not None and (problems := _compare_names(names, set(digests))):
        raise _damaged(version, problems)
    if not names:
        raise UserError(f"{title(version)} contains no diffusers folder: it was not registered by edt")
    for _ in in_threads(lambda name: remote.download(f"{PIPELINE}/{name}", target / name), sorted(names)):
        pass
    # Check the files on disk: none extra, none missing, no links.
    if digests is not None and (problems := _compare(folder_digests(target), digests)):
        raise _damaged(version, problems)


def version_facts(
    client: "MlflowClient", version: Any, names: Sequence[str]
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The digests of a version's files, and some of its JSON files. Its weights are fetched if no digests are stated.

    Raises UserError as `fetch_version`.
    """
    remote = _Remote(client, version)
    digests = _stated_digests(remote, False)
    with tempfile.TemporaryDirectory(prefix="edt-") as folder:
        if digests is None:
            fetch_version(client, version, Path(folder), need_digests=False)
            digests = folder_digests(Path(folder))
        facts = []
        for name in names:
            path = Path(folder) / name
            if name in digests and not path.exists():
                remote.download(f"{PIPELINE}/{name}", path)
            if not path.exists() or sha256_file(path) != digests.get(name):
                raise _damaged(version, [f"{name} is missing, or has another sha256"])
            facts.append(parse_json(read_bounded(path), name))
        return digests, facts


def pull(client: "MlflowClient", version: Any, folder: Path) -> bool:
    """Put the diffusers folder of a version at `folder`, complete or not at all; False if it already exists.

    Raises UserError if something else is there, and as `fetch_version`.
    """
    folder = folder.expanduser().absolute()
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder} is a file or a link; use a new folder")
    if folder.exists() and any(folder.iterdir()):
        _check_pulled(client, version, folder)
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _staging(folder) as staged:
        fetch_version(client, version, staged)
        try:
            staged.rename(folder)
        except OSError:  # another pull was faster: the same version, or something else
            _check_pulled(client, version, folder)
            return False
    return True


def stored_problems(client: "MlflowClient", version: Any) -> list[str]:
    """Problems with the files of a version in its store. Reads every file."""
    try:
        with tempfile.TemporaryDirectory(prefix="edt-") as folder:
            fetch_version(client, version, Path(folder))
    except UserError as error:
        return [str(error)]
    return []


def title(version: Any) -> str:
    """A registered version as messages name it."""
    return f"{version.name} version {version.version}"


class _Remote:
    """The files below `artifacts/` of a version's logged model. Every name from outside is checked before use."""

    def __init__(self, client: "MlflowClient", version: Any) -> None:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        self.title = title(version)
        self.tag: str | None = version.tags.get(DIGEST_TAG)
        location = client.get_model_version_download_uri(version.name, version.version)
        self._repository: Any = get_artifact_repository(location, tracking_uri=client.tracking_uri)

    def names(self) -> set[str]:
        """Names of the files of the diffusers folder, relative to it."""
        root = f"{_ARTIFACTS}/{PIPELINE}"
        return {name.removeprefix(f"{root}/") for name in self._walk(root)}

    def download(self, name: str, target: Path) -> None:
        """Download one file to `target`."""
        source = safe_name(f"{_ARTIFACTS}/{name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".edt-", dir=target.parent) as staging:
            try:
                path = Path(self._repository.download_artifacts(source, staging))
            except Exception as error:  # each kind of store raises its own errors
                raise UserError(f"{self.title}: {name} cannot be downloaded ({error})") from error
            path.replace(target)

    def _walk(self, folder: str, depth: int = 0) -> Iterator[str]:
        try:
            entries = self._repository.list_artifacts(folder)
        except Exception as error:
            raise UserError(f"{self.title}: its files cannot be listed ({error})") from error
        if depth > _DEEPEST or len(entries) > _MOST_FILES:
            raise UserError(f"{self.title} lists more files or folders than any model has; register it again")
        for info in entries:
            name = safe_name(info.path)
            if PurePosixPath(name).parent != PurePosixPath(folder):
                raise UserError(f"{self.title}: the store lists {name!r} in {folder!r}; register it again")
            if info.is_dir:
                yield from self._walk(name, depth + 1)
            else:
                yield name


def _stated_digests(remote: _Remote, needed: bool) -> dict[str, str] | None:
    """`digests.json` of a version, checked against the tag; None for a version registered before digests existed."""
    if remote.tag is None:
        if not needed:
            return None
        raise UserError(
            f"{remote.title} was registered without digests, so its files cannot be checked; register it again"
        )
    with tempfile.TemporaryDirectory(prefix="edt-") as folder:
        path = Path(folder) / DIGESTS
        remote.download(DIGESTS, path)
        text = read_bounded(path)
    if sha256(text).hexdigest() != remote.tag:
        raise UserError(f"{remote.title} is damaged: {DIGESTS} has another sha256 than its tag {DIGEST_TAG} says")
    return {safe_name(name): str(digest) for name, digest in parse_json(text, DIGESTS).items()}


def _compare_names(actual: set[str], stated: set[str]) -> list[str]:
    missing = [f"{name} is missing" for name in sorted(stated - actual)]
    return missing + [f"{name} is not in {DIGESTS}" for name in sorted(actual - stated)]


def _compare(actual: Mapping[str, str], stated: Mapping[str, str]) -> list[str]:
    differing = [
        f"{name} has another sha256" for name in sorted(actual.keys() & stated) if actual[name] != stated[name]
    ]
    return differing + _compare_names(set(actual), set(stated))


def _damaged(version: Any, problems: list[str]) -> UserError:
    return UserError(f"{title(version)} is damaged: {listing(problems)}; use another version or register it again")


def _check_pulled(client: "MlflowClient", version: Any, folder: Path) -> None:
    """Raise UserError unless the folder contains exactly this version."""
    stated = _stated_digests(_Remote(client, version), True)
    assert stated is not None
    if problems := _compare(folder_digests(folder), stated):
        raise UserError(f"{folder} does not contain {title(version)}: {listing(problems)}; use a new folder")


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to fill and rename, locked while its process lives. Removes those of dead processes."""
    import fcntl

    prefix = f".{folder.name}.pull-"
    for old in folder.parent.glob(f"{escape(prefix)}????????"):
        with suppress(OSError), _folder_handle(old) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its pull is alive
            if {path.name for path in old.iterdir()} <= {
                folder.name
            }:  # a folder with other files was not left by a pull
                shutil.rmtree(old, ignore_errors=True)
    staged = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        with _folder_handle(staged) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            inner = staged / folder.name  # has the default permissions of a folder, unlike `staged`
            inner.mkdir(parents=True)
            yield inner
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def _folder_handle(folder: Path) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield handle
    finally:
        os.close(handle)
