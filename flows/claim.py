"""The flow `claim`: the paper's comparison of methods on the miniature world, and whether its ordering holds there."""

import io
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
from prefect import task

from facediffuser.evaluation.claim import checks_by_set, claim_checks, markdown, ordering_holds, sets_markdown
from facediffuser.evaluation.evaluate_settings import EvaluateSettings
from facediffuser.evaluation.tables import from_arrow
from facediffuser.flows.evaluate import evaluate
from facediffuser.flows.flow_check import check_claim
from facediffuser.flows.flow_settings import ClaimSettings
from facediffuser.flows.product_flow import product_flow
from facediffuser.miniature.detector_gate import gate_markdown, rendered_gate
from facediffuser.miniature.render import write_subjects
from facediffuser.settings import Sampling, Seeded
from facediffuser.storage import open_store
from facediffuser.storage.output import put_folder
from facediffuser.tasks.retrying import RETRIES
from facediffuser.tasks.run_page import show_markdown

# Far from everybody that a part of the miniature, a scorer or a photo set is made of.
FIRST_PERSON = 80_000_000
SET_SIZE = 15
"""People of a set; of more people the checks are shown set by set, too."""
MOST_RENDERED = 45
"""Most people whose renderings the detector is tried on."""


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


def set_of_person(subject_id: str) -> str:
    """Return the name of the set of the person called so by `write_subjects`: people 1 to 15, 16 to 30, ..."""
    first = int(subject_id.rpartition("_")[2]) // SET_SIZE * SET_SIZE
    return f"people {first + 1} to {first + SET_SIZE}"


@task(name="count-faces-of-renderings", **RETRIES)
def count_rendered_faces(people: int) -> str:
    """Return, as Markdown, in how many renderings of the people the detector finds them, by style."""
    return gate_markdown(rendered_gate(FIRST_PERSON, people))


@product_flow("claim", "claim in {settings.output}")
def claim(settings: ClaimSettings) -> tuple[str, bool]:
    """Return the tables and the judgement as Markdown, and whether the paper's ordering holds; also `claim.md`."""
    check_claim(settings)
    settings = settings.chosen()
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
    store = open_store(output)
    rows = from_arrow(pq.read_table(io.BytesIO(store.get("table.parquet"))))
    images = pq.read_table(io.BytesIO(store.get("scores.parquet")))
    checks = claim_checks(rows, images)
    text = f"{tables}\n## The paper's claim\n\n{markdown(checks)}"
    if settings.people > SET_SIZE:
        text += f"\n### In sets of {SET_SIZE} people\n\n{sets_markdown(checks_by_set(images, set_of_person))}"
    text += f"\n## What the detector finds in renderings\n\n{count_rendered_faces(min(settings.people, MOST_RENDERED))}"
    store.put("claim.md", text.encode())
    show_markdown(text, key="claim", description="Methods on the miniature world, and the paper's ordering")
    return text, ordering_holds(checks)
