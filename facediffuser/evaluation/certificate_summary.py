"""What a certificate says: paired differences of fast mode to exact mode, with intervals, and whether they are allowed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from facediffuser.evaluation.statistics import Interval, coded, mean_interval
from facediffuser.number_words import counted

LOSSES = {"ip": "IP", "pc": "PC"}


def summarise(
    rows: Sequence[Mapping[str, Any]], timings: Sequence[Mapping[str, Any]], max_loss: float
) -> dict[str, Any]:
    """Return what a certificate says, as the manifest holds it.

    Args:
        rows: of CERTIFICATE_SCHEMA, without images.
        timings: of each part: `rows`, `seconds` and `cost` of both modes.
        max_loss: IP or PC that may be lost.

    Returns:
        sample, pairs: rows of the sample, and those that both modes made; differences: fast minus exact of `ip`, `pc` and
        `faces` (share of images with as many faces as subjects), each with mean, low, high (95%) and n; means of both
        modes; mask_cells, ssim: means; images_per_second, unet_rows: of both modes; max_loss; verdict: `passed` where the
        intervals of IP and PC show that no more is lost, `failed` where one shows that more is, else `undecided`.
    """
    pairs = [row for row in rows if row["status"] == "ok"]
    levels = [coded([tuple(row["subject_ids"]) for row in pairs]), coded([row["prompt_id"] for row in pairs])]

    def values(mode: str, metric: str) -> np.ndarray:
        if metric == "faces":
            return np.array([float(row[f"{mode}_faces"] == len(row["subject_ids"])) for row in pairs])
        return np.array([row[f"{mode}_{metric}"] for row in pairs], np.float64)

    found = {
        name: mean_interval(values("fast", name) - values("exact", name), levels) for name in ("ip", "pc", "faces")
    }
    seconds = {mode: sum(one["seconds"][mode] for one in timings) for mode in ("fast", "exact")}
    made = sum(one["rows"] for one in timings)
    return {
        "sample": len(rows),
        "pairs": len(pairs),
        "differences": {name: _plain(interval) for name, interval in found.items()},
        "means": {
            mode: {name: _number(values(mode, name).mean()) for name in ("ip", "pc", "faces")} if pairs else {}
            for mode in ("fast", "exact")
        },
        "mask_cells": _mean([row["mask_cells"] for row in pairs]),
        "ssim": _mean([row["ssim"] for row in pairs]),
        "images_per_second": {mode: _number(made / spent) if spent else None for mode, spent in seconds.items()},
        "unet_rows": dict(timings[0]["cost"]) if timings else {},
        "max_loss": max_loss,
        "verdict": verdict([found[name] for name in LOSSES], max_loss),
    }


def verdict(differences: Sequence[Interval], max_loss: float) -> str:
    """Return what a certificate's intervals say of a loss: `passed`, `failed` or `undecided`.

    Args:
        differences: those of fast minus exact, of IP and PC.
        max_loss: the most that may be lost of either, above 0.
    """
    if any(interval.high < -max_loss for interval in differences):
        return "failed"
    return "passed" if all(interval.low >= -max_loss for interval in differences) else "undecided"


def failure(certificate: Mapping[str, Any], options: Sequence[str] = ()) -> str | None:
    """Return in one phrase what a failed certificate says was lost and what to change, None for one that did not fail.

    `options`: those that made the run faster, as on a command line.
    """
    if certificate["verdict"] != "failed":
        return None
    lost = [
        f"{title} {found['mean']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"
        for name, title in LOSSES.items()
        if (found := certificate["differences"][name])["high"] < -certificate["max_loss"]
    ]
    fewer_steps = any(option.startswith(("--speed", "--fast-steps")) for option in options)
    return (
        f"fast mode loses {' and '.join(lost)} against exact mode over {counted(certificate['pairs'], 'pair')}, more than --max-loss "
        f"{certificate['max_loss']:g}; leave {' and '.join(options) or 'fast mode'} out"
        + (", or give more --fast-steps" if fewer_steps else "")
    )


def _plain(interval: Interval) -> dict[str, Any]:
    return {
        "mean": _number(interval.mean),
        "low": _number(interval.low),
        "high": _number(interval.high),
        "n": interval.n,
    }


def _number(value: float) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _number(float(np.mean(known))) if known else None
