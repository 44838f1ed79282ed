"""The flow `generate-dataset`: subjects and prompts in, scored images as Parquet out."""

import logging
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from facediffuser.cards.rendering import render
from facediffuser.evaluation.tables import markdown
from facediffuser.flows.stopping import report_stop, watch_process
from facediffuser.generation.generate_settings import GenerateSettings
from facediffuser.generation.job import Prepared
from facediffuser.tasks.generate import estimate_run, finish_dataset, generate_shards, plan_dataset

logger = logging.getLogger(__name__)

EXAMPLES = 3


@flow(name="generate-dataset", on_running=[watch_process], on_failure=[report_stop])
def generate_dataset(settings: GenerateSettings) -> dict[str, Any]:
    """Plan, make what is missing, finish; return counts, where the dataset is, and the table of IP and PC.

    Run again with the same settings it keeps finished shards; an output that holds another run is refused.
    """
    prepared = plan_dataset(settings)
    if settings.dry_run:
        return describe(prepared) | estimate_run(settings, prepared)
    run = generate_shards(prepared.job)
    finished = finish_dataset(prepared.job)
    table = markdown(finished.table)
    text = render("dataset_scores.md.j2", output=prepared.job.output, table=table)
    create_markdown_artifact(text, key="dataset-scores")
    return {
        "output": prepared.job.output,
        **finished.counts.model_dump(),
        "shards_kept": run["kept"],
        "shards_made": run["made"],
        "seconds": run["seconds"],
        "denoising_share": run["busy"],
        "fingerprint": prepared.job.fingerprint,
        "table": table,
    }


def describe(prepared: Prepared) -> dict[str, Any]:
    """Return what a run would make: counts and a few example rows; also logged."""
    job, plan = prepared.job, prepared.plan
    examples = next(plan.tables(EXAMPLES)).select(["sample_id", "prompt", "subject_ids", "seed"]).to_pylist()
    for row in examples:
        logger.info("example: %s: %s (subjects %s, seed %d)", row["sample_id"], row["prompt"],
                    ", ".join(row["subject_ids"]), row["seed"])  # fmt: skip
    return {
        "output": job.output,
        "dry_run": True,
        "rows": job.layout.rows,
        "shards": job.layout.shards,
        "subjects": len(plan.subjects),
        "prompts": len(plan.prompts),
        "batch_size": job.batch_size,
        "fingerprint": job.fingerprint,
        "examples": examples,
    }
