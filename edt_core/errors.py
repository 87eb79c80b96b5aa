"""Errors that are shown to the user."""

from edt_core.printing.redaction import redacted


class UserError(ValueError):
    """An error that the user can correct. The message states the problem, its numbers, and the remedy.

    The command line prints it without a traceback and exits with code 2. It contains no credentials.
    """

    def __str__(self) -> str:
        return redacted(super().__str__())


class StoreUnavailableError(UserError):
    """A store that does not answer, or refuses so many requests: it may do so again in a while."""


class Stopped(RuntimeError):  # noqa: N818  not an error, but a way to end
    """A job stopped on request and can be resumed. The message says from where; the exit code is 130."""


class DivergedError(RuntimeError):
    """A training whose loss or gradients are not finite, and that has no rollback left."""
