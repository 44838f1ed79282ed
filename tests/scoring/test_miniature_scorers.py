"""The shipped scorers of the miniature: people are told apart, and pictures are told from other pictures by their text."""

import numpy as np
import pytest
from PIL import Image

from facediffuser.miniature.render import person, render
from facediffuser.scoring.scorers import load_scorers

PEOPLE = 12
FIRST_PERSON = 40_000_000  # far from those the scorers were trained on


@pytest.fixture(scope="module")
def shipped():
    return load_scorers("miniature")


def test_ip_is_high_for_the_same_person_elsewhere_and_low_for_another(shipped):
    whos = [person(FIRST_PERSON + number) for number in range(PEOPLE)]
    first, second = (
        [Image.fromarray(render([who], seed + 2 * n).image) for n, who in enumerate(whos)] for seed in (7, 8)
    )
    pairs = [
        (one, two)
        for one, two in zip(shipped.identity.embed_faces(first), shipped.identity.embed_faces(second), strict=True)
        if one.faces and two.faces
    ]
    assert len(pairs) >= 0.8 * PEOPLE  # MTCNN misses a few drawn faces
    products = np.stack([one.vectors[0] for one, _ in pairs]) @ np.stack([two.vectors[0] for _, two in pairs]).T
    same, others = np.diag(products), products[~np.eye(len(pairs), dtype=bool)]
    assert same.mean() > 0.6
    assert np.clip(others, 0, 1).mean() < 0.35


def test_pc_is_higher_with_a_pictures_own_text_than_with_anothers(shipped):
    drawn = [render([person(FIRST_PERSON + number)], 100 + number, photo_share=1.0) for number in range(24)]
    pictures = [Image.fromarray(one.image) for one in drawn]
    texts = [one.caption.text for one in drawn]
    own = np.array(shipped.prompt.score(pictures, texts))
    other = np.array(shipped.prompt.score(pictures, texts[1:] + texts[:1]))
    different = np.array([one != two for one, two in zip(texts, texts[1:] + texts[:1], strict=True)])
    assert (own > other)[different].mean() > 0.85
