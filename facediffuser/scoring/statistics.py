"""Means with bootstrap intervals, and differences of two methods on the same rows."""

from dataclasses import dataclass

import numpy as np

SAMPLES = 2000
NORMAL_FROM = 20_000
CHUNK_VALUES = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its 95% interval; NaN where there is nothing to average. `n`: values averaged."""

    mean: float
    low: float
    high: float
    n: int


def mean_interval(values: np.ndarray, seed: int = 0) -> Interval:
    """Return the mean of `values` with its 95% interval: percentiles of the means of 2,000 resamples.

    The same values and seed give the same interval. From 20,000 values on, the resampled means' limit is taken (mean
    plus and minus 1.96 standard errors), which differs by less than what is printed. One value has no width.
    """
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    count = len(values)
    if count == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    mean = float(values.mean())
    if count >= NORMAL_FROM:
        half = 1.959964 * float(values.std(ddof=1)) / count**0.5
        return Interval(mean, mean - half, mean + half, count)
    low, high = np.percentile(_resampled_means(values, seed), [2.5, 97.5])
    return Interval(mean, float(low), float(high), count)


def _resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    at_once = max(1, CHUNK_VALUES // len(values))
    means = []
    for start in range(0, SAMPLES, at_once):
        picks = generator.integers(0, len(values), (min(at_once, SAMPLES - start), len(values)))
        means.append(values[picks].mean(axis=1))
    return np.concatenate(means)


def paired_difference(ours: dict[object, float], theirs: dict[object, float], seed: int = 0) -> Interval:
    """Return the mean of `ours - theirs` over the rows both have (keys of the two), with its 95% interval."""
    shared = sorted(set(ours) & set(theirs), key=repr)
    return mean_interval(np.array([ours[key] - theirs[key] for key in shared]), seed)
