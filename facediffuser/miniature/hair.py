"""Hair behind and before the head, and beards."""

import numpy as np

from facediffuser.miniature.canvas import Array, ellipse, glow, inside
from facediffuser.miniature.head import face_distance, half_width, mouth_level, nose_level


def hair_shade(figure) -> Array:
    """The hair's colour at each pixel: strands, darker below, with a sheen on the lit side."""
    shade = 1 + 0.08 * figure.strands - 0.2 * np.clip(figure.v + 0.6, 0, 1)
    sheen = 26 * glow(figure.u, figure.v, 0.5 * figure.pose.light - 0.2, -0.85, 0.5, 0.16)
    return np.clip(figure.person.hair_colour * shade[..., None] + sheen[..., None], 0, 255)


def draw_back(figure) -> None:
    """What of the hair lies behind neck and shoulders."""
    u, v, width = figure.u, figure.v, figure.person.face_width
    style, colour = figure.person.hair_style, hair_shade(figure) * 0.82
    soft = figure.soft * 1.3
    crown = ellipse(u, v, 0, 0, width + 0.21, 1.2)
    if style == "long":
        sides = np.abs(u) - (width + 0.21 - 0.06 * np.clip(v - 0.6, 0, 1) + 0.02 * np.sin(v * 7))
        figure.put(inside(np.maximum(np.where(v < 0, crown, sides), v - 1.5), soft), colour)
    elif style == "bob":
        sides = np.abs(u) - (width + 0.21 + 0.05 * np.clip(v, 0, 1))
        figure.put(inside(np.maximum(np.where(v < 0, crown, sides), v - 0.72), soft), colour)
    elif style == "curly":
        reach = 0.30 if figure.person.class_word == "man" else 0.38
        drop = -0.3 if figure.person.class_word == "man" else -0.05
        cloud = ellipse(u, v, 0, drop, width + reach, 1.02 if drop < -0.2 else 1.22)
        curls = 0.045 * np.sin(u * 11 + 2 * np.sin(v * 5)) * np.sin(v * 11)
        figure.put(
            inside(cloud + curls + 0.03 * figure.strands, soft * 1.3), colour * (1 + 0.12 * figure.strands)[..., None]
        )
    elif style == "bun" and figure.outfit.hat == "none":
        figure.put(inside(ellipse(u, v, 0, -1.18, 0.34, 0.28), soft), colour)


def draw_front(figure) -> None:
    """The hair over the forehead and temples; a glint on a bald head."""
    style = figure.person.hair_style
    if style == "bald":
        spot = glow(figure.u, figure.v, 0.4 * figure.pose.light - 0.1, -0.72, 0.25, 0.14)
        figure.mark(0.3 * spot * inside(face_distance(figure), figure.soft), (255, 246, 236))
        return
    u, v, person = figure.u, figure.v, figure.person
    shape = np.maximum(ellipse(u, v, 0, -0.06, person.face_width + 0.07, 1.07), _hairline(figure))
    reach = {"short": 0.05, "spiky": -0.1, "curly": 0.1, "bun": -0.02}.get(style, 0.5)
    temples = np.maximum(np.abs(u) - half_width(figure) - 0.1, 0.9 * person.face_width - np.abs(u))
    shape = np.minimum(shape, np.maximum(np.maximum(temples, v - reach), -0.75 - v))
    if style == "spiky" and figure.outfit.hat == "none":
        spikes = np.maximum(
            -v - 1.12 - 0.13 * np.abs(((u * 3.2) % 1) * 2 - 1), np.abs(u) - person.face_width * (0.2 - 0.75 * v)
        )
        shape = np.minimum(shape, np.maximum(spikes, v + 0.62))
    if style == "curly":
        shape = shape + 0.04 * np.sin(u * 14) * np.sin(v * 13) + 0.02 * figure.strands
    colour = hair_shade(figure)
    figure.put(inside(shape + 0.01 * figure.strands, figure.soft * 1.2), colour)
    if style in ("long", "bob"):
        fall = 1.45 if style == "long" else 0.72
        for side in (-1, 1):
            lock = np.abs(u - side * (person.face_width + 0.08 - 0.04 * np.abs(v))) - 0.12
            figure.put(inside(np.maximum(lock, np.maximum(-0.5 - v, v - fall)), figure.soft * 1.2), colour * 0.95)


def _hairline(figure) -> Array:
    u, v, style = figure.u, figure.v, figure.person.hair_style
    if style == "bob":
        return v + 0.50 - 0.03 * np.sin(u * 16)
    if style == "long":
        return v + 0.68 - 0.30 * np.abs(u)
    if style == "bun":
        return v + 0.66 - 0.25 * u**2
    return v + 0.63 - 0.22 * (u + 0.15) ** 2 - 0.03 * np.sin(u * 9)


def draw_beard(figure) -> None:
    """A full beard along the jaw or a moustache; light enough for the face beneath to stay legible."""
    person = figure.person
    if person.beard == "none":
        return
    f, v, soft = figure.f, figure.v, figure.soft
    mouth, nose = mouth_level(person), nose_level(person)
    colour = np.clip(hair_shade(figure) * 0.86 + 22, 0, 255)
    lips = ellipse(f, v, 0, mouth + 0.01, person.mouth_width * 1.15, 0.11)
    if person.beard == "full":
        edge = mouth + 0.02 - 0.55 * np.clip(np.abs(f) - person.mouth_width, 0, 1)
        area = np.maximum(face_distance(figure) - 0.03, np.maximum(edge - v, -lips))
        figure.put(0.62 * inside(area + 0.015 * figure.strands, soft * 2), colour)
    moustache = ellipse(f, v - 0.22 * np.abs(f), 0, (mouth + nose) / 2 + 0.01, person.mouth_width * 1.1, 0.072)
    figure.mark(0.8 * inside(moustache, soft * 1.4), colour)
