"""Which errors of a scheduled run are tried again."""

import pytest
import ray

from facediffuser.errors import InputError, LimitReached, RunError, Stopped, UnreachableError
from facediffuser.flows.generate_dataset import generate_dataset
from facediffuser.storage import StorageError, open_store
from facediffuser.tasks.curate import export_subset, merge_datasets, publish_dataset, retract_subject
from facediffuser.tasks.generate import finish_dataset, generate_shards, plan_dataset
from facediffuser.tasks.ray_place import require_reachable
from facediffuser.tasks.retrying import DELAYS_S, is_transient

NOBODY = "127.0.0.1:1"


@pytest.mark.parametrize(("error", "again"), [
    (StorageError("S3 answered 503 (SlowDown)"), True), (UnreachableError("s3://b: cannot be reached"), True),
    (ray.exceptions.RayActorError(), True), (ConnectionResetError(), True), (TimeoutError(), True),
    (InputError("a.png: damaged; replace it"), False), (Stopped("3 left"), False), (LimitReached("3 left"), False),
    (RunError("too many failed"), False), (PermissionError(13, "denied"), False), (OSError(28, "disk full"), False),
    (ValueError("a bug"), False),
])  # fmt: skip
def test_what_passes_is_tried_again_and_nothing_else(error, again):
    assert is_transient(error) is again


def test_a_store_and_a_cluster_that_are_away_count_as_passing(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{NOBODY}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    for call in (open_store("s3://bucket/x").require_writable, lambda: require_reachable(NOBODY)):
        with pytest.raises(InputError) as caught:
            call()
        assert is_transient(caught.value)


def test_delays_grow_and_the_tasks_of_the_nightly_flow_and_of_finished_datasets_have_them():
    assert DELAYS_S == sorted(set(DELAYS_S))
    tasks = (
        plan_dataset,
        generate_shards,
        finish_dataset,
        merge_datasets,
        retract_subject,
        export_subset,
        publish_dataset,
    )
    for one in tasks:
        assert (one.retries, one.retry_delay_seconds) == (len(DELAYS_S), DELAYS_S)
    assert generate_dataset.retries == 0
