"""What every store does: whole objects go in with one atomic request, pyarrow reads them back."""

import posixpath
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs

from facediffuser.errors import InputError


class StorageError(OSError):
    """A store that answered with something else than data; the operation may be tried again."""


@dataclass(frozen=True)
class ObjectInfo:
    """An object of a store: its key below the store's URL, its size in bytes, a word that changes with its content."""

    key: str
    size: int
    version: str = ""


class Store(ABC):
    """A folder of objects, local or in an S3 bucket; cheap to make, picklable, safe to use from several threads."""

    url: str

    @abstractmethod
    def put(self, key: str, data: bytes, if_absent: bool = False) -> None:
        """Write a whole object with one atomic request: a reader sees all of it or none of it.

        With `if_absent`, raises FileExistsError when the key holds other bytes (the same bytes count as written, so
        that a request repeated after a lost answer succeeds). Not every S3 server keeps this under a race: use it to
        avoid work, not as a lock.
        """

    @abstractmethod
    def get(self, key: str) -> bytes:
        """Return an object's bytes; FileNotFoundError when there is none."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Return whether the key holds an object."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Return the objects whose keys start with `prefix`, sorted by key; unfinished writes are not among them."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; a key that holds none is no error."""

    @abstractmethod
    def download(self, key: str, path: Path) -> None:
        """Write an object's bytes to a local file without holding them all in memory."""

    @abstractmethod
    def arrow(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """Return the pyarrow file system and the path of this store in it, for pyarrow.dataset; read inside `told`."""

    @contextmanager
    def open(self, key: str) -> Iterator[pyarrow.NativeFile]:
        """Yield an object as a file of which pyarrow reads what it needs; errors are told as `get` tells them."""
        filesystem, base = self.arrow()
        with self.told(key), filesystem.open_input_file(f"{base}/{safe_key(key)}") as source:
            yield source

    @contextmanager
    def told(self, key: str = "") -> Iterator[None]:
        """Tell the errors of what is read through `arrow` as `get` tells its own."""
        yield

    @abstractmethod
    def require_readable(self) -> None:
        """Raise InputError when the folder or bucket is missing or may not be read; nothing is written."""

    @abstractmethod
    def require_writable(self) -> None:
        """Raise InputError when the bucket is missing, the credentials are wrong, the folder cannot be written.

        Writes nothing. An S3 server tells whether keys may be read and listed; a missing right to write shows at the
        first `put`, as an InputError too.
        """

    @abstractmethod
    def child(self, prefix: str) -> "Store":
        """Return the store of the objects below `prefix/`."""

    def url_of(self, key: str) -> str:
        """Return the URL of one object, for messages."""
        return posixpath.join(self.url, key)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"


def safe_key(key: str) -> str:
    """Return the key; InputError unless it is names joined by single slashes that cannot leave the store."""
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts) or any(ord(char) < 32 for char in key):
        raise InputError(f"{key!r}: not a key; use names joined by single slashes, without '.' and '..'")
    return key
