"""The S3 server that other tests stand on: what it answers, and that it leaves nothing behind."""

import io
import os
from pathlib import Path

import boto3
import pyarrow.fs
import pytest
from botocore.exceptions import ClientError
from swift import POWERLESS_ACCESS_KEY, POWERLESS_SECRET_KEY, SwiftError, SwiftS3


def _status(error: pytest.ExceptionInfo[ClientError]) -> int:
    return error.value.response["ResponseMetadata"]["HTTPStatusCode"]


def test_what_is_put_is_got_and_listed(s3_bucket):
    client = boto3.session.Session().client("s3")
    data = os.urandom(300_000)
    client.put_object(Bucket=s3_bucket.name, Key="a/b.bin", Body=data)

    assert client.get_object(Bucket=s3_bucket.name, Key="a/b.bin")["Body"].read() == data
    listed = client.list_objects_v2(Bucket=s3_bucket.name, Prefix="a/")["Contents"]
    assert [(item["Key"], item["Size"]) for item in listed] == [("a/b.bin", len(data))]


def test_a_fresh_bucket_is_empty(s3_bucket):
    assert boto3.session.Session().client("s3").list_objects_v2(Bucket=s3_bucket.name)["KeyCount"] == 0


def test_pyarrow_reads_with_the_same_credentials(s3_bucket):
    boto3.session.Session().client("s3").upload_fileobj(io.BytesIO(b"text"), s3_bucket.name, "x.txt")
    filesystem = pyarrow.fs.S3FileSystem(endpoint_override=s3_bucket.server.endpoint)
    with filesystem.open_input_file(f"{s3_bucket.name}/x.txt") as file:
        assert file.read() == b"text"


@pytest.mark.parametrize(
    ("key", "secret"),
    [("test:tester", "wrong"), ("test:nobody", "testing"), (POWERLESS_ACCESS_KEY, POWERLESS_SECRET_KEY)],
    ids=["wrong secret", "unknown key", "no rights"],
)
def test_wrong_credentials_are_answered_403(s3_bucket, key, secret):
    client = boto3.session.Session().client("s3", aws_access_key_id=key, aws_secret_access_key=secret)
    with pytest.raises(ClientError) as error:
        client.list_objects_v2(Bucket=s3_bucket.name)
    assert _status(error) == 403


def test_a_missing_bucket_is_answered_404(s3_bucket):
    with pytest.raises(ClientError) as error:
        boto3.session.Session().client("s3").list_objects_v2(Bucket=s3_bucket.name + "-missing")
    assert _status(error) == 404
    assert error.value.response["Error"]["Code"] == "NoSuchBucket"


def test_a_stopped_server_leaves_no_process_and_no_file(tmp_path: Path):
    server = SwiftS3(parent=tmp_path)
    with server:
        processes = [each.pid for each in server._servers]
        assert len(processes) == 4
        assert all(Path(f"/proc/{pid}").exists() for pid in processes)
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_installation_is_an_error_that_names_the_fix(tmp_path: Path):
    with pytest.raises(SwiftError, match="make test"):
        SwiftS3(environment=tmp_path).__enter__()
