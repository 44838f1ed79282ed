"""The fixtures of S3 servers: `s3_server`, a real one per session, `moto_endpoint`, one in this process, and fresh buckets."""

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import boto3
import pytest
from swift import SwiftS3


@dataclass(frozen=True)
class Bucket:
    """An empty bucket and the server that holds it; `url` is s3://name."""

    name: str
    server: SwiftS3

    @property
    def url(self) -> str:
        return f"s3://{self.name}"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[SwiftS3]:
    """One S3 server for the whole session; where it is not installed the test fails, saying what installs it."""
    with SwiftS3() as server:
        yield server


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    """The URL of an S3 server in this process, which starts in no time and keeps objects in memory."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_bucket(s3_server: SwiftS3, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A fresh bucket; for this test the AWS variables are its server's, and nothing else is configured."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    nothing = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    for name, value in {**s3_server.environment(), **nothing, "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    bucket = Bucket(f"bucket-{uuid.uuid4().hex[:12]}", s3_server)
    # A session of its own: boto3's default one keeps the credentials that its first user had.
    boto3.session.Session().client("s3").create_bucket(Bucket=bucket.name)
    return bucket
