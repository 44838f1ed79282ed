"""One pass over a dataset's rows, without their images: scores, failures, and which images to show on the card."""

import logging
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from facediffuser.dataset.added_columns import read_added_columns
from facediffuser.dataset.manifest import Manifest, listed_shards
from facediffuser.dataset.reading import open_parquet, row_groups, shard_schema
from facediffuser.dataset.schema import FACES, IP_MARGIN
from facediffuser.evaluation.face_facts import FaceCounts, FaceFacts
from facediffuser.evaluation.score_sample import Highest, ScoreSample, rank
from facediffuser.evaluation.tables import NO_CATEGORY, SCORE_COLUMNS, ScoreRow, ScoreSums
from facediffuser.storage import Store

logger = logging.getLogger(__name__)

SHEET_ROWS = 5
SHEET_COLUMNS = 6
EXTREMES = 10
TEXT_COLUMNS = ("sample_id", "prompt_id", "prompt", "error")
SETTING_COLUMNS = (
    "num_inference_steps",
    "guidance_scale",
    "fusion_start",
    "fusion_end",
    "scheduler",
    "height",
    "width",
)
SURVEY_COLUMNS = (*SCORE_COLUMNS, "face_count", *TEXT_COLUMNS, *SETTING_COLUMNS, FACES, IP_MARGIN)
NAMED_EACH = 3
MAX_SETTING_VALUES = 8
# Columns that `copies` adds: the flag, how alike, and to what (None: the row's own references).
FLAGS = {
    "training_copy": ("training_similarity", "training_nearest"),
    "pasted_reference": ("paste_similarity", None),
    "duplicate": ("duplicate_similarity", "duplicate_of"),
}


@dataclass(frozen=True)
class LocatedRow:
    """A row of interest and where its image lies: file, row group, row within the group."""

    file: str
    group: int
    row: int
    values: dict[str, Any]

    @property
    def subject_ids(self) -> tuple[str, ...]:
        """Who the image shows."""
        return tuple(self.values["subject_ids"])

    @property
    def category(self) -> str:
        """The prompt's category."""
        return self.values["category"] or NO_CATEGORY


@dataclass(frozen=True)
class Flagged:
    """Images on which a flag is raised: of how many that were looked at, and those most alike to something."""

    count: int
    checked: int
    shown: list[LocatedRow]


@dataclass
class Survey:
    """What one pass over a dataset found.

    `table`: the means of the rows' scores and of numbers that were added, whose names are in `added`; `sample`: scores
    for plots; `settings`: the different values of each setting column (at most eight); `sheet`: rows for the contact
    sheet, subject set by subject set; `best`, `worst`: rows by IP, ties by PC, none in both; `flags`: what the checks for copies
    raised, empty where they were not made; `faces`: what the column `faces` says, None where there is none; `named`: images
    to show with their faces named; `schema`: the shards' columns; `shard_rows`: how many rows the shards hold, each number
    once.
    """

    rows: int
    table: list[ScoreRow]
    sample: ScoreSample
    subjects: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    settings: dict[str, list] = field(default_factory=dict)
    prompts: int = 0
    sheet: list[list[LocatedRow]] = field(default_factory=list)
    best: list[LocatedRow] = field(default_factory=list)
    worst: list[LocatedRow] = field(default_factory=list)
    flags: dict[str, Flagged] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    faces: FaceFacts | None = None
    named: list[LocatedRow] = field(default_factory=list)
    schema: pa.Schema | None = None
    bytes: int = 0
    files: int = 0
    shard_rows: list[int] = field(default_factory=list)


def survey_dataset(store: Store, manifest: Manifest | None = None) -> Survey:
    """Return what one pass over a dataset's shards finds.

    Only sums, a sample of scores and a few chosen rows stay in memory.
    The choice of rows depends on their ids alone, not on how they lie in shards.

    Args:
        store: the dataset.
        manifest: what lists its shards; None: all of `data/*.parquet`.

    Raises:
        InputError: there are no shards, or one is damaged.
    """
    infos = listed_shards(store, manifest)
    rows, prompts, subjects = 0, set(), set()
    rows_of_file: Counter[str] = Counter()
    schema = shard_schema(store, infos[0].key)
    failures: Counter[str] = Counter()
    settings: dict[str, set] = {}
    added = read_added_columns(store)
    flags = {name: _FlagCounter(similarity) for name, (similarity, _) in FLAGS.items() if name in added.schema.names}
    numbers = [name for name in added.schema.names if is_score(added.schema.field(name)) and name != IP_MARGIN]
    sums, sample, selection, extremes = ScoreSums(numbers), ScoreSample(), _SheetSelection(), _Extremes()
    counts, named = FaceCounts(), _NamedSelection()
    for file, group, table in row_groups(store, [info.key for info in infos], SURVEY_COLUMNS, SCORE_COLUMNS):
        added_rows = added.rows(table["sample_id"])
        faces = table if FACES in table.column_names else added_rows if FACES in added_rows.column_names else None
        if faces is not None:
            _count_faces(counts, table, faces)
        added_rows = added_rows.drop_columns([name for name in (FACES, IP_MARGIN) if name in added_rows.column_names])
        narrow = table.select([name for name in (*SCORE_COLUMNS, "face_count") if name in table.column_names])
        for name in added_rows.column_names:
            narrow = narrow.append_column(name, added_rows[name])
        rows += narrow.num_rows
        rows_of_file[file] += narrow.num_rows
        sums.add(narrow)
        _sample(sample, table)
        subjects.update(table["subject_ids"].combine_chunks().flatten().unique().to_pylist())
        for name in set(SETTING_COLUMNS) & set(table.column_names):
            settings.setdefault(name, set()).update(table[name].unique().to_pylist())
        table = table.drop_columns(
            [name for name in (*SETTING_COLUMNS, FACES, IP_MARGIN) if name in table.column_names]
        )
        added_values = added_rows.to_pylist() if flags else [{}] * table.num_rows
        for row, (values, extra) in enumerate(zip(table.to_pylist(), added_values, strict=True)):
            prompts.add(values["prompt_id"])
            if values["status"] != "ok":
                failures[(values["error"] or "unknown error").strip().splitlines()[0][:200]] += 1
                continue
            located = LocatedRow(file, group, row, values | extra)
            selection.add(located)
            extremes.add(located)
            if faces is not None:
                named.add(located, faces, row)
            for name, flag in flags.items():
                flag.add(located, extra[name])
    best, worst = extremes.result()
    return Survey(
        rows=rows,
        table=sums.table(),
        sample=sample,
        subjects=len(subjects),
        failures=failures,
        settings={
            name: sorted(values - {None}, key=repr)[:MAX_SETTING_VALUES] for name, values in sorted(settings.items())
        },
        prompts=len(prompts),
        sheet=selection.result(),
        best=best,
        worst=worst,
        flags={name: flag.result() for name, flag in flags.items()},
        added=numbers,
        faces=counts.facts(),
        named=named.result(),
        schema=schema,
        bytes=sum(info.size for info in infos),
        files=len(infos),
        shard_rows=sorted(set(rows_of_file.values())),
    )


def fetch_images(store: Store, wanted: list[LocatedRow]) -> dict[str, bytes]:
    """Return the encoded images of rows found by the survey, by sample id, reading only the row groups they lie in."""
    places: dict[str, dict[int, list[LocatedRow]]] = {}
    for located in wanted:
        places.setdefault(located.file, {}).setdefault(located.group, []).append(located)
    images = {}
    for key, groups in sorted(places.items()):
        with open_parquet(store, key) as file:
            for group, rows in sorted(groups.items()):
                # With the status, so that an image that is missing is seen as damage.
                column = file.read_row_group(group, columns=["status", "image"])["image"]
                for located in rows:
                    images[located.values["sample_id"]] = column[located.row].as_py()["bytes"]
    return images


def is_score(column: pa.Field) -> bool:
    """Return whether an added column is one a mean can be taken of, and no part of the checks for copies."""
    checked = {name for flag, columns in FLAGS.items() for name in (flag, *columns)}
    kind = column.type
    return (pa.types.is_floating(kind) or pa.types.is_integer(kind)) and column.name not in checked


def _count_faces(counts: FaceCounts, rows: pa.Table, faces: pa.Table) -> None:
    columns = {name: rows[name] for name in ("sample_id", "subject_ids", "status", "ip")}
    counts.add(pa.table(columns | {"face_count": rows["face_count"], FACES: faces[FACES], IP_MARGIN: faces[IP_MARGIN]}))


def _sample(sample: ScoreSample, table: pa.Table) -> None:
    scored = table.filter(pc.and_kleene(pc.equal(table["status"], "ok"), pc.is_valid(table["ip"])))
    categories = pc.fill_null(scored["category"], NO_CATEGORY).to_pylist()
    ip, consistency = (scored[name].to_numpy() for name in ("ip", "pc"))
    sample.add(scored["sample_id"].to_pylist(), categories, ip, consistency)


class _SheetSelection:
    """Keeps the subject sets whose ids hash lowest, and of each the prompts that hash lowest in every category.

    Prompts rank alike in every subject set, so that the sheet's columns can be compared.
    """

    def __init__(self):
        self.sets: dict[tuple[str, ...], dict[str, dict[str, tuple]]] = {}
        self.ranks: dict[tuple[str, ...], bytes] = {}

    def add(self, located: LocatedRow) -> None:
        subjects = located.subject_ids
        if subjects not in self.sets and not self._keep_set(subjects):
            return
        prompts = self.sets[subjects].setdefault(located.category, {})
        prompt = str(located.values["prompt_id"])
        item = (rank(prompt), rank(located.values["sample_id"]), located)
        if prompt not in prompts or item[:2] < prompts[prompt][:2]:
            prompts[prompt] = item
        if len(prompts) > SHEET_COLUMNS:
            del prompts[max(prompts, key=lambda name: prompts[name][:2])]

    def _keep_set(self, subjects: tuple[str, ...]) -> bool:
        own = rank("\x1f".join(subjects))
        if len(self.sets) >= SHEET_ROWS:
            last = max(self.ranks, key=self.ranks.__getitem__)
            if own >= self.ranks[last]:
                return False
            del self.sets[last], self.ranks[last]
        self.sets[subjects], self.ranks[subjects] = {}, own
        return True

    def result(self) -> list[list[LocatedRow]]:
        rows = []
        for subjects in sorted(self.sets):
            queues = [
                [item[2] for item in sorted(prompts.values(), key=lambda item: item[:2])]
                for _, prompts in sorted(self.sets[subjects].items())
            ]
            mixed = [queue[index] for index in range(SHEET_COLUMNS) for queue in queues if index < len(queue)]
            rows.append(mixed[:SHEET_COLUMNS])
        return rows


class _NamedSelection:
    """Keeps images with faces: of those with most subjects the ones with the highest and the lowest margin."""

    def __init__(self):
        self.high, self.low = Highest[LocatedRow](NAMED_EACH), Highest[LocatedRow](NAMED_EACH)

    def add(self, located: LocatedRow, faces: pa.Table, row: int) -> None:
        margin, there = faces[IP_MARGIN][row].as_py(), faces[FACES][row].as_py()
        if margin is None or there is None:
            return
        people, name = len(located.subject_ids), located.values["sample_id"]
        for kept, value in ((self.high, margin), (self.low, -margin)):
            key = (people, value, name)
            if kept.takes(key):
                own = [{field: value for field, value in face.items() if field != "embedding"} for face in there]
                kept.add(key, replace(located, values=located.values | {FACES: own, IP_MARGIN: margin}))

    def result(self) -> list[LocatedRow]:
        high, low = self.high.items(), self.low.items()[::-1]
        there = {shown.values["sample_id"] for shown in high}
        return high + [shown for shown in low if shown.values["sample_id"] not in there]


class _Extremes:
    """Keeps the rows with the highest and the lowest IP; PC, then the id, decide between equals.

    Both are ends of one order, so that no row is in both; of few rows the lower half counts as the lowest.
    """

    def __init__(self):
        self.count = 0
        self.high, self.low = Highest[LocatedRow](EXTREMES), Highest[LocatedRow](EXTREMES)

    def add(self, located: LocatedRow) -> None:
        ip, pc = located.values["ip"], located.values["pc"]
        if ip is None or pc is None:
            return
        self.count += 1
        name = located.values["sample_id"]
        backwards = (*(-ord(letter) for letter in name), 1)  # the 1 puts a name behind those that begin with it
        self.high.add((ip, pc, name), located)
        self.low.add((-ip, -pc, backwards), located)

    def result(self) -> tuple[list[LocatedRow], list[LocatedRow]]:
        return self.high.items()[: -(-self.count // 2)], self.low.items()[: self.count // 2]


class _FlagCounter:
    """Counts the rows on which a flag is raised and keeps those most alike; the id decides between equals."""

    def __init__(self, similarity: str):
        self.similarity = similarity
        self.count = self.checked = 0
        self.highest = Highest[LocatedRow](EXTREMES)

    def add(self, located: LocatedRow, raised: bool | None) -> None:
        self.checked += raised is not None
        if not raised:
            return
        self.count += 1
        self.highest.add((located.values[self.similarity], located.values["sample_id"]), located)

    def result(self) -> Flagged:
        return Flagged(self.count, self.checked, self.highest.items())
