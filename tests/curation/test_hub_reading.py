"""`hf://` for reading: what was published is verified, read, exported and merged as on a disk; nothing is written there."""

import json

import pytest
from curation.hub import Hub
from curation.test_merge import contents, images, merge
from curation.test_publish import publish, with_hub
from dataset.finished import finish_dataset

from facediffuser.curation.curation_settings import ExportSettings
from facediffuser.curation.export import export_stage
from facediffuser.dataset.verify import verify
from facediffuser.errors import InputError
from facediffuser.storage import open_store
from facediffuser.tasks.local_driver import LocalDriver

URL = "hf://datasets/org/name"
# The hub's address is read when its client is imported: a process of its own.
READ = """
import json, pickle, sys
from pathlib import Path
from huggingface_hub import CommitOperationAdd, HfApi
from facediffuser.curation.curation_settings import ExportSettings, MergeSettings
from facediffuser.curation.export import export_stage
from facediffuser.curation.merge import merge_stage
from facediffuser.dataset import open_dataset
from facediffuser.dataset.verify import verify
from facediffuser.storage import local_copy, open_store
from facediffuser.tasks.local_driver import LocalDriver
url, other, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
store = open_store(url)
found = {"verify": verify(url), "rows": open_dataset(url).to_table(columns=["sample_id"]).num_rows}
found["keys"], found["folders"] = [info.key for info in store.list()], store.folders()
with store.open(found["keys"][0], 16) as file:
    file.seek(5)
    found["part"] = file.read(20).hex()
found["there"] = store.exists("manifest.json"), store.exists("data"), store.child("data").exists("nothing")
LocalDriver().run(export_stage(ExportSettings(url=url, to="webdataset", output=str(out / "tars"))))
LocalDriver().run(merge_stage(MergeSettings(urls=[url, other], output=str(out / "both"))))
found["copy"] = str(local_copy(url + "/data", out / "cache"))
found["page"] = store.page_of("data/x y.parquet")
# A commit that is made meanwhile is seen by those who open the repository after it.
copy, before = pickle.loads(pickle.dumps(store)), store.get("README.md")
HfApi().create_commit("org/name", [CommitOperationAdd("README.md", before + b"new")], commit_message="new", repo_type="dataset")
found["new"] = [one.get("README.md") == before for one in (store, copy, open_store(url))]
print(json.dumps(found))
"""
ERRORS = """
import json, sys
from facediffuser.storage import StorageError, open_store
said = []
for url in sys.argv[1:]:
    try:
        open_store(url).require_readable()
        said.append("readable")
    except (StorageError, ValueError) as error:
        said.append(f"{type(error).__name__}: {error}")
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(hub, store of the dataset that was published there)."""
    store = finish_dataset(tmp_path_factory.mktemp("published") / "dataset")
    with Hub() as hub:
        publish(hub, store)
        yield hub, store


def test_what_was_published_is_read_there_as_on_a_disk(published, tmp_path):
    hub, store = published
    other = finish_dataset(tmp_path / "other", names=("cyd",))
    found = json.loads(with_hub(hub.endpoint, READ, URL, other.url, str(tmp_path)))
    assert hub.ranges and hub.tokens <= {"Bearer hf_secret", None}
    assert found["page"] == f"{hub.endpoint}/datasets/org/name/blob/main/data/x%20y.parquet"
    assert found["new"] == [True, True, False]
    listed = {key: data for key, data in contents(store).items() if not key.startswith("stats/")}
    assert found["verify"] == [] and found["rows"] == 4 and found["keys"] == sorted(listed)
    assert found["folders"] == ["card", "data", "plan"] and found["there"] == [True, False, False]
    assert bytes.fromhex(found["part"]) == listed[found["keys"][0]][5:25]
    assert contents(open_store(found["copy"])) == {
        key.removeprefix("data/"): data for key, data in listed.items() if key.startswith("data/")
    }
    LocalDriver().run(export_stage(ExportSettings(url=store.url, to="webdataset", output=str(tmp_path / "here"))))
    assert contents(open_store(tmp_path / "tars")) == contents(open_store(tmp_path / "here"))
    assert verify(str(tmp_path / "both")) == []
    merge([store.url, other.url], tmp_path / "both-here")
    assert images(tmp_path / "both") == images(tmp_path / "both-here")


def test_what_is_not_there_and_a_hub_that_is_away_are_one_line(published):
    urls = [URL, "hf://datasets/org/nothing", f"{URL}@{'0' * 39}9"]
    said = json.loads(with_hub(published[0].endpoint, ERRORS, *urls))
    assert said[0] == "readable"
    for line, url in zip(said[1:], urls[1:], strict=True):
        assert line.startswith(f"InputError: {url}: the hub answered 404; log in") and "\n" not in line
    away = json.loads(with_hub("http://127.0.0.1:1", ERRORS, URL))
    assert away[0].startswith(f"StorageError: {URL}: the hub cannot be reached (ConnectError)")
    with pytest.raises(InputError, match=f"{URL}: HF_HUB_OFFLINE forbids to ask the hub; unset it"):
        open_store(URL).require_readable()  # the tests' own processes have it set


def test_what_is_no_place_or_is_to_be_written_is_one_line(tmp_path):
    for url in ("hf://org/name", "hf://datasets/name", "hf://datasets/org/..", "hf://models/org/name", "hf://"):
        with pytest.raises(InputError, match="give hf://datasets/ORG/NAME"):
            open_store(url)
    with pytest.raises(InputError, match="cannot carry credentials"):
        open_store("hf://user:secret@datasets/org/name")
    with pytest.raises(InputError, match="not a key"):
        open_store("hf://datasets/org/name/../x")
    store = open_store("hf://datasets/org/name@v1/some/")
    assert store.url == "hf://datasets/org/name@v1/some" and store.child("x").url == f"{store.url}/x"
    for call in (store.require_writable, lambda: store.put("x", b""), lambda: store.delete("x")):
        with pytest.raises(InputError, match="hf:// is for reading; give a folder or a bucket"):
            call()
    finish_dataset(tmp_path / "one")
    finish_dataset(tmp_path / "two", names=("cyd",))
    with pytest.raises(InputError, match="hf:// is for reading"):
        merge([tmp_path / "one", tmp_path / "two"], URL)
