"""The errors a user is meant to see."""

from edt_core.printing.redaction import redacted


class UserError(ValueError):
    """Something the user can mend. The message says the problem, its numbers, and the remedy.

    The command line prints it without a traceback and leaves with exit code 2. It holds no credentials.
    """

    def __str__(self) -> str:
        return redacted(super().__str__())


class Stopped(RuntimeError):  # noqa: N818  not an error, but a way to end
    """A job was asked to stop and can be resumed. The message says from where; the exit code is 130."""
