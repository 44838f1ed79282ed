"""The sample of scores that a card's plots are drawn from: all rows of a small dataset, a fair part of a large one."""

import numpy as np
import pytest

from facediffuser.evaluation import plots
from facediffuser.evaluation.score_sample import ScoreSample


def filled(order: np.ndarray, limit: int, piece: int = 700) -> ScoreSample:
    """A sample of rows whose ip tells their number, in categories of unequal size."""
    sample = ScoreSample(limit)
    for start in range(0, len(order), piece):
        part = order[start : start + piece]
        names = ["rare" if number % 10 == 0 else "usual" for number in part]
        sample.add([f"row-{number}" for number in part], names, part / len(order), np.full(len(part), 0.25))
    return sample


def test_a_small_dataset_is_there_whole_and_in_order():
    groups = filled(np.arange(1000), limit=1000).groups(7, "others")
    assert groups["rare"].ip == pytest.approx(np.arange(0, 1000, 10) / 1000)
    assert groups["usual"].count == len(groups["usual"].ip) == 900


def test_of_a_large_dataset_counts_and_sums_are_of_all_rows_and_values_of_as_many_as_are_kept():
    groups = filled(np.arange(20_000), limit=1000).groups(7, "others")
    assert [group.count for group in groups.values()] == [2000, 18_000]
    assert sum(len(group.ip) for group in groups.values()) == 1000
    assert groups["rare"].ip_sum == pytest.approx(np.arange(0, 20_000, 10).sum() / 20_000)
    assert groups["usual"].pc_sum == pytest.approx(0.25 * 18_000)


def test_the_rows_kept_are_a_fair_sample_and_do_not_depend_on_the_order_of_rows():
    order = np.arange(20_000)
    first, second = (filled(rows, 1000).groups(7, "others") for rows in (order, order[::-1]))
    for name in ("rare", "usual"):
        assert sorted(first[name].ip) == sorted(second[name].ip)
    assert len(first["rare"].ip) == pytest.approx(100, abs=30)
    assert first["usual"].ip.mean() == pytest.approx(0.5, abs=0.04)


def test_plots_say_how_many_rows_their_shapes_are_of(monkeypatch):
    monkeypatch.setattr(plots, "as_png", lambda figure: figure)
    whole, part = (filled(np.arange(9000), limit).groups(7, "others") for limit in (9000, 4500))
    for groups, shares, density in (
        (whole, "images, %", "images"),
        (part, "images, % (shapes: 4,500 of them)", "of 4,500 images"),
    ):
        ip, pc = plots.score_histograms(groups).axes
        assert ip.get_ylabel() == pc.get_ylabel() == shares
        labels = [text.get_text() for text in pc.get_legend().get_texts()]
        assert sorted(labels) == ["all (9000)", "rare (900)", "usual (8100)"]
        assert " mean 0.500" in [text.get_text() for text in ip.texts]
        assert plots.image_plane(groups).axes[-1].get_ylabel() == density
