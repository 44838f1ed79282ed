"""The flow `rehearse`: every stage for a moment at its real size, with random weights, and a table of what it would take."""

import json
import logging
from typing import Any

from facediffuser.dataset.verify import verify
from facediffuser.errors import RunError
from facediffuser.flows.product_flow import product_flow
from facediffuser.generation.job import GenerationJob
from facediffuser.rehearsal.rehearsal import Measured, table
from facediffuser.rehearsal.rehearsal import rehearse as run_rehearsal
from facediffuser.rehearsal.rehearse_check import check_rehearse
from facediffuser.rehearsal.rehearse_settings import RehearseSettings
from facediffuser.storage import open_store
from facediffuser.tasks.generate import finish_dataset
from facediffuser.tasks.run_page import show_markdown

logger = logging.getLogger(__name__)


@product_flow("rehearse", "rehearse the {settings.size} size in {settings.output}")
def rehearse(settings: RehearseSettings) -> dict[str, Any]:
    """Rehearse every stage on this machine, write `rehearsal.md` and `rehearsal.json`; return the table and the stages.

    The stages run one after another in this process, with one worker: neither Ray nor other machines take part.
    """
    check_rehearse(settings)
    store = open_store(settings.output)
    rehearsed = run_rehearsal(settings, _finish, _say)
    text = table(rehearsed, settings.gpu_hour_price)
    document = rehearsed.as_document()
    store.put("rehearsal.json", (json.dumps(document, indent=1) + "\n").encode())
    store.put("rehearsal.md", text.encode())
    show_markdown(text, key="rehearsal", description="What each stage takes on this hardware")
    return {"output": store.url, "table": text, **document}


def _finish(job: GenerationJob) -> None:
    finish_dataset.fn(job)
    if problems := verify(job.output):
        raise RunError(f"{job.output}: {problems[0]}")


def _say(one: Measured) -> None:
    if one.fits:
        logger.info("%s: %.3g %s a second", one.stage, one.rate, one.noun)
    else:
        logger.warning("%s: %s", one.stage, one.note)
