"""The face and its features: shape and shading, nose, mouth, eyes and brows."""

import numpy as np

from facediffuser.miniature.canvas import Array, ellipse, glow, inside
from facediffuser.miniature.people import EYES

EYE_LEVEL = -0.10


def half_width(figure) -> Array:
    """The face's half width at each height of the head, 0 above and below it."""
    person = figure.person
    t = np.clip(figure.v / person.face_height, -1, 1)
    upper = np.sqrt(np.clip(1 - t**2, 0, 1))
    lower = np.clip(1 - np.abs(t) ** (1.7 + 1.7 * person.jaw), 0, 1) ** 0.62
    return person.face_width * np.where(t < 0, upper, lower)


def face_distance(figure) -> Array:
    """Distance to the face's outline."""
    sides = np.abs(figure.u) - half_width(figure)
    return 0.8 * np.maximum(sides, np.abs(figure.v) - figure.person.face_height)


def nose_level(person) -> float:
    """The height of the nose's tip, in units of the head."""
    return EYE_LEVEL + person.nose_length


def mouth_level(person) -> float:
    """The height of the mouth, in units of the head."""
    return nose_level(person) + 0.27


def draw_face(figure) -> None:
    """The skin, shaded as a lit ellipsoid with sockets, cheeks, nose and chin."""
    person, soft = figure.person, figure.soft
    shade = _relief(figure)
    skin = person.skin_colour * shade[..., None]
    blush = glow(np.abs(figure.f), figure.v, 0.44, 0.28, 0.2, 0.15)[..., None]
    skin = skin + blush * np.array([9, -4, -4], np.float32)
    figure.put(inside(face_distance(figure), soft), np.clip(skin, 0, 255))
    nose = nose_level(person)
    for side in (-1, 1):
        nostril = glow(figure.f, figure.v, side * person.nose_width * 0.55, nose + 0.03, 0.045, 0.03)
        figure.mark(0.8 * nostril, person.skin_colour * 0.3)


def _relief(figure) -> Array:
    person, f, v, light = figure.person, figure.f, figure.v, figure.pose.light
    nx, ny = figure.u / (person.face_width * 1.08), v / (person.face_height * 1.1)
    nz = np.sqrt(np.clip(1 - nx**2 - ny**2, 0.03, 1))
    direction = np.array([light, -0.4, 0.9], np.float32) / np.sqrt(light**2 + 0.97)
    shade = 0.66 + 0.42 * np.clip(nx * direction[0] + ny * direction[1] + nz * direction[2], 0, 1)
    nose, mouth = nose_level(person), mouth_level(person)
    dark_side = -0.09 if light > 0 else 0.09
    af = np.abs(f)
    shade -= 0.10 * glow(af, v, person.eye_gap, EYE_LEVEL - 0.02, 0.2, 0.12)
    shade += 0.05 * glow(af, v, 0.44, 0.28, 0.2, 0.16)
    shade -= 0.14 * glow(f, v, dark_side, nose - 0.17, 0.045, 0.17)
    shade += 0.08 * glow(f, v, 0, nose - 0.15, 0.05, 0.2)
    shade += 0.08 * glow(f, v, 0, nose - 0.03, 0.07, 0.05)
    shade -= 0.22 * glow(f, v, 0, nose + 0.07, person.nose_width, 0.035)
    shade -= 0.13 * glow(af, v, person.nose_width * 1.1, nose, 0.035, 0.06)
    shade -= 0.10 * glow(f, v, 0, mouth + 0.15, 0.16, 0.04)
    return shade


def draw_mouth(figure) -> None:
    """Lips: calm with a dark seam, smiling with curved corners and teeth, or surprised and open."""
    person, f, soft = figure.person, figure.f, figure.soft
    mood = figure.outfit.expression
    if mood == "surprised":
        _draw_open_mouth(figure)
        return
    smile = 0.75 if mood == "smiling" else 0.08
    width = person.mouth_width * (1.12 if mood == "smiling" else 1.0)
    v = figure.v - mouth_level(person) + smile * (f**2 / width - width * 0.35)
    profile = np.clip(1 - (f / width) ** 2, 0, 1)
    lips = _lip_colour(person)
    sides = np.abs(f) - width
    upper = np.maximum(sides, np.maximum(-v - person.lip * profile**0.8, v))
    lower = np.maximum(sides + width * 0.06, np.maximum(v - person.lip * 1.35 * profile, -v))
    figure.mark(inside(upper, soft), lips * 0.88)
    figure.mark(inside(lower, soft), lips * 1.04)
    if mood == "smiling":
        teeth = np.maximum(np.abs(f) - width * 0.78, np.abs(v + 0.005) - 0.055 * profile)
        figure.mark(inside(teeth, soft), (248, 244, 240))
    else:
        seam = np.maximum(np.abs(f) - width * 1.04, np.abs(v) - 0.018)
        figure.mark(0.9 * inside(seam, soft), lips * 0.42)


def _draw_open_mouth(figure) -> None:
    person, f, v, soft = figure.person, figure.f, figure.v, figure.soft
    level, width = mouth_level(person) + 0.03, person.mouth_width * 0.62
    figure.mark(inside(ellipse(f, v, 0, level, width, 0.17), soft), _lip_colour(person) * 0.92)
    figure.mark(inside(ellipse(f, v, 0, level, width - 0.055, 0.11), soft), (74, 22, 26))


def _lip_colour(person) -> Array:
    tint = np.array([0.88, 0.60, 0.58] if person.class_word == "man" else [0.92, 0.50, 0.50], np.float32)
    return np.clip(person.skin_colour * tint + np.array([14, -2, 2], np.float32), 0, 255)


def draw_eyes(figure) -> None:
    """Eyes with iris, pupil and glint, lids and lashes, and brows above."""
    for side in (-1, 1):
        _draw_eye(figure, side)
        _draw_brow(figure, side)


def _eye_coordinates(figure, side: int) -> tuple[Array, Array]:
    person = figure.person
    across = (figure.f - side * person.eye_gap) * (1 + 0.25 * figure.pose.yaw * side)
    return across, figure.v - EYE_LEVEL + side * person.eye_tilt * across


def _draw_eye(figure, side: int) -> None:
    person, soft = figure.person, figure.soft
    du, dv = _eye_coordinates(figure, side)
    width = person.eye_width
    height = person.eye_height * {"surprised": 1.2, "smiling": 0.88}.get(figure.outfit.expression, 1.0)
    profile = np.clip(1 - np.abs(du / width) ** 2.2, 0, 1)
    opening = inside(
        np.maximum(np.abs(du) - width, np.maximum(-dv - height * profile, dv - height * 0.8 * profile)), soft
    )
    figure.mark(opening, (244, 241, 238))
    radius = np.hypot(du - figure.pose.gaze, dv)
    iris = height * 1.0
    figure.mark(opening * inside(radius - iris, soft), EYES[person.eyes])
    figure.mark(opening * inside(radius - iris * 0.48, soft), (10, 10, 12))
    glint = np.hypot(du - figure.pose.gaze - 0.03, dv + 0.035) - 0.02
    figure.mark(opening * inside(glint, soft), (255, 255, 255))
    lid = np.abs(dv + height * profile)
    lash = 0.032 if person.class_word == "woman" else 0.02
    reach = 1.18 if person.class_word == "woman" else 1.06
    figure.mark(
        0.92 * inside(np.maximum(np.abs(du) - width * reach, lid - lash * (0.5 + profile)), soft),
        person.skin_colour * 0.16,
    )
    below = np.maximum(np.abs(du) - width, np.abs(dv - height * 0.85 * profile) - 0.008)
    figure.mark(0.35 * inside(below, soft), person.skin_colour * 0.4)


def _draw_brow(figure, side: int) -> None:
    person, soft = figure.person, figure.soft
    du, _ = _eye_coordinates(figure, side)
    raised = 0.06 if figure.outfit.expression == "surprised" else 0.0
    dv = figure.v - (EYE_LEVEL - person.brow_height - raised) + side * person.brow_tilt * 0.8 * du + 0.9 * du**2
    width = person.eye_width * 1.3
    thickness = person.brow_thickness * (1 - 0.45 * np.clip(side * du / width, 0, 1))
    tint = 0.85 if person.hair == "black" else 0.6
    brow = np.maximum(np.abs(du) - width, np.abs(dv) - thickness)
    figure.mark(0.9 * inside(brow, soft * 1.2), person.hair_colour * tint)
