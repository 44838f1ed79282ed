"""Plots of what is known of a dataset's faces, as PNG bytes: whose they are, and how they are turned and how large."""

import numpy as np
from matplotlib.figure import Figure

from facediffuser.evaluation.face_facts import ANGLES, COSINES, MARGINS, SIZES, FaceFacts
from facediffuser.evaluation.plots import COLOURS, as_png, style_axes
from facediffuser.number_words import counted


def identity_plots(facts: FaceFacts) -> bytes:
    """Return a PNG of three distributions: similarity to the own and the nearest other subject, pairs of faces, ip_margin."""
    figure = Figure(figsize=(13.2, 3.9), layout="constrained")
    to_references, pairs, margins = figure.subplots(1, 3)
    edges, own, other = _joined_bins(COSINES, facts.own, facts.other)
    _steps(to_references, own, edges, COLOURS[0], "own subject")
    _steps(to_references, other, edges, COLOURS[3], "nearest other subject")
    style_axes(to_references, "cosine of a face and a subject's reference", "faces, %")
    _zoom(to_references, own + other, edges)
    _legend(to_references)
    if facts.pairs is None:
        pairs.text(
            0.5, 0.5, "needs embeddings, and images\nof several subjects", ha="center", va="center", color="#6c727a"
        )
        pairs.set_axis_off()
    else:
        both = (np.histogram(values, COSINES)[0] for values in (facts.pairs.within, facts.pairs.between))
        edges, within, between = _joined_bins(COSINES, *both)
        _steps(pairs, within, edges, COLOURS[0], f"same subject ({counted(len(facts.pairs.within), 'pair')})")
        _steps(pairs, between, edges, COLOURS[3], f"different subjects ({len(facts.pairs.between):,})")
        label = f"equal error rate {100 * facts.pairs.rate:.1f}%"
        pairs.axvline(facts.pairs.threshold, color="#333333", linewidth=1, linestyle="--", label=label)
        style_axes(pairs, "cosine of two images' faces", "pairs, %")
        _zoom(pairs, within + between, edges)
        _legend(pairs)
    edges, counts = _joined_bins(MARGINS, facts.margins)
    _steps(margins, counts, edges, COLOURS[2], "images")
    margins.axvline(
        0, color="#333333", linewidth=1, linestyle="--", label=f"below 0: {100 * facts.wrong / facts.images:.1f}%"
    )
    style_axes(margins, "ip_margin", "images, %")
    _zoom(margins, counts, edges)
    _legend(margins)
    return as_png(figure)


def pose_plots(facts: FaceFacts) -> bytes:
    """Return a PNG of the distributions of yaw, pitch, roll and size of the faces that have a subject."""
    figure = Figure(figsize=(13.2, 3.4), layout="constrained")
    *angles, sizes = figure.subplots(1, 4)
    titles = (
        "yaw, degrees (> 0: looks right)",
        "pitch, degrees (> 0: looks up)",
        "roll, degrees (> 0: tilted clockwise)",
    )
    for axis, title, counts in zip(angles, titles, (facts.yaw, facts.pitch, facts.roll), strict=True):
        _steps(axis, counts, ANGLES, COLOURS[0], "faces")
        style_axes(axis, title, "faces, %")
        axis.set_xticks([-90, -45, 0, 45, 90])
    there = np.flatnonzero(facts.sizes)
    first, last = (there[0], there[-1] + 1) if len(there) else (0, 1)
    shares = _shares(facts.sizes)[first:last]
    names = [
        f"{SIZES[n]:.0f}–{SIZES[n + 1]:.0f}" if n + 2 < len(SIZES) else f"≥ {SIZES[n]:.0f}" for n in range(first, last)
    ]
    sizes.bar(range(len(shares)), shares, color=COLOURS[0])
    sizes.set_xticks(range(len(shares)), names, rotation=45 if len(names) > 4 else 0, fontsize=8)
    style_axes(sizes, "face's shorter side, px", "faces, %")
    return as_png(figure)


def _steps(axis, counts: np.ndarray, edges: np.ndarray, colour: str, label: str) -> None:
    axis.stairs(_shares(counts), edges, color=colour, fill=True, alpha=0.3)
    axis.stairs(_shares(counts), edges, color=colour, linewidth=1.6, label=label)


def _joined_bins(edges: np.ndarray, *series: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return edges and counts with neighbouring bins joined where there are few values: single ones would stand alone."""
    fewest = min(int(counts.sum()) for counts in series)
    joined = 5 if fewest < 200 else 2 if fewest < 1000 else 1
    return edges[::joined], *(counts.reshape(-1, joined).sum(axis=1) for counts in series)


def _shares(counts: np.ndarray) -> np.ndarray:
    return counts * 100.0 / max(int(counts.sum()), 1)


def _zoom(axis, counts: np.ndarray, edges: np.ndarray) -> None:
    """Show the part of the axis where there is something, and a little beside it."""
    there = np.flatnonzero(counts)
    if len(there):
        room = edges[1] - edges[0]
        axis.set_xlim(edges[there[0]] - room, edges[there[-1] + 1] + room)


def _legend(axis) -> None:
    low, high = axis.get_ylim()
    axis.set_ylim(low, high * 1.35)  # room above the curves
    axis.legend(frameon=False, fontsize=9, loc="upper left")
