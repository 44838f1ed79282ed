"""Whom each face shows: own subject and nearest other, the margin between them, pose, alignment, size and sharpness."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scoring.small_world import beside

from facediffuser.faces import ALIGNED_LANDMARKS, HEAD_LANDMARKS, Face, aligned_crop, head_pose
from facediffuser.scoring.face_labels import Gallery, gallery_of, label_faces, measure_face
from facediffuser.scoring.identity import FaceEmbeddings
from facediffuser.scoring.matching import identity_preservation

FRONTAL = Face((10.0, 10.0, 50.0, 60.0), 0.9, tuple(map(tuple, HEAD_LANDMARKS[:, :2] * 0.5 + 30)))
PEOPLE = Gallery(("ada", "bob", "eve"), np.eye(3))


def unit(*values: float) -> np.ndarray:
    return np.array(values, np.float32) / np.linalg.norm(values)


def labels(vectors: list[np.ndarray], *subjects: str, gallery: Gallery = PEOPLE):
    found = FaceEmbeddings([FRONTAL] * len(vectors), np.array(vectors, np.float32).reshape(len(vectors), 3))
    wanted = np.stack([gallery.vectors[gallery.places[name]] for name in subjects])
    ip, per_subject, chosen = identity_preservation(found.vectors, wanted)
    return label_faces(Image.new("RGB", (80, 80)), found, subjects, chosen, gallery), ip, per_subject


def turned_head(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """The landmarks (5, 2) of a head that looks right by yaw, then up by pitch, then is tilted clockwise by roll."""
    (sy, sp, sr), (cy, cp, cr) = np.sin(np.radians([yaw, pitch, roll])), np.cos(np.radians([yaw, pitch, roll]))
    turn = np.array([[cy, 0, -sy], [0, 1, 0], [sy, 0, cy]])
    nod = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])
    tilt = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return (HEAD_LANDMARKS @ (tilt @ nod @ turn).T)[:, :2]


@pytest.mark.parametrize("pose", [(0, 0, 0), (25, 0, 0), (0, -20, 0), (0, 0, 40), (30, -15, 10), (-60, 20, -100)])
def test_the_pose_of_a_turned_head_is_found_wherever_and_however_large_it_is(pose):
    assert head_pose(turned_head(*pose) * 1.7 + [300, 200]) == pytest.approx(pose, abs=1e-6)


def test_a_head_that_looks_right_has_its_nose_at_the_right_and_one_that_looks_up_has_it_high():
    straight, right, up = (
        turned_head(*pose)[2] - turned_head(*pose)[:2].mean(0) for pose in [(0, 0, 0), (25, 0, 0), (0, 25, 0)]
    )
    assert right[0] > straight[0] + 5 and up[1] < straight[1] - 5


def test_landmarks_in_one_point_have_no_pose():
    assert head_pose([(3.0, 4.0)] * 5) == (0.0, 0.0, 0.0)


def test_an_aligned_face_has_its_landmarks_where_the_template_has_them():
    picture = Image.new("RGB", (400, 400))
    where = turned_head(0, 0, 35) * 2 + 200
    for x, y in where:
        picture.paste((255, 255, 255), (round(x) - 4, round(y) - 4, round(x) + 5, round(y) + 5))
    crop = np.asarray(aligned_crop(picture, where).convert("L"))
    assert crop.shape == (112, 112)
    for x, y in ALIGNED_LANDMARKS:
        assert crop[round(y) - 2 : round(y) + 3, round(x) - 2 : round(x) + 3].max() > 200


def test_a_face_is_labelled_with_its_subject_and_the_nearest_other():
    found, ip, per_subject = labels([unit(0.1, 1, 0.3), unit(1, 0, 0.2)], "ada", "bob")
    first, second = found.faces
    assert (first["subject_id"], first["other_subject_id"]) == ("bob", "eve")
    assert (second["subject_id"], second["other_subject_id"]) == ("ada", "eve")
    # What `ip` says stands in the faces, too.
    assert per_subject == [second["similarity"], first["similarity"]] and ip == min(per_subject)
    assert found.ip_margin == min(face["similarity"] - face["other_similarity"] for face in found.faces) > 0.5


def test_an_exchanged_or_a_blended_person_has_no_margin():
    exchanged, _, _ = labels([unit(1, 0, 0), unit(0, 0.1, 1)], "ada", "bob")
    blended, _, _ = labels([unit(1, 0.95, 0)], "ada")
    assert exchanged.ip_margin < -0.8 and exchanged.faces[1]["other_subject_id"] == "eve"
    assert 0 < blended.ip_margin < 0.05


def test_a_face_that_nobody_asked_for_has_no_subject_but_says_whom_it_is_like():
    found, _, _ = labels([unit(1, 0, 0), unit(0, 0.2, 1)], "ada")
    stranger = found.faces[1]
    assert (stranger["subject_id"], stranger["similarity"], stranger["other_subject_id"]) == (None, None, "eve")
    assert found.ip_margin == pytest.approx(1.0)


def test_without_a_face_or_without_others_there_is_no_margin():
    assert labels([], "ada")[0].ip_margin is None
    alone, _, _ = labels([unit(1, 0, 0)], "ada", gallery=Gallery(("ada",), np.eye(3)[:1]))
    assert alone.ip_margin is None and alone.faces[0]["other_subject_id"] is None


def test_a_person_of_several_references_is_their_mean():
    rows = [{"subject_id": name, "identity": vector} for name, vector in (("a", [1, 0]), ("b", [0, 1]), ("a", [0, 1]))]
    found = gallery_of(rows)
    assert found.ids == ("a", "b")
    np.testing.assert_allclose(found.vectors, [[0.5**0.5, 0.5**0.5], [0, 1]], atol=1e-6)


def test_a_blurred_and_an_enlarged_face_are_less_sharp(scorers, people):
    picture = beside(people["ada"])
    small = picture.resize((96, 96), Image.Resampling.LANCZOS).resize(picture.size, Image.Resampling.BICUBIC)
    pictures = [picture, small, picture.filter(ImageFilter.GaussianBlur(4))]
    [[face]] = scorers.identity.detector.detect([picture])
    sharp, soft, softer = (measure_face(one, face)["sharpness"] for one in pictures)
    assert sharp > 1.5 * soft > 1.5 * softer > 0
    assert measure_face(picture, face)["size"] == min(face.box[2] - face.box[0], face.box[3] - face.box[1])


def test_two_people_who_changed_places_are_both_right_and_their_boxes_say_who_stands_where():
    left, right = (replace(FRONTAL, box=(x, 10.0, x + 40.0, 60.0)) for x in (0.0, 40.0))
    vectors = np.stack([unit(0, 1, 0), unit(1, 0, 0)])  # bob stands left
    wanted = PEOPLE.vectors[:2]
    ip, _, chosen = identity_preservation(vectors, wanted)
    found = label_faces(
        Image.new("RGB", (80, 80)), FaceEmbeddings([left, right], vectors), ("ada", "bob"), chosen, PEOPLE
    )
    assert ip == pytest.approx(1.0) and found.ip_margin == pytest.approx(1.0)
    assert [face["subject_id"] for face in sorted(found.faces, key=lambda face: face["box"])] == ["bob", "ada"]
