"""Prompts with markers: which words name the subjects, and where they stand among the text encoder's tokens.

A prompt names its subjects in words and marks each word: `a man <|image|> and a woman <|image|> in a park`. The marker
is no token of its own; it says that the token before it carries the reference picture's embedding.
"""

import logging
import re
import unicodedata
from typing import Literal

from facediffuser.errors import InputError

logger = logging.getLogger(__name__)

IMAGE_MARKER = "<|image|>"
CLIP_TOKENS = 77
SHOWN_CHARACTERS = 40
# Of a prompt that a message quotes: a caption may be a book.
MOST_QUOTED = 300


def without_markers(prompt: str) -> str:
    """Return the prompt as a reader would write it: `a man <|image|>, smiling` becomes `a man, smiling`.

    Args:
        prompt: with or without markers.
    """
    # From the beginning of the space alone: tried from each place within, long space takes quadratic time.
    marker = rf"(?<!\s)\s*{re.escape(IMAGE_MARKER)}"
    spaced = re.sub(rf"{marker}(?=\w)", " ", prompt)
    return re.sub(marker, "", spaced).strip()


def count_markers(prompt: str) -> int:
    """Return how many subjects a prompt marks.

    Args:
        prompt: with or without markers.
    """
    return prompt.count(IMAGE_MARKER)


def ends_in_word(text: str) -> bool:
    """Return whether a text ends, apart from space, in a letter, a digit or a sign that belongs to one.

    Args:
        text: any text.
    """
    end = text.rstrip()[-1:]
    return end.isalnum() or unicodedata.category(end or " ").startswith("M")


def require_marked_words(prompt: str, where: str = "") -> None:
    """Check that every marker of a prompt follows a word.

    The marker gives the token before it to the subject: after `a woman, ` that would be the comma.

    Args:
        prompt: with markers.
        where: named in the error, such as `prompts.jsonl:3`.

    Raises:
        InputError: a marker follows something else than the end of a word.
    """
    for number, piece in enumerate(prompt.split(IMAGE_MARKER)[:-1], 1):
        shown = piece.strip()[-SHOWN_CHARACTERS:]
        if number > 1 and not shown:
            problem = f"two {IMAGE_MARKER} after one word; give each subject a word of its own"
        elif not shown:
            problem = f"{IMAGE_MARKER} at the start; put it after the word that names the subject"
        elif not ends_in_word(piece):
            problem = f"{IMAGE_MARKER} number {number} stands after {shown!r}; put it right after the word"
        else:
            continue
        raise InputError(f"{where or _quoted(prompt)}: {problem}")


def ids_and_places(tokenizer, prompt: str, lost: Literal["error", "drop"] = "error") -> tuple[list[int], list[int]]:
    """Return the token ids of a prompt and the positions of its subjects in them; needs no torch.

    Args:
        tokenizer: a CLIP tokenizer.
        prompt: with markers.
        lost: as for `tokenize_with_markers`.

    Returns:
        The ids, cut to the tokenizer's length but not padded, and the index of each subject's token.

    Raises:
        InputError: as `tokenize_with_markers`.
    """
    return _cut(tokenizer, prompt, *_ids_and_places(tokenizer, prompt), max_tokens(tokenizer), lost)


def max_tokens(tokenizer) -> int:
    """Return how many tokens the text encoder takes.

    Args:
        tokenizer: of the text encoder; 77 where it names no limit.
    """
    return tokenizer.model_max_length if tokenizer.model_max_length < 10**6 else CLIP_TOKENS


def _quoted(prompt: str) -> str:
    return repr(prompt if len(prompt) <= MOST_QUOTED else f"{prompt[:MOST_QUOTED]}…")


def _ids_and_places(tokenizer, prompt: str) -> tuple[list[int], list[int]]:
    # A special token splits the text before anything else happens to it, so the pieces between give the same ids.
    pieces = prompt.split(IMAGE_MARKER)
    ids: list[int] = [tokenizer.bos_token_id]
    places: list[int] = []
    for number, piece in enumerate(pieces):
        ids += tokenizer(piece, add_special_tokens=False, truncation=False, verbose=False).input_ids if piece else []
        if number == len(pieces) - 1:
            break
        if len(ids) == 1:
            raise InputError(
                f"{_quoted(prompt)}: {IMAGE_MARKER} at the start; put it after the word that names the subject"
            )
        if places and places[-1] == len(ids) - 1:
            raise InputError(
                f"{_quoted(prompt)}: two {IMAGE_MARKER} after one word; give each subject a word of its own"
            )
        places.append(len(ids) - 1)
    return [*ids, tokenizer.eos_token_id], places


def _cut(tokenizer, prompt: str, ids: list[int], places: list[int], length: int, lost: str):
    if len(ids) <= length:
        return ids, places
    kept = [place for place in places if place < length - 1]
    if len(kept) < len(places) and lost == "error":
        raise InputError(
            f"{_quoted(prompt)}: subject {len(kept) + 1} stands behind token {length - 2}, where the text encoder's input "
            "ends; shorten the prompt or name the subject earlier"
        )
    logger.warning("prompt of %d tokens is cut to %d: %s", len(ids), length, _quoted(prompt))
    return [*ids[: length - 1], tokenizer.eos_token_id], kept
