"""What can be said of an evaluation, of added scores and of a search for copies before anything is loaded.

Neither Ray, Prefect nor torch is imported here, so that the command line refuses bad input before it starts them.
"""

from collections.abc import Sequence

from facediffuser.dataset.added_columns import added_key
from facediffuser.dataset.manifest import listed_shards
from facediffuser.dataset.reading import list_shards, require_no_dataset, require_readable_shards
from facediffuser.dataset.seal import require_sealable
from facediffuser.errors import InputError
from facediffuser.evaluation.benchmark_runs import benchmark_runs
from facediffuser.evaluation.copies import recorded_scorers
from facediffuser.evaluation.evaluate_settings import EvaluateSettings
from facediffuser.evaluation.image_sources import dataset_keys, folder_source, name_and_url
from facediffuser.evaluation.row_scorers import check_row_scorers
from facediffuser.evaluation.score_settings import CopySettings, ScoreSettings
from facediffuser.evaluation.training_faces import training_keys
from facediffuser.generation.generate_check import check_generate
from facediffuser.scoring.columns import find_scorer, short_name
from facediffuser.scoring.folder import require_scorers
from facediffuser.storage import Store, open_store


def check_evaluate(settings: EvaluateSettings) -> None:
    """Check what an evaluation reads and writes, before anything is loaded.

    Raises:
        InputError: an output, datasets, folders of images, scorers or benchmark runs cannot be used, or one is given
            twice.
    """
    if settings.output:
        require_usable_output(settings.output)
    for option in ("dataset", "images"):
        given = [(name, open_store(url).url) for name, url in map(name_and_url, getattr(settings, option))]
        for number, (name, url) in enumerate(given):
            if (name, url) in given[:number]:
                raise InputError(f"--{option} {url}: given twice; its images would count twice")
    for _, url in map(name_and_url, settings.dataset):
        dataset_keys(open_store(url), with_subjects=settings.rescore or bool(settings.add))
    for name, url in map(name_and_url, settings.images):
        folder_source(name or url, url, settings, settings.batch_size)
    for name in settings.add:
        find_scorer(name)
    if settings.images or settings.rescore:
        require_scorers(settings.scorers)
    for run in benchmark_runs(settings):
        check_generate(run)


def require_usable_output(url: str) -> None:
    """Check that tables can be written to a place.

    Raises:
        InputError: they cannot, or would lie in a dataset.
    """
    store = open_store(url)
    store.require_writable()
    require_no_dataset(store)


def check_score(settings: ScoreSettings) -> None:
    """Check what `score` reads and writes, before anything is loaded.

    Raises:
        InputError: there is no dataset, it cannot be written to, or a scorer is not to be found.
    """
    keys = [added_key(short_name(name)) for name in settings.add]
    check_row_scorers(settings, _require_extendable(settings.url, keys))
    if settings.scorers:
        require_scorers(settings.scorers)


def check_copies(settings: CopySettings) -> None:
    """Check what `copies` reads, before anything is loaded.

    Raises:
        InputError: there is no dataset, no training set where one is named, or no scorers.
    """
    store = _require_extendable(settings.url, [added_key("copies")])
    if settings.training:
        training_keys(settings.training)
    require_scorers(settings.scorers or recorded_scorers(store))


def _require_extendable(url: str, written: Sequence[str]) -> Store:
    """Return the store of a dataset to which the keys `written` can be added; InputError for none or a damaged one."""
    store = open_store(url)
    list_shards(store)
    store.require_writable()
    require_readable_shards(store, listed_shards(store, require_sealable(store, written)))
    return store
