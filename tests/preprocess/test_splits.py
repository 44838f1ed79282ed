"""Splits: a picture's side does not change when the set grows, and near-identical pictures are on one side."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from skimage import data

from facediffuser.preprocess.splits import TRAIN, assign_splits, near_duplicates, perceptual_hash, split_of


def test_the_share_of_test_is_as_asked_and_grows_with_it():
    ids = [f"picture {number}" for number in range(4000)]
    few, many = ({i for i in ids if split_of(i, share) == "test"} for share in (0.1, 0.3))
    assert abs(len(few) / 4000 - 0.1) < 0.02 and abs(len(many) / 4000 - 0.3) < 0.03
    assert few < many
    assert {split_of(i, 0) for i in ids} == {"train"} and {split_of(i, 1) for i in ids} == {"test"}


def test_a_picture_saved_again_hashes_nearly_alike_and_another_does_not():
    picture = Image.fromarray(data.astronaut())
    again = ImageEnhance.Brightness(picture.resize((200, 200))).enhance(1.1)
    other = Image.fromarray(data.coffee())
    hashes = [perceptual_hash(image) for image in (picture, again, other, picture.transpose(0))]
    assert near_duplicates(hashes, 16).tolist() == [0, 0, 2, 3]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 12))
def test_groups_are_those_of_comparing_every_pair(seed, bits):
    rng = np.random.default_rng(seed)
    table = rng.integers(0, 256, (6, 32), dtype=np.uint8)[rng.integers(0, 6, 40)]
    spread = np.unpackbits(table, axis=1) ^ (rng.random((40, 256)) < 0.02)
    distance = (spread[:, None] != spread[None]).sum(-1)
    expected = np.arange(40)
    for _ in range(40):
        expected = np.array([expected[distance[row] <= bits].min() for row in range(40)])
    hashes = [row.tobytes() for row in np.packbits(spread, axis=1)]
    assert near_duplicates(hashes, bits).tolist() == expected.tolist()


def test_many_equal_pictures_cost_no_pairs():
    assert near_duplicates([bytes(32)] * 50_000, 10).max() == 0
    assert near_duplicates([], 10).tolist() == []


def test_a_group_is_in_train_when_any_of_it_is():
    ids = [str(number) for number in range(60)]
    alone = assign_splits(ids, np.arange(60), 0.5)
    groups = np.arange(60) // 3
    together = assign_splits(ids, groups, 0.5)
    for first in range(0, 60, 3):
        expected = TRAIN if TRAIN in alone[first : first + 3] else "test"
        assert together[first : first + 3] == [expected] * 3


def test_what_was_once_in_train_is_never_in_test_of_a_larger_set():
    ids = [str(number) for number in range(90)]
    groups = np.random.default_rng(1).integers(0, 40, 90)
    small, large = assign_splits(ids[:50], groups[:50], 0.5), assign_splits(ids, groups, 0.5)
    assert all(after == TRAIN for before, after in zip(small, large, strict=False) if before == TRAIN)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30))
def test_no_earlier_picture_moves_and_none_has_a_twin_across(seed, grown):
    rng = np.random.default_rng(seed)
    ids = [str(number) for number in range(20 + grown)]
    before = assign_splits(ids[:20], np.arange(20), 0.5)
    earlier = dict(zip(ids, before, strict=False))
    groups = np.concatenate([rng.integers(0, 40, 20), rng.integers(0, 40, grown)])
    after = assign_splits(ids, groups, 0.5, earlier)
    assert after[:20] == before
    for group in set(groups.tolist()):
        members = np.flatnonzero(groups == group)
        old = {before[index] for index in members if index < 20}
        new = {after[index] for index in members if index >= 20}
        assert new <= ({None} if len(old) == 2 else old or new) and len(new) <= 1
    assert assign_splits(ids, groups, 0.5, {}) == assign_splits(ids, groups, 0.5)
