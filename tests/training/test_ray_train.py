"""The stage on Ray Train: two workers, a lost one, and errors that come out as what they are."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training.prepared_rows import read_prepared, write_prepared
from training.test_loop import same, weights

from facediffuser.errors import InputError
from facediffuser.tasks import ray_train as train
from facediffuser.tasks.end_training import EndTraining
from facediffuser.tasks.ray_train import train_on_ray
from facediffuser.tasks.train_worker import TrainNumbers
from facediffuser.training.loop import DivergedError, train_model


def test_two_workers_on_ray_train_the_weights_of_one_with_the_doubled_batch(
    ray_session, settings, prepared, tmp_path, monkeypatch
):
    """AdamW's first step moves each weight by the sign of its gradient, so SGD-like closeness is asked of most weights."""
    given = dict(steps=2, warmup_steps=0, cpus_per_worker=1, accumulate=2)
    # Paths are told as people type them.
    monkeypatch.chdir(tmp_path)
    paths = dict(data=os.path.relpath(prepared), output="two")
    result = train_on_ray.fn(settings("sdm", workers=2, batch_size=2, **paths, **given))
    assert (result["role"], result["step"]) == ("sdm", 2) and result["loss"] > 0
    train_model(settings("sdm", workers=1, batch_size=4, output=str(tmp_path / "one"), **given), lambda numbers: None)
    ours, theirs = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    close = torch.cat([torch.isclose(ours[name], theirs[name], atol=1e-5).flatten().float() for name in ours])
    assert close.mean() > 0.99


def test_a_run_that_has_ended_is_left_as_it_is(ray_session, settings, tmp_path):
    chosen = settings("tdm", resume=True)
    train_model(chosen, lambda numbers: None)
    assert train_on_ray.fn(chosen)["seconds"] == 0.0


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"data": "/nowhere/prepared"}, InputError),
        # Ray Train starts a second worker group for it.
        pytest.param({"learning_rate": 1e30, "max_grad_norm": 1e30}, DivergedError, marks=pytest.mark.slow),
    ],
)
def test_errors_of_the_workers_come_out_as_what_they_are_and_are_not_tried_again(ray_session, settings, given, kind):
    with pytest.raises(kind):
        train_on_ray.fn(settings("tdm", steps=30, warmup_steps=0, workers=1, **given))


@pytest.mark.slow  # Two workers on Ray Train.
def test_an_error_of_one_of_two_workers_ends_the_other_and_is_not_tried_again(
    ray_session, settings, prepared, tmp_path, monkeypatch
):
    """One worker finds the damaged picture while the other one waits for it in the backward pass."""
    original, starts = train.train_in_worker, tmp_path / "starts"

    def train_counted(config: dict) -> None:
        import uuid

        (Path(starts) / uuid.uuid4().hex).touch()
        original(config)

    starts.mkdir()
    rows = read_prepared(prepared)
    rows[7]["image"]["bytes"] = b"noise"
    write_prepared(tmp_path / "data", rows)
    monkeypatch.setattr(train, "train_in_worker", train_counted)
    given = dict(data=str(tmp_path / "data"), precompute=False, steps=9, workers=2, batch_size=1, cpus_per_worker=1)
    with pytest.raises(InputError, match=f"train picture {rows[7]['image_id']}: image cannot be read"):
        train_on_ray.fn(settings("tdm", **given))
    assert len(list(starts.iterdir())) == 2


def test_the_number_of_workers_is_the_one_given_else_the_one_before_else_that_of_the_gpus(settings):
    def count(given, recorded, gpus, cpus=8, side_by_side=1):
        return train.count_workers(settings("tdm", workers=given), recorded, gpus, cpus, side_by_side)

    assert count(None, None, gpus=4) == 4 and count(None, None, gpus=4, side_by_side=2) == 2
    assert count(None, None, gpus=0) == 1 and count(3, None, gpus=4) == 3
    assert count(None, 2, gpus=4) == count(None, 2, gpus=2, side_by_side=2) == count(None, 2, gpus=0) == 2
    assert count(4, 4, gpus=2) == 4
    for gpus, cpus, here in ((2, 8, "2 GPUs"), (0, 2, "2 cores")):
        with pytest.raises(InputError, match=f"by 4 workers, this cluster has {here}.*--workers 4"):
            count(None, 4, gpus, cpus)


def test_the_first_error_of_the_workers_is_the_one_that_counts():
    numbers = TrainNumbers()
    assert numbers.failure() is None
    first = InputError("one")
    for error in (first, InputError("two")):
        numbers.fail(error)
    assert numbers.failure() is first


def test_a_training_is_ended_at_an_error_for_the_user_and_any_other_is_left_to_ray(monkeypatch):
    numbers = TrainNumbers()
    metrics = SimpleNamespace(failure=SimpleNamespace(remote=numbers.failure))
    monkeypatch.setattr("ray.get", lambda value: value)
    failures = {1: RuntimeError("connection closed by peer")}
    EndTraining(metrics).after_exception(None, failures)
    numbers.fail(InputError("one line"))
    with pytest.raises(InputError, match="one line"):
        EndTraining(metrics).after_exception(None, failures)


@pytest.mark.slow  # Ray Train starts its workers twice, which takes most of a minute.
def test_a_worker_killed_with_sigkill_is_replaced_and_the_run_ends_as_an_undisturbed_one(
    ray_session, settings, tmp_path, monkeypatch
):
    original, mark = train.train_in_worker, tmp_path / "killed"

    def train_killed_once(config: dict) -> None:
        from facediffuser.training import training_run as runs

        save = runs.save_checkpoint

        def save_then_die(store, step, *given, **named) -> None:
            save(store, step, *given, **named)
            if step == 4 and not Path(mark).exists():
                Path(mark).touch()
                os.kill(os.getpid(), signal.SIGKILL)

        runs.save_checkpoint = save_then_die
        try:
            original(config)
        finally:
            runs.save_checkpoint = save

    given = dict(steps=6, checkpoint_every=2, workers=1, cpus_per_worker=1)
    train_model(settings("sdm", output=str(tmp_path / "whole"), **given), lambda numbers: None)
    monkeypatch.setattr(train, "train_in_worker", train_killed_once)
    result = train_on_ray.fn(settings("sdm", output=str(tmp_path / "run"), **given))
    assert mark.exists() and result["step"] == 6
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "run"))


@pytest.mark.slow  # Two trainings at once on Ray Train.
def test_both_models_train_side_by_side(ray_session, prefect_harness, settings, tmp_path):
    from facediffuser.flows.train import train as flow

    results = flow(settings("both", steps=2, seed=3, loaders=1, output=str(tmp_path / "run")))
    assert {role: result["step"] for role, result in results.items()} == {"tdm": 2, "sdm": 2}
    assert all((tmp_path / "run" / role / "final" / "training.json").exists() for role in ("tdm", "sdm"))
