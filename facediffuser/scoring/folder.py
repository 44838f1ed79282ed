"""Where scorers lie: looked up without loading them, and without torch."""

from pathlib import Path

from facediffuser.errors import InputError
from facediffuser.storage import local_copy

PAPER = "paper"


def scorers_folder(name: str) -> Path:
    """Return the local folder of the scorers called `miniature`, or of those in a folder or s3:// prefix.

    Raises InputError unless it holds identity/ and prompt/.
    """
    if name == "miniature":
        from facediffuser.shipped import scorers_folder as shipped

        folder = shipped()
    else:
        folder = local_copy(name)
        if not folder.is_dir():
            raise InputError(f"{name}: not a folder; give paper, miniature, or a folder with identity/ and prompt/")
    for part in ("identity", "prompt"):
        if not (folder / part).is_dir():
            raise InputError(f"{folder}/{part}: missing; a scorers folder holds identity/ and prompt/")
    return folder


def require_scorers(name: str) -> None:
    """Raise InputError unless scorers of this name are there; those called `paper` are looked for when they load."""
    if name != PAPER:
        scorers_folder(name)
