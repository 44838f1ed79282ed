"""`publish`: everything that the manifest lists reaches the hub, once; interrupted, the rest follows."""

import json
import os
import subprocess
import sys

import pytest
from curation.hub import Hub
from curation.test_merge import contents
from dataset.finished import ALONE, finish_dataset

from facediffuser.curation.curation_check import check_publish
from facediffuser.curation.curation_settings import PublishSettings
from facediffuser.errors import InputError

# The hub's address is read when its client is imported: a process of its own.
PUBLISH = """
import json, sys
from facediffuser.curation import publish
from facediffuser.curation.curation_settings import PublishSettings
from facediffuser.tasks.local_driver import LocalDriver
publish.COMMIT_OBJECTS = 3
try:
    print(LocalDriver().run(publish.publish_stage(PublishSettings(places=sys.argv[1:]))))
except (OSError, ValueError) as error:
    print("refused:", error)
"""


def publish(hub, store, target="hf://datasets/org/name"):
    return with_hub(hub.endpoint, PUBLISH, store.url, target)


def with_hub(endpoint, script, *words, **variables):
    """Run a script in a process whose hub is the one at `endpoint`; return its last line."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1",
                   "HF_HUB_OFFLINE": "0", **variables}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "hf_secret" not in done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def test_everything_reaches_the_hub_once_and_in_order(tmp_path):
    store = finish_dataset(tmp_path / "dataset", names=("ada", "bob", "cyd"), prompts=ALONE)
    listed = {key: data for key, data in contents(store).items() if not key.startswith("stats/")}
    with Hub() as hub:
        hub.fail_after = 2
        assert publish(hub, store).startswith("refused: hf://datasets/org/name: the hub answered 500")
        assert len(hub.commits) == 2 and "manifest.json" not in hub.files["org/name"]
        hub.fail_after = -1
        said = publish(hub, store)
        assert said == f"{hub.endpoint}/datasets/org/name", said
        assert hub.files["org/name"] == listed
        every = [key for commit in hub.commits for key in commit]
        assert len(every) == len(set(every)) and set(hub.commits[-1]) == {"README.md", "manifest.json"}
        assert hub.tokens <= {"Bearer hf_secret", None}  # a large file goes to a signed address without it
        # What the dataset has no longer goes from the hub, too.
        gone = store.list("scores/") or store.list("card/")
        document = json.loads(store.get("manifest.json"))
        assert gone and document["digest"]
        for key in ("data/shard-00009-of-00009.parquet", "certificate/part-0000-of-0009.parquet"):
            hub.files["org/name"][key] = b"earlier"
        publish(hub, store)
        assert hub.files["org/name"] == listed


def test_what_cannot_be_published_is_refused(tmp_path):
    store = finish_dataset(tmp_path / "dataset")
    for target in ("hf://org/name", "hf://datasets/name", "hf://datasets/org/../x", "s3://bucket/x"):
        with pytest.raises(InputError, match="give hf://datasets/ORG/NAME"):
            check_publish(PublishSettings(places=[store.url, target]))
    with pytest.raises(InputError, match="no manifest"):
        check_publish(PublishSettings(places=[str(tmp_path), "hf://datasets/org/name"]))
    check_publish(PublishSettings(places=[store.url, "hf://datasets/org/name"]))
