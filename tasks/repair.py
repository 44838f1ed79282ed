"""The stages of `repair-dataset` and `retry-failed` as Prefect tasks."""

import hashlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from prefect import task

from facediffuser.cards.dataset_card import rewrite_card
from facediffuser.dataset.added_columns import ADDED_PREFIX
from facediffuser.dataset.certificate import certified_part, summary_bytes, summary_key
from facediffuser.dataset.manifest import (
    ENTRY_NAMES,
    Manifest,
    Part,
    ShardEntry,
    build_part,
    manifest_digest,
    read_manifest,
    read_sound_manifest,
)
from facediffuser.dataset.seal import is_of_card, seal
from facediffuser.dataset.verify import Problem, check_shard, find_problems
from facediffuser.errors import InputError
from facediffuser.generation.certify import certificate_parts, certificate_stage
from facediffuser.generation.generate_check import check_repair
from facediffuser.generation.generate_settings import RepairSettings, RetrySettings
from facediffuser.generation.generate_stage import replacement_stage
from facediffuser.generation.job import GenerationJob, Listed
from facediffuser.generation.repair import job_of_dataset, restore_plan_part, sort_damage
from facediffuser.number_words import counted
from facediffuser.storage import Store, open_store
from facediffuser.storage.reading import parse_json
from facediffuser.tasks.chosen_driver import chosen_driver
from facediffuser.tasks.driver import Driver
from facediffuser.tasks.retrying import RETRIES

logger = logging.getLogger(__name__)


@task(name="find-damage", cache_policy=None, persist_result=False, **RETRIES)
def find_damage(settings: RepairSettings) -> tuple[Manifest, list[Problem]]:
    """Return the dataset's manifest and what `verify` finds."""
    check_repair(settings)
    store = open_store(settings.url)
    manifest = read_manifest(store)
    return manifest, find_problems(store, manifest)


@task(name="repair-damage", cache_policy=None, persist_result=False, **RETRIES)
def repair_damage(settings: RepairSettings, manifest: Manifest, problems: list[Problem]) -> list[str]:
    """Restore what is damaged, and only that; return what is still wrong, one line each."""
    store = open_store(settings.url)
    if manifest_digest(store) != manifest.digest:  # changed since, perhaps by this very task, which is retried
        manifest = read_manifest(store)
        problems = find_problems(store, manifest)
    damage = sort_damage(store, manifest, problems)
    damaged: dict[int, list[int]] = {}
    for number, shard in damage.shards:
        damaged.setdefault(number, []).append(shard)
    certified = [number for number, part in enumerate(manifest.parts) if _pictures(part, damage.certificate)]
    jobs, refused = _jobs(settings, manifest, sorted({*damaged, *certified}))
    left = []
    for key in damage.plan_parts:
        if not restore_plan_part(store, manifest, key):
            left.append(f"{key}: cannot be made from the shards; remove it and run `generate` again with its options")
    for key in damage.foreign:
        if settings.remove_foreign:
            store.delete(key)
        else:
            left.append(f"{key}: not a shard of this dataset; --remove-foreign removes it")
    if damage.references:
        left.append("subjects.parquet: cannot be made again from the dataset; put it back, or remove it and run "
                    "`generate` again with its options")  # fmt: skip
    for key in damage.stats:
        store.delete(key)
    left += [f"{problem}; `score` and `copies` write their columns again" if problem.key.startswith(ADDED_PREFIX)
             else str(problem) for problem in damage.others]  # fmt: skip
    for number, error in refused.items():
        part = manifest.parts[number]
        keys = [part.shards[shard].key for shard in damaged.get(number, ())] + _pictures(part, damage.certificate)
        left += [f"{key}: {error}" for key in keys]
    with _card_after(store):
        for number, shards in damaged.items():
            if number not in jobs:
                continue
            part = manifest.parts[number]
            wanted = {shard: {"listed": _listed(part, shard), "changed": settings.accept} for shard in shards}
            manifest, made = replace_shards(manifest, number, jobs[number], wanted, "Repair")
            for shard in shards:
                key = part.shards[shard].key
                left += [f"{key}: {what}" for what in check_shard(store, manifest.parts[number], shard)]
                if made[shard]["sha256"] != part.shards[shard].sha256 and not settings.accept:
                    left.append(f"{key}: comes out with other bytes here ({made[shard]['sha256'][:12]}); repair it "
                                "where it was made, or keep the new bytes with --accept")  # fmt: skip
        if damage.certificate:
            broken = {manifest.parts[number].name for number in damaged} if left else set()
            left += repair_certificates(settings, manifest, jobs, damage.certificate, broken)
    if damage.card:
        rewrite_card(store)
    return left


def _pictures(part: Part, keys: Sequence[str]) -> list[str]:
    """Those of the keys that hold images of a part's certificate, and can be made again with its models."""
    mine = [] if part.kept else [key for key in keys if certified_part(key) == part.name]
    return [key for key in mine if key != summary_key(part.name)]


def repair_certificates(
    settings: RepairSettings,
    manifest: Manifest,
    jobs: Mapping[int, GenerationJob],
    keys: Sequence[str],
    broken: Collection[str],
) -> list[str]:
    """Make objects of certificates again; return what is still wrong, one line each.

    Args:
        settings: where the dataset is.
        manifest: its manifest.
        jobs: those of the dataset's parts that can be made here, by number.
        keys: the objects.
        broken: the names of the dataset's parts whose shards could not all be repaired.
    """
    store, left, accepted = open_store(settings.url), [], []
    listed = {entry.key: entry.sha256 for entry in manifest.objects}
    for number, part in enumerate(manifest.parts):
        own = [key for key in keys if certified_part(key) == part.name]
        if summary_key(part.name) in own and part.certificate:
            store.put(summary_key(part.name), summary_bytes(part.certificate))
        pictures = [key for key in own if key != summary_key(part.name)]
        if pictures and part.kept:
            left += [f"{key}: of rows that were there before people were taken out, and cannot be made again; put it back, or "
                     "let `facediffuser card` list the others" for key in pictures]  # fmt: skip
        elif pictures and number in jobs and part.name in broken:
            left += [f"{key}: can be made again once the shards are whole" for key in pictures]
        elif pictures and number in jobs:
            job = jobs[number]
            chosen_driver().run(certificate_stage(job, certificate_parts(job), pictures))
            pictures = []
        for key in own:
            made = hashlib.sha256(store.get(key)).hexdigest() if store.exists(key) else None
            if made is None or made == listed[key] or key in pictures:  # these were not made
                continue
            if settings.accept:
                accepted.append(key)
            else:
                left.append(f"{key}: comes out with other bytes here ({made[:12]}); repair it where it was made, or keep the "
                            "new bytes with --accept")  # fmt: skip
    if accepted:
        seal(store, manifest, accepted, card=False)
    return left


def _jobs(
    settings: RepairSettings | RetrySettings, manifest: Manifest, numbers: Collection[int]
) -> tuple[dict[int, GenerationJob], dict[int, InputError]]:
    """Return the jobs of those parts of a dataset that can be made here, and why the others cannot, before any is begun.

    A merged dataset may have parts of other models, or of other devices: each is made where it can be.

    Raises:
        InputError: none of them can be made here.
    """
    jobs: dict[int, GenerationJob] = {}
    refused: dict[int, InputError] = {}
    for number in numbers:
        try:
            jobs[number] = _job(settings, manifest.parts[number], chosen_driver())
        except InputError as error:
            refused[number] = error
    if refused and not jobs:
        raise next(iter(refused.values()))
    return jobs, refused


def _job(settings: RepairSettings | RetrySettings, part: Part, driver: Driver) -> GenerationJob:
    return job_of_dataset(
        open_store(settings.url), part, settings.models, settings.scorers, driver.gpus > 0, settings.workers,
        settings.exact,
    )  # fmt: skip


@task(name="retry-failed-rows", cache_policy=None, persist_result=False, **RETRIES)
def retry_failed_rows(settings: RetrySettings) -> Manifest:
    """Generate the shards that hold failed rows once more; those with fewer failed rows now take their place."""
    check_repair(settings)
    store = open_store(settings.url)
    manifest = read_sound_manifest(store)
    jobs, refused = _jobs(settings, manifest, [number for number, part in enumerate(manifest.parts) if part.failed])
    for number, error in refused.items():
        logger.warning("%s: %s stay failed, for their shards cannot be made here: %s", store.url,
                       counted(manifest.parts[number].failed, "row"), error)  # fmt: skip
    with _card_after(store):
        for number, job in jobs.items():
            manifest, others = list_replaced(store, manifest, number)
            wanted = {
                # In the place of a shard that is not the one listed any other that is not worse is taken.
                shard: {"fewer_failed_than": entry.failed + (1 if shard in others else 0)}
                for shard, entry in enumerate(manifest.parts[number].shards)
                if entry.failed
            }
            manifest, _ = replace_shards(manifest, number, job, wanted, "Retry")
    return read_sound_manifest(store)


def list_replaced(store: Store, manifest: Manifest, number: int) -> tuple[Manifest, set[int]]:
    """List the shards that a `retry-failed` put which ended at once, before it could list them.

    Their stats, written after them, tell that they are whole; the digest of a shard's stats is that of its bytes.

    Args:
        store: the dataset.
        manifest: its manifest.
        number: that of the part, from 0.

    Returns:
        The manifest, and which shards with failed rows are still not as it says.
    """
    part, replaced, others = manifest.parts[number], {}, set()
    for shard, entry in enumerate(part.shards):
        if not entry.failed or not check_shard(store, part, shard):
            continue
        stats = _stats_of(store, part, shard)
        if (
            stats
            and stats["failed"] < entry.failed
            and not check_shard(store, _with_stats(part, {shard: stats}), shard)
        ):
            replaced[shard] = stats
        else:
            others.add(shard)
    return update_manifest(store.url, manifest, {number: replaced}), others


def _stats_of(store: Store, part: Part, shard: int) -> dict[str, Any] | None:
    """A shard's stats; None where there are none that a manifest could list."""
    try:
        stats = parse_json(store.get(part.layout.stats_key(shard)))
        entry = ShardEntry(key=part.shards[shard].key, **{name: stats[name] for name in ENTRY_NAMES})
        with_rows = entry.rows == part.shards[shard].rows == entry.ok + entry.failed
        return stats if with_rows and isinstance(stats["computed_with"], dict | None) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _listed(part: Part, shard: int) -> Listed:
    return Listed(part.shards[shard].sha256, part.computed_with(shard))


def replace_shards(
    manifest: Manifest, number: int, job: GenerationJob, wanted: dict[int, dict[str, Any]], name: str
) -> tuple[Manifest, dict[int, dict[str, Any]]]:
    """Generate shards of a finished dataset once more; return its manifest then, and the stats of each.

    What was put is listed also when the work ends early: by SIGTERM, or because the store does not answer.

    Args:
        manifest: that of the dataset.
        number: of the part of the dataset that they belong to, from 0.
        job: that part's.
        wanted: the arguments of `ShardGenerator.replace` by shard.
        name: the stage's name in the progress.

    Raises:
        StorageError: another command wrote a manifest meanwhile; the shards that were put are listed when this one runs again.
    """
    made: dict[int, dict[str, Any]] = {}
    wanted = {shard: {**arguments, "manifest": manifest.digest} for shard, arguments in wanted.items()}
    try:
        chosen_driver().run(replacement_stage(job, name, wanted, lambda stats: made.update({stats["shard"]: stats})))
    finally:
        shards = manifest.parts[number].shards
        changed = {n: stats for n, stats in made.items() if stats["put"] and stats["sha256"] != shards[n].sha256}
        manifest = update_manifest(job.output, manifest, {number: changed})
    return manifest, made


def update_manifest(url: str, manifest: Manifest, replaced: dict[int, dict[int, dict[str, Any]]]) -> Manifest:
    """Write the manifest with the stats of shards that were replaced, and return it; the card is to be written after it.

    Args:
        url: the dataset.
        manifest: its manifest before.
        replaced: the stats by the number of the part, from 0, and that of the shard in it.
    """
    if not any(replaced.values()):
        return manifest
    parts = [_with_stats(part, replaced.get(number, {})) for number, part in enumerate(manifest.parts)]
    return seal(open_store(url), manifest.with_parts(parts), card=False)


@contextmanager
def _card_after(store: Store) -> Iterator[None]:
    """Write the card anew at the end of the block, where the manifest does not list it because shards were replaced."""
    try:
        yield
    finally:
        manifest = read_manifest(store)
        if manifest.digest and not any(is_of_card(entry.key) for entry in manifest.objects):
            try:
                rewrite_card(store)
            except InputError as error:  # another shard is damaged
                logger.warning("%s; the card is still that of before, `facediffuser card` writes it anew", error)


def _with_stats(part: Part, replaced: dict[int, dict[str, Any]]) -> Part:
    entries = [
        entry.model_copy(update={name: replaced[shard][name] for name in ENTRY_NAMES}) if shard in replaced else entry
        for shard, entry in enumerate(part.shards)
    ]
    computed_with = [
        replaced[shard]["computed_with"] if shard in replaced else part.computed_with(shard)
        for shard in range(len(entries))
    ]
    made = build_part(part.fingerprint, part.run, part.layout, entries, part.made_from, computed_with, part.spent)
    return made.model_copy(update={"certificate": part.certificate})
