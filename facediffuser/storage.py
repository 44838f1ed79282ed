"""One small door to local folders and s3://: whole objects go in with one atomic request, pyarrow reads them back.

S3 itself stands in s3.py.
"""

import errno
import hashlib
import os
import posixpath
import shutil
import stat
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow.fs

from facediffuser.errors import InputError

TEMPORARY_SUFFIX = ".partial"


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


def open_store(url: str | Path) -> Store:
    """Return the store of a URL: a local folder (a path or file://) or s3://bucket/prefix; InputError for others.

    Nothing is contacted, read or made yet.
    """
    text = str(url)
    scheme = text.split("://", 1)[0].lower() if "://" in text else ""
    if scheme == "s3":
        bucket, _, prefix = text[len("s3://") :].partition("/")
        if "@" in bucket:
            raise InputError("an s3:// URL cannot carry credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        if not bucket:
            raise InputError(f"{text}: no bucket named; give s3://bucket/prefix")
        from facediffuser.s3 import S3Store

        return S3Store(bucket, safe_key(prefix.strip("/")) if prefix.strip("/") else "")
    if scheme == "file":
        return LocalStore(Path(unquote(urlsplit(text).path)))
    if scheme:
        raise InputError(f"{scheme}://: no such storage; give a local folder or s3://bucket/prefix")
    if not text.strip():
        raise InputError("empty URL; give a local folder or s3://bucket/prefix")
    return LocalStore(Path(text).expanduser())


def safe_key(key: str) -> str:
    """Return the key; InputError unless it is names joined by single slashes that cannot leave the store."""
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts) or any(ord(char) < 32 for char in key):
        raise InputError(f"{key!r}: not a key; use names joined by single slashes, without '.' and '..'")
    return key


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


def local_copy(url: str | Path, cache_dir: str | Path | None = None) -> Path:
    """Return a local file or folder with what stands at `url`: a local path as it is, an s3:// URL downloaded once.

    Downloads go below `cache_dir` (default `$XDG_CACHE_HOME/facediffuser` or `~/.cache/facediffuser`), under a name
    made of the URL and its listing, so that a source that changed is downloaded again. Raises InputError when
    there is nothing at the URL.
    """
    store = open_store(url)
    if isinstance(store, LocalStore):
        if not store.root.exists():
            raise InputError(f"{url}: no such file or folder; check the path")
        return store.root
    store.require_readable()
    bucket = type(store)(store.bucket)
    inside = [info for info in bucket.list(store.prefix) if _is_at(info.key, store.prefix)]
    if not inside:
        raise InputError(f"{url}: nothing there; check the bucket and the prefix")
    name = hashlib.sha256(repr((store.url, inside)).encode()).hexdigest()[:24]
    cache = Path(cache_dir) if cache_dir else _default_cache()
    is_file = [info.key for info in inside] == [store.prefix]
    target = cache / name / (posixpath.basename(store.prefix) or store.bucket)
    if not target.exists():
        _download(bucket, inside, store.prefix, cache / name, target.name, is_file)
    return target


def _is_at(key: str, prefix: str) -> bool:
    return not prefix or key == prefix or key.startswith(f"{prefix}/")


def _download(bucket: Store, inside: list[ObjectInfo], prefix: str, home: Path, name: str, is_file: bool) -> None:
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=".download-") as temporary:
        root = Path(temporary, "home", name)
        root.parent.mkdir()
        for info in inside:
            below = info.key[len(prefix) :].lstrip("/")
            path = root if is_file else root / safe_key(below) if below else None
            if path is None:
                continue  # an object named like the folder itself
            path.parent.mkdir(parents=True, exist_ok=True)
            bucket.download(info.key, path)
        try:
            os.rename(root.parent, home)
        except OSError:
            if not home.exists():
                raise
            # Another process finished the same download first; both hold the same bytes.


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "facediffuser"
