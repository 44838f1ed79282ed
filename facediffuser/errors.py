"""Errors a user can cause and mend, and a stop that was asked for."""


class InputError(ValueError):
    """Bad input: one line that names the thing, its value and the mend.

    The command line prints the line and exits with code 2; nothing has been written when it is raised.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))


class Stopped(RuntimeError):
    """The run was asked to stop (SIGTERM) and did, with the work in hand finished; the command line exits with 143."""
