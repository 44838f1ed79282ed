"""The demonstration at its smallest, as a person runs it: one command, a real S3 server, and the same command again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from facediffuser.dataset.manifest import read_manifest
from facediffuser.dataset.reading import read_columns
from facediffuser.dataset.verify import verify
from facediffuser.flows.cli import main
from facediffuser.flows.demo import render_photographs
from facediffuser.flows.flow_settings import DemoSettings
from facediffuser.storage import open_store

SMALLEST = {
    "--photos": 24, "--train-steps": 1, "--batch-size": 2, "--subjects": 1, "--prompts": 2, "--steps": 3,
}  # fmt: skip


@pytest.mark.parametrize(("subjects", "prompts", "pairs"), [(1, 4, 0), (2, 1, 0), (2, 4, 1), (3, 16, 2)])
def test_the_demo_has_men_and_women_and_prompts_of_two(tmp_path, subjects, prompts, pairs):
    settings = DemoSettings(photos=8, subjects=subjects, prompts=prompts)
    photos = Path(render_photographs.fn(settings, str(tmp_path / "photos")))
    words = [line.split(",")[1] for line in (photos / "subjects/subjects.csv").read_text().splitlines()[1:]]
    assert sorted(words) == sorted(["man", "woman", "man"][:subjects])
    rows = [json.loads(line) for line in (photos / "prompts.jsonl").read_text().splitlines()]
    of_two = ["{subject_2}" in row["prompt"] for row in rows]
    assert of_two == [False] * (prompts - pairs) + [True] * pairs


@pytest.mark.timeout(1200)
def test_the_demo_generates_a_dataset_on_s3_and_computes_nothing_twice(
    s3_bucket, tmp_path, prefect_harness, ray_session, capsys
):
    output = f"{s3_bucket.url}/demo"
    arguments = ["demo", "--output", output, *(str(word) for pair in SMALLEST.items() for word in pair)]
    # The first run is a process of its own, which starts Prefect's server and Ray by itself.
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_"))}
    ended = subprocess.run(
        [sys.executable, "-m", "facediffuser.flows.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=1000,
        env=outside | {"PREFECT_HOME": str(tmp_path / "prefect")},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert all(text in ended.stdout for text in (f"{output}/dataset", "| IP | PC |", "facediffuser generate"))
    assert "Generate: 2/2 images, in" in ended.stderr and "Train sdm: 1/1 step," in ended.stderr
    # A healthy run shows nothing of its libraries.
    assert not any(
        word in ended.stdout + ended.stderr
        for word in ("raylet", "WARNING", "Warning", "warning:", "prefect.", "Traceback")
    )
    assert verify(f"{output}/dataset") == []
    store = open_store(f"{output}/dataset")
    keys = [info.key for info in store.list("data/")]
    rows = pa.concat_tables([read_columns(store, key, ["sample_id", "ip", "pc", "status"]) for key in keys])
    assert rows["status"].to_pylist() == ["ok", "ok"]
    assert read_manifest(store).counts.rows == len(rows)
    before = {one.key: store.get(one.key) for one in store.list("data/")}
    assert main(arguments) == 0
    assert "from before" in capsys.readouterr().out
    assert {one.key: store.get(one.key) for one in store.list("data/")} == before
