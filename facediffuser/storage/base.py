"""What every store does: whole objects are written with one atomic request and read whole or in ranges."""

import builtins
import posixpath
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from facediffuser.errors import InputError

BUFFER_BYTES = 1 << 18


class StorageError(OSError):
    """A store that answered with something else than data; the operation may be tried again."""


@dataclass(frozen=True)
class ObjectInfo:
    """An object of a store: its key below the store's URL, its size in bytes, a word that changes with its content."""

    key: str
    size: int
    version: str = ""


@dataclass(frozen=True)
class OldVersion:
    """A version of an object that a bucket keeps after it was replaced or deleted; `read` returns its bytes."""

    key: str
    version: str
    read: Callable[[], bytes]


class Store(ABC):
    """A folder of objects, local or in an S3 bucket; cheap to make, picklable, safe to use from several threads."""

    url: str

    @abstractmethod
    def put(self, key: str, data: bytes, if_absent: bool = False) -> None:
        """Write a whole object with one atomic request: a reader sees all of it or none of it.

        Args:
            key: its key.
            data: its bytes.
            if_absent: refuse to overwrite other bytes. The same bytes count as written, so that a request repeated after a lost
                answer succeeds. Not every S3 server keeps this under a race: use it to avoid work, not as a lock.

        Raises:
            FileExistsError: with `if_absent`, when the key holds other bytes.
        """

    @abstractmethod
    def get(self, key: str) -> bytes:
        """Return an object's bytes.

        Args:
            key: its key.

        Raises:
            FileNotFoundError: the key holds none.
        """

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Return whether a key holds an object.

        Args:
            key: the key.
        """

    @abstractmethod
    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Return the objects whose keys start with a prefix, sorted by key; unfinished writes are not among them.

        Args:
            prefix: of keys; all objects by default.

        Raises:
            InputError: something in a local folder, which is named, cannot be listed: a folder without read permission, a link
                that leads nowhere or back to a folder around it, anything else than regular files.
        """

    @abstractmethod
    def folders(self) -> builtins.list[str]:
        """Return the names of the folders directly below the store, sorted; local ones also when they are empty."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; a key that holds none is no error.

        Args:
            key: its key.
        """

    def copy_from(self, source: "Store", source_key: str, key: str) -> bytes | None:
        """Copy an object of another store to `key`, whole.

        Args:
            source: the other store.
            source_key: the object there.
            key: the object here.

        Returns:
            Its bytes, None where the server copied it by itself.
        """
        data = source.get(source_key)
        self.put(key, data)
        return data

    def delete_leftovers(self) -> int:
        """Remove what writes that were interrupted left behind; return how many. To be called when nobody writes."""
        return 0

    def old_versions(self) -> "builtins.list[OldVersion] | None":
        """Return the versions of objects that the store keeps although they were replaced or deleted.

        None where the store cannot tell, or may not.
        """
        return []

    @abstractmethod
    def download(self, key: str, path: Path) -> None:
        """Write an object's bytes to a local file without holding all of them in memory.

        Args:
            key: its key.
            path: the file to write.
        """

    @contextmanager
    def open(self, key: str, buffer_bytes: int = BUFFER_BYTES) -> Iterator[BinaryIO]:
        """Yield a seekable reader of an object, closed at the end of the block.

        Args:
            key: its key.
            buffer_bytes: read ahead at once.
        """
        with self.reader(key, buffer_bytes) as file:
            yield file

    @abstractmethod
    def reader(self, key: str, buffer_bytes: int = BUFFER_BYTES) -> BinaryIO:
        """Return an object as a seekable binary file; what is not asked for is not transferred.

        Args:
            key: the object.
            buffer_bytes: how much a request fetches at least; more suits reading from beginning to end.

        Raises:
            FileNotFoundError: there is no such object.
            StorageError: the store fails, or the object is replaced by another while it is read.
        """

    @abstractmethod
    def require_readable(self) -> None:
        """Check that the folder or bucket is there and may be read; nothing is written.

        Raises:
            InputError: it is not.
        """

    @abstractmethod
    def require_writable(self) -> None:
        """Check that objects can be written; nothing is written.

        An S3 server tells whether keys may be read and listed; a missing right to write shows at the first `put`, as an
        InputError too.

        Raises:
            InputError: the bucket is missing, the credentials are wrong, or the folder cannot be written.
        """

    @abstractmethod
    def require_replaceable(self, key: str) -> None:
        """Check that a key can be written.

        Args:
            key: the key.

        Raises:
            InputError: something else than an object stands there.
        """

    @abstractmethod
    def child(self, prefix: str) -> "Store":
        """Return the store of the objects below a prefix.

        Args:
            prefix: without the slash at its end.
        """

    def url_of(self, key: str) -> str:
        """Return the URL of an object, for messages.

        Args:
            key: its key.
        """
        return posixpath.join(self.url, key)

    @abstractmethod
    def page_of(self, key: str) -> str | None:
        """Return the address under which a browser may find one object, None for a local file; nothing is contacted."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"


class BucketStore(Store):
    """A prefix of a bucket, a container or a repository: what all stores reached over the network have in common."""

    prefix: str
    """Without a slash at its end; "" for the whole bucket."""

    @property
    def _base(self) -> str:
        """What stands before the keys in the bucket."""
        return f"{self.prefix}/" if self.prefix else ""

    def _key(self, key: str) -> str:
        return self._base + safe_key(key)

    @abstractmethod
    def _head(self, key: str) -> Any:
        """Return what the server says of an object; FileNotFoundError when there is none."""

    def exists(self, key: str) -> bool:
        try:
            self._head(key)
        except FileNotFoundError:
            return False
        return True

    def folders(self) -> builtins.list[str]:
        return sorted({info.key.partition("/")[0] for info in self.list() if "/" in info.key})

    def require_writable(self) -> None:
        self.require_readable()

    def require_replaceable(self, key: str) -> None:
        """Raise nothing: in a bucket no folder stands in a key's place."""


def safe_key(key: str) -> str:
    """Return the key when it is safe.

    Args:
        key: names joined by single slashes.

    Raises:
        InputError: it is something else, or would leave the store.
    """
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts) or any(ord(char) < 32 for char in key):
        raise InputError(f"{key!r}: not a key; use names joined by single slashes, without '.' and '..'")
    return key
