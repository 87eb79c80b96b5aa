"""The one error type a user is meant to see."""


class UserError(ValueError):
    """Something the user can mend. The message says the problem, its numbers, and the remedy.

    The command line prints it without a traceback and leaves with exit code 2.
    """
