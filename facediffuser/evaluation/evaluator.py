"""Evaluation: images of our datasets and of other systems, scored alike, in one table of methods."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from facediffuser.dataset.added_columns import require_new_columns
from facediffuser.dataset.encoding import parquet_bytes
from facediffuser.devices import pick_device
from facediffuser.errors import InputError
from facediffuser.evaluation import compare, tables
from facediffuser.evaluation.evaluate_settings import EvaluateSettings
from facediffuser.evaluation.image_sources import SCORED_SCHEMA, dataset_source, folder_source, name_and_url
from facediffuser.evaluation.plots import method_plane
from facediffuser.evaluation.row_scorers import PictureScorer, score_dataset_rows
from facediffuser.markup import code_span
from facediffuser.number_words import counted
from facediffuser.pictures import rgb_picture
from facediffuser.prompts import without_markers
from facediffuser.scoring.columns import load_columns, short_name
from facediffuser.scoring.scorers import ImageScore, Scorers, load_scorers
from facediffuser.storage import Store, open_store

logger = logging.getLogger(__name__)
# What a row without usable scores has null.
SCORE_COLUMNS = ("ip", "ip_per_subject", "pc")
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Evaluation:
    """The result: a row per image, the tables' rows, paired differences between methods, all of it as Markdown."""

    images: pa.Table
    table: list[tables.ScoreRow]
    subjects: list[tables.SubjectRow]
    differences: list[compare.Difference]
    markdown: str
    digests: dict[str, str]


class Evaluator:
    """An evaluation: the constructor checks all inputs, `run` scores the images and computes the tables.

    Args:
        settings: what is evaluated and how.
        generated: URLs of datasets to evaluate besides those of the settings.

    Raises:
        InputError: an input cannot be used.
    """

    def __init__(self, settings: EvaluateSettings, generated: Sequence[str] = ()):
        self.settings = settings
        if settings.output:
            open_store(settings.output).require_writable()
        datasets = [*map(name_and_url, settings.dataset), *((None, url) for url in generated)]
        self.sources = [dataset_source(name, open_store(url), settings) for name, url in datasets]
        self.sources += [
            folder_source(name or url.rstrip("/").rsplit("/", 1)[-1], url, settings, settings.batch_size)
            for name, url in map(name_and_url, settings.images)
        ]
        self.total = sum(source.count for source in self.sources)
        # Last, as it takes longest; before any image, so that a missing file of weights is reported at the start.
        needed, device = any(source.references for source in self.sources), pick_device(settings.device)
        others = load_columns(settings.add, device)
        self.others = {name: PictureScorer(name, scorer) for name, scorer in others.items()}
        require_new_columns({short_name(name): scorer.columns.names for name, scorer in self.others.items()})
        self.scorers = load_scorers(settings.scorers, device) if needed else None
        self.recorded = self._recorded_digests()

    def run(self, advance: Advance = lambda count: None) -> Evaluation:
        """Score the images, write the output and return the evaluation.

        Args:
            advance: called with the number of images after each batch.
        """
        rows: list[pa.Table] = []
        schema, others = self._schema()
        for source in self.sources:
            references = source.references(self.scorers) if source.references and self.scorers else None
            pictures = source.pictures() if self.others else {}
            for batch in source.batches():
                if references is not None and self.scorers is not None:
                    batch = _scored(batch, self.scorers, references)
                if self.others:
                    values = score_dataset_rows(self.others, batch, _row_picture, pictures)
                    batch = [row | extra for row, extra in zip(batch, values, strict=True)]
                batch = [_failed_unless_finite(row) for row in batch]
                rows.append(pa.Table.from_pylist(batch, schema=schema))
                advance(len(batch))
        images = pa.concat_tables(rows)
        table, subjects = tables.score_table(images, others), tables.subject_table(images)
        several_methods = len({row.method for row in table}) > 1
        paired = compare.differences(images, self.settings.seed, others) if several_methods else []
        evaluation = Evaluation(
            images=images,
            table=table,
            subjects=subjects,
            differences=paired,
            markdown=_markdown(images, table, subjects, paired, self.settings.scorers if self.scorers else None),
            digests=self._digests(),
        )
        if self.settings.output:
            write_evaluation(open_store(self.settings.output), evaluation)
        return evaluation

    def _schema(self) -> tuple[pa.Schema, list[str]]:
        """The columns of all sources, and the names of those added that a mean can be taken of."""
        kinds = [source.added.schema for source in self.sources] + [scorer.columns for scorer in self.others.values()]
        fields = {name: kind.field(name).with_nullable(True) for kind in kinds for name in kind.names}
        numbers = [name for name, column in fields.items() if _is_number(column.type)]
        return pa.schema([*SCORED_SCHEMA, *fields.values()]), numbers

    def _recorded_digests(self) -> dict[str, str]:
        """The digests of all scores in the table; InputError when they are not those of the same scorers."""
        known = [(source.url, source.recorded) for source in self.sources if source.recorded]
        if self.scorers:
            known.append((f"--scorers {self.settings.scorers}", dict(self.scorers.digests)))
        for url, digests in known[1:]:
            unlike = [part for part in digests if digests[part] != known[0][1].get(part)]
            if unlike:
                raise InputError(
                    f"{known[0][0]} and {url}: scored with different scorers ({unlike[0]} "
                    f"{known[0][1].get(unlike[0], 'unknown')[:12]} and {digests[unlike[0]][:12]}); give the --scorers that "
                    "all of them had, or --rescore"
                )
        return known[0][1] if known else {}

    def _digests(self) -> dict[str, str]:
        found = dict(self.recorded)
        for source in self.sources:
            found |= source.added.digests()
        return found | {short_name(name): scorer.digest for name, scorer in self.others.items()}


def write_evaluation(store: Store, evaluation: Evaluation) -> None:
    """Write table.parquet, per_subject.parquet, table.md, plot.png, scores.parquet and, of several methods, differences."""
    digests = {f"facediffuser_scorer_{name}": digest for name, digest in evaluation.digests.items()}
    store.put("scores.parquet", parquet_bytes(evaluation.images.replace_schema_metadata(digests)))
    if evaluation.differences:
        store.put("differences.parquet", parquet_bytes(compare.as_arrow(evaluation.differences)))
    per_subject = tables.as_arrow(evaluation.subjects, tables.SUBJECT_SCHEMA)
    store.put("per_subject.parquet", parquet_bytes(per_subject.replace_schema_metadata(digests)))
    store.put("plot.png", method_plane(evaluation.table))
    store.put("table.md", evaluation.markdown.encode())
    store.put("table.parquet", parquet_bytes(tables.as_arrow(evaluation.table).replace_schema_metadata(digests)))


def _scored(batch: list[dict], scorers: Scorers, references: Mapping[str, np.ndarray]) -> list[dict]:
    """The batch's rows with new scores; rows without an image stay as they are."""
    rows = [row for row in batch if row["image"] and row["image"]["bytes"]]
    vectors = [[_reference(references, name, row) for name in row["subject_ids"]] for row in rows]
    prompts = [without_markers(row["prompt"]) for row in rows]
    scores = scorers.score(list(map(_row_picture, rows)), vectors, prompts)
    changed = {id(row): _columns(score) for row, score in zip(rows, scores, strict=True)}
    return [row | changed.get(id(row), {}) for row in batch]


def _failed_unless_finite(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose scores are numbers as it is; one with NaN or infinity, computed here or recorded, as a failed one."""
    for name in ("ip", "pc"):
        value = row.get(name)
        if value is not None and not math.isfinite(value):
            failed = {"status": "failed", "error": f"the score {name} is {value}; check the scorer's weights"}
            return row | dict.fromkeys(SCORE_COLUMNS) | failed
    return row


def _row_picture(row: Mapping[str, Any]) -> Image.Image:
    return rgb_picture(row["image"]["bytes"], f"{row['source']}: {row['sample_id']}")


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)


def _reference(references: Mapping[str, np.ndarray], name: str, row: dict) -> np.ndarray:
    if name not in references:
        raise InputError(
            f"{row['source']}: {row['sample_id']} shows {name!r}, who has no reference picture there; add one"
        )
    return references[name]


def _columns(score: ImageScore) -> dict:
    return {
        "ip": score.ip,
        "ip_per_subject": score.ip_per_subject,
        "face_count": score.face_count,
        "face_boxes": score.face_boxes,
        "face_probs": score.face_probs,
        "subject_faces": score.subject_faces,
        "pc": score.pc,
        "status": "ok",
        "error": None,
    }


def _markdown(
    images: pa.Table,
    table: list[tables.ScoreRow],
    subjects: list[tables.SubjectRow],
    paired: list[compare.Difference],
    scorers: str | None,
) -> str:
    failed = images.num_rows - images["status"].to_pylist().count("ok")
    scored_by = f"Scored with {code_span(scorers)}." if scorers else "The datasets' recorded scores."
    parts = [
        "# IP and PC\n",
        counted(images.num_rows, "image")
        + (f", {failed} of them failed and not counted" if failed else "")
        + f". {scored_by} Mean and 95% bootstrap interval over people and prompts; right\nfaces: the share of images in which as "
        "many faces are found as there are subjects.\n",
        tables.paper_markdown(table),
        "## By category\n\n" + tables.markdown(table),
        "## By subject\n\nOf images of several people each counts with their own IP, not with the minimum.\n\n"
        + tables.subject_markdown(subjects),
    ]
    if paired:
        parts.append(
            "## Differences on the same rows\n\nMean and 95% interval; bold where zero lies outside.\n\n"
            + compare.markdown(paired)
        )
    return "\n".join(parts)
