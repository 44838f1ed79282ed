"""Parts of a finished dataset generated once more: from its manifest, plan and references, with the models of its run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from facediffuser.batch_stage import WorkerPool
from facediffuser.dataset.added_columns import ADDED_PREFIX
from facediffuser.dataset.manifest import MANIFEST_KEY, Manifest, Part, find_row, object_entry, read_sound_manifest
from facediffuser.dataset.plan import encode_groups, encode_part, read_shard_rows
from facediffuser.dataset.reading import read_columns
from facediffuser.dataset.schema import PLAN_SCHEMA, SUBJECTS_KEY, with_marks
from facediffuser.dataset.seal import is_of_card
from facediffuser.dataset.verify import Problem
from facediffuser.errors import InputError
from facediffuser.generation.generate_check import naming_option
from facediffuser.generation.generate_settings import RemakeSettings
from facediffuser.generation.job import GenerationJob
from facediffuser.generation.shard_generator import ShardGenerator
from facediffuser.modelfolder import model_digests, resolve_model
from facediffuser.runs import differences
from facediffuser.scoring.scorers import load_scorers
from facediffuser.storage import Store, open_store

logger = logging.getLogger(__name__)


def job_of_dataset(
    store: Store,
    manifest: Part,
    models: str | None,
    scorers: str | None,
    gpu: bool,
    workers: int | None = None,
    exact: bool = False,
) -> GenerationJob:
    """Return the job of a finished dataset's run.

    Another provenance here than the shards' is one warning in the log: the last bits of images may depend on it.

    Args:
        store: the dataset.
        manifest: its manifest, or one of the manifest's parts.
        models: where they are now; None: where they were then.
        scorers: likewise.
        gpu: whether workers have a GPU.
        workers: how many; None: one per GPU, or 1.
        exact: refuse another provenance.

    Raises:
        InputError: the models are not those of the dataset, it was generated on a GPU and here is none, or the other way
            round; or the provenance differs and `exact` is set.
    """
    models, scorers = models or manifest.made_from.get("models"), scorers or manifest.made_from.get("scorers")
    if not models or not scorers:
        name = "scorers" if models else "models"
        raise InputError(f"{store.url}: does not say where its {name} are; give --{name}")
    with naming_option("models"):
        found = differences(manifest.models, model_digests(resolve_model(models)))
    if found:
        raise InputError(f"{models}: not the models of this dataset ({found[0]}); give those with --models")
    # The scores are part of a shard's bytes.
    with naming_option("scorers"):
        found = differences(manifest.scorers, load_scorers(scorers).digests)
    if found:
        raise InputError(f"{scorers}: not the scorers of this dataset ({found[0]}); give those with --scorers")
    recorded = manifest.recorded_provenances()
    threads = None if gpu else next((one["threads"] for one in recorded if one.get("threads")), None)
    pool = WorkerPool(workers, cpus=threads or 1, gpu=gpu)
    job = GenerationJob(
        store.url, manifest.fingerprint, manifest.run, manifest.layout, models, scorers, threads, pool, exact=exact
    )
    if (job.device == "cuda") != gpu:
        here = "a GPU" if gpu else "no GPU"
        raise InputError(
            f"{store.url}: was made on {job.device}, and this machine has {here}; run it on such a machine"
        )
    return job.with_recorded(recorded)


@dataclass(frozen=True)
class Damage:
    """What `verify` found, sorted by what can be done about it.

    others: nothing but by the user's hand.
    shards: (number of the part, number of the shard in it).
    certificate: keys of objects of certificates.
    """

    shards: list[tuple[int, int]]
    plan_parts: list[str]
    foreign: list[str]
    references: bool
    card: bool
    stats: list[str]
    certificate: list[str]
    others: list[Problem]


def sort_damage(store: Store, manifest: Manifest, problems: list[Problem]) -> Damage:
    """Return the damage sorted by what can repair it.

    Args:
        store: the dataset.
        manifest: its manifest.
        problems: what `find_problems` found.

    Raises:
        InputError: something cannot be made again from the dataset itself.
    """
    for problem in problems:
        if problem.key == MANIFEST_KEY and manifest.retracting:
            raise InputError(f"{store.url}/{problem}")
        if problem.key == MANIFEST_KEY:
            raise InputError(f"{store.url}/{problem}; remove it and let `generate`, with its options, write it again")
    keys = {problem.key for problem in problems}
    layouts = [part.layout for part in manifest.parts]
    parts = [key for layout in layouts for key in layout.part_keys() if key in keys]

    def plan_of(part: int, shard: int) -> str:
        return layouts[part].part_key(layouts[part].row_group(shard)[0])

    of_plan = ("its plan cannot be read", "its rows are not those planned")
    shards = sorted({
        (problem.part, problem.shard) for problem in problems
        if problem.shard is not None
        and not (plan_of(problem.part, problem.shard) in parts and problem.what.startswith(of_plan))
    })  # fmt: skip
    for part, shard in shards:
        key = plan_of(part, shard)
        if key in parts:
            raise InputError(
                f"{store.url}: {key} and {layouts[part].shard_key(shard)} are both damaged; remove both and run `generate` "
                "again with its options"
            )
    if SUBJECTS_KEY in keys and shards:
        raise InputError(
            f"{store.url_of(SUBJECTS_KEY)}: missing or damaged, so no shard can be made; remove it and run `generate` "
            "again with its options"
        )
    in_the_way = [problem for problem in problems if "a folder stands in its place" in problem.what]
    for problem in in_the_way:
        raise InputError(f"{store.url}/{problem}, then run `repair` again")
    of_card = [problem for problem in problems if is_of_card(problem.key)]
    foreign = [problem.key for problem in problems if problem.foreign]
    stats = [problem.key for problem in problems if problem.stats]
    certificate = [problem.key for problem in problems if problem.certificate]
    settled = {*parts, *foreign, *stats, *certificate, SUBJECTS_KEY, *(problem.key for problem in of_card)}
    others = [problem for problem in problems if problem.shard is None and problem.key not in settled]
    card = bool(of_card) or any(problem.unlisted and problem.key.startswith(ADDED_PREFIX) for problem in others)
    if card:  # which lists added columns that are not listed yet
        others = [problem for problem in others if not (problem.unlisted and problem.key.startswith(ADDED_PREFIX))]
    return Damage(shards, parts, foreign, SUBJECTS_KEY in keys, card, stats, certificate, others)


def restore_plan_part(store: Store, manifest: Manifest, key: str) -> bool:
    """Put a file of the plan again, made of its shards' columns.

    Returns:
        Whether the file is the manifest's; otherwise none is put.
    """
    run, layout, number = next(
        (part, part.layout, number)
        for part in manifest.parts
        for number, own in enumerate(part.layout.part_keys())
        if own == key
    )
    groups = [read_columns(store, layout.shard_key(n), PLAN_SCHEMA.names) for n in layout.shards_of_part(number)]
    marked = with_marks(PLAN_SCHEMA, run.fingerprint, run.run, False)
    if layout.kept:
        data = encode_groups(groups, marked)
    else:
        data = encode_part(pa.concat_tables(groups).cast(PLAN_SCHEMA).combine_chunks(), layout, marked)
    if object_entry(key, data) not in manifest.objects:
        return False
    store.put(key, data)
    return True


@dataclass(frozen=True)
class Remade:
    """One row generated once more, beside the one in the dataset.

    row, stored: the two.
    batch_rows: how many rows were denoised together.
    """

    row: dict[str, Any]
    stored: dict[str, Any]
    batch_rows: int

    @property
    def differing(self) -> list[str]:
        """The columns that are not as in the dataset."""
        return [name for name in self.row if self.row[name] != self.stored[name]]

    @property
    def equal(self) -> bool:
        """Whether image and scores are the dataset's."""
        return not self.differing


def remake(settings: RemakeSettings, gpu: bool, pipeline=None, scorers=None) -> Remade:
    """Return one row of a dataset generated once more, beside the row stored.

    It is generated with its batch first; where that gives other bytes, alone, as it was when its batch failed.

    Args:
        settings: which row, and where models and scorers lie now.
        gpu: whether it is generated on a GPU.
        pipeline: that of the dataset's models, where the caller has it loaded.
        scorers: those of the dataset, likewise.

    Raises:
        InputError: there is no such row, or models, scorers or files are others than the dataset's.
    """
    store = open_store(settings.dataset)
    manifest = read_sound_manifest(store)
    part, shard, place = find_row(store, manifest, settings.sample_id)
    job = job_of_dataset(store, part, settings.models, settings.scorers, gpu)
    planned = read_shard_rows(store, job.layout, shard, job.fingerprint)
    schema = pa.schema(
        [field for field in job.shard_schema if field.name not in PLAN_SCHEMA.names or field.name == "sample_id"]
    )
    table = read_columns(store, job.layout.shard_key(shard), schema.names)
    stored = next((row for row in table.to_pylist() if row["sample_id"] == planned[place]["sample_id"]), None)
    if stored is None:
        key = job.layout.shard_key(shard)
        raise InputError(f"{store.url_of(key)}: lacks the row that is planned; let `facediffuser repair` make it again")
    start = place // job.batch_size * job.batch_size
    batch = planned[start : start + job.batch_size]
    with threads_of(job):
        generator = ShardGenerator(job, pipeline, scorers)
        made = Remade(_as_stored(generator.rows(batch)[place - start], schema), stored, len(batch))
        if made.equal or len(batch) == 1:
            return made
        alone = Remade(_as_stored(generator.rows([planned[place]])[0], schema), stored, 1)
    return alone if alone.equal else made


def _as_stored(row: dict[str, Any], schema: pa.Schema) -> dict[str, Any]:
    """The row's columns of a schema with its numbers as Parquet keeps them (float32, float16)."""
    return pa.Table.from_pylist([row], schema=schema).to_pylist()[0]


@contextmanager
def threads_of(job: GenerationJob) -> Iterator[None]:
    """Compute with as many threads as the dataset was."""
    before = torch.get_num_threads()
    torch.set_num_threads(job.threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
