"""Matching of faces to subjects, on scores whose right answer can be read off."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from facediffuser.scoring.matching import identity_preservation, match_greedily

AXES = np.eye(4, dtype=np.float32)


def test_two_faces_in_the_other_order_find_their_subjects():
    ip, values, faces = identity_preservation(AXES[[1, 0]], AXES[[0, 1]])
    assert (ip, values, faces) == (1.0, [1.0, 1.0], [1, 0])


def test_of_three_faces_the_two_best_are_taken():
    ip, values, faces = identity_preservation(AXES[[2, 1, 0]], AXES[[0, 1]])
    assert (ip, values, faces) == (1.0, [1.0, 1.0], [2, 1])


def test_no_face_is_zero_for_every_subject():
    assert identity_preservation(np.zeros((0, 4)), AXES[[0, 1]]) == (0.0, [0.0, 0.0], [-1, -1])


def test_one_face_for_two_subjects_leaves_one_at_zero():
    ip, values, faces = identity_preservation(AXES[[1]], AXES[[0, 1]])
    assert (ip, values, faces) == (0.0, [0.0, 1.0], [-1, 0])


def test_the_same_person_twice_needs_two_faces():
    one_face, _, _ = identity_preservation(AXES[[0]], AXES[[0, 0]])
    two_faces, _, _ = identity_preservation(AXES[[0, 0]], AXES[[0, 0]])
    assert (one_face, two_faces) == (0.0, 1.0)


def test_opposite_faces_score_zero_not_less():
    assert identity_preservation(-AXES[[0]], AXES[[0]])[:2] == (0.0, [0.0])


def test_the_best_pair_goes_first_even_where_the_sum_would_be_larger_otherwise():
    scores = np.array([[0.9, 0.8], [0.7, 0.1]])  # the best sum is 0.8 + 0.7; the best pair is 0.9
    assert match_greedily(scores) == [0, 1]


def test_a_picture_without_subjects_is_no_case():
    with pytest.raises(ValueError, match="no references"):
        identity_preservation(AXES[[0]], np.zeros((0, 4)))


sizes = st.tuples(st.integers(0, 5), st.integers(1, 5))


@given(sizes.flatmap(lambda shape: arrays(np.float64, shape, elements=st.floats(0, 1))))
def test_no_face_serves_two_subjects_and_none_is_left_idle(scores):
    chosen = match_greedily(scores)
    used = [face for face in chosen if face >= 0]
    assert len(used) == len(set(used)) == min(scores.shape)
    if used:
        assert max(scores[face, subject] for subject, face in enumerate(chosen) if face >= 0) == scores.max()
