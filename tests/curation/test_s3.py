"""merge, retract, export and publish on S3: the server copies by itself, old versions are named, the bytes are those of a folder."""

import io

import boto3
import pytest
from botocore.awsrequest import AWSResponse
from curation.hub import Hub
from curation.test_merge import contents, merge
from curation.test_publish import publish
from curation.test_retract import retract
from dataset.finished import finish_dataset

from facediffuser.curation.curation_settings import ExportSettings
from facediffuser.curation.export import export_stage
from facediffuser.dataset.mentions import find_mentions
from facediffuser.dataset.verify import verify
from facediffuser.errors import InputError
from facediffuser.storage import open_store
from facediffuser.storage.output import put_folder
from facediffuser.storage.s3 import S3Store
from facediffuser.tasks.local_driver import LocalDriver


@pytest.fixture
def moto(moto_endpoint, monkeypatch, request):
    """The URL of a fresh bucket on a server in this process."""
    for name, value in {"ENDPOINT_URL": moto_endpoint, "ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test",
                        "DEFAULT_REGION": "us-east-1"}.items():  # fmt: skip
        monkeypatch.setenv(f"AWS_{name}", value)
    name = f"life{abs(hash(request.node.name)) % 10**12}"
    client().create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(params=["swift", "moto"])
def url(request):
    """The URL of a fresh bucket, on each of two servers."""
    return request.getfixturevalue("s3_bucket").url if request.param == "swift" else request.getfixturevalue("moto")


def client():
    return boto3.session.Session().client("s3")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Two datasets on disk, of different people."""
    root = tmp_path_factory.mktemp("originals")
    return [finish_dataset(root / "one"), finish_dataset(root / "two words", names=("cyd",))]


def put(store, url):
    """Put a dataset's objects into a bucket; return the store there."""
    there = open_store(url)
    put_folder(there, store.root, "manifest.json")
    return there


def test_the_server_copies_what_is_merged(url, originals, monkeypatch, tmp_path):
    urls = [put(store, f"{url}/{store.root.name}").url for store in originals]
    read, get = [], S3Store.get

    def noted(self, key):
        read.append(key)
        return get(self, key)

    with monkeypatch.context() as patched:
        patched.setattr(S3Store, "get", noted)
        merge(urls, f"{url}/both")
    assert "manifest.json" in read and [key for key in read if key.startswith(("data/", "plan/"))] == []
    merge([store.url for store in originals], tmp_path / "both")
    both, here = open_store(f"{url}/both"), open_store(tmp_path / "both")
    prefixes = ("data/", "plan/", "subjects")
    assert objects(both, *prefixes) == objects(here, *prefixes) and verify(both.url) == []


def objects(store, *prefixes):
    return {info.key: store.get(info.key) for prefix in prefixes for info in store.list(prefix)}


def test_a_source_that_lacks_a_shard_or_has_another_is_named(moto, originals):
    one, other = (put(store, f"{moto}/{store.root.name}") for store in originals)
    shard = one.list("data/")[0].key
    data = one.get(shard)
    one.put(shard, data + b"x")
    with pytest.raises(InputError, match=f"{one.url_of(shard)}: is not as its manifest says; run `facediffuser repair"):
        merge([one.url, other.url], f"{moto}/both")
    one.delete(shard)
    with pytest.raises(InputError, match=f"{one.url_of(shard)}: missing; run `facediffuser repair {one.url}"):
        merge([one.url, other.url], f"{moto}/both")
    one.put(shard, data)
    merge([one.url, other.url], f"{moto}/both")
    assert verify(f"{moto}/both") == []


def test_old_versions_that_the_bucket_keeps_are_named(url, originals):
    bucket = url.removeprefix("s3://")
    client().put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    store, other = put(originals[0], f"{url}/dataset"), put(originals[0], f"{url}/dataset-2")
    retract(store)
    assert verify(store.url) == [] and find_mentions(other, "ada").mentions
    absence = find_mentions(store, "ada")
    named = {line.partition(":")[0] for line in absence.mentions}
    assert {"subjects.parquet", "plan/part-00000-of-00001.parquet", store.list("data/")[0].key} <= named
    assert all("(old version " in line for line in absence.mentions) and absence.notes == []
    for version in store.old_versions():
        client().delete_object(Bucket=bucket, Key=f"dataset/{version.key}", VersionId=version.version)
    assert find_mentions(store, "ada").mentions == [] and verify(store.url) == []


@pytest.mark.parametrize(
    ("denied", "mentions", "notes"),
    [
        ("ListObjectVersions", [], ["takes the right s3:ListBucketVersions"]),
        ("GetObject", ["x.bin: may not be read, which takes the right s3:GetObjectVersion (old version"], []),
    ],
)
def test_rights_on_old_versions_that_are_missing_are_named(moto, denied, mentions, notes):
    name = moto.removeprefix("s3://")
    client().put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
    store = open_store(f"{moto}/dataset")
    for data in (b"with ada", b"without"):
        store.put("x.bin", data)

    def refuse(request, **_):
        asks_for_old = denied == "ListObjectVersions" or "versionId" in request.url
        body = io.BytesIO(b"<Error><Code>AccessDenied</Code></Error>")
        body.stream = lambda **_: iter([body.getvalue()])
        return AWSResponse(request.url, 403, {}, body) if asks_for_old else None

    assert find_mentions(store, "ada").mentions
    store._client.meta.events.register(f"before-send.s3.{denied}", refuse)
    absence = find_mentions(store, "ada")
    for found, expected in ((absence.mentions, mentions), (absence.notes, notes)):
        assert len(found) == len(expected) and all(part in line for part, line in zip(expected, found, strict=True))


def test_a_bucket_without_versions_has_none_left(moto, originals):
    store = put(originals[0], f"{moto}/dataset")
    retract(store)
    absence = find_mentions(store, "ada")
    assert (absence.mentions, absence.notes, verify(store.url)) == ([], [], [])


@pytest.mark.parametrize("to", ["webdataset", "imagefolder", "lmdb"])
def test_an_export_from_and_to_s3_has_the_bytes_of_one_on_disk(moto, originals, tmp_path, to):
    there = put(originals[0], f"{moto}/dataset")
    for store, output in ((there, f"{moto}/out"), (originals[0], str(tmp_path / "out"))):
        settings = ExportSettings(url=store.url, to=to, output=output, where="ip > 0.1", rows_per_file=2)
        LocalDriver().run(export_stage(settings))
    assert contents(open_store(f"{moto}/out")) == contents(open_store(tmp_path / "out"))


def test_it_is_published_from_s3(moto, originals):
    store = put(originals[0], f"{moto}/dataset")
    with Hub() as hub:
        publish(hub, store)
        listed = {key: data for key, data in contents(store).items() if not key.startswith("stats/")}
        assert hub.files["org/name"] == listed
