"""What a command writes is written to a bucket as to a folder, whole at the end, and never into a folder called `s3:`."""

import pytest

from facediffuser.errors import InputError
from facediffuser.flows.cli import main
from facediffuser.storage import open_store
from facediffuser.storage.output import output_folder, store_and_key


def test_a_photo_set_is_rendered_into_a_bucket(s3_bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = f"{s3_bucket.url}/photos"
    assert main(["miniature", "render", "--count", "8", "--output", url, "--quiet"]) == 0
    keys = {info.key for info in open_store(url).list()}
    assert "prompts.jsonl" in keys and "subjects/subjects.csv" in keys and list(tmp_path.iterdir()) == []
    assert main(["miniature", "render", "--count", "8", "--output", url, "--quiet"]) == 2


def test_the_last_file_comes_last_and_only_when_all_went_well(s3_bucket):
    url = f"{s3_bucket.url}/models"
    with pytest.raises(KeyError), output_folder(url, "model_index.json") as folder:
        folder.mkdir()
        (folder / "model_index.json").write_text("{}")
        raise KeyError
    assert open_store(url).list() == []


def test_the_place_of_a_file(tmp_path, s3_bucket, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store, key = store_and_key("explain.png")
    assert (store.url, key) == (str(tmp_path), "explain.png")
    store, key = store_and_key(f"{s3_bucket.url}/a/explain.png")
    assert (store.url, key) == (f"{s3_bucket.url}/a", "explain.png")
    (tmp_path / "folder").mkdir()
    for bad in ("s3://bucket", "", str(tmp_path / "folder"), "http://host/x.png"):
        with pytest.raises(InputError):
            store_and_key(bad)
