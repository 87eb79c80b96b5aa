"""Names of folders: which of them a store can have, and how a path is read from what a person typed."""

import os
import unicodedata
from pathlib import Path

from edt_core.errors import UserError
from edt_core.printing.redaction import holds_parameters

_BREAKS = ("Cc", "Zl", "Zp")  # Unicode's control characters and its two separators of lines


def is_local(location: str) -> bool:
    """Whether a location is a path and not a URI: what starts as a path is one, also with `://` further on."""
    return "://" not in location or location.startswith(("/", "./", "../", "~"))


def typed_path(text: str | os.PathLike[str]) -> Path:
    """The path that was typed, `~` at its start expanded. A `~name` that is no user, or comes after `./`, is a name.

    Raises UserError for a NUL, which no path can hold.
    """
    path = os.path.expanduser(os.fspath(text))
    if "\0" in path:
        raise UserError(f"the path {path!r} holds a NUL character, which no file can have in its name; remove it")
    return Path(path)


def place_for_others(location: str) -> str:
    """A location as it is shown to others: of an absolute path the last part alone, because folders may name people.

    URIs, hub ids and relative paths stay as they are.
    """
    path = location.removeprefix("file://")
    return Path(path).name if is_local(path) and path.startswith(("/", "~")) else location


def check_store_name(path: Path) -> None:
    """Raise UserError where MLflow cannot record the path of a local store, before anything is written there.

    Other names are supported, those with `#`, `?`, `%20` and other marks of URIs among them.
    """
    text = str(path.absolute())
    if (character := next(filter(_is_refused, text), None)) is not None:
        part = next(part for part in text.split("/") if character in part)
        raise UserError(
            f"the store {text!r} cannot be used: the name {part!r} holds {_described(character)}. MLflow cannot "
            "record such a path. Rename that folder, or give a store elsewhere (--store)"
        )
    if parameter := holds_parameters(text):
        raise UserError(
            f"the store {text!r} cannot be used: {parameter!r} in its path looks like a credential in a URL. Records "
            "leave such a value out, and no artifact would be found again. Rename that folder, or give a store "
            "elsewhere (--store)"
        )


def _is_refused(character: str) -> bool:
    return unicodedata.category(character) in (*_BREAKS, "Cs")


def _described(character: str) -> str:
    """A character that cannot be shown, in words."""
    if "\udc80" <= character <= "\udcff":  # what Python makes of a byte that is not UTF-8
        return f"the byte 0x{ord(character) - 0xDC00:02x}, which is not UTF-8"
    known = {"\n": "a line break", "\r": "a carriage return", "\t": "a tab"}
    return f"{known.get(character, 'the control character')} (U+{ord(character):04X})"
