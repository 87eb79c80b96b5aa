"""The files and folders in a store that fsspec opens."""

from collections.abc import Iterator, Sequence
from typing import Any

from edt_core.data.sources.files import read_errors, remote, remote_path
from edt_core.data.sources.walk.entry import Entry, hidden
from edt_core.store.folder import Folder

_TOKENS = ("ETag", "etag", "checksum", "md5Hash", "content_md5")  # s3fs, gcsfs and adlfs, fsspec's own, gcsfs, adlfs


def store_entries(root: Folder, folder: bytes) -> Iterator[Entry]:
    """The files and folders directly in a folder of the source."""
    fs, base = remote(root)
    with read_errors(root.uri):
        infos = fs.ls(remote_path(base, folder).rstrip("/"), detail=True)
    yield from _entries(fs, base, infos)


def walk_store(root: Folder, folder: bytes) -> Iterator[Entry]:
    """Every file at any depth below a folder of the source."""
    fs, base = remote(root)
    with read_errors(root.uri):
        infos = fs.find(remote_path(base, folder), detail=True)
    yield from (entry for entry in _entries(fs, base, list(infos.values())) if not entry.is_folder)


def store_file(root: Folder, name: bytes) -> Entry:
    """An existing file."""
    fs, base = remote(root)
    (entry,) = _entries(fs, base, [fs.info(remote_path(base, name))])
    return entry


def _entries(fs: Any, base: str, infos: Sequence[dict[str, Any]]) -> Iterator[Entry]:
    for info in infos:
        path = str(info["name"]).rstrip("/")
        encoded = path.removeprefix(base).lstrip("/").encode("utf-8", "surrogateescape")
        if not path.startswith(f"{base}/") or any(map(hidden, encoded.split(b"/"))):
            continue  # the folder's own marker, and dotfiles
        is_folder = info["type"] == "directory"
        if is_folder or not str(info["name"]).endswith("/"):
            version = "" if is_folder else _version(fs, info)
            yield Entry(encoded, is_folder, int(info.get("size") or 0), version)


def _version(fs: Any, info: dict[str, Any]) -> str:
    token = next((info[key] for key in _TOKENS if info.get(key)), None)
    return str(token if token is not None else fs.checksum(info["name"])).strip('"')
