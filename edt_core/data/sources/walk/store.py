"""The files and folders in a store that fsspec opens.

A bucket of S3 is listed page by page. A folder with many objects is split into its sub-folders, which are listed side
by side: a store answers a page in a tenth of a second, and a page has at most 1,000 objects.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from edt_core.data.sources.files import read_errors, remote, remote_path
from edt_core.data.sources.walk.entry import Entry, hidden
from edt_core.store.folder import Folder

_TOKENS = ("ETag", "etag", "checksum", "md5Hash", "content_md5")  # s3fs, gcsfs and adlfs, fsspec's own, gcsfs, adlfs
_PAGE = 1000  # objects of an answer: the most that S3 gives
_PAGES = 4  # of a folder, before it is split


class Below(NamedTuple):
    """The files at any depth below a folder of the source, or those of them whose path in the store is after one."""

    folder: bytes
    after: str = ""


def store_entries(root: Folder, folder: bytes) -> Iterator[Entry]:
    """The files and folders directly in a folder of the source."""
    fs, base = remote(root)
    with read_errors(root.uri):
        infos = fs.ls(remote_path(base, folder).rstrip("/"), detail=True)
    yield from _entries(fs, base, infos)


def walk_store(root: Folder, part: Below, more: list[Below]) -> Iterator[Entry]:
    """The files of a part; those that are better listed separately are appended to `more` instead."""
    fs, base = remote(root)
    if hasattr(fs, "call_s3") and not getattr(fs, "version_aware", False):
        yield from _walk_bucket(root, part, more)
        return
    with read_errors(root.uri):
        infos = fs.find(remote_path(base, part.folder), detail=True)
    yield from (entry for entry in _entries(fs, base, list(infos.values())) if not entry.is_folder)


def store_file(root: Folder, name: bytes) -> Entry:
    """An existing file."""
    fs, base = remote(root)
    (entry,) = _entries(fs, base, [fs.info(remote_path(base, name))])
    return entry


def _walk_bucket(root: Folder, part: Below, more: list[Below]) -> Iterator[Entry]:
    """The first pages of a part, then the files directly in its folder; `more`: its folders with further files."""
    fs, base = remote(root)
    bucket, prefix, _ = fs.split_path(remote_path(base, part.folder) + "/")
    last, is_sorted = part.after, True
    for number, page in enumerate(_pages(root, Prefix=prefix, **({"StartAfter": last} if last else {})), 1):
        keys = [item["Key"] for item in page.get("Contents", [])]
        yield from _entries(fs, base, [_info(bucket, item) for item in page.get("Contents", [])])
        is_sorted = is_sorted and all(a < b for a, b in zip([last, *keys], keys, strict=False))
        last = keys[-1] if keys else last
        if number >= _PAGES and is_sorted and page.get("IsTruncated"):
            break
    else:
        return
    # Not from `last` on: stores differ in whether a folder that contains the start is among the answers.
    for page in _pages(root, Prefix=prefix, Delimiter="/"):
        files = [item for item in page.get("Contents", []) if item["Key"] > last]
        yield from _entries(fs, base, [_info(bucket, item) for item in files])
        for folder in (item["Prefix"] for item in page.get("CommonPrefixes", [])):
            if folder > last or last.startswith(folder):
                name = _relative(base, f"{bucket}/{folder}")
                more.append(Below(name, last if last.startswith(folder) else ""))


def _pages(root: Folder, **request: Any) -> Iterator[dict[str, Any]]:
    """The answers to a request for objects, one after another."""
    fs, base = remote(root)
    request |= {"Bucket": fs.split_path(base)[0], "MaxKeys": _PAGE, **fs.req_kw}
    while True:
        with read_errors(root.uri):
            page: dict[str, Any] = fs.call_s3("list_objects_v2", **request)
        yield page
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def _info(bucket: str, item: dict[str, Any]) -> dict[str, Any]:
    return {"name": f"{bucket}/{item['Key']}", "type": "file", "size": item["Size"], "ETag": item.get("ETag")}


def _entries(fs: Any, base: str, infos: Sequence[dict[str, Any]]) -> Iterator[Entry]:
    for info in infos:
        path = str(info["name"]).rstrip("/")
        encoded = _relative(base, path)
        if not path.startswith(f"{base}/") or any(map(hidden, encoded.split(b"/"))):
            continue  # the folder's own marker, and dotfiles
        is_folder = info["type"] == "directory"
        if is_folder or not str(info["name"]).endswith("/"):
            version = "" if is_folder else _version(fs, info)
            yield Entry(encoded, is_folder, int(info.get("size") or 0), version)


def _relative(base: str, path: str) -> bytes:
    """The name relative to the source, as bytes, of a path in the store."""
    return path.removeprefix(base).strip("/").encode("utf-8", "surrogateescape")


def _version(fs: Any, info: dict[str, Any]) -> str:
    token = next((info[key] for key in _TOKENS if info.get(key)), None)
    return str(token if token is not None else fs.checksum(info["name"])).strip('"')
