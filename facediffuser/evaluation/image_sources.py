"""Where the images of an evaluation come from: our datasets, or folders of any other system."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from PIL import Image

from facediffuser.dataset.added_columns import AddedColumns, read_added_columns
from facediffuser.dataset.input_tables import read_table_file
from facediffuser.dataset.inputs import Subject, read_prompts, read_subjects
from facediffuser.dataset.manifest import MANIFEST_KEY, listed_shards, read_manifest
from facediffuser.dataset.reading import read_columns, read_footer, recorded_run, row_groups
from facediffuser.dataset.schema import DATASET_SCHEMA, FACES, IP_MARGIN
from facediffuser.dataset.suites import prompts_file
from facediffuser.errors import InputError
from facediffuser.evaluation.evaluate_settings import ExternalImageSettings, TableSettings
from facediffuser.evaluation.external_images import ExternalImage, from_fastcomposer_layout, from_index
from facediffuser.pictures import batches_of_files, open_picture, read_picture_file, stored_picture
from facediffuser.storage import Store, local_copy, open_store

# What lies at the sources can be checked without torch, which takes seconds to import.
if TYPE_CHECKING:
    from facediffuser.scoring.scorers import Scorers

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


@dataclass(frozen=True)
class Source:
    """Images of one source: how many, their rows in batches, whether they are to be scored.

    `pictures`: subject id -> reference pictures, for other scorers; `added`: columns that the rows have besides ours;
    `recorded`: digests of the scorers that made the scores which are used as they are.
    """

    count: int
    batches: Callable[[], Iterator[list[dict]]]
    references: "Callable[[Scorers], Mapping[str, np.ndarray]] | None"
    pictures: Callable[[], Mapping[str, list[Image.Image]]]
    url: str
    added: AddedColumns = field(default_factory=lambda: AddedColumns({}))
    recorded: dict[str, str] = field(default_factory=dict)


def dataset_keys(store: Store, with_subjects: bool = False) -> list[str]:
    """Return the keys of a dataset's shards: those that its manifest lists, where there is one.

    Args:
        store: the dataset.
        with_subjects: whether its references are needed.

    Raises:
        InputError: there are no shards, or no references where they are needed.
    """
    manifest = read_manifest(store) if store.exists(MANIFEST_KEY) else None
    keys = [info.key for info in listed_shards(store, manifest)]
    if with_subjects and not store.exists("subjects.parquet"):
        raise InputError(f"{store.url}/subjects.parquet: missing; scoring again needs the reference pictures")
    return keys


def dataset_source(name: str | None, store: Store, settings: TableSettings) -> Source:
    """Return the images of a dataset.

    Args:
        name: what the table calls the method; None for the name in the rows.
        store: the dataset.
        settings: scorers, added columns, and whether images are scored again.

    Raises:
        InputError: the dataset cannot be read.
    """
    keys = dataset_keys(store, with_subjects=settings.rescore or bool(settings.add))
    footers = [read_footer(store, key) for key in keys]
    recorded = recorded_digests(footers[0].schema.to_arrow_schema())
    columns = SCORED_COLUMNS + (("image",) if settings.add or settings.rescore else ())
    added = read_added_columns(store).without(FACES, IP_MARGIN)
    constants = {"source": store.url} | ({"method": name} if name else {})

    def batches() -> Iterator[list[dict]]:
        for _, _, table in row_groups(store, keys, columns):
            for start in range(0, table.num_rows, settings.batch_size):
                part = table.slice(start, settings.batch_size)
                added_rows = added.rows(part["sample_id"]).to_pylist() if added.tables else [{}] * part.num_rows
                yield [row | extra | constants for row, extra in zip(part.to_pylist(), added_rows, strict=True)]

    references = None
    if settings.rescore:

        def references(scorers: "Scorers") -> Mapping[str, np.ndarray]:
            return dataset_references(store, scorers)

    return Source(
        sum(footer.num_rows for footer in footers),
        batches,
        references,
        lambda: dataset_reference_pictures(store),
        store.url,
        added,
        {} if settings.rescore else recorded,
    )


def folder_source(method: str, url: str, settings: ExternalImageSettings, batch_size: int) -> Source:
    """Return the images of a folder that another system made.

    Args:
        method: what the table calls it.
        url: the folder.
        settings: subjects, prompts and index.
        batch_size: how many images are scored at once.

    Raises:
        InputError: subjects, prompts, index or names of files are wrong.
    """
    store = open_store(url)
    assert settings.subjects is not None  # the settings ask for them with folders of images
    people = settings.subjects
    subjects = read_subjects(people)
    prompts = []
    if settings.prompts:
        prompts = read_prompts(prompts_file(settings.prompts), settings.subjects_per_image)
    if settings.index:
        listed = from_index(store, _file(settings.index), settings.index, subjects, prompts)
    else:
        listed = from_fastcomposer_layout(store, subjects, prompts)

    sizes = {info.key: info.size for info in store.list()}

    def batches() -> Iterator[list[dict]]:
        for batch in batches_of_files(listed, batch_size, lambda image: sizes[image.key]):
            yield [_external_row(store, method, image) for image in batch]

    shown = {name for image in listed for name in image.subject_ids}

    def references(scorers: "Scorers") -> Mapping[str, np.ndarray]:
        return folder_references(open_store(people), [s for s in subjects if s.subject_id in shown], scorers)

    def pictures() -> Mapping[str, list[Image.Image]]:
        place = open_store(people)
        return {s.subject_id: [open_picture(place, key)[0] for key in s.references] for s in subjects}

    return Source(len(listed), batches, references, pictures, store.url)


def _external_row(store: Store, method: str, image: ExternalImage) -> dict:
    return {
        "source": store.url,
        "sample_id": image.key,
        "method": method,
        "subject_ids": list(image.subject_ids),
        "prompt_id": image.prompt_id,
        "prompt": image.prompt,
        "category": image.category,
        "image": {"bytes": read_picture_file(store, image.key)},
    }


def folder_references(store: Store, subjects: Sequence[Subject], scorers: "Scorers") -> dict[str, np.ndarray]:
    """Return the embedding, (d,) float32 of unit length, of each subject of a folder by its id.

    Args:
        store: the folder of subjects.
        subjects: those to embed.
        scorers: whose identity scorer measures.

    Raises:
        InputError: a picture has no face; the error names it.
    """
    from facediffuser.scoring.identity import subject_embedding

    return {
        subject.subject_id: subject_embedding(
            scorers.identity.embed_references(
                [open_picture(store, key)[0] for key in subject.references],
                [store.url_of(key) for key in subject.references],
            )
        )
        for subject in subjects
    }


def dataset_references(store: Store, scorers: "Scorers") -> dict[str, np.ndarray]:
    """Return the embedding, (d,) float32 of unit length, of each of a dataset's subjects by its id.

    What the dataset recorded of its references is used when the same scorers made it; other scorers look at the
    reference pictures that the dataset keeps.
    """
    from facediffuser.scoring.identity import subject_embedding

    table = read_columns(store, "subjects.parquet", ["subject_id", "reference", "image", "identity"])
    same = recorded_digests(table.schema).get("identity") == scorers.digests["identity"]
    vectors: dict[str, list[np.ndarray]] = {}
    for row in table.to_pylist():
        if same and row["identity"]:
            vector = np.asarray(row["identity"], np.float32)
        else:
            name = f"{store.url_of('subjects.parquet')}: {row['reference']}"
            vector = scorers.identity.embed_references([stored_picture(row["image"]["bytes"], name)], [name])[0]
        vectors.setdefault(row["subject_id"], []).append(vector)
    return {name: subject_embedding(np.stack(found)) for name, found in vectors.items()}


def dataset_reference_pictures(store: Store) -> dict[str, list[Image.Image]]:
    """Return subject id -> the reference pictures that a dataset keeps, as the model was shown them."""
    table = read_columns(store, "subjects.parquet", ["subject_id", "image"])
    found: dict[str, list[Image.Image]] = {}
    for row in table.to_pylist():
        picture = stored_picture(row["image"]["bytes"], store.url_of("subjects.parquet"))
        found.setdefault(row["subject_id"], []).append(picture)
    return found


def recorded_digests(schema: pa.Schema) -> dict[str, str]:
    """Return the digests of the scorers that a dataset's footer names, empty when it names none."""
    return recorded_run(schema)[1].get("scorers", {})


def _file(url: str) -> bytes:
    path = local_copy(url)
    if not path.is_file():
        raise InputError(f"{url}: not a file; give the CSV that lists the images")
    return read_table_file(open_store(path.parent), path.name)


def name_and_url(part: str) -> tuple[str | None, str]:
    """Return `sdxl=out/sdxl` as (sdxl, out/sdxl); (None, URL) without a name."""
    name, separator, url = part.partition("=")
    return (name, url) if separator and "/" not in name else (None, part)
