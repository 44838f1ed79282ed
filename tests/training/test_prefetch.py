"""Batches made ahead by other processes are those made when they are wanted, bit for bit."""

from dataclasses import fields

import pytest
import torch
from training.prepared_rows import read_prepared, write_prepared
from training.test_loop import same, weights

from facediffuser.errors import InputError
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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": {"bytes": b"noise", "path": None}}, "image cannot be read (UnidentifiedImageError)"),
        ({"segmentation": b"noise"}, "segmentation cannot be read (UnidentifiedImageError)"),
        ({"caption": " in the park", "end": 0}, "<|image|> at the start"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_in_one_line_whichever_process_finds_it(
    settings, prepared, tmp_path, change, words
):
    rows = read_prepared(prepared)
    if "end" in change:
        rows[7]["subjects"][0]["end"] = 0
    rows[7] |= {name: value for name, value in change.items() if name != "end"}
    write_prepared(tmp_path / "data", rows)
    chosen = settings("sdm", data=str(tmp_path / "data"), precompute=False, caption_drop=0, subject_keep=1)
    batches = split_batches(chosen, load_parts(chosen), "train")
    texts = []
    for loaders in (0, 1):
        with pytest.raises(InputError) as refused:
            list(prefetch_batches(batches, range(0, 12, 2), loaders))
        texts.append(str(refused.value))
    assert texts[0] == texts[1] and "\n" not in texts[0]
    assert texts[0].startswith(f"{tmp_path / 'data'}: train picture {rows[7]['image_id']}: ") and words in texts[0]


def test_every_seed_orders_the_rows_and_the_small_ones_as_they_always_did(settings):
    parts = load_parts(settings("tdm"))
    for seed in (5, 2**44, 2**63 - 1):
        batches = split_batches(settings("tdm", seed=seed), parts, "train")
        assert sorted(batches.rows(12, 12)) == list(range(12)), "the second epoch"
        if seed < 2**44:
            order = torch.randperm(12, generator=torch.Generator().manual_seed(seed * 1_000_003 + 1))
            assert batches.rows(12, 12) == order.tolist()
        assert len(batches[0].noise) == 2


def test_a_run_learns_the_same_whichever_process_makes_its_batches(settings, tmp_path):
    for loaders in (0, 2):
        chosen = settings("sdm", output=str(tmp_path / str(loaders)), accumulate=2)
        train_model(chosen, lambda numbers: None, Worker(loaders=loaders))
    assert same(weights(tmp_path / "0"), weights(tmp_path / "2"))
