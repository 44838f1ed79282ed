"""Input checks of the commands that work on finished datasets; without Prefect, Ray and torch."""

from facediffuser.curation.curation_settings import ExportSettings, MergeSettings, PublishSettings, RetractSettings
from facediffuser.curation.export import open_export
from facediffuser.curation.merge import MARK_KEY, open_sources, require_mergeable, require_output
from facediffuser.curation.publish import listed_objects, repository_of
from facediffuser.curation.retract import begin_retraction, require_retractable
from facediffuser.dataset.manifest import require_objects
from facediffuser.scoring.folder import require_scorers
from facediffuser.storage import open_store


def check_merge(settings: MergeSettings) -> None:
    """Check that the datasets can be merged in the output.

    Raises:
        InputError: they cannot.
    """
    sources, store = open_sources(settings.urls), open_store(settings.output)
    require_output(store, sources)
    for source in sources:
        require_objects(source.store, source.manifest)
    if not store.exists(MARK_KEY):
        require_mergeable(sources)


def check_export(settings: ExportSettings) -> None:
    """Check that the subset can be exported to the output.

    Raises:
        InputError: it cannot.
    """
    export = open_export(settings)
    if export.scorers is not None:
        require_scorers(export.scorers)


def check_retract(settings: RetractSettings) -> None:
    """Check that the dataset has the subject, or that an interrupted retraction of it is to go on.

    Raises:
        InputError: neither is so, or something of the dataset is missing or damaged.
    """
    store = open_store(settings.url)
    manifest, resumes = begin_retraction(store, settings.subject)
    if not resumes:
        require_retractable(store, manifest)


def check_publish(settings: PublishSettings) -> None:
    """Check that the dataset is finished and that the target can be a repository's name; no hub is asked.

    Raises:
        InputError: one of these is not so.
    """
    repository_of(settings.target)
    manifest, _ = listed_objects(settings)
    require_objects(open_store(settings.dataset), manifest)
