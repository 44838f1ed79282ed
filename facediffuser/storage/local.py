"""Objects in a local folder: an object is a file, written beside its place, synced, and renamed."""

import builtins
import errno
import fcntl
import os
import posixpath
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from facediffuser.errors import InputError
from facediffuser.storage.base import BUFFER_BYTES, ObjectInfo, Store, safe_key

TEMPORARY_SUFFIX = ".partial"
# Sooner than the system's own limits (4,096 bytes a path, 255 a name), which differ between file systems.
LONGEST_PATH = 3_500
LONGEST_NAME = 200
# What exFAT, many network shares and file systems in user space answer to what they cannot do.
_NOT_POSSIBLE = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


class LocalStore(Store):
    """A local folder. Links to files and folders are followed; only regular files are objects."""

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
            if not if_absent:
                os.replace(temporary, path)
            elif not _rename_if_absent(temporary, path) and path.read_bytes() != data:
                raise FileExistsError(errno.EEXIST, "already there with other content", str(path))
        except OSError as error:
            error.filename = error.filename or str(path)  # a full disk does not say where
            raise
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)

    def get(self, key: str) -> bytes:
        with self.open(key) as file:
            return file.read()

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        start = self.root / posixpath.dirname(prefix)
        found = [info for info in self._walk(start, ()) if info.key.startswith(prefix)]
        return sorted(found, key=lambda info: info.key)

    def _walk(self, folder: Path, around: tuple[tuple[int, int], ...]) -> Iterator[ObjectInfo]:
        """Yield the objects below a folder; `around`: device and inode of the folders it lies in."""
        try:
            own = folder.stat()
            entries = list(os.scandir(folder))
        except FileNotFoundError:
            return  # removed since it was listed, or never there: as if listed a moment later
        except NotADirectoryError:
            return
        except PermissionError:
            raise InputError(f"{folder}: folder cannot be read; check its permissions or remove it") from None
        if (own.st_dev, own.st_ino) in around:
            raise InputError(f"{folder}: a link that leads back to a folder around it; remove it")
        around = (*around, (own.st_dev, own.st_ino))
        for entry in entries:
            path = Path(entry.path)
            if entry.is_dir():
                yield from self._walk(path, around)
            elif not entry.name.endswith(TEMPORARY_SUFFIX):
                try:
                    state = path.stat()
                except FileNotFoundError:
                    if entry.is_symlink():
                        raise InputError(f"{path}: a link that leads nowhere; correct or remove it") from None
                    continue  # removed between the listing and the look
                if not stat.S_ISREG(state.st_mode):
                    raise InputError(f"{path}: not a regular file (a pipe, socket or device); remove it")
                key = path.relative_to(self.root).as_posix()
                yield ObjectInfo(key, state.st_size, f"{state.st_mtime_ns}-{state.st_ino}")

    def folders(self) -> builtins.list[str]:
        self.require_readable()
        return sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir())

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def delete_leftovers(self) -> int:
        found = list(self.root.rglob(f".*{TEMPORARY_SUFFIX}"))
        for path in found:
            path.unlink(missing_ok=True)
        return len(found)

    def download(self, key: str, path: Path) -> None:
        with self.open(key) as source, open(path, "wb") as target:
            shutil.copyfileobj(source, target)

    def reader(self, key: str, buffer_bytes: int = BUFFER_BYTES) -> BinaryIO:
        path = self._path(key)
        # Without O_NONBLOCK a named pipe would be waited for until somebody writes to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISREG(kind):
            return open(descriptor, "rb", buffering=buffer_bytes)
        os.close(descriptor)
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise InputError(f"{path}: not a regular file (a pipe, socket or device); give a file")

    def require_readable(self) -> None:
        self._require_possible()
        if not self.root.exists():
            raise InputError(f"{self.url}: no such folder; check the path")
        if not self.root.is_dir():
            raise InputError(f"{self.url}: not a folder; give the folder that holds the data")
        if not os.access(self.root, os.R_OK | os.X_OK):
            raise InputError(f"{self.url}: folder cannot be read; check its permissions")

    def require_writable(self) -> None:
        self._require_possible()
        folder = next(path for path in (self.root, *self.root.parents) if path.exists())
        if not stat.S_ISDIR(folder.stat().st_mode):
            raise InputError(f"{self.url}: {folder} is a file, not a folder; give another output")
        read_only = os.statvfs(folder).f_flag & os.ST_RDONLY or _is_virtual(folder)
        if read_only or not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"{self.url}: folder {folder} cannot be written; check its permissions or give another")

    def require_replaceable(self, key: str) -> None:
        path = self._path(key)
        if path.is_dir():
            raise InputError(f"{path}: a folder stands where a file is to be written; remove it")
        if path.exists() and not path.is_file():
            raise InputError(
                f"{path}: a pipe, socket or device stands where a file is to be written; give another place"
            )

    def _require_possible(self) -> None:
        """Raise InputError for a path that no file system can hold, or that leads in a circle."""
        if "\0" in self.url:
            raise InputError(f"{self.url!r}: holds a NUL character; give another path")
        if len(os.fsencode(self.url)) > LONGEST_PATH or any(
            len(os.fsencode(part)) > LONGEST_NAME for part in self.root.parts
        ):
            raise InputError(f"{self.url[:60]}...: path or a name in it is too long; give a shorter one")
        try:
            self.root.stat()
        except FileNotFoundError:
            return
        except NotADirectoryError:
            return  # a file in the way: the callers say which
        except PermissionError:
            raise InputError(f"{self.url}: cannot be reached; check the permissions of the folders above it") from None
        except OSError as error:
            raise InputError(f"{self.url}: no usable path ({error.strerror}); give another") from None

    def child(self, prefix: str) -> "LocalStore":
        return LocalStore(self.root / safe_key(prefix.strip("/")))

    def page_of(self, key: str) -> None:
        return None  # a browser follows no link from a page of the network to a file

    def _path(self, key: str) -> Path:
        return self.root / safe_key(key)


def _is_virtual(folder: Path) -> bool:
    """Return whether a folder is the kernel's own (/proc, /sys), where no file can be made whatever its mode says."""
    return any(os.path.ismount(root) and folder.is_relative_to(root) for root in ("/proc", "/sys"))


def _rename_if_absent(temporary: Path, path: Path) -> bool:
    """Give a finished file its name unless something has it; return whether it got it. One of several callers wins."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NOT_POSSIBLE:
            raise
        # No hard links: whoever holds the folder looks and renames, so that the file still appears whole.
        with _locked(path.parent):
            if os.path.lexists(path):
                return False
            os.replace(temporary, path)
    return True


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes and threads that do so; where the file system has no locks nothing is held."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (*_NOT_POSSIBLE, errno.EINVAL):  # there is nothing to sync a folder with
            raise
    finally:
        os.close(descriptor)
