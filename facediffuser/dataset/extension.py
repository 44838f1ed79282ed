"""Rows added to a finished dataset: which of a plan's rows are new, and parts that were begun and are not finished."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from facediffuser.dataset.certificate import dataset_certificate
from facediffuser.dataset.manifest import (
    Manifest,
    Part,
    begun_parts,
    build_part,
    find_manifest,
    shard_entry,
)
from facediffuser.dataset.other_run import (
    class_words,
    conflicting_prompts,
    recorded_subjects,
    run_of_output,
    subject_differences,
)
from facediffuser.dataset.plan import Layout, Plan, part_names
from facediffuser.dataset.reading import open_parquet, read_footer, row_groups
from facediffuser.dataset.references import encode_references
from facediffuser.dataset.schema import READABLE_VERSIONS, SUBJECTS_KEY, with_marks
from facediffuser.dataset.shards import finished_shards
from facediffuser.errors import InputError
from facediffuser.runs import Run, differences, identity_of, other_run_error
from facediffuser.storage import Store

# What an extension may have more of than the dataset; all else in a run's document stays.
GROWS = ("plan", "subjects")
GROWING_SETTINGS = ("subjects_per_image", "images_per_prompt", "subject_sets")
UNFINISHED_REFERENCES = "stats/subjects-"


class SampleIds:
    """A set of sample ids, 16 bytes each however long they are."""

    def __init__(self, ids: Iterable[str] = ()):
        self._sorted = np.sort(_digests(ids))

    def __len__(self) -> int:
        return len(self._sorted)

    def contain(self, ids: Iterable[str]) -> np.ndarray:
        """Return for each of n ids whether it is in the set: (n,) bool."""
        asked = _digests(ids)
        if not len(self._sorted):
            return np.zeros(len(asked), bool)
        places = np.minimum(np.searchsorted(self._sorted, asked), len(self._sorted) - 1)
        return self._sorted[places] == asked


def _digests(ids: Iterable[str]) -> np.ndarray:
    return np.array([hashlib.blake2b(name.encode(), digest_size=16).digest() for name in ids], "S16")


def planned_ids(store: Store, names: Iterable[str]) -> Iterator[str]:
    """Yield the sample ids of the plans of some parts, part by part; memory holds one row group at a time."""
    for name in names:
        for _, _, rows in row_groups(store, plan_keys(store, name), ["sample_id"]):
            yield from rows["sample_id"].to_pylist()


def plan_keys(store: Store, name: str) -> list[str]:
    """Return the keys of a part's plan files that are there."""
    return [info.key for info in store.list("plan/") if part_names([info.key]) == [name]]


@dataclass(frozen=True)
class NewRows:
    """The rows of a plan that a dataset does not have yet, in the plan's order."""

    plan: Plan
    known: SampleIds

    def __len__(self) -> int:
        return sum(table.num_rows for table in self._filtered())

    def digest(self) -> str:
        """Return the sha256 of the rows."""
        digest = hashlib.sha256(self.plan.digest().encode())
        for table in self._filtered():
            digest.update("".join(f"\n{name}" for name in table["sample_id"].to_pylist()).encode())
        return digest.hexdigest()

    def tables(self, rows_per_table: int) -> Iterator[pa.Table]:
        """Yield the rows as tables of PLAN_SCHEMA, each of `rows_per_table` rows, the last one of what remains."""
        waiting: list[pa.Table] = []
        count = 0
        for table in self._filtered():
            waiting.append(table)
            count += table.num_rows
            while count >= rows_per_table:
                every = pa.concat_tables(waiting)
                yield every.slice(0, rows_per_table).combine_chunks()
                waiting, count = [every.slice(rows_per_table)], count - rows_per_table
        if count:
            yield pa.concat_tables(waiting).combine_chunks()

    def _filtered(self) -> Iterator[pa.Table]:
        for table in self.plan.tables(10_000):
            there = self.known.contain(table["sample_id"].to_pylist())
            if not there.all():
                yield table.filter(pa.array(~there))


# --- parts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputState:
    """What an output holds: its manifest, None where there is none, and the parts that are begun and not in it."""

    manifest: Manifest | None
    begun: list[str] = field(default_factory=list)

    @property
    def next_name(self) -> str:
        """The name of the part that an extension makes."""
        names = [part.name for part in self.manifest.parts] if self.manifest else []
        return part_name(1 + max((int(name[1:]) if name else 1 for name in names), default=0))


def part_name(number: int) -> str:
    """Return the name of a part by its number, from 1."""
    return "" if number == 1 else f"p{number:04d}"


def output_state(store: Store) -> OutputState:
    """Return what an output holds.

    Raises:
        InputError: its manifest is damaged.
    """
    manifest = find_manifest(store)
    return OutputState(manifest, begun_parts(store, manifest))


def last_run(store: Store, there: OutputState) -> Run | None:
    """Return the run that made the last part of what an output holds, finished or not; None for an empty output."""
    names = [*([part.name for part in there.manifest.parts] if there.manifest else []), *there.begun]
    return run_of_output(store, names[-1]) if names else None


def references_key(name: str, fingerprint: str) -> str:
    """Return where the references of a part lie while it is generated.

    Args:
        name: the part's name, "" for the first.
        fingerprint: that of the part's run.
    """
    return f"{UNFINISHED_REFERENCES}{name}-{fingerprint[:16]}.parquet" if name else SUBJECTS_KEY


def part_of_plan(store: Store, name: str) -> tuple[Run, Layout] | None:
    """Return the run and the layout of a part by its plan; None when not all of the plan is there."""
    run = run_of_output(store, name)
    if run is None:
        return None
    size = run.document["settings"]["shard_size"]
    groups: list[int] = []
    keys = plan_keys(store, name)
    for key in keys:
        footer = read_footer(store, key)
        groups += [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    layout = Layout(sum(groups), size, name)
    if layout.part_keys() == keys and groups == [layout.shard_rows(shard) for shard in range(layout.shards)]:
        return run, layout
    if len(keys) != int(keys[0].rsplit("-", 1)[1].removesuffix(".parquet")):
        return None
    # Rows were removed: the shards say how many each of them has.
    shards = [info.key for info in store.list("data/") if part_names([info.key]) == [name]]
    kept = tuple(read_footer(store, key).num_rows for key in shards)
    layout = Layout(sum(kept), size, name, kept)
    found = layout.part_keys() == keys and [layout.shard_key(shard) for shard in range(layout.shards)] == shards
    return (run, layout) if found else None


def finished_part(store: Store, name: str) -> Part | None:
    """Return a part of a dataset made of its plan and its shards; None when some of them are missing."""
    found = part_of_plan(store, name)
    if found is None:
        return None
    run, layout = found
    there = finished_shards(store, layout, run.fingerprint)
    if len(there) != layout.shards:
        return None
    entries = [shard_entry(store, layout, shard, there[shard].info) for shard in range(layout.shards)]
    computed_with = [there[shard].marks.computed_with for shard in range(layout.shards)]
    part = build_part(run.fingerprint, dict(run.document), layout, entries, None, computed_with)
    return part.model_copy(update={"certificate": dataset_certificate(store, name)})


# --- what an extension may be -----------------------------------------------------------------------------------------


def without_growth(document: Mapping[str, Any], undecided: Iterable[str] = ()) -> dict[str, Any]:
    """Return the part of a run's document that an extension must have, too.

    Args:
        document: the run's document.
        undecided: names of settings to leave out, because the other side does not know them yet.
    """
    identity = {name: value for name, value in identity_of(document).items() if name not in GROWS}
    left_out = {*GROWING_SETTINGS, *undecided}
    identity["settings"] = {name: value for name, value in identity["settings"].items() if name not in left_out}
    return identity


def require_extendable(
    store: Store,
    manifest: Manifest | None,
    document: Mapping[str, Any],
    known: Mapping[str, Any],
    plan: Plan,
    references: pa.Table | None = None,
    undecided: Iterable[str] = (),
) -> None:
    """Check that a plan may be added to what an output holds.

    Args:
        store: the output.
        manifest: its manifest, if any.
        document: the run that it holds.
        known: what is known of the run's document at hand.
        plan: what is to be made.
        references: the table of references, once they are read.
        undecided: settings that are not known yet.

    Raises:
        InputError: it may not; the error says in what the runs differ.
    """
    if manifest is not None and manifest.schema_version not in READABLE_VERSIONS:
        raise InputError(f"{store.url}: has schema version {manifest.schema_version!r}, rows are added with versions "
                         f"{' and '.join(READABLE_VERSIONS)}; make a dataset of its own with another output")  # fmt: skip
    undecided = list(undecided)
    there, here = without_growth(document, undecided), without_growth(known, undecided)
    alike = {name: value for name, value in there.items() if name in here}
    recorded = recorded_subjects(store)
    both = {row["subject_id"] for row in recorded} & {subject.subject_id for subject in plan.subjects}
    found = differences(alike, here)
    found += subject_differences(
        [row for row in recorded if row["subject_id"] in both],
        [subject for subject in plan.subjects if subject.subject_id in both],
        references,
    )
    found += conflicting_prompts(store, plan, class_words(plan, recorded))
    if found:
        raise other_run_error(store.url, found, "--extend adds subjects, prompts and images per prompt and leaves all "
                              "else as it is; repeat that run's options or give another output")  # fmt: skip


def add_references(there: pa.Table, here: pa.Table) -> pa.Table:
    """Return the rows of both tables of references, the first's first; a picture that both have stands once.

    Args:
        there: the dataset's, of the columns of SUBJECTS_SCHEMA and perhaps of terms.
        here: those to add.
    """
    known = set(zip(there["subject_id"].to_pylist(), there["reference"].to_pylist(), strict=True))
    names = zip(here["subject_id"].to_pylist(), here["reference"].to_pylist(), strict=True)
    new = here.filter(pa.array([name not in known for name in names], pa.bool_()))
    return pa.concat_tables([there, new], promote_options="default").combine_chunks()


def encode_references_of_parts(table: pa.Table, parts: Sequence[Part]) -> bytes:
    """Return the bytes of subjects.parquet of a dataset of several parts; `table` has the references of all of them."""
    schema = with_marks(table.schema.remove_metadata(), parts[0].fingerprint, parts[0].run, synthetic=False)
    return encode_references(table, schema, [part.fingerprint for part in parts])


def read_references(store: Store, key: str = SUBJECTS_KEY) -> pa.Table:
    """Return the whole table of references of a dataset."""
    try:
        with open_parquet(store, key) as file:
            return file.read()
    except FileNotFoundError:
        raise InputError(f"{store.url_of(key)}: missing; put it back, or run `facediffuser repair`") from None
