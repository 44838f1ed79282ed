"""A small byte-pair tokenizer in CLIP's format, learnt from the captions of the miniature world."""

from collections import Counter
from collections.abc import Iterable

import numpy as np
import torch
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import CLIPTokenizer

from tools.miniature_weights.merges import learn_merges

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 77


def make_tokenizer(texts: Iterable[str], merges: int = 800) -> CLIPTokenizer:
    """Return a CLIPTokenizer with at most `merges` merges learnt from `texts` and 77 tokens a text.

    Every byte, inside a word and at its end, is a token, so no text needs an unknown token. The end token has the highest
    id and pads as well, as in CLIP's own vocabulary.
    """
    normalizer = normalizers.Lowercase()
    words = Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    counts = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    # The library's own trainer settles ties differently from one call to the next.
    learnt = learn_merges(counts, merges)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in learnt)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    vocabulary[START] = len(vocabulary)
    vocabulary[END] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=learnt, model_max_length=MAX_LENGTH)


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]):
    """Return the token ids of texts as a (n, 77) int64 tensor, padded and cut as the pipeline does."""
    batch = tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, truncation=True)
    return torch.from_numpy(np.asarray(batch.input_ids, np.int64))
