"""One person on a canvas: the order in which the parts are laid, and the body beneath the head."""

import numpy as np

from facediffuser.miniature import clothes, hair, head
from facediffuser.miniature.canvas import Array, Canvas, Colour, ellipse, glow, inside
from facediffuser.miniature.looks import COLOURS, Outfit, Pose
from facediffuser.miniature.people import Identity


class Figure:
    """A person being painted, with the coordinates the parts are drawn in.

    x, y: upright, around the head's centre, in half head heights; u, v: the same, tilted with the head;
    f: u moved by the head's turn, for the features of the face. soft: the softness of an edge in these units.
    """

    def __init__(self, canvas: Canvas, person: Identity, outfit: Outfit, pose: Pose) -> None:
        self.canvas, self.person, self.outfit, self.pose = canvas, person, outfit, pose
        self.x = (canvas.x - pose.x) / pose.scale
        self.y = (canvas.y - pose.y) / pose.scale
        cosine, sine = np.float32(np.cos(pose.tilt)), np.float32(np.sin(pose.tilt))
        self.u = cosine * self.x + sine * self.y
        self.v = cosine * self.y - sine * self.x
        self.f = self.u - np.float32(pose.yaw)
        self.soft = canvas.softness / pose.scale
        self.coverage = np.zeros_like(self.x)
        self.strands = canvas.noise(1.0)

    def put(self, mask: Array, colour: Colour) -> None:
        """Paints a part that belongs to the person's outline."""
        self.canvas.paint(mask, colour)
        self.coverage = np.maximum(self.coverage, mask)

    def mark(self, mask: Array, colour: Colour) -> None:
        """Paints a detail that lies within the outline, or is not part of the person."""
        self.canvas.paint(mask, colour)


def draw_person(canvas: Canvas, person: Identity, outfit: Outfit, pose: Pose, number: int) -> None:
    """Paints a person and writes `number` into the canvas' ids wherever the person covers half a pixel or more."""
    figure = Figure(canvas, person, outfit, pose)
    hair.draw_back(figure)
    draw_body(figure)
    head.draw_face(figure)
    hair.draw_beard(figure)
    head.draw_mouth(figure)
    head.draw_eyes(figure)
    hair.draw_front(figure)
    clothes.draw_glasses(figure)
    clothes.draw_hat(figure)
    clothes.draw_action(figure)
    canvas.ids[figure.coverage >= 0.5] = number


def draw_body(figure: Figure) -> None:
    """Shoulders in a shirt with a round neckline, and the neck in the head's shadow."""
    x, y, soft = figure.x, figure.y, figure.soft
    person, pose = figure.person, figure.pose
    shirt = np.asarray(COLOURS[figure.outfit.shirt], np.float32)
    width = pose.shoulders * (1.05 if person.class_word == "man" else 0.95)
    slope = 1.22 + 0.20 * np.clip(np.abs(x) - 0.3, 0, 9) ** 1.7
    body = np.maximum(slope - y, np.abs(x) - width)
    shade = 1 - 0.22 * (x / width) ** 2 + 0.10 * pose.light * x
    figure.put(inside(body, soft), shirt * shade[..., None])
    neck_x = x - 0.3 * pose.yaw
    neck_width = (0.40 if person.class_word == "man" else 0.34) * person.face_width / 0.8
    neck = np.maximum(np.abs(neck_x) - neck_width, np.maximum(0.4 - y, y - 1.3))
    neckline = np.minimum(neck, ellipse(neck_x, y, 0, 1.26, neck_width * 1.15, 0.17))
    skin = person.skin_colour * (0.70 + 0.18 * np.clip((y - 0.95) / 0.4, 0, 1))[..., None]
    figure.mark(inside(np.maximum(ellipse(neck_x, y, 0, 1.27, neck_width * 1.32, 0.24), 1.15 - y), soft), shirt * 0.78)
    figure.put(inside(neckline, soft), skin)
    for side in (-1, 1):
        ear = person.face_width * side
        figure.put(inside(ellipse(figure.u, figure.v, ear * 0.99, 0.02, 0.12, 0.2), soft), person.skin_colour * 0.88)
        figure.mark(0.45 * glow(figure.u, figure.v, ear * 1.02, 0.02, 0.06, 0.11), person.skin_colour * 0.6)
