"""Objects in an S3 bucket: boto3 writes each with one PutObject, pyarrow reads them.

Set up by the standard AWS environment (keys, profile, region, AWS_ENDPOINT_URL) and nothing else. No error text holds
a credential: what a server answered is told by its error code only.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow.fs

from facediffuser.errors import InputError
from facediffuser.storage.base import ObjectInfo, StorageError, Store, safe_key

_REQUEST_TIMEOUT_S = 60
# With the waits between them about a minute of an outage is waited out; then the run ends and can be taken up again.
_ATTEMPTS = 10
# Error codes without case and underscores: boto3 says AccessDenied, pyarrow ACCESS_DENIED.
_DENIED = {"403", "accessdenied", "forbidden", "invalidaccesskeyid", "signaturedoesnotmatch", "expiredtoken",
           "invalidtoken", "authorizationheadermalformed", "allaccessdisabled"}  # fmt: skip
_MISSING_KEY = {"404", "nosuchkey", "notfound"}
_PRECONDITION_FAILED = {"412", "preconditionfailed"}
_ARROW_ERROR = re.compile(r"AWS Error (\w+)(?: \(HTTP status (\d+)\))? during")


class S3Store(Store):
    """A prefix of an S3 bucket; boto3 writes with one PutObject, pyarrow reads."""

    def __init__(self, bucket: str, prefix: str = ""):
        self.bucket, self.prefix = bucket, prefix
        self.url = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
        self._cached_client = self._cached_arrow = None

    def __getstate__(self) -> dict:
        # A boto3 client cannot be pickled, and both take up the environment of where they are used.
        return {**self.__dict__, "_cached_client": None, "_cached_arrow": None}

    def put(self, key: str, data: bytes, if_absent: bool = False) -> None:
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        try:
            with self._told(key):
                self._client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data, **condition)
        except FileExistsError:
            if self.get(key) != data:
                raise

    def get(self, key: str) -> bytes:
        from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

        with self._told(key):
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    answer = self._client.get_object(Bucket=self.bucket, Key=self._key(key))
                    data = answer["Body"].read()
                    if len(data) != answer["ContentLength"]:
                        raise IncompleteReadError(actual_bytes=len(data), expected_bytes=answer["ContentLength"])
                    return data
                except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
                    # boto3 asks again for an answer that does not begin, not for one that breaks off.
                    if attempt == _ATTEMPTS:
                        raise
        raise AssertionError("unreachable")

    def exists(self, key: str) -> bool:
        try:
            with self._told(key):
                self._client.head_object(Bucket=self.bucket, Key=self._key(key))
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        base = f"{self.prefix}/" if self.prefix else ""
        found = []
        with self._told(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=base + prefix)
            for page in pages:
                for item in page.get("Contents", ()):
                    if not item["Key"].endswith("/"):  # a console's folder marker is no object of ours
                        found.append(ObjectInfo(item["Key"][len(base) :], item["Size"], item["ETag"]))
        return sorted(found, key=lambda info: info.key)

    def delete(self, key: str) -> None:
        with self._told(key):
            self._client.delete_object(Bucket=self.bucket, Key=self._key(key))

    def download(self, key: str, path: Path) -> None:
        with self._told(key):
            self._client.download_file(self.bucket, self._key(key), str(path))

    def arrow(self) -> tuple[pyarrow.fs.FileSystem, str]:
        if self._cached_arrow is None:
            self._cached_arrow = self._new_arrow()
        return self._cached_arrow, f"{self.bucket}/{self.prefix}" if self.prefix else self.bucket

    def _new_arrow(self) -> pyarrow.fs.S3FileSystem:
        options = {
            "request_timeout": _REQUEST_TIMEOUT_S,
            "connect_timeout": 10,
            "allow_delayed_open": True,
            "retry_strategy": pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
        }
        endpoint = endpoint_url()
        if endpoint:
            parts = urlsplit(endpoint)
            options |= {"endpoint_override": parts.netloc + parts.path.rstrip("/"), "scheme": parts.scheme}
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if region:
            options["region"] = region
        elif not endpoint:
            options["region"] = pyarrow.fs.resolve_s3_region(self.bucket)
        return pyarrow.fs.S3FileSystem(**options)

    @contextmanager
    def told(self, key: str = "") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            said = None if isinstance(error, StorageError) else _ARROW_ERROR.search(str(error))
            if said is None:
                raise
            code, status = said.group(1), said.group(2)
            raise self._answer(code, int(status) if status else None, self.url_of(key) if key else self.url) from None

    def require_readable(self) -> None:
        # Listing, not HeadBucket: only an answer with a body tells a wrong key from a missing bucket.
        client = _s3_client(connect_timeout=4, read_timeout=15, attempts=4)
        with self._told("", unreachable=InputError):
            client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix, MaxKeys=1)

    def require_writable(self) -> None:
        self.require_readable()

    def child(self, prefix: str) -> "S3Store":
        return S3Store(self.bucket, self._key(prefix.strip("/")))

    def _key(self, key: str) -> str:
        key = safe_key(key)
        return f"{self.prefix}/{key}" if self.prefix else key

    @property
    def _client(self):
        if self._cached_client is None:
            self._cached_client = _s3_client(connect_timeout=10, read_timeout=_REQUEST_TIMEOUT_S, attempts=_ATTEMPTS)
        return self._cached_client

    @contextmanager
    def _told(self, key: str, unreachable: type[Exception] = StorageError) -> Iterator[None]:
        """Turn boto3's errors into InputError, FileNotFoundError, FileExistsError or StorageError without secrets.

        An endpoint that cannot be reached is the user's to mend before a run (InputError), an outage during one.
        """
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            NoCredentialsError,
            PartialCredentialsError,
            ProfileNotFound,
        )

        url = self.url_of(key) if key else self.url
        try:
            yield
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            raise self._answer(code, error.response.get("ResponseMetadata", {}).get("HTTPStatusCode"), url) from None
        except (NoCredentialsError, PartialCredentialsError, ProfileNotFound):
            raise InputError(f"{url}: no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from None
        except (BotoCoreError, Boto3Error) as error:
            kind = type(error).__name__
            where = _without_userinfo(endpoint_url()) or "the S3 endpoint"
            if kind in ("EndpointConnectionError", "ConnectTimeoutError", "InvalidRegionError"):
                raise unreachable(f"{url}: {where} cannot be reached ({kind}); check AWS_ENDPOINT_URL") from None
            raise StorageError(f"{url}: {where} did not answer as it should ({kind})") from None
        except ValueError as error:
            # boto3 raises a bare ValueError for an endpoint that is no URL.
            if isinstance(error, InputError) or "endpoint" not in str(error).lower():
                raise
            raise InputError(f"{url}: AWS_ENDPOINT_URL is not a URL; give http(s)://host:port") from None

    def _answer(self, code: str, status: int | None, url: str) -> Exception:
        """The error for what a server answered: its error code, and its HTTP status if it gave one."""
        plain = code.replace("_", "").lower()
        if plain == "nosuchbucket":
            return InputError(f"s3://{self.bucket}: no such bucket; make it or give another")
        if plain == "invalidbucketname":
            return InputError(f"s3://{self.bucket}: not a bucket name; use lower case letters, digits, '-' and '.'")
        if plain in _DENIED or status in (401, 403):
            return InputError(f"{url}: access denied ({code or status}); check AWS_ACCESS_KEY_ID, "
                              "AWS_SECRET_ACCESS_KEY and the bucket's policy")  # fmt: skip
        if plain in _PRECONDITION_FAILED:
            return FileExistsError(errno.EEXIST, "already there with other content", url)
        if plain in _MISSING_KEY:
            return FileNotFoundError(errno.ENOENT, "no such object", url)
        if status is None:
            where = _without_userinfo(endpoint_url()) or "the S3 endpoint"
            return StorageError(f"{url}: {where} did not answer as it should ({code})")
        return StorageError(f"{url}: S3 answered {status} ({code})")


def _s3_client(connect_timeout: float, read_timeout: float, attempts: int):
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=connect_timeout,
        read_timeout=read_timeout,
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=16,
        # An endpoint of one's own (a server by host name or address) rarely answers to bucket.host.
        s3={"addressing_style": "path" if endpoint_url() else "auto"},
    )
    # A session of its own: boto3's default session is shared and not safe to use from several threads.
    return boto3.session.Session().client("s3", config=config)


def endpoint_url() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _without_userinfo(url: str | None) -> str | None:
    if not url or "@" not in url:
        return url
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
