"""Where scorers lie: looked up without loading them, and without torch."""

from pathlib import Path

from facediffuser.errors import InputError
from facediffuser.storage import local_copy

PAPER = "paper"


def scorers_folder(name: str) -> Path:
    """Return the local folder of scorers.

    Args:
        name: `miniature`, a folder, or an s3:// prefix, which is downloaded.

    Raises:
        InputError: the folder does not hold identity/ and prompt/.
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
    """Check that scorers exist; those called `paper` are looked for when they are loaded.

    Args:
        name: `paper`, `miniature`, a folder or an s3:// prefix.

    Raises:
        InputError: there are no scorers of this name.
    """
    if name != PAPER:
        scorers_folder(name)
