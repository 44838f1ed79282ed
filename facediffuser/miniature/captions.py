"""What a picture shows, in words: a caption, with and without the looks of its people, and where its people are in it."""

from dataclasses import dataclass

import numpy as np

from facediffuser.miniature.looks import ACTIONS, SCENES, Outfit, Setting
from facediffuser.miniature.people import Identity, identity_words
from facediffuser.miniature.worlds import World


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
    words = [person.class_word for person in people]
    return _joined(words, [looks_phrase(person, count) for person in people], outfits, keep, style, scene)


def _joined(
    words: list[str], looks: list[str], outfits: list[Outfit], keep: np.ndarray, style: str, scene: str
) -> Caption:
    text, spans = style, []
    for number, (word, look, outfit) in enumerate(zip(words, looks, outfits, strict=True)):
        text += " and " if number else ""
        phrase = with_article(word)
        spans.append((len(text), len(text) + len(phrase)))
        text += phrase + look + outfit_phrase(outfit, keep[number])
    return Caption(text + scene, tuple(spans))


def write_world_captions(
    people: list[Identity],
    outfits: list[Outfit],
    setting: Setting,
    world: World,
    rng: np.random.Generator,
    thing: str = "",
    framed: int = 0,
) -> tuple[Caption, Caption]:
    """The caption of a picture of a world without and with the looks of its people.

    thing: what stands in a picture without people, "" for nothing; framed: who of two is in the middle of a close-up. A phrase
    that names two people at once gives nobody a span, and neither has somebody whom the caption leaves out: (0, 0).
    """
    keep = rng.random((len(people), 4)) < world.said[:4]
    placed, photo, named, counted, couple = rng.random(5)
    style = f"a {setting.style} of " if setting.style != "photo" or photo < world.said[5] else ""
    place = SCENES[setting.scene]
    if not people:
        shown = f"{with_article(thing)} {place}" if thing else place.split(" ", 1)[1]
        return (Caption(style + shown, ()),) * 2
    scene = f" {place}" if placed < world.said[4] else ""
    words = [str(rng.choice(list(chances), p=list(chances.values()))) for chances in _words(people, world)]
    looks = [_looks_said(person, world, rng) for person in people]
    both = len(people) == 1 or named < world.both_named
    if not both and not world.close_up:
        alike = people[0].class_word == people[1].class_word and counted < 0.5
        several = {"man": "two men", "woman": "two women"}[people[0].class_word] if alike else "two people"
        return (Caption(style + ("a couple" if couple < 0.2 else several) + scene, ((0, 0),) * 2),) * 2
    if both:
        return (
            _joined(words, [""] * len(people), outfits, keep, style, scene),
            _joined(words, looks, outfits, keep, style, scene),
        )
    one = slice(framed, framed + 1)
    alone = [_joined(words[one], shown, outfits[one], keep[one], style, scene) for shown in ([""], looks[one])]
    empty = ((0, 0),) * framed, ((0, 0),) * (1 - framed)
    first, second = (Caption(caption.text, empty[0] + caption.spans + empty[1]) for caption in alone)
    return first, second


def _words(people: list[Identity], world: World) -> list[dict[str, float]]:
    return [world.words[person.class_word] for person in people]


def _looks_said(person: Identity, world: World, rng: np.random.Generator) -> str:
    kinds = ["skin", "hair"] + ["glasses"] * (person.glasses != "none") + ["beard"] * (person.beard != "none")
    kinds += ["face", "eyes"]
    said = [
        words
        for kind, words in zip(kinds, identity_words(person), strict=True)
        if rng.random() < world.looks_said.get(kind, 0.0)
    ]
    return " with " + _listed(said) if said else ""


def with_article(noun: str) -> str:
    """The noun with `a` or `an`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


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
