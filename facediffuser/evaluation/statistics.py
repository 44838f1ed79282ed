"""Means with bootstrap intervals, and differences of two methods on the same rows."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

SAMPLES = 2000
NORMAL_FROM = 20_000
CHUNK_VALUES = 4_000_000
Key = TypeVar("Key", bound=Hashable)
NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its 95% interval; NaN where there is nothing to average. `n`: values averaged."""

    mean: float
    low: float
    high: float
    n: int


def mean_interval(values: np.ndarray, factors: Sequence[np.ndarray] = (), seed: int = 0) -> Interval:
    """Return the mean of values with its 95% interval: percentiles of the means of 2,000 resamples.

    Images of one person are alike, and so are those of one prompt: with factors, what is resampled are the people and the
    prompts, each for themselves, and a value counts as often as both of its own were drawn (the pigeonhole bootstrap,
    Owen 2007). A factor of which there is only one level is left out; without any, the values themselves are resampled.

    The same values and seed give the same interval. From 20,000 values on, the resampled means' limit is taken (mean
    plus and minus 1.96 standard errors), which differs by less than what is printed. One value has no width.

    Args:
        values: (n,), NaN for one that is missing.
        factors: for each factor the codes (n,) of its levels: which subjects, which prompt a value belongs to.
        seed: of the resampling.
    """
    running = RunningMean(len(factors), seed)
    running.add(values, [np.unique(np.asarray(factor), return_inverse=True)[1] for factor in factors])
    return running.interval()


class RunningMean:
    """The mean and interval of values that come piece by piece.

    At most the 20,000 values from which on the limit holds are kept, of more there are sums: memory grows with the factors'
    levels, not with the values.
    """

    def __init__(self, factors: int = 0, seed: int = 0):
        self.count = 0
        self._seed = seed
        self._total = self._squares = 0.0
        self._levels = [np.zeros((2, 0)) for _ in range(factors)]
        self._pieces: list[tuple[np.ndarray, ...]] = []
        self._held = 0

    def add(self, values: np.ndarray, codes: Sequence[np.ndarray] = ()) -> None:
        """Take values.

        Args:
            values: (n,), NaN for one that is missing.
            codes: for each factor the numbers (n,) of their levels, from 0 on.
        """
        values = np.asarray(values, np.float64)
        known = ~np.isnan(values)
        self._pieces.append((values[known], *(code[known] for code in codes)))
        self.count += int(known.sum())
        self._held += int(known.sum())
        if self._held >= NORMAL_FROM:
            self._sum_up()

    def _sum_up(self) -> None:
        values, *codes = self._together()
        self._pieces, self._held = [], 0
        self._total += float(values.sum())
        self._squares += float((values**2).sum())
        for factor, code in enumerate(codes):
            known = self._levels[factor]
            length = max(known.shape[1], int(code.max(initial=-1)) + 1)
            sums = np.stack([np.bincount(code, values, length), np.bincount(code, minlength=length).astype(np.float64)])
            sums[:, : known.shape[1]] += known
            self._levels[factor] = sums

    def _together(self) -> list[np.ndarray]:
        return [np.concatenate(parts) for parts in zip(*self._pieces, strict=True)]

    def interval(self) -> Interval:
        """Return the mean of all values taken so far with its 95% interval."""
        if self.count == 0:
            return Interval(float("nan"), float("nan"), float("nan"), 0)
        if self.count >= NORMAL_FROM:
            if self._held:
                self._sum_up()
            mean = self._total / self.count
            half = NORMAL_95 * self._standard_error(mean)
            return Interval(mean, mean - half, mean + half, self.count)
        values, *factors = self._together()
        codes = [np.unique(factor, return_inverse=True)[1] for factor in factors]
        codes = [code for code in codes if code.max() > 0] or [np.arange(self.count)]
        low, high = np.percentile(_resampled_means(values, codes, self._seed), [2.5, 97.5])
        return Interval(float(values.mean()), float(low), float(high), self.count)

    def _standard_error(self, mean: float) -> float:
        """The standard error of a mean whose values share each factor's levels: the factors' variances add up."""
        present = [levels[:, levels[1] > 0] for levels in self._levels]
        spread = [
            float(((sums - counts * mean) ** 2).sum()) * len(sums) / (len(sums) - 1)
            for sums, counts in present
            if len(sums) > 1
        ]
        alone = max(self._squares - self.count * mean**2, 0.0) * self.count / (self.count - 1)
        return (sum(spread) if spread else alone) ** 0.5 / self.count


def _resampled_means(values: np.ndarray, codes: Sequence[np.ndarray], seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    at_once = max(1, CHUNK_VALUES // len(values))
    means = []
    for start in range(0, SAMPLES, at_once):
        size = min(at_once, SAMPLES - start)
        weights = np.ones((size, len(values)))
        for code in codes:
            levels = int(code.max()) + 1
            weights *= generator.multinomial(levels, np.full(levels, 1 / levels), size)[:, code]
        total = weights.sum(axis=1)
        # People and prompts may be drawn that no image has together; such a draw says nothing.
        means.append((weights @ values)[total > 0] / total[total > 0])
    return np.concatenate(means)


def coded(levels: Sequence[Hashable]) -> np.ndarray:
    """Return a number for each level, equal for equal ones, counted from 0 in their order.

    Args:
        levels: n levels.

    Returns:
        (n,), int64.
    """
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(level, len(numbers)) for level in levels], np.int64)


def paired_difference(
    ours: Mapping[Key, float],
    theirs: Mapping[Key, float],
    factors: Sequence[Callable[[Key], Hashable]] = (),
    seed: int = 0,
) -> Interval:
    """Return the mean of `ours - theirs` over the rows both have, with its 95% interval.

    Args:
        ours: values by row.
        theirs: values by row.
        factors: functions from a row's key to its level of each factor of `mean_interval`.
        seed: of the resampling.
    """
    shared = sorted(set(ours) & set(theirs), key=repr)
    levels = [coded([factor(key) for key in shared]) for factor in factors]
    return mean_interval(np.array([ours[key] - theirs[key] for key in shared]), levels, seed)
