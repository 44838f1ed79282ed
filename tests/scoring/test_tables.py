"""Tables of scores: right means, honest intervals, the same every time."""

import numpy as np
import pyarrow as pa
import pytest

from facediffuser.evaluation import compare
from facediffuser.evaluation.statistics import NORMAL_FROM, RunningMean, mean_interval, paired_difference
from facediffuser.evaluation.tables import ScoreSums, as_arrow, markdown, score_table


def scored(*rows: tuple) -> pa.Table:
    names = ("sample_id", "method", "subject_ids", "prompt_id", "category", "ip", "pc", "status")
    return pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows])


ROWS = scored(
    ("1", "ours", ["ada"], "p", "style", 0.2, 0.20, "ok"),
    ("2", "ours", ["ada"], "q", "context", 0.6, 0.30, "ok"),
    ("3", "ours", ["ada", "bob"], "p", "style", 0.1, 0.10, "ok"),
    ("4", "ours", ["ada"], "q", None, None, None, "failed"),
    ("1", "theirs", ["ada"], "p", "style", 0.1, 0.25, "ok"),
    ("2", "theirs", ["ada"], "q", "context", 0.3, 0.30, "ok"),
)


def test_means_are_by_method_number_of_subjects_and_category_with_all_last():
    table = [(row.method, row.subjects, row.category, row.metric, row.mean, row.n) for row in score_table(ROWS)]
    assert table[:6] == [
        ("ours", 1, "context", "ip", 0.6, 1),
        ("ours", 1, "context", "pc", 0.3, 1),
        ("ours", 1, "style", "ip", 0.2, 1),
        ("ours", 1, "style", "pc", 0.2, 1),
        ("ours", 1, "all", "ip", pytest.approx(0.4), 2),
        ("ours", 1, "all", "pc", pytest.approx(0.25), 2),
    ]
    assert [row[:3] for row in table[6:]][::2] == [
        ("ours", 2, "style"), ("ours", 2, "all"), ("theirs", 1, "context"), ("theirs", 1, "style"), ("theirs", 1, "all")
    ]  # fmt: skip


def test_failed_rows_count_in_no_mean():
    assert sum(row.n for row in score_table(ROWS) if row.category == "all" and row.metric == "ip") == 5


def test_the_table_of_no_rows_is_empty():
    assert score_table(ROWS.slice(0, 0)) == []
    assert markdown([]).count("\n") == 2


def test_the_parquet_has_the_promised_columns():
    columns = ["method", "subjects", "category", "metric", "mean", "low", "high", "n"]
    assert as_arrow(score_table(ROWS)).column_names == columns


def test_markdown_shows_mean_and_interval_and_survives_a_bar_in_a_name():
    text = markdown(score_table(scored(("1", "a|b", ["x"], "p", "c", 0.5, 0.25, "ok"))))
    assert "| **a\\|b** | 1 | **all** | 1 | 0.500 | 0.250 |" in text
    many = markdown(score_table(ROWS))
    assert "| **ours** | 1 | **all** | 2 | 0.400 (0.200 to 0.600) |" in many


def test_an_interval_holds_the_true_mean_about_95_times_in_100():
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        interval = mean_interval(generator.beta(2, 3, 60))
        held += interval.low <= 0.4 <= interval.high
    assert 180 <= held <= 199


def test_the_same_values_give_the_same_interval_and_missing_ones_do_not_count():
    values = np.random.default_rng(0).random(50)
    assert mean_interval(values) == mean_interval(values.copy())
    assert mean_interval(np.append(values, np.nan)) == mean_interval(values)
    assert mean_interval(np.array([])).n == 0 and np.isnan(mean_interval(np.array([])).mean)


def test_the_interval_of_many_values_agrees_with_resampling():
    values = np.random.default_rng(0).beta(2, 3, NORMAL_FROM)
    limit, resampled = mean_interval(values), mean_interval(values[:-1])
    assert limit.low == pytest.approx(resampled.low, abs=3e-4)
    assert limit.high == pytest.approx(resampled.high, abs=3e-4)


def test_paired_differences_use_the_shared_rows_alone():
    interval = paired_difference({"a": 1.0, "b": 3.0, "c": 9.0}, {"a": 0.5, "b": 2.0, "d": 9.0})
    assert (interval.mean, interval.n) == (0.75, 2)


def test_methods_are_compared_on_the_rows_both_made():
    found = {(item.metric, item.subjects): item for item in compare.differences(ROWS)}
    assert set(found) == {("ip", 1), ("pc", 1)}
    ip = found["ip", 1]
    assert (ip.method, ip.other, ip.interval.n) == ("ours", "theirs", 2)
    assert ip.interval.mean == pytest.approx(0.2)
    assert found["pc", 1].interval.mean == pytest.approx(-0.025)


def test_a_constant_lead_is_sure_where_the_means_alone_overlap():
    generator = np.random.default_rng(0)
    base = generator.random(40)
    rows = [
        (f"{number:03d}", name, ["ada"], "p", "c", float(base[number] + lead), 0.2, "ok")
        for name, lead in (("better", 0.05), ("worse", 0.0))
        for number in range(40)
    ]
    table = scored(*rows)
    better, worse = (row for row in score_table(table) if row.category == "all" and row.metric == "ip")
    assert better.low < worse.high
    assert "| better − worse | 1 | 40 | **+0.050** (+0.050 to +0.050) |" in compare.markdown(compare.differences(table))


def test_an_interval_holds_for_other_people_and_prompts_not_only_for_more_images_of_these():
    generator = np.random.default_rng(2)
    held = {"both": 0, "images alone": 0}
    for _ in range(60):
        people, prompts = generator.normal(0, 0.1, 15), generator.normal(0, 0.05, 20)
        values = people[:, None, None] + prompts[None, :, None] + generator.normal(0, 0.05, (15, 20, 2))
        person, prompt, _ = np.indices(values.shape)
        both = mean_interval(values.ravel(), [person.ravel(), prompt.ravel()])
        alone = mean_interval(values.ravel())
        held["both"] += both.low <= 0 <= both.high
        held["images alone"] += alone.low <= 0 <= alone.high
    assert 53 <= held["both"] <= 60 and held["images alone"] < 32


def test_the_limit_of_many_values_agrees_with_resampling_people_and_prompts():
    generator = np.random.default_rng(3)
    shape = (50, 40, NORMAL_FROM // 2000)
    values = generator.normal(0, 1, (50, 1, 1)) + generator.normal(0, 0.5, (1, 40, 1)) + generator.normal(0, 1, shape)
    factors = [part.ravel() for part in np.indices(shape)[:2]]
    limit = mean_interval(values.ravel(), factors)
    resampled = mean_interval(values.ravel()[:-1], [factor[:-1] for factor in factors])
    assert limit.high - limit.low == pytest.approx(resampled.high - resampled.low, rel=0.1)


def test_a_factor_of_one_level_is_left_out():
    values = np.random.default_rng(0).random(30)
    prompts = np.arange(30) % 6
    assert mean_interval(values, [np.zeros(30), prompts]) == mean_interval(values, [prompts])
    assert mean_interval(values, [np.zeros(30)]) == mean_interval(values)


@pytest.mark.parametrize("count", [50, NORMAL_FROM + 3000])
def test_values_that_come_piece_by_piece_give_the_interval_of_them_all(count):
    generator = np.random.default_rng(4)
    factors = [generator.integers(0, 40, count), generator.integers(0, 7, count)]
    values = np.where(generator.random(count) < 0.1, np.nan, generator.random(count) + factors[0] / 40)
    whole, pieces = mean_interval(values, factors), RunningMean(2)
    for part in np.array_split(np.arange(count), 9):
        pieces.add(values[part], [factor[part] for factor in factors])
    found = pieces.interval()
    assert found.n == whole.n == (~np.isnan(values)).sum()
    assert (found.mean, found.low, found.high) == pytest.approx((whole.mean, whole.low, whole.high), abs=1e-12)


def test_the_limit_is_the_textbooks_standard_error_of_each_factors_levels():
    generator = np.random.default_rng(5)
    codes = generator.integers(0, 30, NORMAL_FROM)
    values = generator.random(NORMAL_FROM) * 3 + codes
    residuals = np.array([(values[codes == level] - values.mean()).sum() for level in range(30)])
    error = np.sqrt((residuals**2).sum() * 30 / 29) / NORMAL_FROM
    assert mean_interval(values, [codes]).high == pytest.approx(values.mean() + 1.959964 * error, rel=1e-9)
    alone = mean_interval(values)
    assert alone.high - alone.mean == pytest.approx(1.959964 * values.std(ddof=1) / NORMAL_FROM**0.5, rel=1e-9)


def test_of_many_values_only_sums_are_kept():
    pieces = RunningMean(1)
    for number in range(100):
        pieces.add(np.full(1000, number / 100), [np.arange(1000) % 5])
    assert pieces.count == 100_000 and pieces._held < NORMAL_FROM
    assert pieces.interval().mean == pytest.approx(0.495)


def test_rows_that_come_piece_by_piece_give_the_same_table():
    sums = ScoreSums()
    for start in range(ROWS.num_rows):
        sums.add(ROWS.slice(start, 1))
    assert sums.table() == score_table(ROWS)
