"""People and pictures the tests share; their numbers are far from those of the shipped parts' pictures."""

import numpy as np
import pytest

from facediffuser.miniature.looks import sample_outfit, sample_setting
from facediffuser.miniature.render import Rendering, person, render

UNSEEN = 40_000_000


def picture(number: int, count: int = 1, photo_share: float = 1.0) -> Rendering:
    """A rendering of `count` people seen in no other picture."""
    return render([person(UNSEEN + 2 * number + place) for place in range(count)], number, photo_share=photo_share)


@pytest.fixture(scope="session")
def photos() -> list[Rendering]:
    """48 photos of unseen people, every fifth of two."""
    return [picture(number, 2 if number % 5 == 4 else 1) for number in range(48)]


@pytest.fixture(scope="session")
def portraits() -> list[list[Rendering]]:
    """Three photos each of 40 unseen people, hats, moods and places changing."""
    result = []
    for number in range(40):
        rng = np.random.default_rng(number)
        who = person(UNSEEN + 10_000 + number)
        result.append(
            [
                render([who], 1000 * number + take, setting=sample_setting(rng, 1.0), outfits=[sample_outfit(rng)])
                for take in range(3)
            ]
        )
    return result
