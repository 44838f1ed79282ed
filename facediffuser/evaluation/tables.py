"""Tables of scores: the mean and its 95% interval for each method, number of subjects and category, or subject."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facediffuser.evaluation.statistics import Interval, RunningMean, coded, mean_interval
from facediffuser.markup import Markdown, bold, markdown_table
from facediffuser.number_words import counted

METRICS = ("ip", "pc")
FACES = "faces"
TITLES = {"ip": "IP", "pc": "PC", FACES: "right faces"}
OVERALL = "all"
NO_CATEGORY = "(none)"
SCORE_COLUMNS = ("method", "subject_ids", "prompt_id", "category", "ip", "pc", "status")
_VALUES = [("metric", pa.string()), ("mean", pa.float64()), ("low", pa.float64()), ("high", pa.float64())]
TABLE_SCHEMA = pa.schema(
    [("method", pa.string()), ("subjects", pa.int32()), ("category", pa.string()), *_VALUES, ("n", pa.int64())]
)
SUBJECT_SCHEMA = pa.schema(
    [("method", pa.string()), ("subject_id", pa.string()), ("subjects", pa.int32()), *_VALUES, ("n", pa.int64())]
)
SHOWN_SUBJECTS = 30


@dataclass(frozen=True)
class ScoreRow:
    """One mean of the table: of `metric` over `n` images of a method, number of subjects and category.

    `metric` is ip, pc, faces (the share of images in which as many faces are found as there are subjects) or another
    scorer's column. `category` is `all` for the mean over every category; `low` and `high` are the ends of the 95%
    interval.
    """

    method: str
    subjects: int
    category: str
    metric: str
    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class SubjectRow:
    """One mean over the images of a method, with so many `subjects`, that show a subject: their own IP, the PC."""

    method: str
    subject_id: str
    subjects: int
    metric: str
    mean: float
    low: float
    high: float
    n: int


def score_table(rows: pa.Table, others: Sequence[str] = ()) -> list[ScoreRow]:
    """Return the means of a dataset's rows, sorted by method, number of subjects, category (`all` last), metric.

    Failed rows and rows without a score count in no mean. Intervals hold for other people and other prompts: both are
    resampled.

    Args:
        rows: with the columns method, subject_ids, prompt_id, ip, pc; category, status and face_count are used when
            they are there.
        others: further columns of numbers.
    """
    sums = ScoreSums(others)
    sums.add(rows)
    return sums.table()


class ScoreSums:
    """The sums a `score_table` is made of, for rows that come piece by piece.

    Memory grows with the different people, prompts, methods and categories, not with the rows.
    """

    def __init__(self, others: Sequence[str] = ()):
        self.others = tuple(others)
        self._levels: tuple[dict[str, int], dict[str, int]] = ({}, {})
        self._means: dict[tuple[str, int, str, str], RunningMean] = {}

    def add(self, rows: pa.Table) -> None:
        """Add rows with the columns that `score_table` asks for."""
        rows = _ok(rows)
        methods = _codes(rows["method"], "unknown")
        categories = _codes(rows["category"] if "category" in rows.column_names else None, NO_CATEGORY, rows.num_rows)
        subjects = pc.list_value_length(rows["subject_ids"]).combine_chunks().to_numpy(zero_copy_only=False)
        words = pc.binary_join(rows["subject_ids"], "\x1f"), rows["prompt_id"]
        factors = [_numbered(_codes(word, ""), levels) for word, levels in zip(words, self._levels, strict=True)]
        values = {metric: _floats(rows[metric]) for metric in (*METRICS, *self.others)}
        if "face_count" in rows.column_names:
            counted = _floats(rows["face_count"])
            values[FACES] = np.where(np.isnan(counted), np.nan, counted == subjects)
        for method, count, category, chosen in _groups(methods, subjects, categories):
            for metric, numbers in values.items():
                group = (methods[1][method], int(count), category, metric)
                mean = self._means.setdefault(group, RunningMean(len(factors)))
                mean.add(numbers[chosen], [factor[chosen] for factor in factors])

    def table(self) -> list[ScoreRow]:
        """Return the means of all rows taken so far, in the order of `score_table`."""
        order = {metric: place for place, metric in enumerate([*METRICS, FACES, *self.others])}
        return sorted(
            (ScoreRow(*group, **asdict(mean.interval())) for group, mean in self._means.items()),
            key=lambda row: (row.method, row.subjects, row.category == OVERALL, row.category, order[row.metric]),
        )


def subject_table(rows: pa.Table) -> list[SubjectRow]:
    """Return the means of IP and PC for each subject, sorted by method, number of subjects, subject, metric.

    Of images of several people each counts with their own value of IP, not with the minimum.

    Args:
        rows: with the columns method, subject_ids, prompt_id, ip, ip_per_subject, pc and status.
    """
    found: dict[tuple[str, int, str], dict[str, list]] = {}
    columns = ["method", "subject_ids", "prompt_id", "ip", "ip_per_subject", "pc"]
    for row in _ok(rows).select(columns).to_pylist():
        names = row["subject_ids"]
        own = row["ip_per_subject"] or [row["ip"]] * len(names)
        for name, ip in zip(names, own, strict=True):
            group = found.setdefault(
                (row["method"] or "unknown", len(names), name), {"ip": [], "pc": [], "together": [], "prompt": []}
            )
            group["together"].append(tuple(names))
            group["prompt"].append(row["prompt_id"])
            group["ip"].append(_number(ip))
            group["pc"].append(_number(row["pc"]))
    return [
        SubjectRow(method, name, count, metric, **asdict(mean_interval(np.array(group[metric]), factors)))
        for (method, count, name), group in sorted(found.items())
        for factors in [[coded(group["together"]), coded(group["prompt"])]]
        for metric in METRICS
    ]


def _ok(rows: pa.Table) -> pa.Table:
    return rows.filter(pc.equal(rows["status"], "ok")) if "status" in rows.column_names else rows


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    return column.cast(pa.float64()).combine_chunks().to_numpy(zero_copy_only=False)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _codes(column: pa.ChunkedArray | None, missing: str, length: int = 0) -> tuple[np.ndarray, list[str]]:
    """A column of words as numbers and the words they stand for; nulls become `missing`."""
    if column is None:
        return np.zeros(length, np.int64), [missing]
    encoded = pc.fill_null(column.cast(pa.string()), missing).combine_chunks().dictionary_encode()
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary.to_pylist()


def _numbered(coded: tuple[np.ndarray, list[str]], levels: dict[str, int]) -> np.ndarray:
    """A column's codes in the numbers that `levels` gives its words; words it has not seen yet are counted on."""
    codes, words = coded
    return np.array([levels.setdefault(word, len(levels)) for word in words], np.int64)[codes]


def _groups(methods, subjects: np.ndarray, categories) -> Iterable[tuple[int, int, str, np.ndarray]]:
    for method in np.unique(methods[0]):
        of_method = methods[0] == method
        for count in np.unique(subjects[of_method]):
            chosen = of_method & (subjects == count)
            yield method, count, OVERALL, chosen
            for category in np.unique(categories[0][chosen]):
                yield method, count, categories[1][category], chosen & (categories[0] == category)


def as_arrow(rows: Sequence[ScoreRow] | Sequence[SubjectRow], schema: pa.Schema = TABLE_SCHEMA) -> pa.Table:
    """Return the rows as an Arrow table with their columns.

    Args:
        rows: of `score_table` or `subject_table`.
        schema: TABLE_SCHEMA, or SUBJECT_SCHEMA for a `subject_table`.
    """
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=schema)


def from_arrow(table: pa.Table) -> list[ScoreRow]:
    """Return the rows that `as_arrow` wrote."""
    names = [field.name for field in fields(ScoreRow)]
    return [ScoreRow(**row) for row in table.select(names).to_pylist()]


def overall(rows: Sequence[ScoreRow]) -> dict[tuple[str, int, str], ScoreRow]:
    """Return the means over all categories by method, number of subjects and metric."""
    return {(row.method, row.subjects, row.metric): row for row in rows if row.category == OVERALL}


def metrics_of(rows: Sequence[ScoreRow]) -> list[str]:
    """Return the metrics of a table, IP and PC first."""
    return list(dict.fromkeys([*METRICS, *(row.metric for row in rows)]))


def title(metric: str) -> str:
    """Return what a metric is called above its column."""
    return TITLES.get(metric, metric.replace("_", " "))


def paper_markdown(rows: Sequence[ScoreRow]) -> Markdown:
    """Return the paper's table in Markdown: a line per method, IP, PC and right faces for one, two, ... subjects."""
    values, metrics = overall(rows), [metric for metric in metrics_of(rows) if metric in TITLES]
    counts = sorted({row.subjects for row in rows})
    head = ["method"]
    for count in counts:
        shown = "single" if count == 1 else counted(count, "subject")
        head += [f"{shown}: images", *(f"{shown}: {title(metric)}" for metric in metrics)]
    lines = []
    for method in sorted({row.method for row in rows}):
        cells: list[object] = [method]
        for count in counts:
            found = [values.get((method, count, metric)) for metric in metrics]
            cells += [max((row.n for row in found if row), default=0), *map(value_with_interval, found)]
        lines.append(cells)
    return markdown_table(head, lines)


def markdown(rows: Sequence[ScoreRow]) -> Markdown:
    """Return the rows as a Markdown table: a line per method, number of subjects and category, a column per metric.

    A value reads `0.514 (0.502 to 0.526)`: the mean and its 95% interval; the interval is left out for a single image.
    """
    lines: dict[tuple[str, int, str], dict[str, ScoreRow]] = {}
    for row in rows:
        lines.setdefault((row.method, row.subjects, row.category), {})[row.metric] = row
    metrics, cells = metrics_of(rows), []
    for (method, subjects, category), found in lines.items():
        count = max(row.n for row in found.values())
        name, tag = (bold(method), bold(category)) if category == OVERALL else (method, category)
        cells.append([name, subjects, tag, count, *(value_with_interval(found.get(metric)) for metric in metrics)])
    return markdown_table(["method", "subjects", "category", "images", *map(title, metrics)], cells, right=(1, 3))


def subject_markdown(rows: Sequence[SubjectRow]) -> Markdown:
    """Return a line per subject and number of subjects, a column of IP and one of PC per method.

    Of many subjects only those with the lowest IP (its mean over the methods) are shown, and the text says so.
    """
    methods = sorted({row.method for row in rows})
    values = {(row.method, row.subject_id, row.subjects, row.metric): row for row in rows}
    lines = sorted({(row.subjects, row.subject_id) for row in rows})

    def ip(line: tuple[int, str]) -> float:
        found = [values.get((method, line[1], line[0], "ip")) for method in methods]
        return float(np.mean([row.mean for row in found if row and row.n] or [np.inf]))

    shown = sorted(sorted(lines, key=ip)[:SHOWN_SUBJECTS])
    columns = [(method, metric) for method in methods for metric in METRICS]
    cells = [
        [name, count, *(value_with_interval(values.get((method, name, count, metric))) for method, metric in columns)]
        for count, name in shown
    ]
    head = ["subject", "subjects", *(f"{method}: {title(metric)}" for method, metric in columns)]
    left = len(lines) - len(shown)
    note = f"\nThe {len(shown)} with the lowest IP; {left} more are in `per_subject.parquet`.\n" if left else ""
    return Markdown(markdown_table(head, cells, right=(1,)) + note)


def value_with_interval(row: ScoreRow | SubjectRow | Interval | None) -> str:
    """Return `0.514 (0.502 to 0.526)`, `0.514` for a single image, a dash for none."""
    if row is None or row.n == 0:
        return "–"
    return f"{row.mean:.3f}" + (f" ({row.low:.3f} to {row.high:.3f})" if row.n > 1 else "")
