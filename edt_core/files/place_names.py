"""Names of folders: which of them a store can have, and how typed paths are read."""

import os
import unicodedata
from pathlib import Path

from edt_core.errors import UserError
from edt_core.printing.redaction import holds_parameters

_BREAKS = ("Cc", "Zl", "Zp")  # Unicode's control characters and its two separators of lines


def is_local(location: str) -> bool:
    """Whether a location is a path and not a URI. A text that starts like a path may contain `://`."""
    return "://" not in location or location.startswith(("/", "./", "../", "~"))


def typed_path(text: str | os.PathLike[str]) -> Path:
    """A typed path with `~` at its start expanded. A `~name` that is not a user, or comes after `./`, is a name.

    Raises UserError for a NUL, which no path can contain.
    """
    path = os.path.expanduser(os.fspath(text))
    if "\0" in path:
        raise UserError(f"the path {path!r} contains a NUL character, which file names cannot contain; remove it")
    return Path(path)


def place_for_others(location: str) -> str:
    """A location for public records: only the last part of an absolute path, because folders may name people.

    URIs, hub ids and relative paths stay unchanged.
    """
    path = location.removeprefix("file://")
    return Path(path).name if is_local(path) and path.startswith(("/", "~")) else location


def check_store_name(path: Path) -> None:
    """Raise UserError if MLflow cannot record the path of a local store, before anything is written there.

    All other names are supported, including those with `#`, `?`, `%20` and other URI syntax.
    """
    text = str(path.absolute())
    if (character := next(filter(_is_refused, text), None)) is not None:
        part = next(part for part in text.split("/") if character in part)
        raise UserError(
            f"the store {text!r} cannot be used: the name {part!r} contains {_described(character)}. MLflow cannot "
            "record such a path. Rename that folder, or use another store (--store)"
        )
    if parameter := holds_parameters(text):
        raise UserError(
            f"the store {text!r} cannot be used: {parameter!r} in its path looks like a credential in a URL. Records "
            "omit such a value, so artifacts could not be found again. Rename that folder, or use another store "
            "(--store)"
        )


def _is_refused(character: str) -> bool:
    return unicodedata.category(character) in (*_BREAKS, "Cs")


def _described(character: str) -> str:
    """The description of a character that cannot be printed."""
    if "\udc80" <= character <= "\udcff":  # how Python decodes a byte that is not UTF-8
        return f"the byte 0x{ord(character) - 0xDC00:02x}, which is not UTF-8"
    names = {"\n": "a line break", "\r": "a carriage return", "\t": "a tab"}
    return f"{names.get(character, 'the control character')} (U+{ord(character):04X})"
