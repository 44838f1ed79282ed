"""What the models are told in training: captions that are sometimes left out, subjects that sometimes are."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from facediffuser.prompts import IMAGE_MARKER


@dataclass(frozen=True)
class Told:
    """Whether a caption is told, and which of its subjects carry a reference."""

    caption: bool
    subjects: tuple[int, ...]


def choose_told(count: int, caption_drop: float, subject_keep: float, generator: torch.Generator) -> Told:
    """Return what of a caption with `count` subjects is told this time: drop of all, then of each subject by itself."""
    draws = torch.rand(1 + count, generator=generator).tolist()
    if draws[0] < caption_drop:
        return Told(False, ())
    return Told(True, tuple(number for number, draw in enumerate(draws[1:]) if draw < subject_keep))


def mark_caption(caption: str, ends: Sequence[int]) -> str:
    """Return the caption with a marker after each subject phrase; `ends` are the phrases' ends, in characters."""
    for end in sorted(set(ends), reverse=True):
        rest = caption[end:]
        caption = f"{caption[:end]} {IMAGE_MARKER}{rest}"
    return caption
