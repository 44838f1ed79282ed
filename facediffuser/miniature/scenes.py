"""The places behind the people: each paints a whole canvas from its own random chances."""

from collections.abc import Callable

import numpy as np

from facediffuser.miniature.canvas import Canvas, blend, box, ellipse, glow, inside


def draw_scene(canvas: Canvas, scene: str) -> None:
    """Fills the canvas with a scene of `looks.SCENES`."""
    PAINTERS[scene](canvas)


def _sky(canvas: Canvas, top: tuple, bottom: tuple, horizon: float) -> None:
    canvas.image[:] = blend(top, bottom, (canvas.y + 1) / (horizon + 1))


def _beach(canvas: Canvas) -> None:
    x, y, soft, rng = canvas.x, canvas.y, canvas.softness, canvas.rng
    horizon = rng.uniform(-0.05, 0.1)
    _sky(canvas, (84, 166, 236), (196, 230, 248), horizon)
    canvas.paint(inside(np.hypot(x - rng.choice([-0.75, 0.75]), y + 0.75) - 0.13, soft), (255, 238, 140))
    sea = inside(horizon - y, soft)
    canvas.paint(sea, (28, 120, 180))
    canvas.paint(0.35 * sea * np.clip(np.sin(y * 50), 0, 1), (130, 200, 222))
    shore = horizon + 0.32 + 0.03 * np.sin(x * 4 + rng.uniform(0, 6))
    canvas.paint(inside(shore - 0.05 - y, soft), (226, 240, 244))
    canvas.paint(inside(shore - y, soft), blend((240, 218, 166), (220, 192, 138), y))


def _snow(canvas: Canvas) -> None:
    x, y, soft, rng = canvas.x, canvas.y, canvas.softness, canvas.rng
    _sky(canvas, (150, 174, 206), (222, 232, 244), 0.3)
    for centre in (-0.72, 0.72):
        top = rng.uniform(-0.55, -0.3)
        slope = np.abs(x - centre - rng.uniform(-0.1, 0.1)) * 1.1
        canvas.paint(inside(top + slope - y, soft), (112, 128, 158))
        canvas.paint(inside(np.maximum(top + slope - y, y - top - 0.2 - 0.04 * np.sin(x * 30)), soft), (246, 249, 253))
    canvas.paint(
        inside(0.3 + 0.05 * np.sin(x * 3 + rng.uniform(0, 6)) - y, soft), blend((240, 245, 252), (214, 226, 242), y)
    )
    for fx, fy in rng.uniform(-1, 1, (26, 2)):
        canvas.paint(inside(np.hypot(x - fx, y - fy) - 0.022, soft), (255, 255, 255))


def _forest(canvas: Canvas) -> None:
    x, y, soft, rng = canvas.x, canvas.y, canvas.softness, canvas.rng
    canvas.image[:] = blend((96, 158, 88), (58, 112, 60), (y + 1) / 2)
    for lane in (-0.86, -0.58, 0.58, 0.86):
        place = lane + rng.uniform(-0.06, 0.06)
        width = rng.uniform(0.055, 0.085)
        bark = np.array([96, 66, 42], np.float32) * (1 - 0.4 * np.clip((x - place) / width, -1, 1))[..., None]
        canvas.paint(inside(np.maximum(np.abs(x - place) - width, y - 0.62), soft), bark)
    leaves = canvas.noise(2.6)
    canvas.paint(inside(y + 0.55 - 0.22 * leaves, soft * 2), blend((40, 110, 48), (70, 150, 62), leaves * 0.5 + 0.5))
    canvas.paint(inside(0.6 + 0.03 * np.sin(x * 22) - y, soft), blend((64, 128, 54), (44, 96, 42), y))


def _city(canvas: Canvas) -> None:
    x, y, soft, rng = canvas.x, canvas.y, canvas.softness, canvas.rng
    _sky(canvas, (120, 146, 186), (220, 206, 196), 0.5)
    for lane, left in enumerate((-1.0, -0.68, -0.3, 0.1, 0.42, 0.72)):
        width, top = rng.uniform(0.15, 0.19), rng.uniform(-0.75, -0.3) if lane not in (2, 3) else rng.uniform(-0.4, 0.0)
        centre = left + 0.14
        tower = inside(np.maximum(np.abs(x - centre) - width, top - y), soft)
        canvas.paint(tower, np.array([88, 94, 112], np.float32) * rng.uniform(0.8, 1.15))
        windows = (np.sin((x - centre) * 44) > 0.2) & (np.sin((y - top) * 40) > 0.1) & (y > top + 0.06)
        canvas.paint(tower * windows * 0.85, (250, 222, 130))
    canvas.paint(inside(0.6 - y, soft), (76, 78, 86))
    canvas.paint(inside(np.maximum(np.abs(y - 0.78) - 0.02, 0.1 - np.abs((x * 2.2) % 1 - 0.5)), soft), (236, 232, 214))


def _desert(canvas: Canvas) -> None:
    x, y, soft, rng = canvas.x, canvas.y, canvas.softness, canvas.rng
    _sky(canvas, (246, 176, 104), (254, 226, 166), 0.2)
    sun = rng.choice([-0.75, 0.75])
    canvas.paint(inside(np.hypot(x - sun, y + 0.66) - 0.15, soft), (255, 250, 222))
    dunes = 0.12 + 0.10 * np.sin(x * 3 + rng.uniform(0, 6))
    canvas.paint(inside(dunes - y, soft), blend((224, 158, 88), (196, 124, 64), y))
    place = -sun + rng.uniform(-0.06, 0.06)
    trunk = box(x, y, place, 0.1, 0.075, 0.5)
    arms = np.minimum(box(x, y, place - 0.17, -0.04, 0.045, 0.17), box(x, y, place + 0.17, 0.06, 0.045, 0.17))
    joints = box(x, y, place, 0.15, 0.2, 0.045)
    canvas.paint(inside(np.minimum(np.minimum(trunk, arms), joints) - 0.015, soft), (54, 122, 62))


def _room(canvas: Canvas) -> None:
    x, y, soft, rng = canvas.x, canvas.y, canvas.softness, canvas.rng
    wall = np.array([[226, 208, 178], [204, 214, 204], [206, 202, 222]][rng.integers(3)], np.float32)
    canvas.image[:] = wall * (1.02 - 0.08 * np.abs(x))[..., None]
    side = rng.choice([-1, 1])
    window = side * 0.72
    canvas.paint(inside(box(x, y, window, -0.42, 0.24, 0.34), soft), (250, 250, 250))
    canvas.paint(inside(box(x, y, window, -0.42, 0.20, 0.30), soft), blend((120, 184, 240), (206, 232, 250), y + 0.7))
    bars = np.minimum(np.abs(x - window), np.abs(y + 0.42)) - 0.02
    canvas.paint(inside(np.maximum(bars, box(x, y, window, -0.42, 0.22, 0.32)), soft), (250, 250, 250))
    picture = -side * 0.74
    canvas.paint(inside(box(x, y, picture, -0.46, 0.19, 0.23), soft), (120, 80, 48))
    canvas.paint(inside(box(x, y, picture, -0.46, 0.15, 0.19), soft), (238, 236, 226))
    canvas.paint(inside(ellipse(x, y, picture, -0.44, 0.09, 0.1), soft), (206, 84, 66))
    canvas.paint(inside(0.62 - y, soft), blend((150, 100, 62), (126, 80, 48), y))
    canvas.paint(0.5 * glow(x, y, 0, 0.62, 9.0, 0.02), (250, 246, 240))


PAINTERS: dict[str, Callable[[Canvas], None]] = {
    "beach": _beach,
    "snow": _snow,
    "forest": _forest,
    "city": _city,
    "desert": _desert,
    "room": _room,
}
