"""Two drivers of the same run that finish it at the same time: both end well, and the dataset is whole."""

import dataclasses
import json
import uuid

import boto3
import pytest

from facediffuser.dataset.manifest import ChangedError, Retraction, read_sound_manifest
from facediffuser.dataset.seal import seal
from facediffuser.dataset.spending import SPENT_KEY, read_spent, total_spent
from facediffuser.dataset.verify import verify
from facediffuser.storage import open_store
from facediffuser.tasks.generate import FINISH_TRIES, finish_dataset

pytestmark = pytest.mark.usefixtures("local_driver")


@pytest.fixture
def job(request, made, tmp_path, monkeypatch):
    """A run whose shards are all there and which nobody has finished, in a folder or, with the parameter "s3", in a bucket."""
    url = str(tmp_path / "dataset")
    if getattr(request, "param", "local") == "s3":
        given = {"ENDPOINT_URL": request.getfixturevalue("moto_endpoint"), "ACCESS_KEY_ID": "test",
                 "SECRET_ACCESS_KEY": "test", "REGION": "us-east-1"}  # fmt: skip
        for name, value in given.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        name = f"b{uuid.uuid4().hex[:12]}"
        boto3.session.Session().client("s3").create_bucket(Bucket=name)
        url = f"s3://{name}/dataset"
    source, store = made[0].store(), open_store(url)
    for info in source.list():
        store.put(info.key, source.get(info.key))
    return dataclasses.replace(made[0], output=url)


@pytest.fixture
def before_put(monkeypatch):
    """Let something happen just before an object is put; `times`: how often, at the first puts of that key."""

    def let(store, key, happen, times=1):
        kind, left = type(store), [times]
        put = kind.put

        def watched(self, name, *given, **options):
            if name == key and left[0]:
                left[0] -= 1
                rest, left[0] = left[0], 0  # what happens puts the same key
                happen()
                left[0] = rest
            return put(self, name, *given, **options)

        monkeypatch.setattr(kind, "put", watched)
        return left

    return let


def finished_by_the_other(job) -> None:
    """The other driver made a shard, too, in another time, and finishes the run."""
    store, key = job.store(), job.layout.stats_key(0)
    stats = json.loads(store.get(key))
    stats["seconds"]["total"] += 1000.0
    store.put(key, json.dumps(stats).encode())
    finish_dataset.fn(job)


@pytest.mark.parametrize("job", ["local", "s3"], indirect=True)
def test_both_end_well_and_the_dataset_is_what_the_first_one_listed(job, before_put):
    store, theirs = job.store(), []

    def other():
        finished_by_the_other(job)
        theirs.append(store.get("manifest.json"))

    before_put(store, SPENT_KEY, other)
    assert finish_dataset.fn(job).counts.ok == 12
    assert theirs == [store.get("manifest.json")] and verify(store.url) == []
    manifest = read_sound_manifest(store)
    assert total_spent([manifest.spent]) == read_spent(store)


def test_a_manifest_that_says_something_else_is_left_as_it_is(job, before_put):
    store = job.store()

    def other():
        finished_by_the_other(job)
        manifest = read_sound_manifest(store)
        seal(store, manifest.model_copy(update={"retractions": [Retraction(subjects=1, rows=1)]}))

    before_put(store, SPENT_KEY, other)
    with pytest.raises(ChangedError, match="changed while this command ran"):
        finish_dataset.fn(job)
    assert read_sound_manifest(store).retractions


def test_a_manifest_that_changes_at_every_try_ends_it_in_one_line(job, before_put):
    store, names = job.store(), []

    def other():
        if not names:
            finish_dataset.fn(job)
        names.append(f"place {len(names)}")
        seal(store, read_sound_manifest(store).model_copy(update={"made_from": {"models": names[-1]}}))

    before_put(store, "README.md", other, times=FINISH_TRIES + 1)
    with pytest.raises(ChangedError):
        finish_dataset.fn(job)
    assert len(names) == FINISH_TRIES and read_sound_manifest(store).made_from == {"models": names[-1]}
