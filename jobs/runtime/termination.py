"""SIGTERM is Ctrl-C: `ray job stop`, Kubernetes, systemd and batch systems send it to what could go on later."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def term_interrupts() -> Iterator[None]:
    """Inside, SIGTERM does what Ctrl-C does at that moment; in a thread other than the main one, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Call the handler of Ctrl-C. A process in the background ignores Ctrl-C, and ends all the same."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):  # SIG_IGN or SIG_DFL
        raise KeyboardInterrupt
    handler(number, frame)


@contextmanager
def term_kept() -> Iterator[None]:
    """Inside, `ray.init` may take SIGTERM for itself: it would end the process at once. Afterwards it is as before.

    Where nothing handled SIGTERM before, Ray's handler stays.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
