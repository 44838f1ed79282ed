"""Input checks of the commands that work on finished datasets; without Prefect, Ray and torch."""

from facediffuser.curation.curation_settings import ExportSettings, MergeSettings, PublishSettings, RetractSettings
from facediffuser.curation.export import open_export
from facediffuser.curation.merge import MARK_KEY, merge_identity, open_sources, require_mergeable, require_output
from facediffuser.curation.publish import listed_objects, repository_of
from facediffuser.curation.retract import begin_retraction
from facediffuser.scoring.folder import require_scorers
from facediffuser.storage import open_store


def check_merge(settings: MergeSettings) -> None:
    """Raise InputError unless the datasets can be merged in the output."""
    sources, store = open_sources(settings.urls), open_store(settings.output)
    require_output(store, merge_identity(sources))
    if not store.exists(MARK_KEY):
        require_mergeable(sources)


def check_export(settings: ExportSettings) -> None:
    """Raise InputError unless the subset can be exported to the output."""
    export = open_export(settings)
    if export.scorers is not None:
        require_scorers(export.scorers)


def check_retract(settings: RetractSettings) -> None:
    """Raise InputError unless the dataset has the subject, or an interrupted retraction of it is to go on."""
    begin_retraction(open_store(settings.url), settings.subject)


def check_publish(settings: PublishSettings) -> None:
    """Raise InputError unless the dataset is finished and the target can be a repository's name; asks no hub."""
    repository_of(settings.target)
    listed_objects(settings)
