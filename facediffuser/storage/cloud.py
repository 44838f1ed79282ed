"""Objects of Google Cloud Storage (`gs://`) and Azure Blob Storage (`az://`), through obstore; S3 has a file of its own.

Credentials come from the environment and the files that the clouds' own tools write (GOOGLE_APPLICATION_CREDENTIALS,
AZURE_STORAGE_ACCOUNT_NAME, ...) and nothing else. A put is one request, which both services do atomically.
"""

import errno
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from facediffuser.errors import InputError
from facediffuser.storage.base import BUFFER_BYTES, BucketStore, ObjectInfo, StorageError
from facediffuser.storage.local import LocalStore
from facediffuser.storage.ranges import RangedObject
from facediffuser.storage.reading import read_json_object

CREDENTIALS = {
    "gs": "GOOGLE_APPLICATION_CREDENTIALS or `gcloud auth application-default login`",
    "az": "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or another Azure credential",
}
CREDENTIAL_FILES = ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH")
_SECRET = re.compile(r"Debug source:.*", re.DOTALL)


class CloudStore(BucketStore):
    """A prefix of a bucket (gs) or a container (az)."""

    def __init__(self, scheme: str, bucket: str, prefix: str = ""):
        self.scheme, self.bucket, self.prefix = scheme, bucket, prefix
        self.url = f"{scheme}://{bucket}/{prefix}" if prefix else f"{scheme}://{bucket}"
        self._cached: Any = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_cached": None}

    @property
    def _store(self) -> Any:
        if self._cached is None:
            try:
                from obstore import store as stores
            except ModuleNotFoundError:
                raise InputError(
                    f"{self.url}: obstore is not installed; run: pip install 'facediffuser[stores]'"
                ) from None
            kind, prefix = (stores.GCSStore, "GOOGLE_") if self.scheme == "gs" else (stores.AzureStore, "AZURE_")
            self._require_credential_files()
            for name, value in os.environ.items():
                # The client panics at a token with a line's end.
                if name.startswith(prefix) and not value.isprintable():
                    raise InputError(f"{name}: holds a control character; set it again without")
            try:
                with self._translated_errors(""):
                    self._cached = kind(self.bucket)
            except StorageError:  # nothing was asked yet: the environment, or the name, cannot be used
                raise InputError(f"{self.url}: the client refuses the bucket's name or one of the environment's "
                                 f"{prefix}*; correct it") from None  # fmt: skip
        return self._cached

    def _require_credential_files(self) -> None:
        """Raise InputError for a file of credentials that is named and cannot be used: the client would wait for a pipe."""
        for name in CREDENTIAL_FILES if self.scheme == "gs" else ():
            if value := os.environ.get(name):
                path = Path(value)
                try:
                    read_json_object(LocalStore(path.parent), path.name, f"correct {name}", {})
                except OSError as error:
                    raise InputError(f"{name}={value}: cannot be read ({error.strerror}); correct it") from None

    def put(self, key: str, data: bytes, if_absent: bool = False) -> None:
        import obstore

        with self._translated_errors(key):
            try:
                # In one part: a whole object appears, or none.
                obstore.put(
                    self._store, self._key(key), data, mode="create" if if_absent else "overwrite", use_multipart=False
                )
                return
            except (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError):
                pass
        if self.get(key) != data:
            raise FileExistsError(errno.EEXIST, "already there with other content", self.url_of(key))

    def get(self, key: str) -> bytes:
        import obstore

        with self._translated_errors(key):
            return bytes(obstore.get(self._store, self._key(key)).bytes())

    def _head(self, key: str) -> dict[str, Any]:
        import obstore

        with self._translated_errors(key):
            return {**obstore.head(self._store, self._key(key))}

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        import obstore

        # These services are asked for folders: a prefix that ends within a name is one of names in its folder.
        folder = (self._base + prefix).rpartition("/")[0]
        found = []
        with self._translated_errors(prefix):
            for some in obstore.list(self._store, prefix=folder or None):
                for item in some:
                    if item["path"].startswith(self._base + prefix) and not item["path"].endswith("/"):
                        found.append(ObjectInfo(item["path"][len(self._base) :], item["size"], item["e_tag"] or ""))
        return sorted(found, key=lambda info: info.key)

    def delete(self, key: str) -> None:
        import obstore

        try:
            with self._translated_errors(key):
                obstore.delete(self._store, self._key(key))
        except FileNotFoundError:
            pass

    def download(self, key: str, path: Path) -> None:
        import obstore

        with self._translated_errors(key), open(path, "wb") as file:
            for some in obstore.get(self._store, self._key(key)):
                file.write(some)

    def reader(self, key: str, buffer_bytes: int = BUFFER_BYTES) -> BinaryIO:
        import obstore

        head = self._head(key)

        def read(start: int, end: int) -> bytes:
            options: Any = {"range": (start, end)} | ({"if_match": head["e_tag"]} if head["e_tag"] else {})
            with self._translated_errors(key):
                try:
                    return bytes(obstore.get(self._store, self._key(key), options=options).bytes())
                except obstore.exceptions.PreconditionError:
                    raise StorageError(f"{self.url_of(key)}: replaced while it was read; run again") from None

        return io.BufferedReader(RangedObject(head["size"], read), buffer_bytes)

    def require_readable(self) -> None:
        import obstore

        try:
            with self._translated_errors(""):
                next(iter(obstore.list(self._store, prefix=self.prefix or None, chunk_size=1)), None)
        except FileNotFoundError:
            raise InputError(f"{self.scheme}://{self.bucket}: no such bucket; make it or give another") from None

    def page_of(self, key: str) -> str | None:
        if self.scheme == "gs":
            return f"https://console.cloud.google.com/storage/browser/_details/{self.bucket}/{quote(self._key(key))}"
        return None

    def old_versions(self) -> None:
        return None

    def child(self, prefix: str) -> "CloudStore":
        return CloudStore(self.scheme, self.bucket, self._key(prefix.strip("/")))

    def whole(self) -> "CloudStore":
        """Return the store of the whole bucket."""
        return CloudStore(self.scheme, self.bucket)

    @contextmanager
    def _translated_errors(self, key: str) -> Iterator[None]:
        """Turn obstore's errors into InputError, FileNotFoundError or StorageError, without what may hold a secret."""
        import obstore.exceptions as kinds

        url = self.url_of(key) if key else self.url
        try:
            yield
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "no such object", url) from None
        except (kinds.PermissionDeniedError, kinds.UnauthenticatedError, PermissionError):
            raise InputError(
                f"{url}: access denied; set {CREDENTIALS[self.scheme]}, and check the bucket's policy"
            ) from None
        except kinds.BaseError as error:
            said = _SECRET.sub("", str(error))
            if re.search(r"\b404\b", said):  # a listing of a bucket that is not there
                raise FileNotFoundError(errno.ENOENT, "no such object", url) from None
            if "Account must be specified" in said or "credential" in said.lower():
                raise InputError(f"{url}: no credentials; set {CREDENTIALS[self.scheme]}") from None
            raise StorageError(f"{url}: the store did not answer as it should ({type(error).__name__})") from None
