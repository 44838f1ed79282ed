"""Conditioning in training: random dropout of captions and of subjects' references, and markers in captions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch

from facediffuser.prompts import IMAGE_MARKER


@dataclass(frozen=True)
class ConditionDropout:
    """One draw of the dropout: whether the caption is kept, and the indices of the subjects that keep their reference."""

    caption: bool
    subjects: tuple[int, ...]


def draw_condition_dropout(
    count: int, caption_drop: float, subject_keep: float, generator: torch.Generator
) -> ConditionDropout:
    """Draw which conditions of an image are used: first the caption as a whole, then each subject independently.

    Args:
        count: subjects that the caption names, >= 0.
        caption_drop: probability of an empty caption without subjects, 0..1.
        subject_keep: probability that a subject keeps its reference, 0..1.
        generator: source of the 1 + `count` random numbers.
    """
    draws = torch.rand(1 + count, generator=generator).tolist()
    if draws[0] < caption_drop:
        return ConditionDropout(False, ())
    return ConditionDropout(True, tuple(number for number, draw in enumerate(draws[1:]) if draw < subject_keep))


def subjects_in_caption(row: Mapping[str, Any], most: int) -> list[dict[str, Any]]:
    """Return the subjects of a prepared row in the order of its caption, `most` at most; of two that end together one."""
    return sorted({subject["end"]: subject for subject in row["subjects"]}.values(), key=itemgetter("end"))[:most]


def mark_caption(caption: str, ends: Sequence[int]) -> str:
    """Return the caption with `<|image|>` after each subject phrase.

    Args:
        caption: text without markers.
        ends: character offset just after each phrase, in any order; a repeated one counts once.
    """
    for end in sorted(set(ends), reverse=True):
        rest = caption[end:]
        caption = f"{caption[:end]} {IMAGE_MARKER}{rest}"
    return caption
