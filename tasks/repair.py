"""The stages of `repair-dataset` and `retry-failed` as Prefect tasks."""

import logging
from typing import Any

from prefect import task

from facediffuser.cards.dataset_card import rewrite_card, write_card
from facediffuser.dataset.added_columns import ADDED_PREFIX
from facediffuser.dataset.manifest import Manifest, build_manifest, read_manifest, read_sound_manifest
from facediffuser.dataset.seal import seal
from facediffuser.dataset.verify import Problem, check_shard, find_problems
from facediffuser.generation.generate_check import check_repair
from facediffuser.generation.generate_settings import RepairSettings, RetrySettings
from facediffuser.generation.repair import job_of_dataset, restore_plan_part, sort_damage
from facediffuser.storage import open_store
from facediffuser.tasks.pool import RepairActor, Work, stopped_by_sigterm
from facediffuser.tasks.progress import Progress
from facediffuser.tasks.ray_session import cluster_gpus, connect_ray
from facediffuser.tasks.spending import follow

logger = logging.getLogger(__name__)


@task(name="find-damage", cache_policy=None, persist_result=False)
def find_damage(settings: RepairSettings) -> tuple[Manifest, list[Problem]]:
    """Return the dataset's manifest and what `verify` finds."""
    check_repair(settings)
    store = open_store(settings.url)
    manifest = read_manifest(store)
    return manifest, find_problems(store, manifest)


@task(name="repair-damage", cache_policy=None, persist_result=False)
def repair_damage(settings: RepairSettings, manifest: Manifest, problems: list[Problem]) -> list[str]:
    """Make what is damaged again, and only that; return what is still wrong, one line each."""
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
    if damage.shards:
        wanted = {shard: {"sha256": None if settings.accept else manifest.shards[shard].sha256}
                  for shard in damage.shards}  # fmt: skip
        made = make_again(settings, manifest, wanted, "Repair")
        changed = {shard: stats for shard, stats in made.items() if stats["sha256"] != manifest.shards[shard].sha256}
        if settings.accept and changed:
            manifest = list_again(settings.url, manifest, changed)
        for shard in damage.shards:
            entry = manifest.shards[shard]
            left += [f"{entry.key}: {what}" for what in check_shard(store, manifest, shard, entry)]
            if shard in changed and not settings.accept:
                left.append(f"{entry.key}: comes out with other bytes here ({made[shard]['sha256'][:12]}); repair it "
                            "where it was made, or keep the new bytes with --accept")  # fmt: skip
    if damage.card:
        rewrite_card(store)
    return left


@task(name="retry-failed-rows", cache_policy=None, persist_result=False)
def retry_failed_rows(settings: RetrySettings) -> Manifest:
    """Make the shards that hold failed rows again; those with fewer failed rows now take their place."""
    check_repair(settings)
    store = open_store(settings.url)
    manifest = read_sound_manifest(store)
    wanted = {shard: {"fewer_failed_than": entry.failed} for shard, entry in enumerate(manifest.shards) if entry.failed}
    if not wanted:
        return manifest
    made = make_again(settings, manifest, wanted, "Retry")
    return list_again(settings.url, manifest, {shard: stats for shard, stats in made.items() if stats["put"]})


def make_again(
    settings: RepairSettings | RetrySettings, manifest: Manifest, wanted: dict[int, dict[str, Any]], title: str
) -> dict[int, dict[str, Any]]:
    """Have the pool make shards again; return the stats of each."""
    connect_ray()
    store = open_store(settings.url)
    job = job_of_dataset(store, manifest, settings.models, settings.scorers, cluster_gpus() > 0, settings.workers)
    work = Work(job, sorted(wanted), RepairActor, again=wanted)
    made: dict[int, dict[str, Any]] = {}
    rows = sum(manifest.shards[shard].rows for shard in wanted)
    with Progress(rows, "images", title) as progress, stopped_by_sigterm(work):
        follow(work, progress, made)
    return made


def list_again(url: str, manifest: Manifest, made: dict[int, dict[str, Any]]) -> Manifest:
    """Write card and manifest with shards that were made again, and return the manifest."""
    entries = [
        entry.model_copy(update={name: made[shard][name] for name in ("rows", "ok", "failed", "bytes", "sha256")})
        if shard in made else entry
        for shard, entry in enumerate(manifest.shards)
    ]  # fmt: skip
    store = open_store(url)
    listed = build_manifest(
        manifest.fingerprint, manifest.run, manifest.layout, entries, manifest.objects, manifest.made_from
    )
    if not made:
        return listed
    write_card(store)
    return seal(store, listed)
