"""What is taken home from another machine: few files, each below a size, never half written."""

import io
import logging
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path

logger = logging.getLogger(__name__)

MOST_BYTES = 16 * 2**20


def pack(files: Mapping[str, Path | bytes], target: Path, compress: bool = False) -> None:
    """Write files (what is missing is left out) or bytes under their names into a tar archive, whole or not at all.

    Files may grow or go while they are read: others are writing logs and results.
    """
    temporary = target.with_name(f".{target.name}")
    with tarfile.open(temporary, "w:xz" if compress else "w") as archive:
        for name, content in files.items():
            try:
                data = content if isinstance(content, bytes) else content.read_bytes()
            except FileNotFoundError:
                continue
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    put(temporary, target)


def put(temporary: Path, target: Path) -> None:
    """Move a finished file to its place, unless it is too large to be taken home."""
    size = temporary.stat().st_size
    if size >= MOST_BYTES:
        logger.error("%s: %d bytes, more than can be taken home; left out", target.name, size)
        temporary.unlink()
        return
    temporary.replace(target)


def put_copy(source: Path, target: Path) -> None:
    """Copy a finished file to be taken home."""
    temporary = target.with_name(f".{target.name}")
    shutil.copy(source, temporary)
    put(temporary, target)


def below(folder: Path, prefix: str = "") -> dict[str, Path]:
    """Return all files below a folder by their names in it, each behind a prefix; without those that are still written."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return {f"{prefix}{path.relative_to(folder)}": path for path in files}
