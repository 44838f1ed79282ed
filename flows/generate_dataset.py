"""The flow `generate-dataset`: subjects and prompts in, scored images as Parquet out."""

import logging
from typing import Any

from facediffuser.cards.card_facts import spent_lines
from facediffuser.cards.rendering import render
from facediffuser.dataset.certificate import sample_size
from facediffuser.dataset.manifest import MANIFEST_KEY
from facediffuser.dataset.spending import read_spent
from facediffuser.evaluation.tables import markdown
from facediffuser.flows.product_flow import product_flow
from facediffuser.generation.generate_settings import GenerateSettings
from facediffuser.generation.job import Prepared
from facediffuser.markup import Markdown, link
from facediffuser.storage import Store
from facediffuser.tasks.generate import (
    Finished,
    certify_dataset,
    estimate_run,
    finish_dataset,
    generate_shards,
    plan_dataset,
)
from facediffuser.tasks.metrics import metrics_served
from facediffuser.tasks.run_page import show_markdown

logger = logging.getLogger(__name__)

EXAMPLES = 3


@product_flow("generate-dataset", "generate {settings.output} of {settings.subjects} with {settings.models}")
def generate_dataset(settings: GenerateSettings) -> dict[str, Any]:
    """Plan, make what is missing, finish; return counts, where the dataset is, and the table of IP and PC.

    Run again with the same settings it keeps finished shards; an output that holds another run is refused. With
    `extend` rows are added to a finished dataset, after an extension that was interrupted is finished.
    """
    with metrics_served(settings.metrics_port, settings.metrics_address):
        limits = settings.limits.of_one_run()
        prepared = plan_dataset(settings).with_limits(limits)
        if settings.dry_run:
            described = describe(prepared)
            return described | (estimate_run(settings, prepared) if prepared.job.layout.rows else {})
        run = generate_shards(prepared.job)
        finished = finish_dataset(prepared.job, certify_dataset(prepared.job))
        while prepared.resumes:
            prepared = plan_dataset(settings).with_limits(limits)
            later = generate_shards(prepared.job)
            run = {**later, "made": run["made"] + later["made"], "kept": run["kept"] + later["kept"]}
            finished = finish_dataset(prepared.job, certify_dataset(prepared.job))
    table = markdown(finished.table)
    show_markdown(
        _summary(prepared.job.store(), finished, run, table),
        key="dataset-scores",
        description="What was generated, where it is, and its scores (IP and PC)",
    )
    return {
        "output": prepared.job.output,
        **finished.counts.model_dump(),
        "shards_kept": run["kept"],
        "shards_made": run["made"],
        "seconds": run["seconds"],
        "denoising_share": run["busy"],
        "fingerprint": prepared.job.fingerprint,
        "table": table,
        **({"certificate": finished.certificate} if finished.certificate else {}),
    }


def _summary(store: Store, finished: Finished, run: dict[str, Any], table: str) -> str:
    """Return the page of a finished run: links to the dataset's card and manifest, counts, scores."""
    places = {"card": "card/index.html", "README.md": "README.md", "manifest": MANIFEST_KEY}
    pages = [(name, store.page_of(key)) for name, key in places.items()]
    counts = finished.counts
    lines = [
        ("images", f"{counts.rows:,}"),
        ("failed", f"{counts.failed:,}"),
        ("shards", f"{counts.shards:,}"),
        ("shards kept from before", f"{run['kept']:,}"),
        ("seconds", f"{run['seconds']:,.0f}"),
        *spent_lines(read_spent(store)),
    ]
    return render(
        "dataset_scores.md.j2",
        output=store.url,
        links=Markdown(", ".join(link(name, page) for name, page in pages if page)),
        lines=lines,
        table=table,
    )


def describe(prepared: Prepared) -> dict[str, Any]:
    """Return what a run would make: counts and a few example rows; also logged."""
    job, plan = prepared.job, prepared.plan
    first = next((prepared.rows or plan).tables(EXAMPLES), None)
    examples = first.select(["sample_id", "prompt", "subject_ids", "seed"]).to_pylist() if first else []
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
        **({"rows_of_certificate": sample_size(job.layout.rows)} if job.exact_settings else {}),
    }
