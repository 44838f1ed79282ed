"""Prompts with markers as tensors: token ids and the places of their subjects."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from facediffuser.prompts import ids_and_places, max_tokens, without_markers


@dataclass(frozen=True)
class TokenizedPrompts:
    """Prompts as ids, with the places of their subjects.

    `input_ids` (b, n) int64 without markers; `subject_mask` (b, n) bool, true at the last token of a subject's words;
    `subject_counts` (b,) int64, true cells per row; `texts_without_markers` the prompts a scorer may read.
    """

    input_ids: torch.Tensor
    subject_mask: torch.Tensor
    subject_counts: torch.Tensor
    texts_without_markers: list[str]


def tokenize_with_markers(
    tokenizer, prompts: Sequence[str], lost: Literal["error", "drop"] = "error"
) -> TokenizedPrompts:
    """Return the token ids of prompts, padded or cut to the tokenizer's length, and the positions of their subjects.

    The ids are those of the tokenizer with the marker added as a special token, the marker's own ids left out; the
    tokenizer itself is not changed. A prompt that is too long is cut as the tokenizer cuts it, the end token kept, with
    a warning (the released code loses the end token there, in the fused embedding alone).

    Args:
        tokenizer: a CLIP tokenizer.
        prompts: b prompts with markers.
        lost: what to do about a subject that is cut off: `error`, or `drop`, which leaves it out; `subject_counts` says how
            many remain.

    Raises:
        InputError: a marker stands at a prompt's start, two stand at one word, or one is cut off.
    """
    length = max_tokens(tokenizer)
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
