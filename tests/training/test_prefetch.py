"""Batches made ahead by other processes are those made when they are wanted, bit for bit."""

from dataclasses import fields

import pytest
import torch
from training.test_loop import same, weights

from facediffuser.training.data_loading import split_batches
from facediffuser.training.denoisers import load_parts
from facediffuser.training.loop import train_model
from facediffuser.training.prefetch import prefetch_batches
from facediffuser.training.worker_context import Worker


def _tensors(batch) -> dict[str, torch.Tensor]:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("loaders", [1, 2])
def test_any_number_of_processes_makes_the_same_batches_in_the_same_order(settings, loaders):
    # The paper's augmentation, which draws most.
    chosen = settings("sdm", batch_size=3, augmentation={"elastic": 0.5, "blur": 0.5, "rotate": 0.75, "zoom": 0.5})
    batches = split_batches(chosen, load_parts(chosen), "train")
    places = range(0, 24, 3)
    theirs = list(prefetch_batches(batches, places, loaders))
    assert len(theirs) == len(places)
    for ours, made in zip(prefetch_batches(batches, places, 0), theirs, strict=True):
        assert torch.equal(ours.tokens.input_ids, made.tokens.input_ids)
        for name, value in _tensors(ours).items():
            assert torch.equal(value, _tensors(made)[name]), name


def test_a_run_learns_the_same_whichever_process_makes_its_batches(settings, tmp_path):
    for loaders in (0, 2):
        chosen = settings("sdm", output=str(tmp_path / str(loaders)), accumulate=2)
        train_model(chosen, lambda numbers: None, Worker(loaders=loaders))
    assert same(weights(tmp_path / "0"), weights(tmp_path / "2"))
