"""What a command ends with: 0, 1, 2 or 130."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from edt_core.errors import Stopped
from edt_core.printing.console import say
from jobs.runtime.failure import tell_failure
from jobs.runtime.termination import term_interrupts


@contextmanager
def exit_code() -> Iterator[None]:
    """A user's mistake becomes one message and exit code 2; an interrupt, or a job that was asked to stop, 130.

    SIGTERM is an interrupt too.

    Anything else is a failure, exit code 1: the cause, the remedy, and the file that the traceback is in.
    """
    try:
        with term_interrupts():
            yield
    except KeyboardInterrupt:
        say("stopped; finished work is kept. Rerun the same command to resume", err=True)
        sys.exit(130)
    except Exception as error:
        cause: BaseException = error
        if "ray" in sys.modules:  # else nothing can have wrapped it, and Ray takes a second to import
            from jobs.runtime.cluster import cause_of

            cause = cause_of(error)
        if isinstance(cause, Stopped):
            say(f"{cause}; rerun the same command to resume", err=True)
            sys.exit(130)
        sys.exit(tell_failure(cause, raised=error))
