"""Two named worlds of pictures: what a base model is to know, and what FFHQ has of it.

`broad` stands for what Stable Diffusion has seen, `ffhq` for the set that it is fine-tuned on. docs/miniature-notebook.md
says where each share comes from; the shares were written down before any model was trained on these worlds.
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import gaussian_filter

from facediffuser.errors import InputError
from facediffuser.miniature.canvas import Canvas
from facediffuser.miniature.head import EYE_LEVEL, mouth_level
from facediffuser.miniature.looks import (
    ACTIONS,
    COLOURS,
    EXPRESSIONS,
    HATS,
    SCENES,
    STYLES,
    Outfit,
    Pose,
    Setting,
    sample_pose,
)
from facediffuser.miniature.people import Identity, sample_identity
from facediffuser.miniature.world_names import WorldName


@dataclass(frozen=True)
class World:
    """The shares of what pictures show, and of what their captions say of it.

    Probabilities are in the order of `looks`: scenes of SCENES, hats of HATS, expressions of EXPRESSIONS. accepted: how often
    somebody with a trait is taken into the set; said: hat, shirt, expression, doing, place, the word `photo`.
    """

    photos: float
    scenes: tuple[float, ...]
    unfocused: float
    hats: float
    hat_kinds: tuple[float, ...]
    expressions: tuple[float, ...]
    actions: float
    pairs: float
    empty: float
    close_up: bool
    both_named: float
    words: dict[str, dict[str, float]]
    said: tuple[float, float, float, float, float, float]
    looks: float
    looks_said: dict[str, float]
    women: float = 1.0
    glasses: float = 1.0
    beards: float = 1.0


WORLDS: dict[WorldName, World] = {
    "broad": World(
        photos=0.7,
        scenes=(1 / 6,) * 6,
        unfocused=0.0,
        hats=0.45,
        hat_kinds=(1 / 3,) * 3,
        expressions=(0.55, 0.33, 0.12),
        actions=0.5,
        pairs=0.25,
        empty=0.15,
        close_up=False,
        both_named=0.85,
        words={
            "man": {
                "man": 0.50, "person": 0.14, "boy": 0.13, "guy": 0.07, "gentleman": 0.03, "male": 0.02, "human": 0.01,
                "adult": 0.01, "child": 0.05, "kid": 0.04,
            },
            "woman": {
                "woman": 0.50, "person": 0.14, "girl": 0.15, "lady": 0.08, "female": 0.02, "human": 0.01, "adult": 0.01,
                "child": 0.05, "kid": 0.04,
            },
        },
        said=(0.9, 0.6, 0.75, 0.95, 0.9, 0.5),
        looks=0.3,
        looks_said={"skin": 0.4, "hair": 0.9, "glasses": 0.8, "beard": 0.8, "face": 0.15, "eyes": 0.2},
    ),
    "ffhq": World(
        photos=1.0,
        scenes=(0.07, 0.04, 0.25, 0.25, 0.04, 0.35),
        unfocused=0.7,
        hats=0.07,
        hat_kinds=(0.5, 0.45, 0.05),
        expressions=(0.367, 0.62, 0.013),
        actions=0.03,
        pairs=0.10,
        empty=0.0,
        close_up=True,
        both_named=0.5,
        words={
            "man": {"man": 0.80, "boy": 0.15, "child": 0.02, "person": 0.02, "guy": 0.01},
            "woman": {"woman": 0.79, "girl": 0.16, "child": 0.02, "person": 0.02, "lady": 0.01},
        },
        said=(0.8, 0.2, 0.6, 0.8, 0.12, 0.1),
        looks=0.5,
        looks_said={"hair": 0.7, "glasses": 0.8, "beard": 0.8, "eyes": 0.1},
        women=0.74,
        glasses=0.53,
        beards=0.18,
    ),
}  # fmt: skip


def world_of(name: WorldName) -> World:
    """Return the world of that name.

    Raises:
        InputError: there is none; the error names those there are.
    """
    if name not in WORLDS:
        raise InputError(f"world {name}: there is none of that name; give {' or '.join(WORLDS)}")
    return WORLDS[name]


def people_of(world: World, first: int, count: int) -> list[int]:
    """Return the numbers, from `first` on, of `count` people who are taken into a world's pictures, always the same."""
    numbers: list[int] = []
    candidate = first
    while len(numbers) < count:
        who = sample_identity(np.random.default_rng((candidate, 7)))
        chance = world.women if who.class_word == "woman" else 1.0
        chance *= world.glasses if who.glasses != "none" else 1.0
        chance *= world.beards if who.beard != "none" else 1.0
        if np.random.default_rng((candidate, 31)).random() < chance:
            numbers.append(candidate)
        candidate += 1
    return numbers


def world_outfit(world: World, rng: np.random.Generator) -> Outfit:
    """Random clothes, mood and doing, in a world's shares."""
    colours = list(COLOURS)
    return Outfit(
        hat=str(rng.choice(HATS, p=world.hat_kinds)) if rng.random() < world.hats else "none",
        hat_colour=str(rng.choice(colours)),
        shirt=str(rng.choice(colours)),
        expression=str(rng.choice(EXPRESSIONS, p=world.expressions)),
        action=str(rng.choice(list(ACTIONS)[1:])) if rng.random() < world.actions else "none",
    )


def world_setting(world: World, rng: np.random.Generator) -> Setting:
    """A random place and style, in a world's shares."""
    style = "photo" if rng.random() < world.photos else str(rng.choice(STYLES[1:]))
    return Setting(scene=str(rng.choice(list(SCENES), p=world.scenes)), style=style)


def world_poses(world: World, people: list[Identity], rng: np.random.Generator) -> list[Pose]:
    """Where heads sit, from left to right.

    Close up one is framed as FFHQ's alignment frames it, and of a second there is what the edge leaves. Elsewhere people stand
    nearer and further away than in `sample_pose`.
    """
    if not world.close_up:
        poses = [sample_pose(rng, place, len(people)) for place in range(len(people))]
        if len(poses) == 1:
            poses[0] = replace(poses[0], x=poses[0].x + rng.uniform(-0.15, 0.15), scale=rng.uniform(0.42, 0.58))
        return poses
    if len(people) < 2:
        return [_aligned(who, rng) for who in people]
    framed = int(rng.integers(2))
    poses = [_aligned(who, rng) for who in people]
    side = 1.0 if framed == 0 else -1.0
    poses[1 - framed] = replace(poses[1 - framed], x=side * rng.uniform(1.0, 1.25), scale=rng.uniform(0.6, 0.72))
    return poses


def _aligned(who: Identity, rng: np.random.Generator) -> Pose:
    """FFHQ's frame: as wide as four times the eyes' distance or 3.6 times that of eyes and mouth, a tenth below the eyes."""
    eye_to_mouth = mouth_level(who) - EYE_LEVEL
    side = max(4.0 * 2 * who.eye_gap, 3.6 * eye_to_mouth)
    scale = 2 / side * rng.uniform(0.97, 1.03)
    return Pose(
        x=rng.uniform(-0.02, 0.02),
        y=-(EYE_LEVEL + 0.1 * eye_to_mouth) * scale + rng.uniform(-0.02, 0.02),
        scale=scale,
        tilt=rng.uniform(-0.03, 0.03),
        yaw=rng.uniform(-0.08, 0.08),
        gaze=rng.uniform(-0.02, 0.02),
        light=rng.uniform(-0.4, 0.4),
        shoulders=1.45,
    )


def blur_background(canvas: Canvas, world: World, rng: np.random.Generator) -> None:
    """Put what is behind the people out of focus, as often as the world has it so."""
    if rng.random() < world.unfocused:
        sigma = canvas.size / 64 * rng.uniform(1.5, 4.0)
        canvas.image = gaussian_filter(canvas.image, (sigma, sigma, 0), mode="nearest")
