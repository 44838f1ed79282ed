"""Who a person is: the identity, how it is drawn from a seed, and how it is said in words."""

from dataclasses import dataclass

import numpy as np

SKINS = {
    "pale": (250, 222, 204),
    "fair": (238, 194, 160),
    "tan": (206, 154, 110),
    "brown": (168, 114, 80),
    "dark": (132, 88, 66),
}
HAIRS = {
    "black": (34, 28, 30),
    "brown": (104, 64, 36),
    "blond": (230, 190, 96),
    "red": (190, 76, 28),
    "gray": (176, 174, 174),
}
EYES = {"brown": (96, 58, 30), "blue": (60, 124, 204), "green": (62, 142, 84)}
FACES = {
    "round": (0.86, 0.92, 0.45),
    "long": (0.71, 1.08, 0.50),
    "square": (0.81, 1.00, 1.00),
    "oval": (0.77, 1.01, 0.35),
}
HAIR_STYLES = {"man": ("short", "curly", "bald", "spiky"), "woman": ("long", "bob", "curly", "bun")}
BEARDS = ("none", "full", "moustache")
GLASSES = {"none": (0, 0, 0), "black": (26, 26, 30), "red": (190, 34, 40)}


@dataclass(frozen=True)
class Identity:
    """All that stays the same of a person from picture to picture; lengths are in half face heights."""

    class_word: str
    skin: str
    hair: str
    hair_style: str
    eyes: str
    face: str
    glasses: str
    beard: str
    face_width: float
    face_height: float
    jaw: float
    eye_gap: float
    eye_width: float
    eye_height: float
    eye_tilt: float
    brow_thickness: float
    brow_tilt: float
    brow_height: float
    nose_length: float
    nose_width: float
    mouth_width: float
    lip: float
    skin_shift: tuple[float, float, float]
    hair_shift: tuple[float, float, float]

    @property
    def skin_colour(self) -> np.ndarray:
        """Red, green, blue of the skin in 0..255, (3,) float32."""
        return np.clip(np.asarray(SKINS[self.skin], np.float32) + self.skin_shift, 0, 255).astype(np.float32)

    @property
    def hair_colour(self) -> np.ndarray:
        """Red, green, blue of the hair in 0..255, (3,) float32."""
        return np.clip(np.asarray(HAIRS[self.hair], np.float32) + self.hair_shift, 6, 250).astype(np.float32)


def sample_identity(rng: np.random.Generator) -> Identity:
    """A random person; beards only on men, the face's proportions around those of its shape."""
    man = bool(rng.random() < 0.5)
    class_word = "man" if man else "woman"
    face = str(rng.choice(list(FACES)))
    width, height, jaw = FACES[face]
    return Identity(
        class_word=class_word,
        skin=str(rng.choice(list(SKINS))),
        hair=str(rng.choice(list(HAIRS))),
        hair_style=str(rng.choice(HAIR_STYLES[class_word])),
        eyes=str(rng.choice(list(EYES))),
        face=face,
        glasses=str(rng.choice(list(GLASSES), p=[0.7, 0.15, 0.15])),
        beard=str(rng.choice(BEARDS, p=[0.5, 0.3, 0.2])) if man else "none",
        face_width=width + rng.uniform(-0.02, 0.02),
        face_height=height + rng.uniform(-0.02, 0.02),
        jaw=jaw * (1.0 if man else 0.7) + rng.uniform(-0.05, 0.05),
        eye_gap=rng.uniform(0.30, 0.37),
        eye_width=rng.uniform(0.15, 0.18),
        eye_height=rng.uniform(0.085, 0.11) + (0.0 if man else 0.012),
        eye_tilt=rng.uniform(-0.14, 0.14),
        brow_thickness=rng.uniform(0.035, 0.065) if man else rng.uniform(0.022, 0.04),
        brow_tilt=rng.uniform(-0.10, 0.16),
        brow_height=rng.uniform(0.2, 0.25),
        nose_length=rng.uniform(0.34, 0.46),
        nose_width=rng.uniform(0.10, 0.17),
        mouth_width=rng.uniform(0.22, 0.33),
        lip=rng.uniform(0.04, 0.065) if man else rng.uniform(0.06, 0.09),
        skin_shift=_shift(rng, 7),
        hair_shift=_shift(rng, 8),
    )


def identity_words(person: Identity) -> list[str]:
    """What can be said of a person's looks, most telling first: "brown skin", "curly red hair", "glasses", ..."""
    words = [f"{person.skin} skin"]
    words.append("a bald head" if person.hair_style == "bald" else _hair_words(person))
    if person.glasses != "none":
        words.append(f"{person.glasses} glasses")
    if person.beard != "none":
        words.append("a beard" if person.beard == "full" else "a moustache")
    words.append(f"a {person.face} face" if person.face != "oval" else "an oval face")
    words.append(f"{person.eyes} eyes")
    return words


def _hair_words(person: Identity) -> str:
    if person.hair_style in ("bob", "bun"):
        return f"{person.hair} hair in a {person.hair_style}"
    return f"{person.hair_style} {person.hair} hair"


def _shift(rng: np.random.Generator, reach: float) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in rng.uniform(-reach, reach, 3))
    return red, green, blue
