"""What changes from picture to picture: clothes, expression, doing, place, style and the small chances of a pose."""

from dataclasses import dataclass

import numpy as np

COLOURS = {
    "red": (208, 40, 44),
    "blue": (44, 84, 200),
    "green": (44, 146, 72),
    "yellow": (242, 206, 56),
    "white": (240, 240, 240),
    "black": (40, 40, 46),
}
HATS = ("beanie", "cap", "top hat")
SCENES = {
    "beach": "on the beach",
    "snow": "in the snow",
    "forest": "in the forest",
    "city": "in the city",
    "desert": "in the desert",
    "room": "in a room",
}
STYLES = ("photo", "sketch", "painting")
EXPRESSIONS = ("calm", "smiling", "surprised")
ACTIONS = {
    "none": "",
    "wave": "waving",
    "cup": "holding a cup",
    "balloon": "holding a balloon",
    "book": "reading a book",
}
ACTION_SHARE = 0.3


@dataclass(frozen=True)
class Outfit:
    """One person's passing looks."""

    hat: str = "none"
    hat_colour: str = "red"
    shirt: str = "white"
    expression: str = "calm"
    action: str = "none"


@dataclass(frozen=True)
class Setting:
    """Where the picture is taken and how it is made."""

    scene: str = "room"
    style: str = "photo"


@dataclass(frozen=True)
class Pose:
    """Where a head sits in the picture (-1..1), its half height, tilt (radians), turn, gaze and the light on it."""

    x: float
    y: float
    scale: float
    tilt: float
    yaw: float
    gaze: float
    light: float
    shoulders: float


def sample_outfit(rng: np.random.Generator, hats: bool = True, action_share: float = ACTION_SHARE) -> Outfit:
    """Random clothes and mood; about half wear a hat, `action_share` do something."""
    colours = list(COLOURS)
    return Outfit(
        hat=str(rng.choice(HATS)) if hats and rng.random() < 0.45 else "none",
        hat_colour=str(rng.choice(colours)),
        shirt=str(rng.choice(colours)),
        expression=str(rng.choice(EXPRESSIONS, p=[0.55, 0.33, 0.12])),
        action=str(rng.choice(list(ACTIONS)[1:])) if action_share and rng.random() < action_share else "none",
    )


def sample_setting(rng: np.random.Generator, photo_share: float = 0.8) -> Setting:
    """A random place; a photo with the given probability, else a sketch or a painting."""
    style = "photo" if rng.random() < photo_share else str(rng.choice(STYLES[1:]))
    return Setting(scene=str(rng.choice(list(SCENES))), style=style)


def sample_pose(rng: np.random.Generator, place: int, people: int) -> Pose:
    """A pose as in aligned portraits: nearly upright, centred; two people stand side by side, `place` 0 on the left."""
    alone = people == 1
    return Pose(
        x=(0.0 if alone else (-0.49, 0.49)[place]) + rng.uniform(-0.05, 0.05) * (1.0 if alone else 0.5),
        y=(0.02 if alone else 0.08) + rng.uniform(-0.03, 0.03),
        scale=rng.uniform(0.50, 0.56) if alone else rng.uniform(0.40, 0.43),
        tilt=rng.uniform(-0.06, 0.06),
        yaw=rng.uniform(-0.06, 0.06),
        gaze=rng.uniform(-0.02, 0.02),
        light=rng.uniform(-0.4, 0.4),
        shoulders=1.45 if alone else 1.12,
    )
