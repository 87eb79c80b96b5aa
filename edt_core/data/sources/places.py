"""Resolves `source.path`: a folder, a file, or files that match a pattern."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from edt_core.data.sources.files import CREDENTIALS, as_text, read_errors, remote, shown, some
from edt_core.data.sources.walk import Files, files_below, one_file
from edt_core.errors import UserError
from edt_core.progress import Progress
from edt_core.store.folder import Folder

_META = re.compile(r"[*?\[{]")


@dataclass(frozen=True)
class Place:
    """What `source.path` names: a folder (`pattern` empty), one file of it, or the files of it that match a pattern."""

    root: Folder
    pattern: str = ""
    is_file: bool = False

    def __str__(self) -> str:
        return shown(f"{self.root.uri}/{self.pattern}" if self.pattern else self.root.uri)


def locate(location: str) -> Place:
    """Find what a path or URI names. An existing name that contains `*`, `?`, `[` or `{` is not a pattern.

    Raises UserError if nothing is there.
    """
    if location.startswith("pipe:"):
        raise UserError(
            f"source.path {location.split()[0]!r} is a command, which is not supported; give the path or URI of files"
        )
    if CREDENTIALS.search(location):
        raise UserError(
            f"the address {shown(location)} contains a user name and a password, which every record of the run would "
            "show; set them in the environment instead (for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
        )
    folder = Folder.at(location)
    parts = folder.uri.split("/")
    first = next((k for k, part in enumerate(parts) if _META.search(part)), None)
    with read_errors(location):
        kind = _kind(folder)
        root = Folder("/".join(parts[:first]) or "/")
        is_pattern = kind is None and first is not None and _kind(root) == "folder"
    parent, _, name = folder.uri.rpartition("/")
    if kind == "folder":
        return Place(folder)
    if kind == "file":
        return Place(Folder(parent or "/"), name, is_file=True)
    if not is_pattern:
        raise UserError(
            f"the source {shown(folder.uri)} does not exist; give a folder, an archive, a parquet file or a pattern "
            "such as train-{000..127}.tar"
        )
    return Place(root, "/".join(parts[first:]))


def _kind(folder: Folder) -> str | None:
    """'folder', 'file', or None if there is neither."""
    if (path := folder.local) is not None:
        return "folder" if path.is_dir() else "file" if path.exists() else None
    fs, inside = remote(folder)
    try:
        return "folder" if fs.info(inside)["type"] == "directory" else "file"
    except FileNotFoundError:
        return None


def matching(place: Place, suffix: str, progress: Progress) -> Files:
    """The files of a place: the one named, those of the pattern, or every `*<suffix>` at any depth of the folder.

    Raises UserError if there is none, or if a part of a brace pattern matches nothing.
    """
    if not place.pattern:
        files = files_below(place.root, lambda name: name.lower().endswith(suffix.encode()), progress)
    elif place.is_file:
        files = one_file(place.root, os.fsencode(place.pattern))
    else:
        files = _by_pattern(place, progress)
    if not files.table.num_rows:
        raise UserError(
            f"no {suffix} files in {place}: {files.left_out.total()} other files found; check source.path and "
            "source.kind"
        )
    return files


def _by_pattern(place: Place, progress: Progress) -> Files:
    globs = {os.fsencode(glob) for glob in expand_braces(place.pattern)}
    patterns = {glob: _glob(glob) for glob in globs if _META.search(as_text(glob))}
    matched: set[bytes] = set()

    def keep(name: bytes) -> bool:
        matches = [name] if name in globs else [glob for glob, pattern in patterns.items() if pattern.fullmatch(name)]
        matched.update(matches)
        return bool(matches)

    files = files_below(place.root, keep, progress, recursive="/" in place.pattern)
    if missing := sorted(globs - matched):
        raise UserError(
            f"{place} expands to {len(globs)} files or patterns, and {len(missing)} of them match nothing: "
            f"{some(missing)}; add the missing files, or give a narrower pattern"
        )
    return files


def expand_braces(pattern: str) -> list[str]:
    """`a{00..02}{x,y}` -> a00x, a00y, a01x, ...: number ranges keep their leading zeros. Braces do not nest."""
    choices: list[list[str]] = []
    for part in re.split(r"(\{[^{}]*\})", pattern):
        if not part.startswith("{"):
            choices.append([part])
        elif numbers := re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part):
            low, high = numbers.groups()
            choices.append([str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)])
        else:
            choices.append(part[1:-1].split(","))
    return ["".join(parts) for parts in product(*choices)]


def _glob(glob: bytes) -> re.Pattern[bytes]:
    """A glob as a regular expression: `*` and `?` match inside one folder, `**/` any number of folders."""
    text = ""
    for token in re.findall(rb"\*\*/|\*|\?|\[[^]]*\]|[^*?\[]+|\[", glob):
        simple = {b"**/": "(?:.*/)?", b"*": "[^/]*", b"?": "[^/]"}
        if token in simple:
            text += simple[token]
        elif token.startswith(b"[") and len(token) > 2:
            text += token.decode("latin-1").replace("[!", "[^")
        else:
            text += re.escape(token).decode("latin-1")
    return re.compile(text.encode("latin-1"), re.DOTALL)


def warn_of_splits(names: Sequence[bytes], where: object, progress: Progress) -> None:
    """Warn if there are files of several splits: all splits in a folder are used together."""
    words = re.compile(rb"(?:^|[-_./])(train|validation|valid|val|test)(?=[-_./])")
    splits = {match[1].decode() for name in names if (match := words.search(name))}
    if len(splits) > 1:
        progress.warn(
            f"{where} contains files of several splits ({', '.join(sorted(splits))}); all of them are used. "
            "To use only one, give a pattern such as train-*"
        )
