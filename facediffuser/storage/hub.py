"""A dataset's repository on the Hugging Face Hub (`hf://datasets/ORG/NAME`), for reading; `publish` writes there.

The token is that of `hf auth login` or HF_TOKEN. A store reads one commit, the one it found first, also after others were
made: what it reads belongs together.
"""

import errno
import io
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn
from urllib.parse import quote, unquote

from facediffuser.errors import InputError
from facediffuser.storage.base import BUFFER_BYTES, BucketStore, ObjectInfo, StorageError, safe_key
from facediffuser.storage.ranges import RangedObject

DOWNLOAD_BYTES = 8 << 20
REQUEST_TIMEOUT_S = 60
ENVIRONMENT = "correct HF_ENDPOINT, HF_TOKEN, HF_HUB_*, the proxy or SSL_CERT_FILE of the environment"
_NAME = r"[A-Za-z0-9][\w.-]*"
_URL = re.compile(
    rf"hf://datasets/(?P<repository>{_NAME}/(?P<name>{_NAME}))(?:@(?P<revision>[\w.%-]+))?(?:/(?P<prefix>.*))?",
    re.ASCII,
)


def open_hub(url: str) -> "HubStore":
    """Return the store of an `hf://datasets/ORG/NAME[@REVISION][/PREFIX]` URL.

    Raises:
        InputError: it is another URL.
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise InputError(f"{url}: not a dataset of the hub; give hf://datasets/ORG/NAME, or a folder in it")
    require_repository_name(match["repository"])
    prefix = (match["prefix"] or "").strip("/")
    return HubStore(match["repository"], match["revision"] or "", safe_key(prefix) if prefix else "")


def require_repository_name(name: str) -> None:
    """Check an `ORG/NAME` by the hub's own rules, before it is asked.

    Raises:
        InputError: it is none.
    """
    hub_client()
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"hf://datasets/{name}: {str(error).rstrip('.')}; give hf://datasets/ORG/NAME") from None


class HubStore(BucketStore):
    """A prefix of a repository; `revision`: a branch, tag or commit, its slashes as %2F."""

    def __init__(self, repository: str, revision: str = "", prefix: str = "", commit: str = ""):
        self.repository, self.revision, self.prefix = repository, revision, prefix
        self.bucket = repository.rpartition("/")[2]
        whole = f"hf://datasets/{repository}" + (f"@{revision}" if revision else "")
        self.url = f"{whole}/{prefix}" if prefix else whole
        self._found_commit = commit
        self._listed: dict[str, ObjectInfo] | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_listed": None}

    @property
    def _commit(self) -> str:
        if not self._found_commit:
            with hub_errors(self.url):
                info = hub_client().repo_info(
                    self.repository, repo_type="dataset", revision=unquote(self.revision) or None
                )
            self._found_commit = str(info.sha)
        return self._found_commit

    @property
    def _files(self) -> dict[str, ObjectInfo]:
        """Every file of the commit by its path in the repository."""
        if self._listed is None:
            with hub_errors(self.url):
                entries = hub_client().list_repo_tree(
                    self.repository, recursive=True, revision=self._commit, repo_type="dataset"
                )
                # Folders have no blob.
                files = [entry for entry in entries if hasattr(entry, "blob_id")]
            self._listed = {entry.path: ObjectInfo(entry.path, entry.size, entry.blob_id) for entry in files}
        return self._listed

    def _head(self, key: str) -> ObjectInfo:
        try:
            return self._files[self._key(key)]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, "no such object", self.url_of(key)) from None

    def get(self, key: str) -> bytes:
        info = self._head(key)
        return self._read(info, 0, info.size)

    def _read(self, info: ObjectInfo, start: int, end: int) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        if end <= start:
            return b""
        place = hf_hub_url(self.repository, info.key, repo_type="dataset", revision=self._commit)
        headers = build_hf_headers() | ({} if end - start == info.size else {"range": f"bytes={start}-{end - 1}"})
        with hub_errors(f"{self.whole().url}/{info.key}"):
            answer = http_backoff("GET", place, headers=headers, timeout=REQUEST_TIMEOUT_S)
            hf_raise_for_status(answer)
            data = bytes(answer.content)
        if len(data) != end - start:
            raise StorageError(
                f"{self.whole().url}/{info.key}: the hub gave {len(data)} bytes of {end - start}; run again"
            )
        return data

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        return [
            ObjectInfo(path[len(self._base) :], info.size, info.version)
            for path, info in sorted(self._files.items())
            if path.startswith(self._base + prefix)
        ]

    def download(self, key: str, path: Path) -> None:
        with self.reader(key, DOWNLOAD_BYTES) as source, open(path, "wb") as file:
            shutil.copyfileobj(source, file, DOWNLOAD_BYTES)

    def reader(self, key: str, buffer_bytes: int = BUFFER_BYTES) -> BinaryIO:
        info = self._head(key)
        return io.BufferedReader(RangedObject(info.size, lambda start, end: self._read(info, start, end)), buffer_bytes)

    def require_readable(self) -> None:
        _ = self._commit

    def put(self, key: str, data: bytes, if_absent: bool = False) -> NoReturn:
        self._refuse()

    def delete(self, key: str) -> NoReturn:
        self._refuse()

    def require_writable(self) -> NoReturn:
        self._refuse()

    def require_replaceable(self, key: str) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise InputError(
            f"{self.url}: hf:// is for reading; give a folder or a bucket, then `facediffuser publish` that"
        )

    def old_versions(self) -> None:
        """Return None: the hub keeps earlier commits, and does not say which of their files were replaced."""

    def child(self, prefix: str) -> "HubStore":
        return HubStore(self.repository, self.revision, self._key(prefix.strip("/")), self._found_commit)

    def whole(self) -> "HubStore":
        """Return the store of the whole repository, at the same commit."""
        return HubStore(self.repository, self.revision, commit=self._found_commit)

    def page_of(self, key: str) -> str:
        where = f"{self.revision or 'main'}/{quote(self._key(key))}"
        return f"{_endpoint()}/datasets/{self.repository}/blob/{where}"


def hub_client() -> Any:
    """Return the hub's client; InputError when it is not installed."""
    try:
        from huggingface_hub import HfApi
    except ModuleNotFoundError:
        raise InputError("huggingface_hub is not installed; run: pip install 'facediffuser[stores]'") from None
    except ValueError:  # its numbers are read when it is imported
        raise InputError(f"the hub's client does not start; {ENVIRONMENT}") from None
    return HfApi()


def _endpoint() -> str:
    return str(hub_client().endpoint)


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn what the hub's client raises in the block into one line without a token.

    Args:
        what: the URL, for the message.

    Raises:
        InputError: the hub refuses, knows no such repository, or HF_HUB_OFFLINE is set.
        StorageError: the hub fails or cannot be reached.
    """
    hub_client()
    # `HTTPError` is that of the HTTP library which the client was built on; it is another in each of its versions.
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

    try:
        yield
    except (InputError, StorageError):
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403, 404):
            raise InputError(f"{what}: the hub answered {status}; log in (`hf auth login`), and check the name and your rights "
                             "there") from None  # fmt: skip
        raise StorageError(f"{what}: the hub answered {status}; run the same command again") from None
    except OfflineModeIsEnabled:
        raise InputError(f"{what}: HF_HUB_OFFLINE forbids to ask the hub; unset it") from None
    except HFValidationError:
        raise InputError(f"{what}: not a name that the hub allows; give hf://datasets/ORG/NAME") from None
    except HTTPError as error:
        raise StorageError(
            f"{what}: the hub cannot be reached ({type(error).__name__}); run the same command again"
        ) from None
    except (ValueError, OSError) as error:  # of an address, a token, a proxy or certificates that cannot be
        raise InputError(f"{what}: the hub cannot be asked ({type(error).__name__}); {ENVIRONMENT}") from None
