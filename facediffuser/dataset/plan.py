"""The plan: every image of a dataset as a row, written before any pixel, the same rows for the same inputs."""

import errno
import functools
import hashlib
import io
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from facediffuser.dataset.encoding import parquet_bytes
from facediffuser.dataset.input_tables import normalised
from facediffuser.dataset.inputs import Prompt, Subject
from facediffuser.dataset.reading import open_parquet
from facediffuser.dataset.schema import FINGERPRINT_KEY, PLAN_SCHEMA
from facediffuser.errors import InputError
from facediffuser.runs import canonical_json
from facediffuser.storage import Store

ROWS_PER_PART = 100_000
GROUPS_PER_PART = 256
_PART_KEY = re.compile(r"(?:data/shard|plan/part)-(?:(p\d{4,6})-)?\d+-of-\d+\.parquet")
# The sets of subjects are held in memory while the plan is written, the shards' entries while the manifest is.
MOST_ROWS = 10**9
MOST_SHARDS = 10**6


class RowSettings(BaseModel):
    """What is the same in every row of a plan: how its image is sampled."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    num_inference_steps: int
    guidance_scale: float
    fusion_start: int
    fusion_end: int
    scheduler: str
    height: int
    width: int


@dataclass(frozen=True)
class Layout:
    """How the rows of a run lie in shards and plan files; a function of the numbers, not of workers.

    A shard is one row group of a plan file, so a worker reads just its own rows.

    rows: how many.
    shard_size: rows of a shard.
    name: "" for a dataset's first part, `p0002` and so on for those that were added; stands in the keys.
    kept: where rows were removed since, how many each shard has now; a shard without rows has no row group.
    """

    rows: int
    shard_size: int
    name: str = ""
    kept: tuple[int, ...] = ()

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return len(self.kept) or -(-self.rows // self.shard_size)  # whole numbers: exact however many rows

    @property
    def shards_per_part(self) -> int:
        """How many shards have their rows in one file of the plan."""
        return max(1, min(GROUPS_PER_PART, ROWS_PER_PART // self.shard_size))

    @property
    def parts(self) -> int:
        """How many files the plan has."""
        return -(-self.shards // self.shards_per_part)

    def shard_rows(self, shard: int) -> int:
        """Return how many rows a shard has: `shard_size`, the last one what remains."""
        return self.kept[shard] if self.kept else min(self.shard_size, self.rows - shard * self.shard_size)

    def row_group(self, shard: int) -> tuple[int, int]:
        """Return where a shard's rows are planned: the number of the plan's file, and of the row group in it, from 0."""
        part, place = divmod(shard, self.shards_per_part)
        empty = self.kept[shard - place : shard].count(0)
        return part, place - empty

    def shards_of_part(self, part: int) -> range:
        """Return the numbers of the shards that a plan file has the rows of."""
        first = part * self.shards_per_part
        return range(first, min(first + self.shards_per_part, self.shards))

    def part_key(self, part: int) -> str:
        """Return the key of one of the plan's files."""
        return f"plan/part-{self._infix}{part:05d}-of-{self.parts:05d}.parquet"

    def part_keys(self) -> list[str]:
        """Return the keys of all plan files."""
        return [self.part_key(part) for part in range(self.parts)]

    def shard_key(self, shard: int) -> str:
        """Return the key of a shard."""
        return f"data/shard-{self._infix}{shard:05d}-of-{self.shards:05d}.parquet"

    def stats_key(self, shard: int) -> str:
        """Return the key of a shard's timings."""
        return f"stats/shard-{self._infix}{shard:05d}.json"

    @property
    def _infix(self) -> str:
        return f"{self.name}-" if self.name else ""

    def shard_of_key(self, key: str) -> int | None:
        """Return the number of a shard of this layout by its key, None for any other key."""
        match = re.fullmatch(rf"data/shard-{self._infix}(\d+)-of-(\d+)\.parquet", key)
        number = int(match[1]) if match else -1
        return number if 0 <= number < self.shards and self.shard_key(number) == key else None


@dataclass(frozen=True)
class Plan:
    """Subjects x prompts x images: each prompt with each unordered set of as many subjects as it shows.

    With `most_sets`, only so many sets of a size, in which every subject comes about equally often. Rows of images of
    one subject stand first, then those of two, and so on; within a size the sets, within a set the prompts.
    """

    subjects: tuple[Subject, ...]
    prompts: tuple[Prompt, ...]
    images_per_prompt: int
    seed: int
    row: RowSettings
    most_sets: int | None = None

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of subjects that the prompts show, each once, ascending."""
        return tuple(sorted({prompt.subjects for prompt in self.prompts}))

    @property
    def subjects_per_image(self) -> int | list[int]:
        """How many subjects an image shows; where that differs by prompt, the sizes."""
        return self.sizes[0] if len(self.sizes) == 1 else list(self.sizes)

    @property
    def subject_sets(self) -> int | list[int]:
        """How many sets of subjects there are; where prompts differ in size, of each size."""
        counts = [self.count_sets(size) for size in self.sizes]
        return counts[0] if len(counts) == 1 else counts

    def count_sets(self, size: int) -> int:
        """Return how many sets of `size` subjects are planned."""
        every = math.comb(len(self.subjects), size)
        return every if self.most_sets is None else min(every, self.most_sets)

    def of_size(self, size: int) -> tuple[Prompt, ...]:
        """Return the prompts that show `size` subjects, in their order."""
        return tuple(prompt for prompt in self.prompts if prompt.subjects == size)

    def prompts_in_order(self) -> list[Prompt]:
        """Return the prompts in the order in which their rows come."""
        return [prompt for size in self.sizes for prompt in self.of_size(size)]

    def __len__(self) -> int:
        return sum(self.count_sets(size) * len(self.of_size(size)) for size in self.sizes) * self.images_per_prompt

    def digest(self) -> str:
        """Return the sha256 of all that the rows are made of."""
        digest = hashlib.sha256()
        head = [self.subjects_per_image, self.subject_sets, self.images_per_prompt, self.seed, self.row.model_dump()]
        people = [[person.subject_id, person.class_word] for person in self.subjects]
        digest.update(canonical_json([head, people]).encode())
        for prompt in self.prompts:
            line = [prompt.prompt_id, prompt.category, prompt.pieces, prompt.order]
            digest.update(b"\n" + canonical_json(line).encode())
        return digest.hexdigest()

    def sets(self, size: int) -> Iterator[tuple[Subject, ...]]:
        """Yield the sets of `size` subjects, each in the order of the subjects."""
        count, wanted = len(self.subjects), self.count_sets(size)
        every: Iterator[tuple[int, ...]] = itertools.combinations(range(count), size)
        if wanted < math.comb(count, size):
            # Neighbours on a ring first, then every second one, and so on: each subject as often as any other.
            ring = (
                {(start + stride * place) % count for place in range(size)}
                for stride in range(1, count)
                for start in range(count)
            )
            chosen: dict[tuple[int, ...], None] = {}
            for members in itertools.chain(ring, every):
                if len(members) == size:
                    chosen[tuple(sorted(members))] = None
                if len(chosen) == wanted:
                    break
            every = iter(sorted(chosen))
        for members in every:
            yield tuple(self.subjects[member] for member in members)

    def rows(self) -> Iterator[tuple[str, str, str, str | None, tuple[str, ...], int]]:
        """Yield (sample_id, prompt_id, prompt, category, subject_ids, seed) of each image."""
        for size in self.sizes:
            prompts = self.of_size(size)
            for people in self.sets(size):
                yield from self._rows_of(people, prompts)

    def _rows_of(self, people: tuple[Subject, ...], prompts: tuple[Prompt, ...]):
        ids = tuple(person.subject_id for person in people)
        words = tuple(person.class_word for person in people)
        name = "+".join(ids)
        for prompt in prompts:
            text, ordered = prompt.text(words), prompt.subjects_in_order(ids)
            for number in range(self.images_per_prompt):
                sample_id = f"{name}~{prompt.prompt_id}~{number}"
                yield sample_id, prompt.prompt_id, text, prompt.category, ordered, row_seed(self.seed, sample_id)

    def tables(self, rows_per_table: int) -> Iterator[pa.Table]:
        """Yield the plan as tables of PLAN_SCHEMA, each of `rows_per_table` rows, the last one of what remains."""
        same = self.row.model_dump()
        rows = self.rows()
        while chunk := list(itertools.islice(rows, rows_per_table)):
            columns = dict(
                zip(("sample_id", "prompt_id", "prompt", "category", "subject_ids", "seed"), zip(*chunk, strict=True),
                    strict=True)
            )  # fmt: skip
            arrays = [
                pa.array(columns[field.name], field.type)
                if field.name in columns
                else pa.repeat(pa.scalar(same[field.name], field.type), len(chunk))
                for field in PLAN_SCHEMA
            ]
            yield pa.Table.from_arrays(arrays, schema=PLAN_SCHEMA)


def row_seed(run_seed: int, sample_id: str) -> int:
    """Return a row's seed, 0 to 2^63 - 1: from a hash of the run's seed and the sample_id."""
    digest = hashlib.blake2b(f"{run_seed}\0{sample_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def part_names(keys: Iterable[str]) -> list[str]:
    """Return the names of the parts that plan files and shards belong to by their keys, sorted; others have none."""
    matches = (_PART_KEY.fullmatch(key) for key in keys)
    return sorted({match[1] or "" for match in matches if match})


class Rows(Protocol):
    """Planned rows: a whole `Plan`, or what an extension adds."""

    def __len__(self) -> int: ...

    def tables(self, rows_per_table: int) -> Iterator[pa.Table]: ...


def write_plan(store: Store, plan: Rows, layout: Layout, schema: pa.Schema) -> int:
    """Write the plan's missing files; memory holds one of them at a time.

    The first file is put only where none is: it settles which of two runs started at once on one output goes on, and the
    others are put only where it is this run's. Of two runs whose plans have other numbers of files at most one goes on.
    Files appear whole, so one that is there is finished.

    Args:
        store: the output.
        plan: the rows.
        layout: how the plan is cut into shards.
        schema: PLAN_SCHEMA with the run's marks.

    Returns:
        How many files were written.

    Raises:
        FileExistsError: another run was the first on this output.
    """
    there = {info.key for info in store.list("plan/")}
    if there.issuperset(layout.part_keys()):
        return 0
    written = 0
    for part, table in enumerate(plan.tables(layout.shards_per_part * layout.shard_size)):
        key = layout.part_key(part)
        if key not in there:
            store.put(key, encode_part(table, layout, schema), if_absent=part == 0)
            written += 1
        if part == 0:
            _require_first(store, layout, schema, written > 0)
    return written


def _require_first(store: Store, layout: Layout, schema: pa.Schema, written: bool) -> None:
    """Raise FileExistsError where a plan's first file is another run's, or beside one of a plan of more or fewer files.

    The latter, `written` just now, is removed: another run that looks at the same time does the same, and neither goes on.
    """
    key = layout.part_key(0)
    with open_parquet(store, key) as file:
        same = (file.schema_arrow.metadata or {}).get(FINGERPRINT_KEY) == (schema.metadata or {}).get(FINGERPRINT_KEY)
    own = layout.part_keys()
    beside = [
        info.key for info in store.list("plan/") if info.key not in own and part_names([info.key]) == [layout.name]
    ]
    if beside and written:
        store.delete(key)
    if beside or not same:
        raise FileExistsError(
            errno.EEXIST, "the plan of another run is there", store.url_of(beside[0] if beside else key)
        )


def encode_part(rows: pa.Table, layout: Layout, schema: pa.Schema) -> bytes:
    """Return the Parquet of a plan's file, a row group for each shard; the same rows give the same bytes."""
    return parquet_bytes(rows.replace_schema_metadata(schema.metadata), row_group_size=layout.shard_size)


def encode_groups(groups: Iterable[pa.Table], schema: pa.Schema) -> bytes:
    """Return the Parquet of a plan's file whose row groups, one a shard, differ in size; empty ones are left out."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema, compression="zstd", write_page_index=True) as writer:
        for rows in groups:
            if rows.num_rows:
                writer.write_table(
                    rows.cast(schema).replace_schema_metadata(schema.metadata), row_group_size=rows.num_rows
                )
    return sink.getvalue()


def read_shard_rows(store: Store, layout: Layout, shard: int, fingerprint: str | None = None) -> list[dict[str, Any]]:
    """Return the planned rows of one shard.

    Args:
        store: the dataset.
        layout: how the plan is cut into shards.
        shard: the shard's number, from 0.
        fingerprint: the run's; None reads the plan of any run.

    Returns:
        A dictionary by column of PLAN_SCHEMA for each row.

    Raises:
        InputError: the plan is another run's.
    """
    part, group = layout.row_group(shard)
    with open_parquet(store, layout.part_key(part)) as file:
        mark = (file.schema_arrow.metadata or {}).get(FINGERPRINT_KEY, b"").decode()
        if fingerprint is not None and mark != fingerprint:
            raise InputError(
                f"{store.url}: has the plan of another run ({mark[:12]}), begun at the same time; give another output"
            )
        return file.read_row_group(group).to_pylist() if layout.shard_rows(shard) else []


def find_sample(store: Store, layout: Layout, sample_id: str) -> tuple[int, int] | None:
    """Return where a row is planned, by reading one column only.

    Args:
        store: the dataset.
        layout: how the plan is cut into shards.
        sample_id: the row's; it may be given in another of Unicode's forms than the plan's, as a file system or a
            keyboard writes it.

    Returns:
        (shard, place in it), both from 0; None when no such row is planned.
    """
    wanted = pa.array(dict.fromkeys((sample_id, normalised(sample_id))))
    for part in range(layout.parts):
        with open_parquet(store, layout.part_key(part)) as file:
            for shard in filter(layout.shard_rows, layout.shards_of_part(part)):
                ids = file.read_row_group(layout.row_group(shard)[1], columns=["sample_id"])["sample_id"]
                place = pc.index(pc.is_in(ids, wanted), True).as_py()
                if place >= 0:
                    return shard, place
    return None
