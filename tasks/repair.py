"""The stages of `repair-dataset` and `retry-failed` as Prefect tasks."""

import hashlib
import logging
from collections.abc import Collection, Sequence
from typing import Any

from prefect import task

from facediffuser.cards.dataset_card import rewrite_card, write_card
from facediffuser.dataset.added_columns import ADDED_PREFIX
from facediffuser.dataset.certificate import certified_part, summary_bytes, summary_key
from facediffuser.dataset.manifest import ENTRY_NAMES, Manifest, Part, build_part, read_manifest, read_sound_manifest
from facediffuser.dataset.seal import seal
from facediffuser.dataset.verify import Problem, check_shard, find_problems
from facediffuser.generation.certify import certificate_parts, certificate_stage
from facediffuser.generation.generate_check import check_repair
from facediffuser.generation.generate_settings import RepairSettings, RetrySettings
from facediffuser.generation.generate_stage import replacement_stage
from facediffuser.generation.job import GenerationJob, Listed
from facediffuser.generation.repair import job_of_dataset, restore_plan_part, sort_damage
from facediffuser.storage import open_store
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
    damage = sort_damage(store, manifest, problems)
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
    for number in sorted({number for number, _ in damage.shards}):
        part, shards = manifest.parts[number], [shard for of, shard in damage.shards if of == number]
        wanted = {shard: {"listed": _listed(part, shard), "changed": settings.accept} for shard in shards}
        made = replace_shards(settings, part, wanted, "Repair")
        changed = {shard: stats for shard, stats in made.items() if stats["sha256"] != part.shards[shard].sha256}
        if settings.accept and changed:
            manifest = update_manifest(settings.url, manifest, {number: changed})
            part = manifest.parts[number]
        for shard in shards:
            key = part.shards[shard].key
            left += [f"{key}: {what}" for what in check_shard(store, part, shard)]
            if shard in changed and not settings.accept:
                left.append(f"{key}: comes out with other bytes here ({made[shard]['sha256'][:12]}); repair it "
                            "where it was made, or keep the new bytes with --accept")  # fmt: skip
    if damage.certificate:
        broken = {manifest.parts[number].name for number, _ in damage.shards} if left else set()
        left += repair_certificates(settings, manifest, damage.certificate, broken)
        manifest = read_manifest(store)
    if damage.card:
        rewrite_card(store)
    return left


def repair_certificates(
    settings: RepairSettings, manifest: Manifest, keys: Sequence[str], broken: Collection[str]
) -> list[str]:
    """Make objects of certificates again; return what is still wrong, one line each.

    Args:
        settings: where the dataset, its models and scorers are.
        manifest: its manifest.
        keys: the objects.
        broken: the names of the dataset's parts whose shards could not all be repaired.
    """
    store, left, accepted = open_store(settings.url), [], []
    listed = {entry.key: entry.sha256 for entry in manifest.objects}
    for part in manifest.parts:
        own = [key for key in keys if certified_part(key) == part.name]
        if summary_key(part.name) in own and part.certificate:
            store.put(summary_key(part.name), summary_bytes(part.certificate))
        pictures = [key for key in own if key != summary_key(part.name)]
        if pictures and part.kept:
            left += [f"{key}: of rows that were there before people were taken out, and cannot be made again; put it back, or "
                     "let `facediffuser card` list the others" for key in pictures]  # fmt: skip
        elif pictures and part.name in broken:
            left += [f"{key}: can be made again once the shards are whole" for key in pictures]
        elif pictures:
            driver = chosen_driver()
            job = _job(settings, part, driver)
            driver.run(certificate_stage(job, certificate_parts(job), pictures))
        for key in own:
            made = hashlib.sha256(store.get(key)).hexdigest() if store.exists(key) else None
            if made is None or made == listed[key] or (key in pictures and part.kept):
                continue
            if settings.accept:
                accepted.append(key)
            else:
                left.append(f"{key}: comes out with other bytes here ({made[:12]}); repair it where it was made, or keep the "
                            "new bytes with --accept")  # fmt: skip
    if accepted:
        seal(store, manifest, accepted)
    return left


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
    replaced = {}
    for number, part in enumerate(manifest.parts):
        failed = {shard: entry.failed for shard, entry in enumerate(part.shards) if entry.failed}
        if failed:
            wanted = {shard: {"fewer_failed_than": count} for shard, count in failed.items()}
            made = replace_shards(settings, part, wanted, "Retry")
            replaced[number] = {shard: stats for shard, stats in made.items() if stats["put"]}
    return update_manifest(settings.url, manifest, replaced)


def _listed(part: Part, shard: int) -> Listed:
    return Listed(part.shards[shard].sha256, part.computed_with(shard))


def replace_shards(
    settings: RepairSettings | RetrySettings,
    part: Part,
    wanted: dict[int, dict[str, Any]],
    name: str,
) -> dict[int, dict[str, Any]]:
    """Generate shards of a finished dataset once more; return the stats of each.

    Args:
        settings: where the dataset, its models and scorers are.
        part: the part of the dataset that they belong to.
        wanted: the arguments of `ShardGenerator.replace` by shard.
        name: the stage's name in the progress.
    """
    driver = chosen_driver()
    return driver.run(replacement_stage(_job(settings, part, driver), name, wanted))


def update_manifest(url: str, manifest: Manifest, replaced: dict[int, dict[int, dict[str, Any]]]) -> Manifest:
    """Write card and manifest with the stats of shards that were replaced, and return the manifest.

    Args:
        url: the dataset.
        manifest: its manifest before.
        replaced: the stats by the number of the part, from 0, and that of the shard in it.
    """
    if not any(replaced.values()):
        return manifest
    store = open_store(url)
    parts = [_with_stats(part, replaced.get(number, {})) for number, part in enumerate(manifest.parts)]
    write_card(store)
    return seal(store, manifest.with_parts(parts))


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
