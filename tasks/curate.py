"""The tasks of the flows on finished datasets: merge, retract, export, publish."""

from typing import Any

from prefect import task

from facediffuser.curation.curation_settings import ExportSettings, MergeSettings, PublishSettings, RetractSettings
from facediffuser.curation.export import export_stage
from facediffuser.curation.merge import merge_stage
from facediffuser.curation.publish import publish_stage
from facediffuser.curation.retract import retract_stage
from facediffuser.dataset.manifest import Manifest
from facediffuser.tasks.chosen_driver import chosen_driver
from facediffuser.tasks.retrying import RETRIES


@task(name="merge-datasets", cache_policy=None, persist_result=False, **RETRIES)
def merge_datasets(settings: MergeSettings) -> Manifest:
    """Copy what is missing of the merged dataset, finish it and return its manifest."""
    stage = merge_stage(settings)  # refuses before Ray is started
    return chosen_driver().run(stage)


@task(name="retract-subject", cache_policy=None, persist_result=False, **RETRIES)
def retract_subject(settings: RetractSettings) -> Manifest:
    """Make a dataset's objects without a subject, and return the manifest of what remains."""
    stage = retract_stage(settings)  # refuses before Ray is started
    return chosen_driver().run(stage)


@task(name="export-subset", cache_policy=None, persist_result=False, **RETRIES)
def export_subset(settings: ExportSettings) -> dict[str, Any]:
    """Write what is missing of an export, finish it and return its manifest."""
    stage = export_stage(settings)  # refuses before Ray is started
    return chosen_driver().run(stage)


@task(name="publish-dataset", cache_policy=None, persist_result=False, **RETRIES)
def publish_dataset(settings: PublishSettings) -> str:
    """Put on the hub what is missing there of a dataset; return the URL of its page."""
    stage = publish_stage(settings)  # refuses before Ray is started
    return chosen_driver().run(stage)
