"""Objects in an S3 bucket, through boto3 alone: written with one PutObject, read whole or in ranges.

There is one client, so there is one configuration: the standard AWS environment variables and config files (keys,
profile, SSO, region, endpoint, certificates, proxy, addressing) and nothing else. No error text holds a credential:
what a server answered is shown by its error code only.
"""

import builtins
import errno
import functools
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, urlsplit

from facediffuser.errors import DeniedError, InputError, UnreachableError
from facediffuser.storage.base import BUFFER_BYTES, BucketStore, ObjectInfo, OldVersion, StorageError, Store
from facediffuser.storage.ranges import RangedObject

_REQUEST_TIMEOUT_S = 60
# With the waits between them about a minute of an outage is waited out; then the run ends and can be resumed.
_ATTEMPTS = 10
# Error codes in lower case.
_DENIED = {"403", "accessdenied", "forbidden", "invalidaccesskeyid", "signaturedoesnotmatch", "expiredtoken",
           "invalidtoken", "authorizationheadermalformed", "allaccessdisabled"}  # fmt: skip
_MISSING_KEY = {"404", "nosuchkey", "notfound"}
_PRECONDITION_FAILED = {"412", "preconditionfailed"}
_UNREACHABLE = {"EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError"}
# What botocore finds wrong with the configuration or the credentials, by the name of its error.
_CONFIGURATION = {
    "ProfileNotFound": "the AWS profile is in none of the AWS config files; check AWS_PROFILE",
    "ConfigParseError": "an AWS config file cannot be parsed; check AWS_CONFIG_FILE and AWS_SHARED_CREDENTIALS_FILE "
    "(by default ~/.aws/config and ~/.aws/credentials)",
    "InvalidRegionError": "the AWS region is not a region's name; check AWS_REGION, AWS_DEFAULT_REGION and the profile",
    "NoRegionError": "no AWS region; set AWS_DEFAULT_REGION",
    "NoCredentialsError": "no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "PartialCredentialsError": "half of the S3 credentials are missing; set both AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY",
    "SSLError": "the S3 server's certificate is not trusted; set AWS_CA_BUNDLE to the file of its authority",
}
_NO_ENDPOINT = (
    "the S3 endpoint is not a URL; give http(s)://host:port in AWS_ENDPOINT_URL or the profile's endpoint_url"
)
_AMAZON = re.compile(r"\.amazonaws\.com(\.cn)?$")
_CREDENTIALS = re.compile(r"^(SSO|UnauthorizedSSO|Token|Login|CredentialRetrieval|RefreshWithMFA|NoAuthToken)")


class S3Store(BucketStore):
    """A prefix of an S3 bucket."""

    def __init__(self, bucket: str, prefix: str = ""):
        self.bucket, self.prefix = bucket, prefix
        self.url = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
        self._cached_client = None

    def __getstate__(self) -> dict:
        # A boto3 client cannot be pickled, and it takes up the environment of where it is used.
        return {**self.__dict__, "_cached_client": None}

    def put(self, key: str, data: bytes, if_absent: bool = False) -> None:
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        try:
            with self._translated_errors(key):
                self._client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data, **condition)
        except FileExistsError:
            if self.get(key) != data:
                raise

    def get(self, key: str) -> bytes:
        return self._get_body(key)

    def _get_body(self, key: str, **conditions: str) -> bytes:
        """Return the body of a GetObject; a body that breaks off is asked for again."""
        from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

        with self._translated_errors(key):
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    answer = self._client.get_object(Bucket=self.bucket, Key=self._key(key), **conditions)
                    data = answer["Body"].read()
                    if len(data) != answer["ContentLength"]:
                        raise IncompleteReadError(actual_bytes=len(data), expected_bytes=answer["ContentLength"])
                    return data
                except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
                    # boto3 asks again for an answer that does not begin, not for one that breaks off.
                    if attempt == _ATTEMPTS:
                        raise
        raise AssertionError("unreachable")

    def _head(self, key: str) -> dict[str, Any]:
        with self._translated_errors(key):
            return self._client.head_object(Bucket=self.bucket, Key=self._key(key))

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        found = []
        with self._translated_errors(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self._base + prefix
            )
            for page in pages:
                for item in page.get("Contents", ()):
                    if not item["Key"].endswith("/"):  # a console's folder marker is no object of ours
                        found.append(ObjectInfo(item["Key"][len(self._base) :], item["Size"], item["ETag"]))
        return sorted(found, key=lambda info: info.key)

    def folders(self) -> builtins.list[str]:
        found = []
        with self._translated_errors(""):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self._base, Delimiter="/"
            )
            for page in pages:
                found += [item["Prefix"][len(self._base) :].rstrip("/") for item in page.get("CommonPrefixes", ())]
        return sorted(found)

    def delete(self, key: str) -> None:
        with self._translated_errors(key):
            self._client.delete_object(Bucket=self.bucket, Key=self._key(key))

    def copy_from(self, source: Store, source_key: str, key: str) -> bytes | None:
        if not isinstance(source, S3Store):
            return super().copy_from(source, source_key, key)
        place = {"Bucket": source.bucket, "Key": source._key(source_key)}
        # What goes wrong with a copy is about the object that is not there or may not be read.
        with source._translated_errors(source_key):
            self._client.copy_object(Bucket=self.bucket, Key=self._key(key), CopySource=place)
        return None

    def old_versions(self) -> builtins.list[OldVersion] | None:
        found = []
        try:
            with self._translated_errors(""):
                pages = self._client.get_paginator("list_object_versions").paginate(
                    Bucket=self.bucket, Prefix=self._base
                )
                for page in pages:
                    for item in page.get("Versions", ()):
                        if not item["IsLatest"]:
                            read = functools.partial(self._get_version, item["Key"], item["VersionId"])
                            found.append(OldVersion(item["Key"][len(self._base) :], item["VersionId"], read))
        except (StorageError, DeniedError):
            return None  # a server without versions, or credentials that may not list them (s3:ListBucketVersions)
        return found

    def _get_version(self, name: str, version: str) -> bytes:
        with self._translated_errors(name):
            return self._client.get_object(Bucket=self.bucket, Key=name, VersionId=version)["Body"].read()

    def download(self, key: str, path: Path) -> None:
        with self._translated_errors(key):
            self._client.download_file(self.bucket, self._key(key), str(path))

    def reader(self, key: str, buffer_bytes: int = BUFFER_BYTES) -> BinaryIO:
        head = self._head(key)
        version = head["ETag"]

        def read(start: int, end: int) -> bytes:
            try:
                return self._get_body(key, Range=f"bytes={start}-{end - 1}", IfMatch=version)
            except FileExistsError:  # the precondition: the object is no longer the one that was opened
                raise StorageError(f"{self.url_of(key)}: replaced while it was read; run again") from None

        return io.BufferedReader(RangedObject(head["ContentLength"], read), buffer_bytes)

    def require_readable(self) -> None:
        # Listing, not HeadBucket: only an answer with a body tells a wrong key from a missing bucket.
        with self._translated_errors("", unreachable=UnreachableError):
            _ = self._client
            client = _s3_client(connect_timeout=4, read_timeout=15, attempts=4)
            client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix, MaxKeys=1)

    def whole(self) -> "S3Store":
        """Return the store of the whole bucket."""
        return S3Store(self.bucket)

    def child(self, prefix: str) -> "S3Store":
        return S3Store(self.bucket, self._key(prefix.strip("/")))

    def page_of(self, key: str) -> str:
        where = quote(self._key(key))
        if _AMAZON.search(urlsplit(self._endpoint).netloc):
            return f"https://console.aws.amazon.com/s3/object/{self.bucket}?prefix={where}"
        return f"{self._endpoint.rstrip('/')}/{self.bucket}/{where}"

    @property
    def _client(self):
        if self._cached_client is None:
            self._cached_client = _s3_client(connect_timeout=10, read_timeout=_REQUEST_TIMEOUT_S, attempts=_ATTEMPTS)
        return self._cached_client

    @property
    def _endpoint(self) -> str:
        """The server's address for messages."""
        meta = getattr(self._cached_client, "meta", None)
        return meta.endpoint_url if meta else "the S3 endpoint"

    @contextmanager
    def _translated_errors(self, key: str, unreachable: type[Exception] = StorageError) -> Iterator[None]:
        """Turn boto3's errors into InputError, FileNotFoundError, FileExistsError or StorageError without secrets.

        An endpoint that cannot be reached is the user's to fix before a run (UnreachableError), an outage during one.
        """
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

        url = self.url_of(key) if key else self.url
        try:
            yield
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            raise self._answer(code, error.response.get("ResponseMetadata", {}).get("HTTPStatusCode"), url) from None
        except (BotoCoreError, Boto3Error) as error:
            kind = type(error).__name__
            if kind in _CONFIGURATION:
                raise InputError(f"{url}: {_CONFIGURATION[kind]}") from None
            if _CREDENTIALS.match(kind):
                raise InputError(f"{url}: S3 credentials cannot be had ({kind}); log in again (`aws sso login`) or set "
                                 "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from None  # fmt: skip
            if kind in _UNREACHABLE:
                raise unreachable(f"{url}: {self._endpoint} cannot be reached ({kind}); check AWS_ENDPOINT_URL, the "
                                  "profile's endpoint_url and the proxy") from None  # fmt: skip
            if isinstance(error, HTTPClientError) and "TLS CA certificate bundle" in str(error):
                raise InputError(f"{url}: AWS_CA_BUNDLE names no file of certificates; check the path") from None
            if (
                isinstance(error, HTTPClientError)
                or isinstance(error, Boto3Error)
                or "Response" in kind
                or "Read" in kind
            ):
                raise StorageError(f"{url}: {self._endpoint} did not answer as it should ({kind})") from None
            raise InputError(f"{url}: the AWS configuration cannot be used ({kind}); check the AWS variables and "
                             "~/.aws/config") from None  # fmt: skip
        except OSError as error:
            if "TLS CA certificate bundle" not in str(error):
                raise
            raise InputError(f"{url}: AWS_CA_BUNDLE names no file of certificates; check the path") from None

    def _answer(self, code: str, status: int | None, url: str) -> Exception:
        """The error for what a server answered: its error code, and its HTTP status if it gave one."""
        plain = code.replace("_", "").lower()
        if plain == "nosuchbucket":
            return InputError(f"s3://{self.bucket}: no such bucket; make it or give another")
        if plain == "invalidbucketname":
            return InputError(f"s3://{self.bucket}: not a bucket name; use lower case letters, digits, '-' and '.'")
        if plain in _DENIED or status in (401, 403):
            return DeniedError(f"{url}: access denied ({code or status}); check AWS_ACCESS_KEY_ID, "
                               "AWS_SECRET_ACCESS_KEY and the bucket's policy")  # fmt: skip
        if plain in _PRECONDITION_FAILED:
            return FileExistsError(errno.EEXIST, "already there with other content", url)
        if plain in _MISSING_KEY:
            return FileNotFoundError(errno.ENOENT, "no such object", url)
        if status is None:
            return StorageError(f"{url}: {self._endpoint} did not answer as it should ({code})")
        return StorageError(f"{url}: S3 answered {status} ({code})")


@functools.cache
def _descriptions(folders: str | None) -> Any:
    """Return what reads botocore's descriptions of services: one for all clients, for each takes a third of a second to read them."""
    from botocore.loaders import create_loader

    return create_loader(folders)


def _s3_client(connect_timeout: float, read_timeout: float, attempts: int):
    import boto3
    import botocore.session
    from boto3.exceptions import Boto3Error
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        connect_timeout=connect_timeout,
        read_timeout=read_timeout,
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=16,
    )
    # A session of its own: boto3's default session is shared and not safe to use from several threads.
    core = botocore.session.Session()
    try:
        core.register_component("data_loader", _descriptions(core.get_config_variable("data_path")))
        session = boto3.session.Session(botocore_session=core)
        client = session.client("s3", config=config)
        credentials = session.get_credentials()
        if credentials is not None:
            credentials.get_frozen_credentials()  # a file, a program or a server is asked for them now, not in a request
    except (BotoCoreError, Boto3Error):
        raise
    except Exception as error:
        # What stands in the variables and files reaches the standard library unchecked, which raises as it comes.
        if "endpoint" in str(error).lower() or "IPv6" in str(error):
            raise InputError(_NO_ENDPOINT) from None
        raise InputError(f"the AWS configuration cannot be used ({type(error).__name__}); check the AWS variables, "
                         "~/.aws/config and ~/.aws/credentials, and what they name") from None  # fmt: skip
    endpoint = client.meta.endpoint_url
    if any(char in endpoint for char in "@?#"):
        # Not shown: what stands there is a password or a signature.
        raise InputError("the S3 endpoint carries credentials or a query; give http(s)://host:port in AWS_ENDPOINT_URL "
                         "and the keys in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")  # fmt: skip
    style_is_set = "addressing_style" in (core.get_scoped_config().get("s3") or {})
    if not style_is_set and not _AMAZON.search(urlsplit(endpoint).hostname or ""):
        # An endpoint of one's own (a server by host name or address) rarely answers to bucket.host.
        client = session.client("s3", config=config.merge(Config(s3={"addressing_style": "path"})))
    return client
