"""Glasses, hats, and what the hands do."""

import numpy as np

from facediffuser.miniature.canvas import box, ellipse, inside
from facediffuser.miniature.head import EYE_LEVEL
from facediffuser.miniature.looks import COLOURS
from facediffuser.miniature.people import GLASSES


def draw_glasses(figure) -> None:
    """Two rims, a bridge and temples."""
    person, f, v, soft = figure.person, figure.f, figure.v, figure.soft
    if person.glasses == "none":
        return
    frame = GLASSES[person.glasses]
    level, gap = EYE_LEVEL + 0.02, person.eye_gap
    for side in (-1, 1):
        rim = (np.abs((f - side * gap) / 0.26) ** 3 + np.abs((v - level) / 0.21) ** 3) ** (1 / 3) - 1
        figure.mark(0.08 * inside(0.2 * rim, soft), (220, 236, 255))
        figure.mark(inside(0.22 * np.abs(rim) - 0.03, soft), frame)
        arm = np.maximum(gap + 0.25 - side * f, side * figure.u - person.face_width * 1.02)
        figure.mark(inside(np.maximum(np.abs(v - level + 0.04) - 0.028, arm), soft), frame)
    bridge = np.maximum(np.abs(f) - (gap - 0.25), np.abs(v - level + 0.04) - 0.028)
    figure.mark(inside(bridge, soft), frame)


def draw_hat(figure) -> None:
    """A beanie with a bobble, a cap with a peak, or a top hat with a band; all leave the brows free."""
    kind = figure.outfit.hat
    if kind == "none":
        return
    u, v, soft = figure.u, figure.v, figure.soft
    width = figure.person.face_width
    colour = np.asarray(COLOURS[figure.outfit.hat_colour], np.float32)
    round_shade = (1.04 - 0.25 * (u / width) ** 2)[..., None]
    if kind == "beanie":
        crown = np.maximum(ellipse(u, v, 0, -0.45, width + 0.14, 0.82), v + 0.6)
        ribs = (0.07 * np.sin(u * 36))[..., None]
        figure.put(inside(ellipse(u, v, 0, -1.3, 0.17, 0.16), soft * 1.5), np.clip(colour * 0.6 + 96, 0, 255))
        figure.put(inside(crown, soft), colour * (round_shade + ribs))
        figure.put(inside(box(u, v, 0, -0.63, width + 0.15, 0.11), soft), colour * 0.78)
    elif kind == "cap":
        crown = np.maximum(ellipse(u, v, 0, -0.50, width + 0.11, 0.68), v + 0.55)
        figure.put(inside(crown, soft), colour * round_shade)
        peak = ellipse(u, v, 2 * figure.pose.yaw, -0.56, width + 0.02, 0.10)
        figure.put(inside(peak, soft), colour * 0.62)
    else:
        crown = np.maximum(np.abs(u) - width * (0.86 - 0.05 * v), np.maximum(-1.55 - v, v + 0.62))
        band = np.maximum(np.abs(u) - width * 0.91, np.abs(v + 0.80) - 0.08)
        figure.put(inside(crown, soft), colour * round_shade)
        figure.mark(inside(band, soft), (150, 40, 44) if figure.outfit.hat_colour == "black" else colour * 0.42)
        figure.put(inside(ellipse(u, v, 0, -0.63, width + 0.36, 0.10), soft), colour * 0.86)


def draw_action(figure) -> None:
    """A waving hand, or a hand with a cup or a balloon, or both hands with an open book."""
    painter = {"wave": _wave, "cup": _cup, "balloon": _balloon, "book": _book}.get(figure.outfit.action)
    if painter is not None:
        painter(figure)


def _hand(figure, x: float, y: float, side: int) -> None:
    """A hand at (x, y) on a sleeve that rises from below."""
    soft, shirt = figure.soft, np.asarray(COLOURS[figure.outfit.shirt], np.float32)
    sleeve = np.maximum(np.abs(figure.x - x - 0.15 * side * (figure.y - y)) - 0.18, y + 0.14 - figure.y)
    figure.put(inside(sleeve, soft), shirt * 0.84)
    figure.put(inside(ellipse(figure.x, figure.y, x, y, 0.19, 0.20), soft), figure.person.skin_colour * 0.96)


def _side(figure) -> tuple[float, int]:
    """Where a raised hand goes: far enough from the face, inside the picture."""
    return (1.16, 1) if figure.pose.shoulders > 1.3 else (0.92, 1)


def _wave(figure) -> None:
    x, side = _side(figure)
    _hand(figure, x, 0.62, side)
    skin = figure.person.skin_colour * 0.96
    for finger, height in ((-0.13, 0.36), (-0.045, 0.30), (0.045, 0.30), (0.13, 0.36)):
        shape = box(figure.x, figure.y, x + finger, height + 0.12, 0.032, 0.16)
        figure.put(inside(shape, figure.soft), skin)


def _cup(figure) -> None:
    x, side = _side(figure)
    _hand(figure, x - 0.12, 1.22, side)
    figure.mark(inside(ellipse(figure.x, figure.y, x - 0.36, 1.08, 0.1, 0.12), figure.soft), (216, 216, 222))
    figure.mark(inside(box(figure.x, figure.y, x - 0.16, 1.08, 0.17, 0.22), figure.soft), (248, 248, 252))
    figure.mark(inside(ellipse(figure.x, figure.y, x - 0.16, 0.87, 0.16, 0.045), figure.soft), (96, 58, 36))


def _balloon(figure) -> None:
    x, side = _side(figure)
    string = np.maximum(np.abs(figure.x - x) - 0.018, np.maximum(-0.45 - figure.y, figure.y - 1.2))
    figure.mark(inside(string, figure.soft), (90, 90, 96))
    _hand(figure, x, 1.18, side)
    balloon = ellipse(figure.x, figure.y, x + 0.03, -0.72, 0.28, 0.36)
    shade = 1.08 - 0.3 * np.hypot(figure.x - x + 0.05, figure.y + 0.85)
    figure.mark(inside(balloon, figure.soft), np.array([226, 60, 120], np.float32) * shade[..., None])


def _book(figure) -> None:
    soft = figure.soft
    cover = box(figure.x, figure.y, 0, 1.52, 0.60, 0.24)
    figure.put(inside(cover, soft), (126, 74, 36))
    pages = box(np.abs(figure.x), figure.y, 0.28, 1.48, 0.26, 0.22)
    figure.put(inside(pages, soft), (250, 246, 230))
    for line in (1.36, 1.46, 1.56):
        figure.mark(0.5 * inside(box(np.abs(figure.x), figure.y, 0.28, line, 0.18, 0.016), soft), (120, 116, 110))
    for side in (-1, 1):
        figure.put(
            inside(ellipse(figure.x, figure.y, side * 0.62, 1.58, 0.13, 0.15), soft), figure.person.skin_colour * 0.96
        )
