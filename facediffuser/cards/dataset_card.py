"""The card of a dataset: README.md for readers and hubs, pictures and a page in card/, all from the Parquet alone."""

import logging
from collections.abc import Collection
from typing import Any

from PIL import Image

from facediffuser.cards.card_facts import (
    FACE_PICTURES,
    IDENTITY,
    NAMED,
    POSE,
    RIGHTS,
    Card,
    run_lines,
    shared_values,
    sheet_line,
    summary,
)
from facediffuser.cards.card_page import card_page
from facediffuser.cards.contact_sheet import SheetRow, Tile, contact_sheet
from facediffuser.cards.named_faces import named_faces_sheet
from facediffuser.cards.rendering import render
from facediffuser.cards.survey import LocatedRow, fetch_images, survey_dataset
from facediffuser.dataset.certificate import dataset_certificates
from facediffuser.dataset.column_meanings import column_lines
from facediffuser.dataset.consent import consent_facts
from facediffuser.dataset.manifest import Manifest
from facediffuser.dataset.reading import open_parquet, read_chosen, recorded_run
from facediffuser.dataset.seal import CARD_KEYS, require_sealable, seal
from facediffuser.dataset.spending import read_spent
from facediffuser.evaluation.face_plots import identity_plots, pose_plots
from facediffuser.evaluation.plots import image_plane, score_histograms
from facediffuser.evaluation.tables import ScoreRow, markdown
from facediffuser.markup import Markdown, markdown_table
from facediffuser.number_words import counted
from facediffuser.picture_grid import png_bytes
from facediffuser.pictures import stored_picture
from facediffuser.prompts import without_markers
from facediffuser.storage import Store

logger = logging.getLogger(__name__)

MAX_LINES = 7
OTHERS = "others"
SIZE_TAGS = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def write_card(store: Store, manifest: Manifest | None = None) -> list[ScoreRow]:
    """Write `README.md`, `card/index.html` and the pictures of both in `card/`.

    Reads the shards, `subjects.parquet`, the plan's metadata and `stats/spent.json`; the same dataset gives the
    same bytes. Memory does not grow with the rows, but with the different people and prompts, and with columns that
    were added.

    Args:
        store: the dataset.
        manifest: that of the dataset, or the one that is written next: the card is of the parts that it lists, not of rows
            that are still being added. None: of all of `data/*.parquet`.

    Returns:
        The table of scores.

    Raises:
        InputError: there is no dataset.
    """
    survey = survey_dataset(store, manifest)
    names = {part.name for part in manifest.parts} if manifest else None
    shown = [located for row in survey.sheet for located in row] + survey.best + survey.worst + survey.named
    shown += [located for flagged in survey.flags.values() for located in flagged.shown]
    card = Card(
        name=store.url.rstrip("/").rsplit("/", 1)[-1],
        survey=survey,
        run=_run_facts(store),
        images=fetch_images(store, shown),
        spent=read_spent(store),
        references=_references(store, {name for located in shown for name in located.subject_ids}),
        certificates={
            name: found for name, found in dataset_certificates(store).items() if names is None or name in names
        },
    )
    groups = survey.sample.groups(MAX_LINES, OTHERS)
    pictures = {
        "card/contact_sheet.png": _sheet(card),
        "card/score_histograms.png": score_histograms(groups),
        "card/ip_pc_plane.png": image_plane(groups),
        **_face_pictures(card),
    }
    for key in CARD_KEYS:
        store.require_replaceable(key)
    for key, data in pictures.items():
        store.put(key, data)
    facts, settings = [*summary(card), *consent_facts(store)], run_lines(card.run)
    store.put("card/index.html", card_page(card, pictures, facts, settings).encode())
    store.put("README.md", readme(card, facts, settings).encode())
    logger.info("%s: card of %s written", store.url, counted(card.rows, "row"))
    return card.table


def rewrite_card(store: Store, written: Collection[str] = ()) -> list[ScoreRow]:
    """Write a finished dataset's card anew and list it in the manifest, where the dataset has one.

    Args:
        store: the dataset.
        written: keys below scores/ that were written just before.

    Returns:
        The table of scores.

    Raises:
        InputError: the dataset is damaged; nothing is written then.
        StorageError: another command wrote a manifest meanwhile.
    """
    manifest = require_sealable(store)
    table = write_card(store, manifest)
    if manifest is not None:
        seal(store, manifest, written)
    return table


def readme(card: Card, facts: list[tuple[str, str]], settings: list[tuple[str, str]]) -> str:
    """Return the text of README.md, with the front matter that the Hugging Face Hub reads.

    Args:
        card: what the card shows.
        facts: (name, value) lines.
        settings: (dotted name, value) lines.
    """
    tag = next((tag for limit, tag in SIZE_TAGS if card.rows < limit), "n>1M")
    front_matter = {
        "pretty_name": card.name,
        "license": "other",
        "license_name": "see-rights-section",
        "task_categories": ["text-to-image"],
        "tags": ["synthetic", "faces", "subject-driven-generation", "face-diffuser", "parquet"],
        "size_categories": [tag],
        "configs": [{"config_name": "default", "data_files": "data/*.parquet"}],
    }
    return render(
        "dataset_readme.md.j2",
        **shared_values(card),
        front_matter=front_matter,
        facts=facts,
        scores=markdown(card.table),
        face_pictures=[
            (Markdown(key), words)
            for key, words in FACE_PICTURES
            if (card.survey.named if key == NAMED else card.survey.faces)
        ],
        columns=Markdown(markdown_table(("column", "type", "meaning"), column_lines(card.survey.schema))),
        settings=settings,
        rights=Markdown(RIGHTS),
    )


def _face_pictures(card: Card) -> dict[str, bytes]:
    """The plots of identity and pose, and images with their faces named; none for a dataset without `faces`."""
    pictures = {}
    if card.survey.faces is not None:
        pictures = {IDENTITY: identity_plots(card.survey.faces), POSE: pose_plots(card.survey.faces)}
    if card.survey.named:
        rows = [located.values for located in card.survey.named]
        sheet = named_faces_sheet([(stored_picture(card.images[row["sample_id"]]), row) for row in rows])
        pictures[NAMED] = png_bytes(sheet, optimize=True)
    return pictures


def _sheet(card: Card) -> bytes:
    rows = [
        SheetRow(
            subjects=[(name, card.references.get(name)) for name in row[0].subject_ids],
            tiles=[tile(located, card.images) for located in row],
        )
        for row in card.survey.sheet
        if row
    ]
    overall = [row for row in card.table if row.category == "all"]
    scored = [row for row in overall[:2] if row.n]
    means = ", ".join(f"{row.metric.upper()} {row.mean:.3f}" for row in scored)
    if scored and len({row.subjects for row in overall}) > 1:
        # The table begins with the fewest people in an image; means over all would mix unlike things.
        people = scored[0].subjects
        means += f" ({counted(people, 'person', 'people')})"
    sizes = {"image": card.rows - card.failed, "subject": card.subjects, "prompt": card.survey.prompts}
    counts = ", ".join(counted(count, noun) for noun, count in sizes.items())
    return png_bytes(contact_sheet(rows, card.name, f"{counts}   {means}", sheet_line(card)), optimize=True)


def tile(located: LocatedRow, images: dict[str, bytes]) -> Tile:
    """Return one image of the sheet with its prompt and scores.

    Args:
        located: the row.
        images: encoded images by sample id; without the row's its place stays empty.
    """
    values = located.values
    data = images.get(values["sample_id"])
    return Tile(
        image=stored_picture(data, values["sample_id"]) if data else None,
        prompt=without_markers(values["prompt"]),
        category=values["category"] or "",
        ip=values["ip"],
        pc=values["pc"],
    )


def _references(store: Store, names: set[str]) -> dict[str, Image.Image]:
    """The first reference picture of each named subject; none when there is no subjects.parquet."""
    if not names or not store.exists("subjects.parquet"):
        return {}
    table = read_chosen(store, "subjects.parquet", ("subject_id", "image"), "subject_id", sorted(names))
    pictures: dict[str, Image.Image] = {}
    for row in table.to_pylist():
        data = (row["image"] or {}).get("bytes")
        if row["subject_id"] not in pictures and data:
            pictures[row["subject_id"]] = stored_picture(data, row["subject_id"])
    return pictures


def _run_facts(store: Store) -> dict[str, Any]:
    """The run's settings and digests as the plan's Parquet metadata tells them; empty without a plan."""
    plans = [info.key for info in store.list("plan/") if info.key.endswith(".parquet")]
    if not plans:
        return {}
    with open_parquet(store, plans[0]) as file:
        fingerprint, run = recorded_run(file.schema_arrow)
    if isinstance(run.get("settings"), dict):
        # What was asked for: a dataset of few rows has smaller shards. The survey counts what each really holds.
        run = run | {"settings": {name: value for name, value in run["settings"].items() if name != "shard_size"}}
    return {"fingerprint": fingerprint, **run} if fingerprint else run
