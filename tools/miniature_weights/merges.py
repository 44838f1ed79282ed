"""Byte-pair merges learnt from counted words, the same every time."""

from collections import Counter


def learn_merges(words: Counter[str], count: int, end: str = "</w>") -> list[tuple[str, str]]:
    """At most `count` merges, the most frequent neighbours first and equals in alphabetical order.

    words: how often each word occurs; a word starts as its letters, the last one marked with `end`. Pairs seen once are
    not merged. Source: Sennrich et al., arXiv 1508.07909, section 3.2.
    """
    spelt = [([*word[:-1], word[-1] + end], times) for word, times in sorted(words.items()) if word]
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for pieces, times in spelt:
            for pair in zip(pieces, pieces[1:], strict=False):
                pairs[pair] += times
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < 2:
            break
        merges.append(best)
        spelt = [(_merged(pieces, best), times) for pieces, times in spelt]
    return merges


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    result: list[str] = []
    for piece in pieces:
        # "aaa" merges from the left once: a piece just merged is never the first half of the same merge.
        if result and (result[-1], piece) == pair:
            result[-1] += piece
        else:
            result.append(piece)
    return result
