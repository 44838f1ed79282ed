"""Evaluation: images of our datasets and of other systems, scored alike, in one table of methods."""

import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from facediffuser.dataset.added import Added, read_added
from facediffuser.dataset.inputs import Subject, open_picture, read_prompts, read_subjects
from facediffuser.dataset.schema import DATASET_SCHEMA, RUN_KEY
from facediffuser.dataset.survey import row_groups
from facediffuser.errors import InputError
from facediffuser.scoring import compare, tables
from facediffuser.scoring.benchmarks import prompts_file
from facediffuser.scoring.columns import ColumnScorer, column_scores, load_columns, short_name
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
# `subject_faces`: the place in `face_boxes` of each subject's face, -1 for none; null where recorded scores are used.
SCORED_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string()),
        *(DATASET_SCHEMA.field(name).with_nullable(True) for name in SCORED_COLUMNS),
        pa.field("subject_faces", pa.list_(pa.int32())),
    ]
)
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


@dataclass(frozen=True)
class _Job:
    """Images of one source: how many, their rows in batches, whether they are to be scored.

    `pictures`: subject id -> reference pictures, for other scorers; `added`: columns that the rows have besides ours;
    `recorded`: digests of the scorers that made the scores which are used as they are.
    """

    count: int
    batches: Callable[[], Iterator[list[dict]]]
    references: Callable[[Scorers], Mapping[str, np.ndarray]] | None
    pictures: Callable[[], Mapping[str, list[Image.Image]]]
    url: str
    added: Added = field(default_factory=lambda: Added({}))
    recorded: dict[str, str] = field(default_factory=dict)


class Evaluator:
    """Checks everything at once when made (InputError), then scores and makes the table with `run`.

    `made`: URLs of datasets to take beside those of the settings.
    """

    def __init__(self, settings: EvaluateSettings, made: Sequence[str] = ()):
        self.settings = settings
        if settings.output:
            open_store(settings.output).require_writable()
        named = [*map(_named, several(settings.dataset)), *((None, url) for url in made)]
        self.jobs = [_dataset_job(name, open_store(url), settings) for name, url in named]
        self.jobs += [
            _folder_job(name or url.rstrip("/").rsplit("/", 1)[-1], url, settings)
            for name, url in map(_named, several(settings.images))
        ]
        self.total = sum(job.count for job in self.jobs)
        # Last, as it takes longest; before any image, so that a missing weight is told at the start.
        needed, device = any(job.references for job in self.jobs), pick_device(settings.device)
        self.others = load_columns(several(settings.add), device)
        self.scorers = load_scorers(settings.scorers, device) if needed else None
        self.recorded = self._recorded()

    def run(self, advance: Advance = lambda count: None) -> Evaluation:
        """Score what is to be scored and return the evaluation; `advance` hears of images done. Writes the output."""
        rows: list[pa.Table] = []
        schema, others = self._schema()
        for job in self.jobs:
            references = job.references(self.scorers) if job.references else None
            pictures = job.pictures() if self.others else {}
            for batch in job.batches():
                if references is not None:
                    batch = _scored(batch, self.scorers, references)
                if self.others:
                    batch = _with_others(batch, self.others, pictures)
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
        kinds = [job.added.schema for job in self.jobs] + [scorer.columns for scorer in self.others.values()]
        fields = {name: kind.field(name).with_nullable(True) for kind in kinds for name in kind.names}
        numbers = [name for name, column in fields.items() if _is_number(column.type)]
        return pa.schema([*SCORED_SCHEMA, *fields.values()]), numbers

    def _recorded(self) -> dict[str, str]:
        """The digests of all scores in the table; InputError when they are not those of the same scorers."""
        known = [(job.url, job.recorded) for job in self.jobs if job.recorded]
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
        for job in self.jobs:
            found |= job.added.digests()
        return found | {short_name(name): scorer.digest for name, scorer in self.others.items()}


def write_evaluation(store: Store, evaluation: Evaluation) -> None:
    """Write table.parquet, per_subject.parquet, table.md, plot.png, scores.parquet, of several methods differences."""
    digests = {f"facediffuser_scorer_{name}": digest for name, digest in evaluation.digests.items()}
    store.put("scores.parquet", _parquet(evaluation.images.replace_schema_metadata(digests)))
    if evaluation.differences:
        store.put("differences.parquet", _parquet(compare.as_arrow(evaluation.differences)))
    per_subject = tables.as_arrow(evaluation.subjects, tables.SUBJECT_SCHEMA)
    store.put("per_subject.parquet", _parquet(per_subject.replace_schema_metadata(digests)))
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


def _dataset_job(name: str | None, store: Store, settings: EvaluateSettings) -> _Job:
    """The images of a dataset; `name` stands for the method its rows name."""
    store.require_readable()
    keys = [info.key for info in store.list("data/") if info.key.endswith(".parquet")]
    if not keys:
        raise InputError(f"{store.url}: no data/*.parquet there; give the URL that `generate` wrote to")
    filesystem, base = store.arrow()
    footers = [pq.read_metadata(f"{base}/{key}", filesystem=filesystem) for key in keys]
    recorded = json.loads((footers[0].metadata or {}).get(RUN_KEY, b"{}")).get("scorers", {})
    columns = SCORED_COLUMNS + (("image",) if settings.add or settings.rescore else ())
    if settings.rescore or settings.add:
        if not store.exists("subjects.parquet"):
            raise InputError(f"{store.url}/subjects.parquet: missing; scoring again needs the reference pictures")
    added = read_added(store)
    always = {"source": store.url} | ({"method": name} if name else {})

    def batches() -> Iterator[list[dict]]:
        for _, _, table in row_groups(store, keys, columns):
            for start in range(0, table.num_rows, settings.batch_size):
                part = table.slice(start, settings.batch_size)
                beside = added.of(part["sample_id"]).to_pylist() if added.tables else [{}] * part.num_rows
                yield [row | more | always for row, more in zip(part.to_pylist(), beside, strict=True)]

    references = None
    if settings.rescore:

        def references(scorers: Scorers) -> Mapping[str, np.ndarray]:
            return dataset_references(store, scorers)

    return _Job(
        sum(footer.num_rows for footer in footers),
        batches,
        references,
        lambda: dataset_pictures(store),
        store.url,
        added,
        {} if settings.rescore else recorded,
    )


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

    def pictures() -> Mapping[str, list[Image.Image]]:
        place = open_store(settings.subjects)
        return {s.subject_id: [open_picture(place, key)[0] for key in s.references] for s in subjects}

    return _Job(len(listed), batches, references, pictures, store.url)


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


def dataset_pictures(store: Store) -> dict[str, list[Image.Image]]:
    """Return subject id -> the reference pictures that a dataset keeps, as the model was shown them."""
    filesystem, base = store.arrow()
    table = pq.read_table(f"{base}/subjects.parquet", filesystem=filesystem, columns=["subject_id", "image"])
    found: dict[str, list[Image.Image]] = {}
    for row in table.to_pylist():
        picture = _open(row["image"]["bytes"], store.url_of("subjects.parquet"))
        found.setdefault(row["subject_id"], []).append(picture)
    return found


def recorded_digests(schema: pa.Schema) -> dict[str, str]:
    """Return the digests of the scorers that a dataset's footer names, empty when it names none."""
    return json.loads((schema.metadata or {}).get(RUN_KEY, b"{}")).get("scorers", {})


def _scored(batch: list[dict], scorers: Scorers, references: Mapping[str, np.ndarray]) -> list[dict]:
    """The batch's rows with new scores; rows without an image stay as they are."""
    made = [row for row in batch if row["image"] and row["image"]["bytes"]]
    pictures = [_open(row["image"]["bytes"], f"{row['source']}: {row['sample_id']}") for row in made]
    wanted = [[_reference(references, name, row) for name in row["subject_ids"]] for row in made]
    scores = scorers.score(pictures, wanted, [without_markers(row["prompt"]) for row in made]) if made else []
    changed = {id(row): _columns(score) for row, score in zip(made, scores, strict=True)}
    return [row | changed.get(id(row), {}) for row in batch]


def _with_others(
    batch: list[dict], others: Mapping[str, ColumnScorer], references: Mapping[str, list[Image.Image]]
) -> list[dict]:
    """The batch's rows with the columns of other scorers, null where there is no image."""
    made = [row for row in batch if row["image"] and row["image"]["bytes"]]
    pictures = [_open(row["image"]["bytes"], f"{row['source']}: {row['sample_id']}") for row in made]
    shown = [[references.get(name, []) for name in row["subject_ids"]] for row in made]
    found = column_scores(others, pictures, shown, [without_markers(row["prompt"]) for row in made]).to_pylist()
    more = {id(row): values for row, values in zip(made, found, strict=True)}
    return [row | more.get(id(row), {}) for row in batch]


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)


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
        "subject_faces": score.subject_faces,
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


def several(text: str | None) -> list[str]:
    """Return the parts of a list with commas."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _named(part: str) -> tuple[str | None, str]:
    """`sdxl=out/sdxl` as (sdxl, out/sdxl); (None, URL) without a name."""
    name, separator, url = part.partition("=")
    return (name, url) if separator and "/" not in name else (None, part)


def _markdown(
    images: pa.Table,
    table: list[tables.ScoreRow],
    subjects: list[tables.SubjectRow],
    paired: list[compare.Difference],
    scorers: str | None,
) -> str:
    failed = images.num_rows - images["status"].to_pylist().count("ok")
    scored_by = f"Scored with `{scorers}`." if scorers else "The datasets' recorded scores."
    parts = [
        "# IP and PC\n",
        f"{images.num_rows} images"
        + (f", {failed} of them failed and not counted" if failed else "")
        + f". {scored_by} Mean and 95% bootstrap interval over images; right\nfaces: the share of images in which as "
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
