"""Methods against each other on the rows they share: same subjects, same prompt, same instance."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import pyarrow as pa

from facediffuser.evaluation.statistics import Interval, paired_difference
from facediffuser.evaluation.tables import METRICS, title
from facediffuser.markup import Markdown, bold, markdown_table

DIFFERENCE_SCHEMA = pa.schema(
    [
        ("method", pa.string()),
        ("other", pa.string()),
        ("subjects", pa.int32()),
        ("metric", pa.string()),
        ("mean", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("n", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Difference:
    """The mean of `method` minus `other` in one metric over the rows both made, for one number of subjects."""

    method: str
    other: str
    subjects: int
    metric: str
    interval: Interval


def differences(rows: pa.Table, seed: int = 0, others: Sequence[str] = ()) -> list[Difference]:
    """Return the paired differences of every two methods of a table of scored rows.

    Rows are paired by subjects, prompt and instance: the n-th image of a method for a prompt and subjects, by
    sample_id. Failed rows pair with nothing.

    Args:
        rows: with sample_id, method, subject_ids, prompt_id, ip, pc, status and the columns of `others`.
        seed: that of the bootstrap.
        others: further columns of numbers to compare.
    """
    metrics = (*METRICS, *others)
    values, found = paired_values(rows, metrics), []
    methods = sorted({method for method, _, _ in values})
    for (first, second), count, metric in itertools.product(
        itertools.combinations(methods, 2), sorted({count for _, count, _ in values}), metrics
    ):
        ours, theirs = values.get((first, count, metric), {}), values.get((second, count, metric), {})
        interval = paired_difference(ours, theirs, (itemgetter(0), itemgetter(1)), seed)
        if interval.n:
            found.append(Difference(first, second, count, metric, interval))
    return found


def paired_values(rows: pa.Table, metrics: Sequence[str] = METRICS) -> dict[tuple[str, int, str], dict[tuple, float]]:
    """Return the values of a table of scored rows by (method, number of subjects, metric) and by row.

    A row's key is (subjects, prompt, instance): the n-th image of a method for a prompt and subjects, by sample_id. Failed rows
    are left out.
    """
    columns = ("sample_id", "method", "subject_ids", "prompt_id", "status", *metrics)
    values: dict[tuple[str, int, str], dict[tuple, float]] = {}
    instances: Counter[tuple] = Counter()
    for row in sorted(rows.select(columns).to_pylist(), key=lambda row: (row["method"], row["sample_id"])):
        name = (row["method"], tuple(row["subject_ids"]), row["prompt_id"])
        # A failed row uses up its instance too: the images after it keep their partners.
        instances[name] += 1
        if row["status"] == "ok":
            for metric in metrics:
                if row[metric] is None:
                    continue
                group = (row["method"], len(row["subject_ids"]), metric)
                values.setdefault(group, {})[(*name[1:], instances[name])] = row[metric]
    return values


def as_arrow(found: list[Difference]) -> pa.Table:
    """Return the differences as an Arrow table, a row for each."""
    fields = (vars(item) | vars(item.interval) for item in found)
    records = [{name: values[name] for name in DIFFERENCE_SCHEMA.names} for values in fields]
    return pa.Table.from_pylist(records, schema=DIFFERENCE_SCHEMA)


def markdown(found: list[Difference]) -> Markdown:
    """Return the differences as a Markdown table, a line per pair of methods; bold where zero lies outside."""
    lines: dict[tuple[str, str, int], dict[str, Interval]] = {}
    for item in found:
        lines.setdefault((item.method, item.other, item.subjects), {})[item.metric] = item.interval
    metrics, rows = list(dict.fromkeys([*METRICS, *(item.metric for item in found)])), []
    for (method, other, subjects), intervals in lines.items():
        cells = [_value(intervals[metric]) if metric in intervals else "–" for metric in metrics]
        rows.append([f"{method} − {other}", subjects, max(interval.n for interval in intervals.values()), *cells])
    return markdown_table(["method − other", "subjects", "pairs", *map(title, metrics)], rows, right=(1, 2))


def _value(interval: Interval) -> Markdown | str:
    if not np.isfinite(interval.mean):
        return "–"
    value = f"{interval.mean:+.3f}"
    sure = interval.n > 1 and (interval.low > 0 or interval.high < 0)
    return Markdown(f"{bold(value) if sure else value} ({interval.low:+.3f} to {interval.high:+.3f})")
