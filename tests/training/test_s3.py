"""A run whose data, cache and checkpoints lie in S3."""

from pathlib import Path

import pytest
from training.test_loop import same, weights

from facediffuser.flows.cli import main
from facediffuser.storage import local_copy, open_store
from facediffuser.training import training_run as runs
from facediffuser.training.loop import train_model


@pytest.fixture
def remote(s3_bucket, prepared) -> str:
    """The prepared data in a bucket."""
    store = open_store(f"{s3_bucket.url}/prepared")
    for path in sorted(path for path in Path(prepared).rglob("*") if path.is_file()):
        store.put(path.relative_to(prepared).as_posix(), path.read_bytes())
    return store.url


def test_a_run_stopped_and_resumed_in_s3_ends_as_a_local_one(settings, s3_bucket, remote, tmp_path, monkeypatch, base):
    from facediffuser.modelfolder import assemble

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "downloads"))
    monkeypatch.setattr(runs, "PART_BYTES", 400_000)
    # Constant, because a decaying learning rate follows from the number of steps.
    given = dict(checkpoint_every=1, resume=True, schedule="constant")
    output = f"{s3_bucket.url}/runs/sdm"
    for steps in (2, 4):
        train_model(settings("sdm", data=remote, cache=None, output=output, steps=steps, **given), lambda numbers: None)
    train_model(settings("sdm", output=str(tmp_path / "local"), steps=4, **given), lambda numbers: None)
    store = open_store(output)
    assert runs.checkpoint_steps(store) == [3, 4] and runs.finished_step(store) == 4
    assert [one.key for one in open_store(f"{remote}-latents").list("moments-")]
    assert same(weights(tmp_path / "local"), weights(local_copy(output)))
    train_model(settings("tdm", output=f"{s3_bucket.url}/runs/tdm", steps=1), lambda numbers: None)
    models = assemble(base, f"{s3_bucket.url}/runs/tdm", output, tmp_path / "models")
    assert (models / "model_index.json").exists()
    words = ["assemble", "--base", str(base), "--tdm", f"{s3_bucket.url}/runs/tdm", "--sdm", output]
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--output", f"{s3_bucket.url}/models", "--quiet"]) == 0
    there = local_copy(f"{s3_bucket.url}/models")
    names = {path.relative_to(models).as_posix() for path in models.rglob("*") if path.is_file()}
    assert names == {path.relative_to(there).as_posix() for path in there.rglob("*") if path.is_file()}
    assert main([*words, "--output", f"{s3_bucket.url}/models", "--quiet"]) == 2, "it holds models already"
    assert not (tmp_path / "s3:").exists()
