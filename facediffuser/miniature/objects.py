"""Things that stand alone in a scene: what a base model knows of them without a person who holds them."""

import numpy as np

from facediffuser.miniature.canvas import Canvas, box, ellipse, inside

OBJECTS = ("cup", "balloon", "book")


def draw_object(canvas: Canvas, kind: str) -> None:
    """Paint one of OBJECTS somewhere in the middle of a scene."""
    rng = canvas.rng
    size = rng.uniform(1.0, 1.6)
    x = (canvas.x - rng.uniform(-0.4, 0.4)) / size
    y = (canvas.y - rng.uniform(0.0, 0.35)) / size
    soft = canvas.softness / size
    {"cup": _cup, "balloon": _balloon, "book": _book}[kind](canvas, x, y, soft)


def _cup(canvas: Canvas, x: np.ndarray, y: np.ndarray, soft: float) -> None:
    handle = np.abs(ellipse(x, y, -0.2, 0.0, 0.11, 0.12)) - 0.03
    canvas.paint(inside(handle, soft), (216, 216, 222))
    canvas.paint(inside(box(x, y, 0, 0, 0.17, 0.22), soft), (248, 248, 252))
    canvas.paint(inside(ellipse(x, y, 0, -0.21, 0.16, 0.045), soft), (96, 58, 36))


def _balloon(canvas: Canvas, x: np.ndarray, y: np.ndarray, soft: float) -> None:
    canvas.paint(inside(np.maximum(np.abs(x) - 0.015, np.maximum(-y, y - 0.7)), soft), (90, 90, 96))
    shade = 1.08 - 0.3 * np.hypot(x + 0.08, y + 0.3)
    canvas.paint(
        inside(ellipse(x, y, 0, -0.15, 0.24, 0.31), soft), np.array([226, 60, 120], np.float32) * shade[..., None]
    )


def _book(canvas: Canvas, x: np.ndarray, y: np.ndarray, soft: float) -> None:
    canvas.paint(inside(box(x, y, 0, 0, 0.44, 0.19), soft), (126, 74, 36))
    canvas.paint(inside(box(np.abs(x), y, 0.205, -0.02, 0.19, 0.16), soft), (250, 246, 230))
    for line in (-0.1, -0.02, 0.06):
        canvas.paint(0.5 * inside(box(np.abs(x), y, 0.205, line, 0.13, 0.012), soft), (120, 116, 110))
