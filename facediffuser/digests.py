"""SHA-256 digests of files and folders. What they cover never changes: they are recorded in runs and datasets."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path


def files_digest(paths: Sequence[Path]) -> str:
    """Return the SHA-256, hexadecimal, over the names and contents of files.

    Args:
        paths: the files, in the order that counts.
    """
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def folder_digest(folder: Path, names: Iterable[Path] | None = None) -> str:
    """Return the SHA-256, hexadecimal, over the paths below a folder and the digests of what the files hold.

    Args:
        folder: the folder.
        names: paths relative to it, in the order in which they count; by default all files, sorted.
    """
    if names is None:
        names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.as_posix().encode() + b"\0")
        with (folder / name).open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
