"""The demonstration at its smallest, as a person runs it: one command, a real S3 server, and the same command again."""

import subprocess
import sys

import pyarrow as pa

from facediffuser.dataset.manifest import read_manifest
from facediffuser.dataset.reading import read_columns
from facediffuser.dataset.verify import verify
from facediffuser.storage import open_store

SMALLEST = {
    "--photos": 24, "--train-steps": 1, "--batch-size": 2, "--subjects": 1, "--prompts": 2, "--steps": 3,
}  # fmt: skip


def run_demo(output: str) -> tuple[str, str]:
    """Return what the command printed and what it logged."""
    options = [str(word) for pair in SMALLEST.items() for word in pair]
    command = [sys.executable, "-m", "facediffuser.flows.cli", "demo", "--output", output, *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout, ended.stderr


def test_the_demo_makes_a_dataset_on_s3_and_makes_nothing_twice(s3_bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    output = f"{s3_bucket.url}/demo"
    told, logged = run_demo(output)
    assert f"{output}/dataset" in told and "| IP | PC |" in told and "facediffuser generate" in told
    assert "Generate: 2/2 images, in" in logged and "Train sdm: 1/1 steps" in logged
    assert verify(f"{output}/dataset") == []
    store = open_store(f"{output}/dataset")
    keys = [info.key for info in store.list("data/")]
    rows = pa.concat_tables([read_columns(store, key, ["sample_id", "ip", "pc", "status"]) for key in keys])
    assert rows["status"].to_pylist() == ["ok", "ok"]
    assert read_manifest(store).counts.rows == len(rows)
    before = {one.key: store.get(one.key) for one in store.list("data/")}
    assert "from before" in run_demo(output)[0]
    assert {one.key: store.get(one.key) for one in store.list("data/")} == before
