"""Treat SIGTERM as Ctrl-C: `ray job stop`, Kubernetes, systemd and batch systems send it to jobs that can resume."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def term_interrupts() -> Iterator[None]:
    """Inside, SIGTERM acts like Ctrl-C. Changes nothing in a thread other than the main one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Call the handler of Ctrl-C. A background process ignores Ctrl-C, but SIGTERM still ends it."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):  # SIG_IGN or SIG_DFL
        raise KeyboardInterrupt
    handler(number, frame)


@contextmanager
def term_kept() -> Iterator[None]:
    """Restore the handler of SIGTERM after `ray.init`, whose own handler ends the process at once.

    If nothing handled SIGTERM before, Ray's handler stays.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
