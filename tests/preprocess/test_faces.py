"""Faces are found where they are, whatever the picture's size and company, and crops are square and filled."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from facediffuser.faces import crop_square, crop_turned, face_crop_box, ffhq_crop
from facediffuser.scoring import face_detector as module
from facediffuser.scoring.face_detector import FaceDetector


@pytest.fixture(scope="module")
def astronaut() -> Image.Image:
    return Image.fromarray(data.astronaut()).crop((96, 0, 352, 256))


@pytest.fixture(scope="module")
def detector() -> FaceDetector:
    return FaceDetector()


def overlap(a, b) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0, width) * max(0, height)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def test_the_search_is_facenet_pytorchs_own(detector, astronaut):
    from facenet_pytorch import MTCNN

    boxes, probs, points = MTCNN(keep_all=True).detect(astronaut, landmarks=True)
    (face,) = detector.detect([astronaut])[0]
    np.testing.assert_allclose(face.box, boxes[0].astype(float), atol=1e-3)
    np.testing.assert_allclose(face.landmarks, points[0].astype(float), atol=1e-3)
    assert face.prob == pytest.approx(float(probs[0]), abs=1e-6)


def test_a_pictures_faces_do_not_depend_on_its_neighbours(detector, astronaut):
    others = [Image.new("RGB", (256, 256), "grey"), astronaut.resize((64, 96)), astronaut]
    alone = detector.detect([astronaut])[0]
    assert detector.detect([others[0], astronaut, *others[1:]])[1] == alone
    assert alone


def test_a_face_has_the_same_box_whatever_the_number_of_threads(detector, astronaut, monkeypatch):
    pictures = [astronaut, astronaut.resize((90, 70)), Image.new("RGB", (256, 256), "grey"), astronaut.resize((80, 80))]
    threads = torch.get_num_threads()
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(detector.detect(pictures))
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    assert found[0] == found[1] and found[0][0]
    monkeypatch.setattr(module, "_replace_max_pooling", lambda network: None)
    assert FaceDetector().detect(pictures) == found[0]


@pytest.mark.parametrize(("size", "stride"), [(2, 2), (3, 2)])
def test_the_quick_maximum_is_pytorchs(size, stride):
    for height, width in itertools.product(range(2, 9), repeat=2):
        x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height * width))
        expected = torch.nn.functional.max_pool2d(x, size, stride, ceil_mode=True)
        assert torch.equal(module._MaxPool(size, stride)(x), expected)


def test_a_huge_picture_is_searched_reduced(detector, astronaut, monkeypatch):
    (expected,) = detector.detect([astronaut])[0]
    monkeypatch.setattr(module, "MAX_SEARCH_PIXELS", 30_000)
    monkeypatch.setattr(detector, "_run", lambda pictures, run=detector._run: run(_at_most(30_100, pictures)))
    (found,) = detector.detect([astronaut])[0]
    assert overlap(found.box, expected.box) > 0.8


def _at_most(pixels: int, pictures: list) -> list:
    assert all(picture.shape[0] * picture.shape[1] <= pixels for picture in pictures)
    return pictures


def test_boxes_of_an_enlarged_picture_are_in_its_own_pixels(detector, astronaut):
    (large,) = detector.detect([astronaut])[0]
    (small,) = detector.detect([astronaut.resize((64, 64))])[0]
    assert overlap([value * 4 for value in small.box], large.box) > 0.7
    assert 0 <= min(small.box) and max(small.box) <= 64
    assert FaceDetector(min_side=0).detect([astronaut.resize((24, 24))]) == [[]]


def test_pictures_without_a_face_and_tiny_ones_have_none(detector):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    pictures = [Image.new("RGB", (300, 5)), Image.fromarray(noise), Image.new("L", (64, 64)), Image.new("RGB", (1, 1))]
    assert detector.detect(pictures) == [[], [], [], []]
    assert FaceDetector(min_side=0).detect(pictures[3:]) == [[]]
    assert detector.detect([]) == []


def test_the_largest_face_comes_first(detector, astronaut):
    wide = Image.new("RGB", (500, 256), "grey")
    wide.paste(astronaut.resize((160, 160)), (0, 0))
    wide.paste(astronaut, (244, 0))
    first, second = detector.detect([wide])[0]
    assert first.box[0] > second.box[0]
    assert first.box[2] - first.box[0] > second.box[2] - second.box[0]


def test_a_search_that_fails_inside_of_mtcnn_is_done_again_with_a_rim(detector, astronaut, monkeypatch):
    expected = detector.detect([astronaut])[0][0]
    whole = detector._run

    def fails_on_plain_pictures(pictures):
        if pictures[0].shape[0] == astronaut.height:
            raise IndexError("the shape of the mask does not match")
        return whole(pictures)

    monkeypatch.setattr(detector, "_run", fails_on_plain_pictures)
    (found,) = detector.detect([astronaut])[0]
    assert overlap(found.box, expected.box) > 0.85
    np.testing.assert_allclose(found.landmarks, expected.landmarks, atol=5)


@pytest.mark.parametrize("box", [(10, 20, 50, 90), (-8.5, -3, 12, 40.2), (0.4, 0.4, 0.6, 0.6)])
@pytest.mark.parametrize("margin", [0, 0.3, 1])
def test_a_crop_box_is_a_square_around_the_faces_centre(box, margin):
    x1, y1, x2, y2 = face_crop_box(box, margin)
    assert x2 - x1 == y2 - y1 >= 1
    assert x2 - x1 == max(1, round(max(box[2] - box[0], box[3] - box[1]) * (1 + 2 * margin)))
    assert abs((x1 + x2) / 2 - (box[0] + box[2]) / 2) <= 1 and abs((y1 + y2) / 2 - (box[1] + box[3]) / 2) <= 1


def test_outside_of_the_picture_a_crop_repeats_the_edge():
    pixels = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    crop = np.asarray(crop_square(Image.fromarray(pixels), (-2, 1, 3, 6)))
    assert crop.shape == (5, 5, 3)
    np.testing.assert_array_equal(crop[0, :3], pixels[[1, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(crop[:, 4], pixels[[1, 2, 3, 3, 3], [2, 2, 2, 2, 2]])
    far = np.asarray(crop_square(Image.fromarray(pixels), (100, 100, 103, 103)))
    assert (far == pixels[3, 3]).all()
    assert crop_square(Image.fromarray(pixels), (0, 0, 4, 4), 7).size == (7, 7)


@pytest.mark.parametrize("angle", [-25, 0, 25])
def test_an_aligned_face_is_upright_and_in_the_middle(detector, astronaut, angle):
    turned = astronaut.rotate(angle, Image.Resampling.BICUBIC, fillcolor="grey")
    box, degrees = ffhq_crop(detector.detect([turned])[0][0].landmarks)
    assert degrees == pytest.approx(-angle, abs=6)
    aligned = crop_turned(turned, box, degrees, 192)
    (face,) = detector.detect([aligned])[0]
    left, right, *_ = np.array(face.landmarks)
    assert abs(np.degrees(np.arctan2(*(right - left)[::-1]))) < 6
    np.testing.assert_allclose((left + right)[0] / 2, 96, atol=12)


def test_ffhqs_square_holds_the_whole_face(detector, astronaut):
    (face,) = detector.detect([astronaut])[0]
    (x1, y1, x2, y2), _ = ffhq_crop(face.landmarks)
    assert x2 - x1 == y2 - y1
    assert x1 < face.box[0] and y1 < face.box[1] and x2 > face.box[2] and y2 > face.box[3]


def test_a_turned_crop_is_the_picture_turned():
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[10:20, 10:20], pixels[10:20, 20:30], pixels[20:30, 10:20] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    picture, box = Image.fromarray(pixels), (10, 10, 30, 30)
    plain, quarter = np.asarray(crop_turned(picture, box, 0.0)), np.asarray(crop_turned(picture, box, 90.0))
    np.testing.assert_array_equal(plain, pixels[10:30, 10:30])
    # The right side of the picture is what lies at the top of a square turned clockwise.
    np.testing.assert_allclose(np.rot90(plain)[4::10, 4::10], quarter[4::10, 4::10], atol=3)
