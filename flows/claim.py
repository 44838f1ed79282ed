"""The flow `claim`: the paper's comparison of methods on the miniature world, and whether its ordering holds there."""

import io
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
from prefect import task
from prefect.artifacts import create_markdown_artifact

from facediffuser.evaluation.claim import claim_checks, markdown, ordering_holds
from facediffuser.evaluation.evaluate_settings import EvaluateSettings
from facediffuser.evaluation.tables import from_arrow
from facediffuser.flows.evaluate import evaluate
from facediffuser.flows.flow_check import check_claim
from facediffuser.flows.flow_settings import ClaimSettings
from facediffuser.flows.product_flow import product_flow
from facediffuser.miniature.render import write_subjects
from facediffuser.settings import Sampling, Seeded
from facediffuser.storage import open_store
from facediffuser.storage.output import put_folder
from facediffuser.tasks.retrying import RETRIES

# Far from everybody that a part of the miniature, a scorer or a photo set is made of.
FIRST_PERSON = 80_000_000


@task(name="render-unseen-people", **RETRIES)
def render_people(count: int, url: str) -> str:
    """Render the people to `url`, unless they are there already; return `url`."""
    store = open_store(url)
    if not store.exists("subjects.csv"):
        with tempfile.TemporaryDirectory(prefix="facediffuser-people-") as name:
            folder = Path(name) / "subjects"
            write_subjects(folder, FIRST_PERSON, count=count)
            put_folder(store, folder, "subjects.csv")
    return url


@product_flow("claim", "claim in {settings.output}")
def claim(settings: ClaimSettings) -> tuple[str, bool]:
    """Return the tables and the judgement as Markdown, and whether the paper's ordering holds; also `claim.md`."""
    check_claim(settings)
    output = settings.output.rstrip("/")
    fusion_start, fusion_end = settings.fusion_window
    tables = evaluate(
        EvaluateSettings(
            **settings.values_of(Sampling, Seeded) | {"fusion_start": fusion_start, "fusion_end": fusion_end},
            benchmark=["miniature-30", "miniature-pairs-8"],
            models=settings.models,
            subjects=render_people(settings.people, f"{output}/people"),
            scorers=settings.scorers,
            output=output,
            subject_sets=settings.people,
            images_per_prompt=settings.images_per_prompt,
            workers=settings.workers,
            cpus_per_worker=1,
            generate_batch_size=settings.batch_size,
            shard_size=settings.batch_size,
        )
    )
    rows = from_arrow(pq.read_table(io.BytesIO(open_store(output).get("table.parquet"))))
    checks = claim_checks(rows)
    text = f"{tables}\n## The paper's claim\n\n{markdown(checks)}"
    open_store(output).put("claim.md", text.encode())
    create_markdown_artifact(text, key="claim", description="Methods on the miniature world, and the paper's ordering")
    return text, ordering_holds(checks)
