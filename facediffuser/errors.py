"""Errors that one line explains to the user, and a requested stop."""

from collections.abc import Sequence

from facediffuser.redaction import redacted


def first_few(names: Sequence[str], most: int = 5, separator: str = ", ") -> str:
    """Return the first of some names for a message, and how many more there are: `a, b and 3 more`.

    Args:
        names: the names.
        most: how many are shown.
        separator: what stands between them.
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, at most 200 characters; the name of its class where it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class InputError(ValueError):
    """Bad input: one line that names what is wrong, its value and how to fix it.

    The command line prints the line and exits with code 2; nothing has been written when it is raised. Credentials in
    the URLs it quotes are replaced by ***.
    """

    def __init__(self, message: str):
        super().__init__(redacted(" ".join(str(message).split())))


class UnreachableError(InputError):
    """A server named by the user did not answer before anything was done: a wrong address, or one that is away."""


class DeniedError(InputError):
    """A server that does not let these credentials do what was asked."""


class RunError(RuntimeError):
    """A run failed for a reason that its one line explains; the command line prints it and exits with code 1."""


class Stopped(RuntimeError):
    """The run was asked to stop (SIGTERM) and did, after its current units of work; the command line exits with 143."""


class LimitReached(Stopped):
    """The run reached its --max-hours or --max-cost and stopped in good order; the command line exits with 3."""


class NotFiniteError(ArithmeticError):
    """Latents, pixels or scores of one image hold NaN or infinity, or its pixels are all equal; the image is unusable."""
