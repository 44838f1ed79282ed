"""Plots of scores, as PNG bytes: histograms, the IP-PC plane of images, the IP-PC plane of methods."""

import io
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from facediffuser.evaluation.score_sample import Scores
from facediffuser.evaluation.tables import METRICS, OVERALL, ScoreRow
from facediffuser.markup import one_line
from facediffuser.number_words import counted

# Okabe and Ito's colours: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D00", "#555555")
AXES = ("IP, identity preservation", "PC, prompt consistency")
MARKERS = "osD^vP*X"
MANY_POINTS = 4000


def score_histograms(groups: Mapping[str, Scores]) -> bytes:
    """Return a PNG of the distributions of IP and PC: a line per category over the histogram of all images.

    Args:
        groups: scores by category. Counts and means are of all images, the shapes of those whose values are there.
    """
    figure = Figure(figsize=(10.4, 4.2), layout="constrained")
    count = sum(scores.count for scores in groups.values())
    for metric, axis, name in zip(METRICS, figure.subplots(1, 2), AXES, strict=True):
        everything = _pooled(groups, metric)
        edges = _bin_edges(everything, from_zero=metric == "ip")
        weights = np.full(len(everything), 100.0 / max(len(everything), 1))
        axis.hist(everything, edges, weights=weights, color="#d8dde3", label=f"{OVERALL} ({count})")
        for colour, (category, scores) in zip(itertools.cycle(COLOURS), groups.items(), strict=False):
            values = getattr(scores, metric)
            shares = np.histogram(values, edges)[0] * 100.0 / max(len(values), 1)
            axis.stairs(shares, edges, color=colour, linewidth=1.8, label=_label(f"{category} ({scores.count})"))
        if count:
            mean = sum(getattr(scores, f"{metric}_sum") for scores in groups.values()) / count
            axis.axvline(mean, color="#333333", linewidth=1, linestyle="--")
            axis.annotate(
                f" mean {mean:.3f}",
                (mean, 1),
                xycoords=("data", "axes fraction"),
                va="top",
                fontsize=9,
                color="#333333",
            )
        drawn = "" if len(everything) == count else f" (shapes: {len(everything):,} of them)"
        style_axes(axis, name, f"images, %{drawn}")
        if metric == "pc" and groups:
            axis.legend(frameon=False, fontsize=9, title="category (images)", title_fontsize=9)
    return as_png(figure)


def image_plane(groups: Mapping[str, Scores]) -> bytes:
    """Return a PNG with a point per image: IP across, PC up, coloured by category; a density from 4,000 points on."""
    figure = Figure(figsize=(6.4, 5.0), layout="constrained")
    axis = figure.subplots()
    ip, pc = (_pooled(groups, metric) for metric in METRICS)
    if len(ip) >= MANY_POINTS:
        cells = axis.hexbin(ip, pc, gridsize=45, mincnt=1, bins="log", cmap="viridis", linewidths=0)
        figure.colorbar(
            cells,
            label="images"
            if len(ip) == sum(scores.count for scores in groups.values())
            else f"of {counted(len(ip), 'image')}",
        )
    else:
        for colour, (category, scores) in zip(itertools.cycle(COLOURS), groups.items(), strict=False):
            axis.scatter(scores.ip, scores.pc, s=16, alpha=0.7, color=colour, linewidths=0, label=_label(category))
        if groups:
            axis.legend(frameon=False, fontsize=9)
    style_axes(axis, *AXES)
    return as_png(figure)


def method_plane(rows: Sequence[ScoreRow]) -> bytes:
    """Return a PNG with one point per method and number of subjects: IP across, PC up, with their 95% intervals."""
    overall = {(row.method, row.subjects, row.metric): row for row in rows if row.category == OVERALL and row.n}
    figure = Figure(figsize=(6.8, 5.2), layout="constrained")
    axis = figure.subplots()
    counts = sorted({subjects for _, subjects, _ in overall})
    methods = sorted({method for method, _, _ in overall})
    for colour, method in zip(itertools.cycle(COLOURS), methods, strict=False):
        for marker, subjects in zip(itertools.cycle(MARKERS), counts, strict=False):
            ip, pc = (overall.get((method, subjects, metric)) for metric in ("ip", "pc"))
            if ip is None or pc is None:
                continue
            label = method if len(counts) == 1 else f"{method}, {counted(subjects, 'subject')}"
            axis.errorbar(
                ip.mean,
                pc.mean,
                xerr=_error_bars(ip),
                yerr=_error_bars(pc),
                fmt=marker,
                color=colour,
                capsize=3,
                markersize=8,
                elinewidth=1.4,
                label=_label(f"{label} ({ip.n})"),
            )
    if overall:
        axis.legend(frameon=False, fontsize=9, title="method (images)", title_fontsize=9)
    axis.margins(0.15)
    style_axes(axis, *AXES)
    return as_png(figure)


def _pooled(groups: Mapping[str, Scores], metric: str) -> np.ndarray:
    return np.concatenate([getattr(scores, metric) for scores in groups.values()]) if groups else np.zeros(0)


def _label(text: str) -> str:
    """The text as a legend shows it: a dollar sign would start mathematics, and a leading underscore hides the entry."""
    line = one_line(text).replace("$", r"\$")
    return f" {line}" if line.startswith("_") else line


def _error_bars(row: ScoreRow) -> np.ndarray:
    return np.array([[max(0.0, row.mean - row.low)], [max(0.0, row.high - row.mean)]])


def _bin_edges(values: np.ndarray, from_zero: bool) -> np.ndarray:
    if not len(values):
        return np.linspace(0, 1, 11)
    low, high = float(min(values.min(), 0.0) if from_zero else values.min()), float(values.max())
    high = max(high, low + 0.05)
    return np.linspace(low, high, int(np.clip(np.sqrt(len(values)), 8, 40)) + 1)


def style_axes(axis, across: str, up: str) -> None:
    """Name the axes of a plot and draw it without a frame, on a pale grid."""
    axis.set_xlabel(across)
    axis.set_ylabel(up)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#e6e8eb", linewidth=0.8)
    axis.set_axisbelow(True)


def as_png(figure: Figure) -> bytes:
    """Return a figure as a PNG; the same numbers give the same bytes."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    # Without the metadata matplotlib adds, the same numbers are the same bytes whatever its version string.
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
