"""The log of a run: what Ray, MLflow and other libraries print, in a file and not over what a person looks at."""

import os
import sys
import tempfile
import time
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import TextIO

from edt_core.errors import UserError
from edt_core.files.private_files import FILE_MODE, make_private
from edt_core.printing.console import printable, without_colours
from edt_core.printing.redaction import redacted
from edt_core.store.folder import Folder

FOLDER = "logs"
_MOST_CHARS = 2_000_000  # of a log that is put into the run's record: its end


class RunLog:
    """A file that takes all that is printed while it is entered, but what goes to `screen`.

    It takes the file descriptors 1 and 2 themselves: Ray's and other C++ code writes there without asking Python.
    Credentials are taken out at the end.
    """

    def __init__(self, path: Path, to_stderr: bool = False) -> None:
        self.path = path
        stream = sys.stderr if to_stderr else sys.stdout
        self._kept: dict[int, int] = {}
        self._descriptor = 2 if to_stderr else 1
        self.screen: TextIO = stream  # where the view goes; another one while entered

    @classmethod
    def new(cls, store: str, name: str, to_stderr: bool = False) -> "RunLog":
        """A new log in the `logs` of a local store; in the temporary folder where a store is remote or read-only."""
        root = Folder.at(store).local
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        file = f"{name}-{stamp}-{os.getpid()}.log"
        # The temporary folder is everybody's: there, a folder of our own, which nobody else can fill with links.
        own = Path(tempfile.gettempdir()) / f"edt-logs-{os.getuid()}"
        for folder in (root / FOLDER if root is not None else None, own):
            if folder is None:
                continue
            try:
                if folder == own:
                    make_private(folder)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / file).touch(mode=FILE_MODE, exist_ok=False)
            except (OSError, UserError):
                continue
            return cls(folder / file, to_stderr)
        return cls(Path(os.devnull), to_stderr)

    def __enter__(self) -> "RunLog":
        _flush()
        self._kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
        if _is_descriptor(self.screen, self._descriptor):
            encoding = self.screen.encoding
            self.screen = open(os.dup(self._descriptor), "w", encoding=encoding, buffering=1)
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        for descriptor in self._kept:
            os.dup2(file, descriptor)
        os.close(file)
        return self

    def __exit__(self, *_: object) -> None:
        _flush()
        for descriptor, kept in self._kept.items():
            os.dup2(kept, descriptor)
            os.close(kept)
        if not _is_descriptor(self.screen, self._descriptor) and self.screen not in (sys.stdout, sys.stderr):
            self.screen.close()
        self._clean()

    def write(self, text: str) -> None:
        """Add a line or more of our own."""
        with suppress(OSError), open(self.path, "a", encoding="utf-8") as file:  # a full disk is the run's to tell
            file.write(f"{printable(redacted(text))}\n")

    def text(self) -> str:
        """What it holds so far, without credentials: the end of it, where it is long."""
        _flush()
        return _readable(self.path.read_text(encoding="utf-8", errors="replace"))[-_MOST_CHARS:]

    def _clean(self) -> None:
        if not self.path.is_file():
            return
        with suppress(OSError):
            raw = self.path.read_text(encoding="utf-8", errors="replace")
            if not raw:
                self.path.unlink()
            elif (clean := _readable(raw)) != raw:
                self._replace(clean)

    def _replace(self, text: str) -> None:
        """Rewrite it atomically."""
        cleaned = self.path.with_suffix(".cleaned")
        cleaned.unlink(missing_ok=True)
        cleaned.touch(mode=FILE_MODE, exist_ok=False)
        try:
            cleaned.write_text(text, encoding="utf-8")
            cleaned.replace(self.path)
        finally:
            cleaned.unlink(missing_ok=True)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()


def _readable(text: str) -> str:
    """Without colours and credentials, and a line that comes again and again once, with how often."""
    output = []
    for line, same in groupby(_lines(text)):
        number = sum(1 for _ in same)
        output.append(line if number == 1 or not line else f"{line} [{number} times]")
    return "".join(f"{line}\n" for line in output)


def _lines(text: str) -> list[str]:
    """The lines of what was printed; what a carriage return begins counts as one, as a bar of progress does."""
    plain = without_colours(text).replace("\r", "\n")
    return printable(redacted(plain)).splitlines()


def _is_descriptor(stream: TextIO, descriptor: int) -> bool:
    """Whether a stream is that of a file descriptor, and not one that a test put in its place."""
    try:
        return stream.fileno() == descriptor
    except (OSError, ValueError, AttributeError):
        return False
