"""The log of a run: a file that captures the output of Ray, MLflow and other libraries, away from the screen."""

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
_MAX_CHARS = 2_000_000  # at the end of the log, for the run's record


class RunLog:
    """A context in which a file captures all output except what is written to `screen`.

    It redirects the file descriptors 1 and 2, because Ray and other C++ code write there directly. Credentials are
    removed from the file at the end.
    """

    def __init__(self, path: Path, to_stderr: bool = False) -> None:
        self.path = path
        stream = sys.stderr if to_stderr else sys.stdout
        self._saved: dict[int, int] = {}  # copies of the redirected descriptors
        self._descriptor = 2 if to_stderr else 1
        self.screen: TextIO = stream  # for the view of the run; replaced while the context is active

    @classmethod
    def new(cls, store: str, name: str, to_stderr: bool = False) -> "RunLog":
        """A new log in `logs` of a local store, or in the temporary folder if the store is remote or read-only."""
        root = Folder.at(store).local
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        file = f"{name}-{stamp}-{os.getpid()}.log"
        # All users can write to the temporary folder, so the log goes to a private folder in it, safe from their links.
        private = Path(tempfile.gettempdir()) / f"edt-logs-{os.getuid()}"
        for folder in (root / FOLDER if root is not None else None, private):
            if folder is None:
                continue
            try:
                if folder == private:
                    make_private(folder)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / file).touch(mode=FILE_MODE, exist_ok=False)
            except (OSError, UserError):
                continue
            return cls(folder / file, to_stderr)
        return cls(Path(os.devnull), to_stderr)

    def __enter__(self) -> "RunLog":
        _flush()
        self._saved = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
        if _is_descriptor(self.screen, self._descriptor):
            encoding = self.screen.encoding
            self.screen = open(os.dup(self._descriptor), "w", encoding=encoding, buffering=1)
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        for descriptor in self._saved:
            os.dup2(file, descriptor)
        os.close(file)
        return self

    def __exit__(self, *_: object) -> None:
        _flush()
        for descriptor, original in self._saved.items():
            os.dup2(original, descriptor)
            os.close(original)
        if not _is_descriptor(self.screen, self._descriptor) and self.screen not in (sys.stdout, sys.stderr):
            self.screen.close()
        self._clean()

    def write(self, text: str) -> None:
        """Add one or more lines."""
        with suppress(OSError), open(self.path, "a", encoding="utf-8") as file:  # the run itself reports a full disk
            file.write(f"{printable(redacted(text))}\n")

    def text(self) -> str:
        """The log so far without credentials, or the end of a long one."""
        _flush()
        return _readable(self.path.read_text(encoding="utf-8", errors="replace"))[-_MAX_CHARS:]

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
        """Replace the log atomically."""
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
    """Text without colours and credentials. A repeated line appears once, with the number of repetitions."""
    output = []
    for line, same in groupby(_lines(text)):
        number = sum(1 for _ in same)
        output.append(line if number == 1 or not line else f"{line} [{number} times]")
    return "".join(f"{line}\n" for line in output)


def _lines(text: str) -> list[str]:
    """The lines of printed text. A carriage return, as in a progress bar, starts a new line."""
    plain = without_colours(text).replace("\r", "\n")
    return printable(redacted(plain)).splitlines()


def _is_descriptor(stream: TextIO, descriptor: int) -> bool:
    """Whether a stream writes to a file descriptor, and is not a replacement, as in tests."""
    try:
        return stream.fileno() == descriptor
    except (OSError, ValueError, AttributeError):
        return False
