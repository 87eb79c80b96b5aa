"""Exit codes of a command: 0, 1, 2 or 130."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from edt_core.errors import Stopped
from edt_core.printing.console import say
from jobs.runtime.failure import tell_failure
from jobs.runtime.termination import term_interrupts


@contextmanager
def exit_code() -> Iterator[None]:
    """Turn a user's mistake into one message and exit code 2, an interrupt or a requested stop into exit code 130.

    SIGTERM is an interrupt too. Any other error is a failure with exit code 1: the message has the cause, the remedy,
    and the file that contains the traceback.
    """
    try:
        with term_interrupts():
            yield
    except KeyboardInterrupt:
        say("stopped; finished work is kept. Rerun the same command to resume", err=True)
        sys.exit(130)
    except Exception as error:
        cause: BaseException = error
        if "ray" in sys.modules:  # otherwise Ray cannot have wrapped the error, and its import takes a second
            from jobs.runtime.cluster import cause_of

            cause = cause_of(error)
        if isinstance(cause, Stopped):
            say(f"{cause}; rerun the same command to resume", err=True)
            sys.exit(130)
        sys.exit(tell_failure(cause, raised=error))
