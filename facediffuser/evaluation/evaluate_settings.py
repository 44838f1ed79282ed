"""What `facediffuser evaluate` and the flow `evaluate` are told."""

from pydantic import BaseModel, ConfigDict, Field, model_validator

from facediffuser.schedulers import SchedulerName
from facediffuser.window import fusion_window

METHODS = ("face-diffuser", "tdm", "sdm", "fastcomposer")


class BenchmarkSettings(BaseModel):
    """For methods against each other: whose images of which prompts are made before the table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    benchmark: str | None = Field(
        None,
        description="suites (single-30, single-40, pairs-20, miniature-30, miniature-pairs-8) or files of prompts, "
        "several separated by commas: their images of --subjects are made with --models, what is missing of them",
    )
    models: str | None = Field(None, description="for --benchmark: model folder, as for generate")
    methods: str = Field(",".join(METHODS), description="for --benchmark: samplers, separated by commas")
    images_per_prompt: int = Field(1, ge=1, description="for --benchmark: images of each prompt and set of subjects")
    subject_sets: int | None = Field(
        None, ge=1, description="for --benchmark: most sets of subjects a suite is made of (default: every set)"
    )
    steps: int = Field(50, ge=1, le=1000, description="for --benchmark: denoising steps of an image")
    guidance_scale: float = Field(
        5.0, ge=0, le=100, allow_inf_nan=False, description="for --benchmark: as for generate"
    )
    fusion_start: int | None = Field(None, ge=0, description="for --benchmark: as for generate")
    fusion_end: int | None = Field(None, ge=0, description="for --benchmark: as for generate")
    scheduler: SchedulerName | None = Field(None, description="for --benchmark: as for generate")
    workers: int | None = Field(None, ge=1, description="for --benchmark: Ray workers")
    cpus_per_worker: int | None = Field(None, ge=1, description="for --benchmark: CPU cores of a worker without a GPU")
    shard_size: int = Field(500, ge=1, le=100_000, description="for --benchmark: rows of a shard")
    generate_batch_size: int | None = Field(None, ge=1, le=1024, description="for --benchmark: images made together")


class EvaluateSettings(BenchmarkSettings):
    """Which images to put in the table, what to score them with, where the table goes."""

    dataset: str | None = Field(
        None,
        description="datasets that `generate` wrote: a folder or s3://bucket/prefix, several separated by commas; "
        "NAME=URL names the method",
    )
    images: str | None = Field(
        None,
        description="folders of images of any system, several separated by commas; NAME=FOLDER names the method; files "
        "are called subject_0000_prompt_0000_instance_0000.jpg, or --index says what each shows",
    )
    subjects: str | None = Field(
        None, description="for --images and --benchmark: the subjects' folder, as for generate"
    )
    prompts: str | None = Field(None, description="for --images: the prompts' file, as for generate, or a suite's name")
    subjects_per_image: int | None = Field(
        None,
        ge=1,
        le=4,
        description="for --images: how many subjects every prompt of --prompts must name (default: each says it itself)",
    )
    index: str | None = Field(
        None, description="for --images: CSV with the columns image, subject_ids (joined by +), prompt_id or prompt"
    )
    scorers: str = Field(
        "paper", description="paper, miniature, or a folder or s3:// prefix holding identity/ and prompt/"
    )
    add: str | None = Field(
        None,
        description="other scorers whose columns are added, separated by commas: sharpness, an entry point of "
        "facediffuser.scorers, or module:Class",
    )
    rescore: bool = Field(False, description="score the dataset's images again instead of using its recorded scores")
    output: str | None = Field(
        None,
        description="where table.parquet, table.md, plot.png and scores.parquet go, and the datasets of --benchmark; "
        "without it nothing is written",
    )
    batch_size: int = Field(16, ge=1, description="images scored at a time")
    device: str = Field("auto", description="where the scorers run: auto, cpu, cuda, cuda:1, ...")
    seed: int = Field(0, ge=0, description="seed of the bootstrap intervals, and of the images of --benchmark")

    @model_validator(mode="after")
    def _something_to_score(self) -> "EvaluateSettings":
        if not self.dataset and not self.images and not self.benchmark:
            raise ValueError("nothing to evaluate; give --dataset or --images, or --benchmark and --models")
        for name in ("models", "subjects", "output"):
            if self.benchmark and not getattr(self, name):
                raise ValueError(f"--benchmark needs --{name}")
        unknown = [name for name in several(self.methods) if name not in METHODS]
        if self.benchmark and unknown:
            raise ValueError(f"method {unknown[0]!r}: no such sampler; give some of {', '.join(METHODS)}")
        if self.benchmark:
            fusion_window(self.steps, self.fusion_start, self.fusion_end)
        if self.images and not self.subjects:
            raise ValueError("--images needs --subjects, the folder of reference pictures")
        if self.images and not (self.prompts or self.index):
            raise ValueError("--images needs --prompts, or an --index with a column prompt")
        return self


def several(text: str | None) -> list[str]:
    """Return the parts of a list with commas."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]
