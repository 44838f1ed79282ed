"""Prompts with markers: which words name the subjects, and where they stand among the text encoder's tokens.

A prompt names its subjects in words and marks each word: `a man <|image|> and a woman <|image|> in a park`. The marker
is no token of its own; it says that the token before it carries the reference picture's embedding.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from facediffuser.errors import InputError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

IMAGE_MARKER = "<|image|>"
CLIP_TOKENS = 77


@dataclass(frozen=True)
class TokenizedPrompts:
    """Prompts as ids, with the places of their subjects.

    `input_ids` (b, n) int64 without markers; `subject_mask` (b, n) bool, true at the last token of a subject's words;
    `subject_counts` (b,) int64, true cells per row; `texts_without_markers` the prompts a scorer may read.
    """

    input_ids: "torch.Tensor"
    subject_mask: "torch.Tensor"
    subject_counts: "torch.Tensor"
    texts_without_markers: list[str]


def tokenize_with_markers(
    tokenizer, prompts: Sequence[str], lost: Literal["error", "drop"] = "error"
) -> TokenizedPrompts:
    """Return the prompts' ids, padded or cut to the tokenizer's length, and the places of their subjects.

    The ids are those of the tokenizer with the marker added as a special token, the marker's own ids left out; the
    tokenizer itself is not changed. A prompt that is too long is cut as the tokenizer cuts it, the end token kept, with
    a warning (the released code loses the end token there, in the fused embedding alone). Raises InputError for a
    marker at a prompt's start, two markers at one word, and a marker that is cut off; with `lost="drop"` a subject that
    is cut off is left out instead, and `subject_counts` says how many remain.
    """
    import torch  # here: what only reads markers has no need of it

    length = _length(tokenizer)
    rows, masks = [], []
    for prompt in prompts:
        ids, places = ids_and_places(tokenizer, prompt, lost)
        rows.append(ids + [tokenizer.pad_token_id] * (length - len(ids)))
        mask = torch.zeros(length, dtype=torch.bool)
        mask[places] = True
        masks.append(mask)
    subject_masks = torch.stack(masks)
    return TokenizedPrompts(
        input_ids=torch.tensor(rows, dtype=torch.int64),
        subject_mask=subject_masks,
        subject_counts=subject_masks.sum(dim=1),
        texts_without_markers=[without_markers(prompt) for prompt in prompts],
    )


def without_markers(prompt: str) -> str:
    """Return the prompt as a reader would write it, without markers: `a man <|image|>, smiling` is `a man, smiling`."""
    marker = re.escape(IMAGE_MARKER)
    spaced = re.sub(rf"\s*{marker}(?=\w)", " ", prompt)
    return re.sub(rf"\s*{marker}", "", spaced).strip()


def count_markers(prompt: str) -> int:
    """Return how many subjects the prompt marks."""
    return prompt.count(IMAGE_MARKER)


def ids_and_places(tokenizer, prompt: str, lost: Literal["error", "drop"] = "error") -> tuple[list[int], list[int]]:
    """Return a prompt's ids, cut to the tokenizer's length but not padded, and the places of its subjects in them.

    Raises InputError as `tokenize_with_markers` does; needs no torch.
    """
    return _cut(tokenizer, prompt, *_ids_and_places(tokenizer, prompt), _length(tokenizer), lost)


def _length(tokenizer) -> int:
    return tokenizer.model_max_length if tokenizer.model_max_length < 10**6 else CLIP_TOKENS


def _ids_and_places(tokenizer, prompt: str) -> tuple[list[int], list[int]]:
    # A special token splits the text before anything else happens to it, so the pieces between give the same ids.
    pieces = prompt.split(IMAGE_MARKER)
    ids, places = [tokenizer.bos_token_id], []
    for number, piece in enumerate(pieces):
        ids += tokenizer(piece, add_special_tokens=False, truncation=False, verbose=False).input_ids if piece else []
        if number == len(pieces) - 1:
            break
        if len(ids) == 1:
            raise InputError(f"{prompt!r}: {IMAGE_MARKER} at the start; put it after the word that names the subject")
        if places and places[-1] == len(ids) - 1:
            raise InputError(f"{prompt!r}: two {IMAGE_MARKER} after one word; give each subject a word of its own")
        places.append(len(ids) - 1)
    return [*ids, tokenizer.eos_token_id], places


def _cut(tokenizer, prompt: str, ids: list[int], places: list[int], length: int, lost: str):
    if len(ids) <= length:
        return ids, places
    kept = [place for place in places if place < length - 1]
    if len(kept) < len(places) and lost == "error":
        raise InputError(
            f"{prompt!r}: subject {len(kept) + 1} stands behind token {length - 2}, where the text encoder's input "
            "ends; shorten the prompt or name the subject earlier"
        )
    logger.warning("prompt of %d tokens is cut to %d: %r", len(ids), length, prompt)
    return [*ids[: length - 1], tokenizer.eos_token_id], kept
