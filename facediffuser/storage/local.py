"""Objects in a local folder: an object is a file, written beside its place, synced, and renamed."""

import errno
import os
import posixpath
import shutil
import stat
import uuid
from pathlib import Path

import pyarrow.fs

from facediffuser.errors import InputError
from facediffuser.storage.base import ObjectInfo, Store, safe_key

TEMPORARY_SUFFIX = ".partial"


class LocalStore(Store):
    """A local folder. An object is a file; it is written beside its place, synced, and renamed."""

    def __init__(self, root: Path):
        self.root = Path(os.path.abspath(root))
        self.url = str(self.root)

    def put(self, key: str, data: bytes, if_absent: bool = False) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        # A leading dot hides the unfinished file from dataset readers; the suffix hides it from `list`.
        temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if if_absent:
                self._link(temporary, path, data)
            else:
                os.replace(temporary, path)
        except OSError as error:
            error.filename = error.filename or str(path)  # a full disk does not say where
            raise
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)

    def _link(self, temporary: Path, path: Path, data: bytes) -> None:
        try:
            os.link(temporary, path)
        except FileExistsError:
            if path.read_bytes() != data:
                raise FileExistsError(errno.EEXIST, "already there with other content", str(path)) from None

    def get(self, key: str) -> bytes:
        return self._path(key).read_bytes()

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        start = self.root / posixpath.dirname(prefix)
        found = []
        for folder, _, names in os.walk(start):
            for name in names:
                path = Path(folder, name)
                key = path.relative_to(self.root).as_posix()
                if key.startswith(prefix) and not name.endswith(TEMPORARY_SUFFIX):
                    try:
                        state = path.stat()
                        found.append(ObjectInfo(key, state.st_size, f"{state.st_mtime_ns}-{state.st_ino}"))
                    except FileNotFoundError:
                        continue  # removed between the walk and the look: as if listed a moment later
        return sorted(found, key=lambda info: info.key)

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def download(self, key: str, path: Path) -> None:
        shutil.copyfile(self._path(key), path)

    def arrow(self) -> tuple[pyarrow.fs.FileSystem, str]:
        return pyarrow.fs.LocalFileSystem(), str(self.root)

    def require_readable(self) -> None:
        if not self.root.exists():
            raise InputError(f"{self.url}: no such folder; check the path")
        if not self.root.is_dir():
            raise InputError(f"{self.url}: not a folder; give the folder that holds the dataset")
        if not os.access(self.root, os.R_OK | os.X_OK):
            raise InputError(f"{self.url}: folder cannot be read; check its permissions")

    def require_writable(self) -> None:
        folder = next(path for path in (self.root, *self.root.parents) if path.exists())
        if not stat.S_ISDIR(folder.stat().st_mode):
            raise InputError(f"{self.url}: {folder} is a file, not a folder; give another output")
        read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
        if read_only or not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"{self.url}: folder {folder} cannot be written; check its permissions or give another")

    def child(self, prefix: str) -> "LocalStore":
        return LocalStore(self.root / safe_key(prefix.strip("/")))

    def _path(self, key: str) -> Path:
        return self.root / safe_key(key)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
