"""Means with bootstrap intervals, and differences of two methods on the same rows."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

SAMPLES = 2000
NORMAL_FROM = 20_000
CHUNK_VALUES = 4_000_000
NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its 95% interval; NaN where there is nothing to average. `n`: values averaged."""

    mean: float
    low: float
    high: float
    n: int


def mean_interval(values: np.ndarray, factors: Sequence[np.ndarray] = (), seed: int = 0) -> Interval:
    """Return the mean of `values` with its 95% interval: percentiles of the means of 2,000 resamples.

    `factors`, an array of codes per factor, say which subjects and which prompt a value belongs to. Images of one person
    are alike, and so are those of one prompt: what is resampled then are the people and the prompts, each for
    themselves, and a value counts as often as both of its own were drawn (the pigeonhole bootstrap, Owen 2007). A factor of
    which there is only one level is left out; without any, the values themselves are resampled.

    The same values and seed give the same interval. From 20,000 values on, the resampled means' limit is taken (mean
    plus and minus 1.96 standard errors), which differs by less than what is printed. One value has no width.
    """
    values = np.asarray(values, np.float64)
    known = ~np.isnan(values)
    values = values[known]
    count = len(values)
    if count == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    mean = float(values.mean())
    codes = [np.unique(np.asarray(factor)[known], return_inverse=True)[1] for factor in factors]
    codes = [code for code in codes if code.max() > 0] or [np.arange(count)]
    if count >= NORMAL_FROM:
        half = NORMAL_95 * _standard_error(values - mean, codes)
        return Interval(mean, mean - half, mean + half, count)
    low, high = np.percentile(_resampled_means(values, codes, seed), [2.5, 97.5])
    return Interval(mean, float(low), float(high), count)


def _standard_error(residuals: np.ndarray, codes: Sequence[np.ndarray]) -> float:
    """The standard error of a mean whose values share each factor's levels: the factors' variances add up."""
    variance = 0.0
    for code in codes:
        sums = np.bincount(code, residuals)
        variance += float((sums**2).sum()) * len(sums) / max(len(sums) - 1, 1)
    return variance**0.5 / len(residuals)


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
    """Return a number for each level, equal for equal ones, counted from 0 in their order."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(level, len(numbers)) for level in levels], np.int64)


def paired_difference(
    ours: Mapping[Hashable, float],
    theirs: Mapping[Hashable, float],
    factors: Sequence[Callable[[Hashable], Hashable]] = (),
    seed: int = 0,
) -> Interval:
    """Return the mean of `ours - theirs` over the rows both have (keys of the two), with its 95% interval.

    `factors` tell a key's level of each factor of `mean_interval`.
    """
    shared = sorted(set(ours) & set(theirs), key=repr)
    levels = [coded([factor(key) for key in shared]) for factor in factors]
    return mean_interval(np.array([ours[key] - theirs[key] for key in shared]), levels, seed)
