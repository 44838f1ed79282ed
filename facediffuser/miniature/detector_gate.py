"""How many renderings the face detector passes, by style: what no method's images can be asked to be above."""

import numpy as np
from PIL import Image

from facediffuser.markup import Markdown, markdown_table
from facediffuser.miniature.looks import SCENES, STYLES, Setting
from facediffuser.miniature.render import person, render


def rendered_gate(first_person: int, people: int) -> dict[tuple[str, int], tuple[int, int]]:
    """Return by style and number of people how many renderings have as many faces as people, and how many there are.

    Args:
        first_person: number of the first person.
        people: how many of them are rendered, each alone and each with the next, in every style.
    """
    from facediffuser.scoring.face_detector import FaceDetector

    detector, found = FaceDetector(), {}
    for style in STYLES:
        for count in (1, 2):
            pictures = []
            for place in range(people):
                rng = np.random.default_rng((first_person, place, count, 41))
                who = [person(first_person + (place + step) % people) for step in range(count)]
                setting = Setting(str(rng.choice(list(SCENES))), style)
                pictures.append(Image.fromarray(render(who, int(rng.integers(2**31)), setting=setting).image))
            right = sum(len(faces) == count for faces in detector.detect(pictures))
            found[style, count] = right, len(pictures)
    return found


def gate_markdown(found: dict[tuple[str, int], tuple[int, int]]) -> Markdown:
    """Return the counts as a Markdown table, a line a style."""
    lines = []
    for style in dict.fromkeys(style for style, _ in found):
        cells = [found[style, count] for count in (1, 2)]
        lines.append([style, *(f"{right / total:.3f} of {total}" for right, total in cells)])
    return markdown_table(["renderings", "one face of one", "two faces of two"], lines, right=(1, 2))
