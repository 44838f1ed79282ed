"""Tables of IP and PC: the mean and its 95% interval for each method, number of subjects and category."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facediffuser.scoring.statistics import mean_interval

METRICS = ("ip", "pc")
OVERALL = "all"
NO_CATEGORY = "(none)"
SCORE_COLUMNS = ("method", "subject_ids", "category", "ip", "pc", "status")
TABLE_SCHEMA = pa.schema(
    [
        ("method", pa.string()),
        ("subjects", pa.int32()),
        ("category", pa.string()),
        ("metric", pa.string()),
        ("mean", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("n", pa.int64()),
    ]
)


@dataclass(frozen=True)
class ScoreRow:
    """One mean of the table: of `metric` (ip or pc) over `n` images of a method, number of subjects and category.

    `category` is `all` for the mean over every category; `low` and `high` are the ends of the 95% interval.
    """

    method: str
    subjects: int
    category: str
    metric: str
    mean: float
    low: float
    high: float
    n: int


def score_table(rows: pa.Table) -> list[ScoreRow]:
    """Return the means of a dataset's rows, sorted by method, number of subjects, category (`all` last), metric.

    `rows` needs the columns method, subject_ids, ip, pc, and uses category and status when it has them. Failed rows and
    rows without a score count in no mean.
    """
    if "status" in rows.column_names:
        rows = rows.filter(pc.equal(rows["status"], "ok"))
    methods = _codes(rows["method"], "unknown")
    categories = _codes(rows["category"] if "category" in rows.column_names else None, NO_CATEGORY, rows.num_rows)
    subjects = pc.list_value_length(rows["subject_ids"]).combine_chunks().to_numpy(zero_copy_only=False)
    values = {metric: rows[metric].combine_chunks().to_numpy(zero_copy_only=False) for metric in METRICS}
    return sorted(
        (
            ScoreRow(methods[1][method], int(count), category, metric, **asdict(mean_interval(values[metric][chosen])))
            for method, count, category, chosen in _groups(methods, subjects, categories)
            for metric in METRICS
        ),
        key=lambda row: (row.method, row.subjects, row.category == OVERALL, row.category, row.metric),
    )


def _codes(column: pa.ChunkedArray | None, missing: str, length: int = 0) -> tuple[np.ndarray, list[str]]:
    """A column of words as numbers and the words they stand for; nulls become `missing`."""
    if column is None:
        return np.zeros(length, np.int64), [missing]
    encoded = pc.fill_null(column.cast(pa.string()), missing).combine_chunks().dictionary_encode()
    return encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary.to_pylist()


def _groups(methods, subjects: np.ndarray, categories) -> Iterable[tuple[int, int, str, np.ndarray]]:
    for method in np.unique(methods[0]):
        of_method = methods[0] == method
        for count in np.unique(subjects[of_method]):
            chosen = of_method & (subjects == count)
            yield method, count, OVERALL, chosen
            for category in np.unique(categories[0][chosen]):
                yield method, count, categories[1][category], chosen & (categories[0] == category)


def as_arrow(rows: Sequence[ScoreRow]) -> pa.Table:
    """Return the rows as an Arrow table with the columns of `ScoreRow`."""
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=TABLE_SCHEMA)


def markdown(rows: Sequence[ScoreRow]) -> str:
    """Return the rows as a Markdown table: a line per method, number of subjects and category, IP and PC beside it.

    A value reads `0.514 (0.502 to 0.526)`: the mean and its 95% interval; the interval is left out for a single image.
    """
    lines: dict[tuple[str, int, str], dict[str, ScoreRow]] = {}
    for row in rows:
        lines.setdefault((row.method, row.subjects, row.category), {})[row.metric] = row
    text = ["| method | subjects | category | images | IP | PC |", "|---|---:|---|---:|---|---|"]
    for (method, subjects, category), metrics in lines.items():
        count = max(row.n for row in metrics.values())
        cells = [_value(metrics.get(metric)) for metric in METRICS]
        name, tag = method.replace("|", "\\|"), category.replace("|", "\\|")
        if category == OVERALL:
            name, tag = f"**{name}**", f"**{tag}**"
        text.append(f"| {name} | {subjects} | {tag} | {count} | {cells[0]} | {cells[1]} |")
    return "\n".join(text) + "\n"


def _value(row: ScoreRow | None) -> str:
    if row is None or row.n == 0:
        return "–"
    return f"{row.mean:.3f}" + (f" ({row.low:.3f} to {row.high:.3f})" if row.n > 1 else "")
