"""The flows on finished datasets: `merge` joins them, `retract` takes a person out, `export` and `publish` hand it on."""

from typing import Any

from facediffuser.curation.curation_settings import ExportSettings, MergeSettings, PublishSettings, RetractSettings
from facediffuser.flows.product_flow import product_flow
from facediffuser.storage import open_store
from facediffuser.tasks.curate import export_subset, merge_datasets, publish_dataset, retract_subject


@product_flow("merge", "merge {settings.urls} in {settings.output}")
def merge(settings: MergeSettings) -> dict[str, Any]:
    """Join datasets; return where the merged one is and what it holds."""
    manifest = merge_datasets(settings)
    return {"output": settings.output, "parts": len(manifest.parts), **manifest.counts.model_dump()}


@product_flow("retract", "take a subject out of {settings.url}")
def retract(settings: RetractSettings) -> dict[str, Any]:
    """Take a person out of a dataset; return what remains, and how many old versions of objects the bucket keeps."""
    manifest = retract_subject(settings)
    versions = open_store(settings.url).old_versions()
    kept = (
        "unknown: the server does not say (on S3 it takes the right s3:ListBucketVersions)"
        if versions is None
        else len(versions)
    )
    return {
        "output": settings.url,
        "removed": manifest.retractions[-1].rows,
        **manifest.counts.model_dump(),
        "old_versions_kept": kept,
    }


@product_flow("export", "export {settings.url} as {settings.to} in {settings.output}")
def export(settings: ExportSettings) -> dict[str, Any]:
    """Export a subset; return where it is, what it holds and what was left out."""
    manifest = export_subset(settings)
    left_out = {f"left_out_{name}": count for name, count in manifest["left_out"].items()}
    sides = {f"subjects_{side}": len(names) for side, names in manifest["subjects"].items()}
    return {"output": settings.output, "files": len(manifest["objects"]), **manifest["counts"], **left_out, **sides}


@product_flow("publish", "publish {settings.dataset} as {settings.target}")
def publish(settings: PublishSettings) -> dict[str, Any]:
    """Publish a dataset; return the URL of its page."""
    return {"page": publish_dataset(settings)}
