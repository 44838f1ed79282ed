"""The flows `repair-dataset` and `retry-failed`: a finished dataset made whole again, and only where it is not."""

import logging
from typing import Any

from facediffuser.cards.rendering import render
from facediffuser.flows.product_flow import product_flow
from facediffuser.generation.generate_settings import RepairSettings, RetrySettings
from facediffuser.tasks.repair import find_damage, repair_damage, retry_failed_rows
from facediffuser.tasks.run_page import show_markdown

logger = logging.getLogger(__name__)


@product_flow("repair-dataset", "repair {settings.url}")
def repair_dataset(settings: RepairSettings) -> dict[str, Any]:
    """Make again what `verify` finds missing or damaged; return what was found and what is left, one line each."""
    manifest, problems = find_damage(settings)
    left = repair_damage(settings, manifest, problems) if problems else []
    found = [str(problem) for problem in problems]
    text = render("dataset_repair.md.j2", output=settings.url, found=found, left=left)
    show_markdown(text, key="dataset-repair")
    return {"output": settings.url, "found": found, "left": left}


@product_flow("retry-failed", "retry the failed rows of {settings.url}")
def retry_failed(settings: RetrySettings) -> dict[str, Any]:
    """Make the shards that hold failed rows again; return how many rows are ok and failed now."""
    manifest = retry_failed_rows(settings)
    return {"output": settings.url, **manifest.counts.model_dump()}
