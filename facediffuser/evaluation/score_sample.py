"""What is kept of a dataset's rows for plots and cards: counts and means of all, a fair sample, the highest."""

import hashlib
import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Generic, TypeVar

import numpy as np

LIMIT = 50_000

Item = TypeVar("Item")


def rank(text: str) -> bytes:
    """Return 8 bytes by which texts are chosen: as good as random, and the same whatever order they come in."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


class Highest(Generic[Item]):
    """Keeps the items with the highest keys, `most` of them; no two keys are equal."""

    def __init__(self, most: int):
        self.most = most
        self._heap: list[tuple[Any, Item]] = []

    def takes(self, key: Any) -> bool:
        """Return whether an item with this key would be kept."""
        return len(self._heap) < self.most or key > self._heap[0][0]

    def add(self, key: Any, item: Item) -> None:
        """Take an item."""
        if self.takes(key):
            (heapq.heappush if len(self._heap) < self.most else heapq.heapreplace)(self._heap, (key, item))

    def items(self) -> list[Item]:
        """Return the items kept, the highest first."""
        return [item for _, item in sorted(self._heap, key=itemgetter(0), reverse=True)]


@dataclass(frozen=True)
class Scores:
    """Scores of a category.

    ip, pc: float32 arrays (k,), of all its rows or of a fair sample; count: its rows; ip_sum, pc_sum: over all of them.
    """

    ip: np.ndarray
    pc: np.ndarray
    count: int
    ip_sum: float
    pc_sum: float


class ScoreSample:
    """Takes rows piece by piece and keeps all of them, or of more than 50,000 those whose ids' hashes are lowest."""

    def __init__(self, limit: int = LIMIT):
        self.limit = limit
        self.names: dict[str, int] = {}
        self.counts: Counter[int] = Counter()
        self.sums: dict[int, np.ndarray] = {}
        self._pieces: list[tuple[np.ndarray, ...]] = []
        self._held = 0

    def add(self, sample_ids: Sequence[str], categories: Sequence[str], ip: np.ndarray, pc: np.ndarray) -> None:
        """Take n rows.

        Args:
            sample_ids: n ids.
            categories: n categories.
            ip: (n,) without NaN.
            pc: (n,) without NaN.
        """
        if not len(sample_ids):
            return
        codes = np.array([self.names.setdefault(name, len(self.names)) for name in categories], np.int32)
        ranks = np.frombuffer(b"".join(map(rank, sample_ids)), ">u8").astype(np.uint64)
        for code in np.unique(codes):
            chosen = codes == code
            self.counts[int(code)] += int(chosen.sum())
            sums = np.array([ip[chosen].sum(dtype=np.float64), pc[chosen].sum(dtype=np.float64)])
            self.sums[int(code)] = self.sums.get(int(code), np.zeros(2)) + sums
        self._pieces.append((ranks, codes, ip.astype(np.float32), pc.astype(np.float32)))
        self._held += len(ranks)
        if self._held > 2 * self.limit:
            self._shorten()

    def _shorten(self) -> None:
        columns = tuple(np.concatenate(parts) for parts in zip(*self._pieces, strict=True))
        if self._held > self.limit:
            highest = np.partition(columns[0], self.limit - 1)[self.limit - 1]
            columns = tuple(column[columns[0] <= highest] for column in columns)
        self._pieces, self._held = [columns], len(columns[0])

    def groups(self, lines: int, others: str) -> dict[str, Scores]:
        """Return the scores by category, the largest first.

        Args:
            lines: how many categories are shown; beyond one more than these the smallest are taken together.
            others: what those are called.
        """
        if not self._pieces:
            return {}
        self._shorten()
        _, codes, ip, pc = self._pieces[0]
        largest = sorted(self.names, key=lambda name: (-self.counts[self.names[name]], name))
        named = largest if len(largest) <= lines + 1 else largest[:lines]
        members = {name: [self.names[name]] for name in sorted(named)}
        if len(named) < len(largest):
            members[others] = [self.names[name] for name in largest[lines:]]
        groups = {}
        for name, parts in members.items():
            chosen = np.isin(codes, parts)
            count = sum(self.counts[code] for code in parts)
            sums = sum((self.sums[code] for code in parts), np.zeros(2))
            groups[name] = Scores(ip[chosen], pc[chosen], count, float(sums[0]), float(sums[1]))
        return groups
