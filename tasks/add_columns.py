"""The tasks of the flows `score` and `copies`: what is added to a finished dataset."""

from prefect import task

from facediffuser.batch_stage import WorkerPool
from facediffuser.cards.dataset_card import rewrite_card
from facediffuser.dataset.added_columns import write_added_columns
from facediffuser.dataset.manifest import find_manifest, listed_shards
from facediffuser.dataset.reading import count_rows
from facediffuser.devices import pick_device
from facediffuser.evaluation.add_columns import column_stage
from facediffuser.evaluation.copies import find_copies, recorded_scorers
from facediffuser.evaluation.evaluate_check import check_copies, check_score
from facediffuser.evaluation.score_settings import CopySettings, ScoreSettings
from facediffuser.evaluation.training_faces import count_training, training_faces
from facediffuser.scoring.scorers import load_scorers
from facediffuser.storage import open_store
from facediffuser.tasks.chosen_driver import chosen_driver
from facediffuser.tasks.progress import Progress
from facediffuser.tasks.retrying import RETRIES


@task(name="add-columns", cache_policy=None, **RETRIES)
def add_scores(settings: ScoreSettings) -> list[str]:
    """Write the columns of other scorers beside the shards; return the keys of the files."""
    check_score(settings)
    driver = chosen_driver()
    gpu = driver.gpus > 0 and settings.device != "cpu"
    # Without GPUs the workers share the cores.
    cpus = 1 if gpu else max(1, driver.cpus // (settings.workers or 1))
    return driver.run(column_stage(settings, WorkerPool(settings.workers, cpus=cpus, gpu=gpu)))


@task(name="find-copies", cache_policy=None, **RETRIES)
def flag_copies(settings: CopySettings) -> tuple[str, dict[str, int]]:
    """Write `scores/copies.parquet`; return its key and how many images each flag is raised on."""
    check_copies(settings)
    store = open_store(settings.url)
    total = count_rows(store, listed_shards(store, find_manifest(store)))
    known = count_training(settings.training) if settings.training else 0
    scorers = load_scorers(settings.scorers or recorded_scorers(store), pick_device(settings.device))
    training = None
    if settings.training:
        with Progress(known, "pictures", "training faces") as progress:
            training = training_faces(settings.training, scorers.identity, progress.advance)
    with Progress(total, "images", "copies") as progress:
        table = find_copies(store, scorers.identity, settings, training, progress.advance)
    key = write_added_columns(store, "copies", table, {"copies_identity": scorers.digests["identity"]})
    flags = ("training_copy", "pasted_reference", "duplicate")
    return key, {name: table[name].to_pylist().count(True) for name in flags if name in table.column_names}


@task(name="write-card", cache_policy=None, **RETRIES)
def update_card(url: str, written: list[str]) -> None:
    """Write a dataset's card with what was added, and list both in the manifest."""
    rewrite_card(open_store(url), written)
