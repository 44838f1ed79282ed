"""Google Cloud Storage behind the same door: a dataset is written, verified, merged and retracted there as on a disk."""

import json
import os
import pickle

import pytest
from dataset.finished import finish_dataset
from gcs import CloudStorage

from facediffuser.curation.curation_settings import MergeSettings, RetractSettings
from facediffuser.curation.merge import merge_stage
from facediffuser.curation.retract import retract_stage
from facediffuser.dataset import open_dataset
from facediffuser.dataset.mentions import find_mentions
from facediffuser.dataset.verify import verify
from facediffuser.errors import InputError
from facediffuser.storage import local_copy, open_store
from facediffuser.storage.hub import hub_errors
from facediffuser.tasks.local_driver import LocalDriver

pytestmark = pytest.mark.usefixtures("plain_plots")


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    with CloudStorage("bucket") as server:
        account = {
            "gcs_base_url": server.endpoint,
            "disable_oauth": True,
            "client_email": "",
            "private_key": "",
            "private_key_id": "",
        }
        (tmp_path / "account.json").write_text(json.dumps(account))
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
        monkeypatch.setenv("GOOGLE_ALLOW_HTTP", "true")
        yield server


def test_objects_are_put_whole_and_read_in_ranges(cloud, tmp_path):
    store = open_store("gs://bucket/some/prefix")
    store.require_readable()
    assert store.list() == [] and not store.exists("a/b")
    store.put("a/b", b"0123456789")
    store.put("ab", b"x")
    assert [info.key for info in store.list()] == ["a/b", "ab"] and [info.key for info in store.list("a")] == [
        "a/b",
        "ab",
    ]
    assert [(info.key, info.size) for info in store.list("a/")] == [("a/b", 10)] and store.folders() == ["a"]
    store.put("ab", b"x", if_absent=True)
    with pytest.raises(FileExistsError):
        store.put("ab", b"y", if_absent=True)
    with store.open("a/b", 4) as file:
        file.seek(3)
        assert file.read(5) == b"34567"
    assert pickle.loads(pickle.dumps(store)).get("a/b") == b"0123456789"
    assert store.child("a").get("b") == b"0123456789"
    with pytest.raises(FileNotFoundError):
        store.get("c")
    store.download("a/b", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"0123456789"
    assert (local_copy("gs://bucket/some", tmp_path / "cache") / "prefix/ab").read_bytes() == b"x"
    store.delete("ab")
    store.delete("ab")
    assert [info.key for info in store.list()] == ["a/b"]


def test_a_dataset_lives_there(cloud, tmp_path):
    finish_dataset("gs://bucket/mine")
    finish_dataset("gs://bucket/theirs", names=("cyd",))
    assert verify("gs://bucket/mine") == []
    assert open_dataset("gs://bucket/mine").to_table(columns=["sample_id"]).num_rows == 4
    urls = ["gs://bucket/mine", "gs://bucket/theirs"]
    LocalDriver().run(merge_stage(MergeSettings(urls=urls, output="gs://bucket/both")))
    LocalDriver().run(retract_stage(RetractSettings(url="gs://bucket/both", subject="ada")))
    found = find_mentions(open_store("gs://bucket/both"), "ada")
    assert verify("gs://bucket/both") == [] and found.mentions == [] and "does not say" in found.notes[0]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("gs://", "no bucket named"),
        ("gs://user:secret@bucket/x", "cannot carry credentials"),
        ("gs://bucket/../x", "not a key"),
        ("ftp://bucket", "no such storage"),
    ],
)
def test_what_is_no_place_is_one_line(url, said):
    with pytest.raises(InputError, match=said):
        open_store(url)


def test_a_missing_bucket_and_missing_credentials_are_one_line(cloud, monkeypatch):
    for url in ("gs://nobucket/x", f"gs://no{'-bucket' * 8}/{'long/' * 40}x"):
        with pytest.raises(InputError, match="no such bucket"):
            open_store(url).require_readable()
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="no credentials; set AZURE_STORAGE_ACCOUNT_NAME"):
        open_store("az://container/x").require_readable()


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "empty", "nested", "binary", "list"])
def test_a_file_of_credentials_that_cannot_be_used_is_one_line(tmp_path, monkeypatch, kind):
    path = tmp_path / "key.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "missing":
        path.write_bytes({"empty": b"", "nested": b"[" * 100_000, "binary": b"\xff\xfe\0", "list": b"[]"}[kind])
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    with pytest.raises(InputError, match="key.json") as error:
        open_store("gs://bucket/x").require_readable()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "value"), [("GOOGLE_TIMEOUT", "MARKED"), ("GOOGLE_ALLOW_HTTP", "MARKED")])
def test_an_environment_that_the_client_refuses_is_one_line_without_its_values(monkeypatch, name, value):
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="environment's GOOGLE_") as error:
        open_store("gs://bucket/x").require_readable()
    assert "MARKED" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["a--b/c", "org/n..x", "org/n.git", f"org/{'n' * 200}", "org/-n", "org/n-", "\u00e9/n"]
)
def test_a_name_that_the_hub_does_not_allow_is_refused_before_it_is_asked(name):
    with pytest.raises(InputError, match="give hf://datasets/ORG/NAME"):
        open_store(f"hf://datasets/{name}")


def test_a_token_with_an_end_of_line_is_one_line_without_it(monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "a")
    monkeypatch.setenv("AZURE_STORAGE_TOKEN", "MARKED\n")
    with pytest.raises(InputError, match="AZURE_STORAGE_TOKEN: holds a control character") as error:
        open_store("az://container/x").require_readable()
    assert "MARKED" not in str(error.value)


@pytest.mark.parametrize(
    "error", [ValueError("MARKED"), UnicodeEncodeError("ascii", "MARKED", 0, 1, "x"), OSError(2, "MARKED")]
)
def test_what_the_hubs_client_makes_of_a_bad_environment_is_one_line(error):
    with pytest.raises(InputError, match="HF_ENDPOINT, HF_TOKEN") as found, hub_errors("hf://datasets/org/name"):
        raise error
    assert "MARKED" not in str(found.value)
