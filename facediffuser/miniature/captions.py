"""What a picture shows, in words: a caption, with and without the looks of its people, and where its people are in it."""

from dataclasses import dataclass

import numpy as np

from facediffuser.miniature.looks import ACTIONS, SCENES, Outfit, Setting
from facediffuser.miniature.people import Identity, identity_words


@dataclass(frozen=True)
class Caption:
    """A text and, per person from left to right, the characters (start, end exclusive) of the phrase naming them."""

    text: str
    spans: tuple[tuple[int, int], ...]


def write_captions(
    people: list[Identity], outfits: list[Outfit], setting: Setting, rng: np.random.Generator
) -> tuple[Caption, Caption]:
    """The caption of a picture without and with the looks of its people; passing things are left out now and then."""
    keep = rng.random((len(people), 4)) < (0.9, 0.6, 0.75, 0.95)
    scene = f" {SCENES[setting.scene]}" if rng.random() < 0.9 else ""
    style = f"a {setting.style} of " if setting.style != "photo" or rng.random() < 0.5 else ""
    count = int(rng.integers(2, 5))
    return (
        _compose(people, outfits, keep, style, scene, 0),
        _compose(people, outfits, keep, style, scene, count),
    )


def _compose(
    people: list[Identity], outfits: list[Outfit], keep: np.ndarray, style: str, scene: str, count: int
) -> Caption:
    text, spans = style, []
    for number, (person, outfit) in enumerate(zip(people, outfits, strict=True)):
        text += " and " if number else ""
        phrase = f"a {person.class_word}"
        spans.append((len(text), len(text) + len(phrase)))
        text += phrase + looks_phrase(person, count) + outfit_phrase(outfit, keep[number])
    return Caption(text + scene, tuple(spans))


def looks_phrase(person: Identity, count: int = 9) -> str:
    """The first `count` attributes of a person's looks: " with brown skin, curly red hair and a beard"."""
    return " with " + _listed(identity_words(person)[:count]) if count else ""


def outfit_phrase(outfit: Outfit, keep: np.ndarray | tuple[bool, ...] = (True,) * 4) -> str:
    """Hat, shirt, expression and doing, those to keep: " wearing a red cap and a blue shirt, smiling, reading a book"."""
    hat, shirt, expression, action = keep
    worn = [f"a {outfit.hat_colour} {outfit.hat}"] if hat and outfit.hat != "none" else []
    worn += [f"a {outfit.shirt} shirt"] if shirt else []
    text = " wearing " + _listed(worn) if worn else ""
    doing = [outfit.expression] if expression and outfit.expression != "calm" else []
    doing += [ACTIONS[outfit.action]] if action and outfit.action != "none" else []
    return text + (" " + _listed(doing) if doing else "")


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
