"""Evaluation: images of our datasets and of other systems, scored alike, in one table of methods."""

import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from facediffuser.dataset.inputs import Subject, open_picture, read_prompts, read_subjects
from facediffuser.dataset.schema import DATASET_SCHEMA, RUN_KEY
from facediffuser.dataset.survey import row_groups
from facediffuser.errors import InputError
from facediffuser.scoring import compare, tables
from facediffuser.scoring.benchmarks import prompts_file
from facediffuser.scoring.external import ExternalImage, from_fastcomposer_layout, from_index, without_markers
from facediffuser.scoring.identity import subject_embedding
from facediffuser.scoring.plots import method_plane
from facediffuser.scoring.scorers import ImageScore, Scorers, load_scorers
from facediffuser.scoring.settings import EvaluateSettings
from facediffuser.storage import Store, local_copy, open_store

logger = logging.getLogger(__name__)

SCORED_COLUMNS = (
    *("sample_id", "method", "subject_ids", "prompt_id", "prompt", "category", "ip", "ip_per_subject", "face_count"),
    *("face_boxes", "face_probs", "pc", "status", "error"),
)
SCORED_SCHEMA = pa.schema(
    [pa.field("source", pa.string()), *(DATASET_SCHEMA.field(name).with_nullable(True) for name in SCORED_COLUMNS)]
)
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Evaluation:
    """The result: a row per image, the table's rows, paired differences between methods, all of it as Markdown."""

    images: pa.Table
    table: list[tables.ScoreRow]
    differences: list[compare.Difference]
    markdown: str
    digests: dict[str, str]


@dataclass(frozen=True)
class _Job:
    """Images of one source: how many, their rows in batches, whether they are to be scored."""

    count: int
    batches: Callable[[], Iterator[list[dict]]]
    references: Callable[[Scorers], Mapping[str, np.ndarray]] | None


class Evaluator:
    """Checks everything at once when made (InputError), then scores and makes the table with `run`."""

    def __init__(self, settings: EvaluateSettings):
        self.settings = settings
        if settings.output:
            open_store(settings.output).require_writable()
        self.jobs = [_dataset_job(open_store(url), settings) for url in _several(settings.dataset)]
        self.jobs += [_folder_job(name, url, settings) for name, url in map(_named, _several(settings.images))]
        self.total = sum(job.count for job in self.jobs)
        # Last, as it takes longest; before any image, so that a missing weight is told at the start.
        needed = any(job.references for job in self.jobs)
        self.scorers = load_scorers(settings.scorers, pick_device(settings.device)) if needed else None

    def run(self, advance: Advance = lambda count: None) -> Evaluation:
        """Score what is to be scored and return the evaluation; `advance` hears of images done. Writes the output."""
        rows: list[pa.Table] = []
        for job in self.jobs:
            references = job.references(self.scorers) if job.references else None
            for batch in job.batches():
                if references is not None:
                    batch = _scored(batch, self.scorers, references)
                rows.append(pa.Table.from_pylist(batch, schema=SCORED_SCHEMA))
                advance(len(batch))
        images = pa.concat_tables(rows)
        table = tables.score_table(images)
        paired = compare.differences(images, self.settings.seed) if len({row.method for row in table}) > 1 else []
        evaluation = Evaluation(
            images=images,
            table=table,
            differences=paired,
            markdown=_markdown(images, table, paired, self.settings.scorers if self.scorers else None),
            digests=dict(self.scorers.digests) if self.scorers else {},
        )
        if self.settings.output:
            write_evaluation(open_store(self.settings.output), evaluation)
        return evaluation


def write_evaluation(store: Store, evaluation: Evaluation) -> None:
    """Write table.parquet, table.md, plot.png, scores.parquet and, with several methods, differences.parquet."""
    digests = {f"facediffuser_scorer_{name}": digest for name, digest in evaluation.digests.items()}
    store.put("scores.parquet", _parquet(evaluation.images.replace_schema_metadata(digests)))
    if evaluation.differences:
        store.put("differences.parquet", _parquet(compare.as_arrow(evaluation.differences)))
    store.put("plot.png", method_plane(evaluation.table))
    store.put("table.md", evaluation.markdown.encode())
    store.put("table.parquet", _parquet(tables.as_arrow(evaluation.table).replace_schema_metadata(digests)))


def pick_device(name: str) -> str:
    """Return `name`, for `auto` cuda where there is one and cpu elsewhere; InputError for a GPU that is not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {name}: no GPU that torch can use; give cpu")
    return name


def _dataset_job(store: Store, settings: EvaluateSettings) -> _Job:
    store.require_readable()
    keys = [info.key for info in store.list("data/") if info.key.endswith(".parquet")]
    if not keys:
        raise InputError(f"{store.url}: no data/*.parquet there; give the URL that `generate` wrote to")
    filesystem, base = store.arrow()
    count = sum(pq.read_metadata(f"{base}/{key}", filesystem=filesystem).num_rows for key in keys)
    columns = SCORED_COLUMNS
    if settings.rescore:
        if not store.exists("subjects.parquet"):
            raise InputError(f"{store.url}/subjects.parquet: missing; scoring again needs the reference pictures")
        columns += ("image",)

    def batches() -> Iterator[list[dict]]:
        for _, _, table in row_groups(store, keys, columns):
            for start in range(0, table.num_rows, settings.batch_size):
                yield [row | {"source": store.url} for row in table.slice(start, settings.batch_size).to_pylist()]

    references = None
    if settings.rescore:

        def references(scorers: Scorers) -> Mapping[str, np.ndarray]:
            return dataset_references(store, scorers)

    return _Job(count, batches, references)


def _folder_job(method: str, url: str, settings: EvaluateSettings) -> _Job:
    store = open_store(url)
    subjects = read_subjects(settings.subjects)
    prompts = []
    if settings.prompts:
        prompts = read_prompts(prompts_file(settings.prompts), settings.subjects_per_image)
    if settings.index:
        listed = from_index(store, _file(settings.index), settings.index, subjects, prompts)
    else:
        listed = from_fastcomposer_layout(store, subjects, prompts, settings.subjects_per_image)

    def batches() -> Iterator[list[dict]]:
        for start in range(0, len(listed), settings.batch_size):
            yield [_external_row(store, method, image) for image in listed[start : start + settings.batch_size]]

    shown = {name for image in listed for name in image.subject_ids}

    def references(scorers: Scorers) -> Mapping[str, np.ndarray]:
        return folder_references(open_store(settings.subjects), [s for s in subjects if s.subject_id in shown], scorers)

    return _Job(len(listed), batches, references)


def _external_row(store: Store, method: str, image: ExternalImage) -> dict:
    return {
        "source": store.url,
        "sample_id": image.key,
        "method": method,
        "subject_ids": list(image.subject_ids),
        "prompt_id": image.prompt_id,
        "prompt": image.prompt,
        "category": image.category,
        "image": {"bytes": store.get(image.key)},
    }


def folder_references(store: Store, subjects: Sequence[Subject], scorers: Scorers) -> dict[str, np.ndarray]:
    """Return subject id -> embedding of subjects of a folder; InputError names a picture without a face."""
    return {
        subject.subject_id: subject_embedding(
            scorers.embed_references(
                [open_picture(store, key)[0] for key in subject.references],
                [store.url_of(key) for key in subject.references],
            )
        )
        for subject in subjects
    }


def dataset_references(store: Store, scorers: Scorers) -> dict[str, np.ndarray]:
    """Return subject id -> embedding of a dataset's subjects, from its subjects.parquet.

    What the dataset recorded of its references is used when the same scorers made it; other scorers look at the
    reference pictures that the dataset keeps.
    """
    filesystem, base = store.arrow()
    table = pq.read_table(f"{base}/subjects.parquet", filesystem=filesystem)
    same = recorded_digests(table.schema).get("identity") == scorers.digests["identity"]
    vectors: dict[str, list[np.ndarray]] = {}
    for row in table.to_pylist():
        if same and row["identity"]:
            vector = np.asarray(row["identity"], np.float32)
        else:
            name = f"{store.url_of('subjects.parquet')}: {row['reference']}"
            vector = scorers.embed_references([_open(row["image"]["bytes"], name)], [name])[0]
        vectors.setdefault(row["subject_id"], []).append(vector)
    return {name: subject_embedding(np.stack(found)) for name, found in vectors.items()}


def recorded_digests(schema: pa.Schema) -> dict[str, str]:
    """Return the digests of the scorers that a dataset's footer names, empty when it names none."""
    return json.loads((schema.metadata or {}).get(RUN_KEY, b"{}")).get("scorers", {})


def _scored(batch: list[dict], scorers: Scorers, references: Mapping[str, np.ndarray]) -> list[dict]:
    """The batch's rows with new scores; rows without an image stay as they are. Reads and drops `image`."""
    made = [row for row in batch if row["image"] and row["image"]["bytes"]]
    pictures = [_open(row["image"]["bytes"], f"{row['source']}: {row['sample_id']}") for row in made]
    wanted = [[_reference(references, name, row) for name in row["subject_ids"]] for row in made]
    scores = scorers.score(pictures, wanted, [without_markers(row["prompt"]) for row in made]) if made else []
    changed = {id(row): _columns(score) for row, score in zip(made, scores, strict=True)}
    rows = [row | changed.get(id(row), {}) for row in batch]
    return [{name: value for name, value in row.items() if name != "image"} for row in rows]


def _reference(references: Mapping[str, np.ndarray], name: str, row: dict) -> np.ndarray:
    if name not in references:
        raise InputError(f"{row['source']}: {row['sample_id']} shows {name!r}, who has no reference picture there")
    return references[name]


def _columns(score: ImageScore) -> dict:
    return {
        "ip": score.ip,
        "ip_per_subject": score.ip_per_subject,
        "face_count": score.face_count,
        "face_boxes": score.face_boxes,
        "face_probs": score.face_probs,
        "pc": score.pc,
        "status": "ok",
        "error": None,
    }


def _open(data: bytes, name: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{name}: image cannot be read; replace it or leave it out") from error


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _file(url: str) -> bytes:
    path = local_copy(url)
    if not path.is_file():
        raise InputError(f"{url}: not a file; give the CSV that lists the images")
    return path.read_bytes()


def _several(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _named(part: str) -> tuple[str, str]:
    """`sdxl=out/sdxl` as (sdxl, out/sdxl); without a name the folder's."""
    name, separator, url = part.partition("=")
    return (name, url) if separator and "/" not in name else (part.rstrip("/").rsplit("/", 1)[-1], part)


def _markdown(
    images: pa.Table, table: list[tables.ScoreRow], paired: list[compare.Difference], scorers: str | None
) -> str:
    failed = images.num_rows - images["status"].to_pylist().count("ok")
    scored_by = f"Scored with `{scorers}`." if scorers else "The datasets' recorded scores."
    parts = [
        "# IP and PC\n",
        f"{images.num_rows} images"
        + (f", {failed} of them failed and not counted" if failed else "")
        + f". {scored_by} Mean and 95% bootstrap interval.\n",
        tables.markdown(table),
    ]
    if paired:
        parts.append(
            "## Differences on the same rows\n\nMean and 95% interval; bold where zero lies outside.\n\n"
            + compare.markdown(paired)
        )
    return "\n".join(parts)
