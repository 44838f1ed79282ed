"""The flow `claim`: the paper's comparison of methods on the miniature world, and whether its ordering holds there."""

import io
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from pydantic import BaseModel, ConfigDict, Field, model_validator

from facediffuser.evaluation.claim import judge, markdown, ordering_holds
from facediffuser.evaluation.evaluate_settings import EvaluateSettings
from facediffuser.evaluation.tables import from_arrow
from facediffuser.flows.evaluate import evaluate
from facediffuser.miniature.render import write_subjects
from facediffuser.schedulers import SchedulerName
from facediffuser.storage import open_store
from facediffuser.window import fusion_window

# Far from everybody that a part of the miniature, a scorer or a photo set is made of.
FIRST_PERSON = 80_000_000


class ClaimSettings(BaseModel):
    """The paper's table in small: 15 unseen people x 30 prompts, 15 pairs x 8 prompts, three images of each, 4 methods.

    The defaults fit 20 minutes on two CPU cores.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: str = Field("miniature", description="model folder to judge, or `miniature` for the shipped one")
    scorers: str = Field("miniature", description="miniature, or a folder with identity/ and prompt/")
    output: str = Field("out/claim", description="where people, images and tables go; run again, it goes on")
    people: int = Field(15, ge=2, description="unseen people, and at most as many pairs of them")
    images_per_prompt: int = Field(3, ge=1, description="images of each prompt and subjects, each from its own seed")
    steps: int = Field(12, ge=1, le=1000, description="denoising steps of an image")
    guidance_scale: float = Field(
        5.0, ge=0, le=100, description="strength of the guidance, the paper's; less suits pictures of 64 px better"
    )
    scheduler: SchedulerName = Field(
        "dpm", description="noise scheduler; at a change of models pndm, with a longer memory, mixes their noises"
    )
    fusion_start: int | None = Field(None, ge=0, description="first step of both models (default: 3 of 12)")
    fusion_end: int | None = Field(None, ge=0, description="first step of the SDM alone (default: 11 of 12)")
    seed: int = Field(0, ge=0, description="seed of all images")
    workers: int = Field(2, ge=1, description="Ray workers, each with a core")
    batch_size: int = Field(45, ge=1, le=1024, description="images made together")

    @property
    def fusion_window(self) -> tuple[int, int]:
        """First step of both models and first step of the SDM alone; what suits the miniature where none is given."""
        suits = round(self.steps * 3 / 12), round(self.steps * 11 / 12)
        return fusion_window(self.steps, self.fusion_start, self.fusion_end, suits)

    @model_validator(mode="after")
    def _has_a_window(self) -> "ClaimSettings":
        _ = self.fusion_window
        return self


@task(name="render-unseen-people")
def render_people(count: int, url: str) -> str:
    """Render the people to `url`, unless they are there already; return `url`."""
    store = open_store(url)
    if not store.exists("subjects.csv"):
        with tempfile.TemporaryDirectory(prefix="facediffuser-people-") as name:
            folder = Path(name) / "subjects"
            write_subjects(folder, FIRST_PERSON, count=count)
            for path in [*sorted(folder.rglob("*.png")), folder / "subjects.csv"]:
                store.put(path.relative_to(folder).as_posix(), path.read_bytes())
    return url


@flow(name="claim")
def claim(settings: ClaimSettings) -> tuple[str, bool]:
    """Return the tables and the judgement as Markdown, and whether the paper's ordering holds; also `claim.md`."""
    output = settings.output.rstrip("/")
    open_store(output).require_writable()
    fusion_start, fusion_end = settings.fusion_window
    tables = evaluate(
        EvaluateSettings(
            benchmark="miniature-30,miniature-pairs-8",
            models=settings.models,
            subjects=render_people(settings.people, f"{output}/people"),
            scorers=settings.scorers,
            output=output,
            subject_sets=settings.people,
            images_per_prompt=settings.images_per_prompt,
            steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            scheduler=settings.scheduler,
            fusion_start=fusion_start,
            fusion_end=fusion_end,
            seed=settings.seed,
            workers=settings.workers,
            cpus_per_worker=1,
            generate_batch_size=settings.batch_size,
            shard_size=settings.batch_size,
        )
    )
    rows = from_arrow(pq.read_table(io.BytesIO(open_store(output).get("table.parquet"))))
    checks = judge(rows)
    text = f"{tables}\n## The paper's claim\n\n{markdown(checks)}"
    open_store(output).put("claim.md", text.encode())
    create_markdown_artifact(text, key="claim", description="Methods on the miniature world, and the paper's ordering")
    return text, ordering_holds(checks)
