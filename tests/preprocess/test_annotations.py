"""What a source says of a picture is checked against the picture: all of it fits, or the picture is rejected."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from facediffuser.faces import Face
from facediffuser.pictures import Rejection
from facediffuser.preprocess.annotations import (
    annotated_segments,
    annotated_subjects,
    identity_of,
    read_annotation,
    read_caption,
)
from facediffuser.preprocess.phrases import find_person_phrases
from facediffuser.preprocess.segment_maps import Segment, decode_map, encode_map, read_map, resize_map
from facediffuser.preprocess.subject_segments import Subject, assign_faces, match_subjects
from facediffuser.scoring.matching import greedy_pairs

CAPTION = "an old man and a woman outside"
IDS = np.array([[0, 1, 1, 0, 2, 2], [0, 1, 1, 0, 2, 2]])


def annotation(*segments: dict, caption: str = CAPTION, **others):
    return read_annotation(json.dumps({"caption": caption, "segments": list(segments), **others}).encode())


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_subjects_come_with_the_maps_boxes_and_the_parsed_start():
    said = annotation(
        {"id": 2, "coco_label": "person", "bbox": [0, 3, 2, 6], "end": 22, "identity": 8},
        {"id": 1, "coco_label": "person", "bbox": [1, 0, 4, 2], "start": 3, "end": 10, "identity": 7},
    )
    segments = annotated_segments(said, IDS)
    assert annotated_subjects(said, segments) == [
        Subject("old man", 3, 10, 1, (1, 0, 3, 2)),
        Subject("a woman", 15, 22, 2, (4, 0, 6, 2)),
    ]
    assert identity_of(said, segments) == "7+8"
    assert identity_of(annotation(identity="5+6"), []) == "5+6" and identity_of(annotation(), []) is None


def test_segments_without_a_phrase_or_of_things_are_no_subjects():
    said = annotation({"id": 1, "coco_label": "person"}, {"id": 2, "coco_label": "tie", "end": 22})
    assert annotated_subjects(said, annotated_segments(said, IDS)) == []


@pytest.mark.parametrize(
    ("segment", "reason"),
    [
        ({"id": 3, "end": 10}, "segment 3 is not in the segmentation map"),
        ({"id": 1, "end": 31}, "subject end 31 is not within the caption's 30 characters"),
        ({"id": 1, "end": -1}, "subject end -1"),
        ({"id": 1, "end": 9}, "subject end 9 is not the end of a word"),
        ({"id": 1, "start": 12, "end": 10}, "subject start 12 is not before"),
        ({"id": 1, "start": -4, "end": 10}, "subject start -4"),
        ({"id": 1, "bbox": [0, 4, 2, 6], "end": 10}, "segment 1 is in [1, 0, 3, 2] of the map, its bbox [0, 4, 2, 6]"),
    ],
)
def test_an_annotation_that_does_not_fit_is_rejected(segment, reason):
    said = annotation(segment)
    with pytest.raises(Rejection, match="annotation does not match") as rejection:
        annotated_subjects(said, annotated_segments(said, IDS))
    assert reason in rejection.value.reason


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b"{}",
        b'{"caption": 3}',
        b'{"caption": "a", "segments": 3}',
        b'{"caption": "a", "segments": [3]}',
        b'{"caption": "a", "segments": [{}]}',
        b'{"caption": "a", "segments": [{"id": "1"}]}',
        b'{"caption": "a", "segments": [{"id": 1, "end": 1.5}]}',
        b'{"caption": "a", "segments": [{"id": 1, "bbox": [1, 2, 3]}]}',
        b'{"caption": "a", "segments": [{"id": 1, "bbox": [1, 2, 3, "4"]}]}',
        b'{"caption": "a", "segments": [{"id": 1, "identity": "\\udc00"}]}',
        b'{"caption": "\\ud800"}',
        b"[" * 100_000,
    ],
)
def test_json_of_another_kind_is_rejected(data):
    with pytest.raises(Rejection, match="damaged annotation"):
        read_annotation(data)


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("a man <|image|> reading a book", "a man reading a book"),
        ("\ufeffa man <|image|> <|image|>, a woman<|image|>\r\n", "a man, a woman"),
        ("<|image|>", ""),
        ("a man <| image |> reading", "a man <| image |> reading"),
    ],
)
def test_a_caption_is_read_without_markers(text, caption):
    assert read_caption(text.encode()).caption == caption
    assert read_annotation(json.dumps({"caption": text.strip("\ufeff\r\n")}).encode()).caption == caption


def test_markers_of_a_caption_may_not_move_its_subjects():
    caption = "a man <|image|> and a woman <|image|>"
    said = annotation({"id": 1, "end": 5}, caption=caption)
    assert said.caption == "a man and a woman"
    assert [subject.phrase for subject in annotated_subjects(said, annotated_segments(said, IDS))] == ["a man"]
    for end in (15, 27):
        with pytest.raises(Rejection, match=f"does not match: `caption` has <.image.> before subject end {end}; write"):
            annotation({"id": 1, "end": 5}, {"id": 2, "end": end}, caption=caption)


def test_a_marker_that_is_left_when_another_is_taken_out_is_rejected():
    nested = "a man <<|image|>|image|> outside"
    for read in (lambda: read_caption(nested.encode()), lambda: annotation(caption=nested)):
        with pytest.raises(Rejection, match="damaged annotation: the caption has"):
            read()


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64", "bool"])
def test_a_map_of_any_integers_is_read(dtype):
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype)
    assert read_map(npy(array), 2, 3).tolist() == array.astype(int).tolist()
    assert read_map(npy(np.array([[-1, 3]])), 1, 2).tolist() == [[0, 3]]


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "damaged segmentation map"),
        (b"no array", "damaged segmentation map"),
        (npy(np.zeros((2, 3), int))[:-8], "damaged segmentation map"),
        (npy(np.zeros((2, 3))), "damaged segmentation map"),
        (npy(np.full((2, 3), 70_000)), "damaged segmentation map"),
        (npy(np.array([[None] * 3] * 2, dtype=object)), "damaged segmentation map"),
        (npy(np.zeros((3, 2), int)), "segmentation map does not fit"),
        (npy(np.zeros((2, 3, 1), int)), "segmentation map does not fit"),
        (npy(np.zeros((2, 3), int)).replace(b"(2, 3)", b"(2, 3" + b"0" * 12 + b")").replace(b" " * 12, b"", 1),
         "segmentation map does not fit"),
    ],
)  # fmt: skip
def test_a_map_that_is_damaged_or_of_another_size_is_rejected(data, kind):
    with pytest.raises(Rejection) as rejection:
        read_map(data, 2, 3)
    assert rejection.value.kind == kind


@pytest.mark.parametrize(("largest", "mode"), [(255, "L"), (256, "I;16"), (65_535, "I;16")])
def test_a_map_goes_through_png_unchanged(largest, mode):
    ids = np.array([[0, 7], [largest, 1]], np.int32)
    data = encode_map(ids)
    assert Image.open(io.BytesIO(data)).mode == mode
    assert decode_map(data).tolist() == ids.tolist()


def test_a_map_is_resized_without_new_ids():
    ids = np.array([[1, 9], [4, 4]], np.int32)
    assert resize_map(ids, 4, 2).tolist() == [[1, 1, 9, 9], [4, 4, 4, 4]]
    assert resize_map(resize_map(ids, 64, 48), 2, 2).tolist() == ids.tolist()


class Opinion:
    """A matcher that says what the test wants."""

    def __init__(self, similarity):
        self.table = np.array(similarity)

    def similarity(self, crops, phrases):
        assert (len(phrases), len(crops)) == self.table.shape
        return self.table


PEOPLE = [Segment(5, "person", (40, 0, 60, 60)), Segment(6, "tie", (0, 0, 5, 5)), Segment(7, "person", (0, 0, 30, 60))]


def test_phrases_go_to_the_segments_that_look_like_them_best_first():
    phrases = find_person_phrases("a man and a woman")
    image = Image.new("RGB", (64, 64))
    crossed = match_subjects(image, phrases, PEOPLE, Opinion([[0.1, 0.9], [0.8, 0.95]]))
    assert [(subject.phrase, subject.segment_id) for subject in crossed] == [("a man", 7), ("a woman", 5)]
    tied = match_subjects(image, phrases, PEOPLE, Opinion([[0.5, 0.5], [0.5, 0.5]]))
    assert [(subject.phrase, subject.segment_id) for subject in tied] == [("a man", 7), ("a woman", 5)]
    assert match_subjects(image, phrases, PEOPLE, None) == tied


def test_one_phrase_and_one_person_need_no_opinion_and_leftovers_are_no_subjects():
    image, (phrase,) = Image.new("RGB", (64, 64)), find_person_phrases("two men")
    assert [s.segment_id for s in match_subjects(image, [phrase], PEOPLE[:1], None)] == [5]
    assert len(match_subjects(image, [phrase], PEOPLE, Opinion([[0.2, 0.4]]))) == 1
    assert match_subjects(image, [], PEOPLE, None) == [] == match_subjects(image, [phrase], PEOPLE[1:2], None)


def test_greedy_matching_is_one_to_one():
    pairs = greedy_pairs(np.random.default_rng(0).random((4, 6)))
    assert len({row for row, _ in pairs}) == len({column for _, column in pairs}) == len(pairs) == 4


def test_a_face_goes_to_the_subject_it_lies_in():
    ids = np.zeros((10, 20), np.int32)
    ids[:, :9], ids[:, 11:] = 1, 2
    subjects = [Subject("a man", 0, 5, 2, (11, 0, 20, 10)), Subject("a woman", 10, 17, 1, (0, 0, 9, 10))]
    faces = [Face((-3.0, 1.0, 6.0, 8.0), 1.0, ()), Face((12.0, 2.0, 25.0, 8.0), 1.0, ()), Face((9.0, 0, 11, 3), 1, ())]
    assert [subject.face_index for subject in assign_faces(subjects, faces, ids)] == [1, 0]
    assert [subject.face_index for subject in assign_faces(subjects, faces[2:], ids)] == [-1, -1]
    assert [subject.face_index for subject in assign_faces(subjects, [], ids)] == [-1, -1]
