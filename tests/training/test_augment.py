"""Reference pictures: the person's pixels, nobody else's, varied as the recipe says."""

import numpy as np
import pytest
import torch
from PIL import Image

from facediffuser.training.augment import augmenter, face_reference, segment_reference
from facediffuser.training.recipe import NO_AUGMENTATION, Augmentation


@pytest.fixture
def picture() -> Image.Image:
    """64 x 48 px, every pixel another colour."""
    rows, columns = np.mgrid[:48, :64]
    return Image.fromarray(np.stack([rows * 5, columns * 4, rows + columns], -1).astype(np.uint8))


def varied(seed: int = 0, side: int = 32, **given) -> torch.Tensor:
    """Return what becomes of a picture of three stripes, red, green and blue, with some augmentation alone."""
    stripes = torch.zeros(3, 30, 30)
    for channel in range(3):
        stripes[channel, channel * 10 : (channel + 1) * 10] = 1
    torch.manual_seed(seed)
    return augmenter(Augmentation(**NO_AUGMENTATION | given), side)(stripes)


def test_a_segments_reference_is_its_box_with_noise_around_it(picture):
    ids = np.zeros((48, 64), np.uint8)
    ids[10:30, 20:40] = 3
    ids[10:20, 20:30] = 7
    made = segment_reference(picture, ids, 3, [16, 8, 44, 32])
    assert made.shape == (3, 24, 28)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[:, 8:32, 16:44] / 255
    inside = torch.from_numpy(ids[8:32, 16:44] == 3).expand(3, -1, -1)
    torch.testing.assert_close(made[inside], pixels[inside])
    assert not torch.isclose(made[~inside], pixels[~inside]).float().mean() > 0.05
    assert 0 <= made.min() and made.max() <= 1 and made[~inside].std() > 0.2


def test_a_faces_reference_is_the_square_around_it_whatever_stands_there(picture):
    made = face_reference(picture, [20, 10, 40, 30])
    assert made.shape == (3, 20, 20)
    torch.testing.assert_close(made, torch.from_numpy(np.array(picture)).permute(2, 0, 1)[:, 10:30, 20:40] / 255)


def test_without_augmentation_a_picture_is_only_made_square_and_resized():
    tall = torch.ones(3, 40, 20)
    made = augmenter(Augmentation(**NO_AUGMENTATION), 40)(tall)
    assert made.shape == (3, 40, 40)
    assert made[..., 10:30].min() > 0.99 and made[..., :9].max() < 0.01 and made[..., 31:].max() < 0.01


def test_each_variation_does_what_it_is_called():
    plain = varied()
    mirrored = varied(flip=1.0)
    torch.testing.assert_close(mirrored, plain.flip(-1))
    grey = varied(grey=1.0)
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[1], grey[2])
    for name in ("rotate", "blur", "elastic"):
        assert not torch.allclose(varied(**{name: 1.0}), plain), name
    assert not torch.allclose(varied(jitter=1.0, jitter_strength=0.5), plain)
    # A window of the picture: what is in it is larger, and nothing else than the picture's colours is.
    zoomed = varied(zoom=1.0, zoom_to=4.0, seed=3)
    assert not torch.allclose(zoomed, plain) and zoomed.sum(0).min() > 0.9


def test_a_variation_happens_as_often_as_the_recipe_says():
    plain = varied()
    share = np.mean([not torch.equal(varied(seed, grey=0.3), plain) for seed in range(300)])
    assert abs(share - 0.3) < 0.09


def test_the_same_seed_varies_the_same_way():
    everything = dict(zoom=0.5, rotate=0.75, jitter=0.5, blur=0.5, grey=0.1, flip=0.5, elastic=0.5)
    assert torch.equal(varied(5, **everything), varied(5, **everything))
    assert not torch.equal(varied(5, **everything), varied(6, **everything))
