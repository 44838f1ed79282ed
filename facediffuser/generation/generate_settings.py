"""What `facediffuser generate`, `repair`, `retry-failed` and `remake`, and their flows, are told."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from facediffuser.dataset.suites import suite_prompts, suite_subjects
from facediffuser.prompts import IMAGE_MARKER
from facediffuser.schedulers import SCHEDULER_HELP, SchedulerName
from facediffuser.window import fusion_window


class Pool(BaseModel):
    """How many workers make images: a fixed number, or between two bounds as there is work and room."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    workers: int | None = None
    min_workers: int | None = None
    max_workers: int | None = None
    cpus_per_worker: int | None = None

    def size(self, gpus: int, shards: int) -> tuple[int, int]:
        """Return the fewest and the most workers for so many GPUs of the cluster and shards to make."""
        if self.max_workers:
            return min(self.min_workers or 1, shards), min(self.max_workers, shards)
        fixed = min(self.workers or gpus or 1, shards)
        return fixed, fixed


class GenerateSettings(BaseModel):
    """Subjects x prompts x images to a scored image dataset; run again, it goes on where it stopped."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: str = Field(description="model folder: a folder, an s3:// URL, a hub id, or `miniature`")
    subjects: str = Field(description="folder or s3:// prefix of <subject_id>/*.jpg|png|webp, subjects.csv beside them")
    prompts: str | None = Field(
        None, description="JSONL, CSV or Parquet with prompt, and prompt_id and category at choice"
    )
    benchmark: str | None = Field(
        None,
        description="instead of prompts: single-30, single-40, pairs-20, miniature-30 or miniature-pairs-8; it decides "
        "how many subjects an image shows",
    )
    output: str = Field(description="where the dataset goes: a folder or s3://bucket/prefix")
    subjects_per_image: int | None = Field(
        None,
        ge=1,
        le=16,
        description="how many subjects every prompt must show (default: each prompt says by its places how many it shows)",
    )
    subject_sets: int | None = Field(
        None,
        ge=1,
        description="how many sets of subjects a prompt is made with, chosen evenly (default: every set there is)",
    )
    images_per_prompt: int = Field(1, ge=1, description="images of each prompt and set of subjects")
    seed: int = Field(0, ge=0, description="the same seed makes the same dataset")
    method: Literal["face-diffuser", "tdm", "sdm", "fastcomposer"] = Field("face-diffuser", description="sampler")
    steps: int = Field(50, ge=1, le=1000, description="denoising steps of an image")
    guidance_scale: float = Field(5.0, ge=0, le=100, allow_inf_nan=False, description="strength of the guidance")
    fusion_start: int | None = Field(None, ge=0, description="first step of both models (default: 16 of 50)")
    fusion_end: int | None = Field(None, ge=0, description="first step of the SDM alone (default: 31 of 50)")
    height: int | None = Field(None, ge=8, le=4096, description="image height, px (default: the model's)")
    width: int | None = Field(None, ge=8, le=4096, description="image width, px (default: the model's)")
    scheduler: SchedulerName | None = Field(None, description=SCHEDULER_HELP)
    negative_prompt: str = Field(
        "",
        description="what images should not show: takes the place of the empty text in the guidance of the TDM's steps "
        "(alone and fused) and of FastComposer's; the SDM is guided from the plain text, so its part does not read it",
    )
    workers: int | None = Field(None, ge=1, description="Ray workers (default: one per GPU, or 1)")
    min_workers: int | None = Field(None, ge=1, description="fewest workers of a pool that grows and shrinks by itself")
    max_workers: int | None = Field(None, ge=1, description="most workers of a pool that grows and shrinks by itself")
    cpus_per_worker: int | None = Field(
        None, ge=1, description="CPU cores of a worker without a GPU; the last bits of an image can depend on it"
    )
    batch_size: int | None = Field(None, ge=1, le=1024, description="images denoised together (default: by image size)")
    shard_size: int = Field(500, ge=1, le=100_000, description="rows of a shard, the unit of work and of resuming")
    scorers: str | None = Field(
        None, description="paper, miniature, or a folder with identity/ and prompt/ (default: those of the models)"
    )
    image_format: Literal["png", "jpeg", "webp"] = Field("png", description="how images are stored")
    reference_crop: Literal["face", "whole"] = Field(
        "face", description="what the model is shown of a reference picture: the square around its face, or all of it"
    )
    reference_margin: float = Field(
        0.3, ge=0, le=3, description="for `face`: how much wider the square is on each side, in parts of the face"
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="numbers the models compute in (auto: float16 on a GPU, float32 on a CPU)"
    )
    max_failed: float = Field(0.01, ge=0, le=1, description="share of failed rows above which the run fails")
    provenance: bool = Field(True, description="mark images and Parquet as synthetic")
    dry_run: bool = Field(
        False,
        description="check the input, make one batch in memory, say what a run would make and take, write nothing",
    )
    measured_by: str | None = Field(
        None, description="for --dry-run: a dataset made before, whose rate is taken instead of a batch's"
    )
    gpu_hour_price: float | None = Field(None, ge=0, description="for --dry-run: what an hour of a worker costs")

    @model_validator(mode="before")
    @classmethod
    def _prompts(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        benchmark = given.get("benchmark")
        if bool(benchmark) == bool(given.get("prompts")):
            raise ValueError("give --prompts or --benchmark" + (", not both" if benchmark else ""))
        if not benchmark:
            return given
        count = suite_subjects(benchmark)
        if given.get("subjects_per_image") not in (None, count):
            raise ValueError(f"benchmark {benchmark} shows {count} in an image; leave --subjects-per-image out")
        return given | {"subjects_per_image": count}

    @model_validator(mode="after")
    def _fits(self) -> "GenerateSettings":
        fusion_window(self.steps, self.fusion_start, self.fusion_end)
        self._require_use_of_negative_prompt()
        if self.workers and (self.min_workers or self.max_workers):
            raise ValueError("workers is a fixed number; give it, or min_workers and max_workers")
        if self.min_workers and self.min_workers > (self.max_workers or 0):
            raise ValueError(f"min_workers {self.min_workers}, max_workers {self.max_workers}; give a larger maximum")
        return self

    def _require_use_of_negative_prompt(self) -> None:
        text = self.negative_prompt
        if not text:
            return
        if self.method == "sdm":
            raise ValueError(
                "negative_prompt: method sdm is guided from the plain text and does not read it; leave it out"
            )
        if not text.strip() or IMAGE_MARKER in text or "{subject" in text:
            raise ValueError(
                f"negative_prompt {text!r}: names a subject, or nothing; give plain words without {IMAGE_MARKER} and "
                "{subject}"
            )

    @property
    def prompts_url(self) -> str:
        """Where the prompts stand: the file given, or the benchmark's."""
        return str(suite_prompts(self.benchmark)) if self.benchmark else self.prompts

    @property
    def pool(self) -> Pool:
        """The part of the settings that says how many workers there are."""
        return Pool(**{name: getattr(self, name) for name in Pool.model_fields})

    @property
    def fusion_window(self) -> tuple[int, int]:
        """First step of both models and first step of the SDM alone; the released window scaled where none is given."""
        return fusion_window(self.steps, self.fusion_start, self.fusion_end)


class _MendSettings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str = Field(description="the dataset: a folder or s3://bucket/prefix")
    models: str | None = Field(None, description="where the models lie now (default: where `generate` had them)")
    scorers: str | None = Field(None, description="where the scorers lie now (default: where `generate` had them)")
    workers: int | None = Field(None, ge=1, description="Ray workers (default: one per GPU, or 1)")


class RepairSettings(_MendSettings):
    """Makes again what `verify` finds missing or damaged, and nothing else; the bytes are the manifest's."""

    accept: bool = Field(
        False, description="keep shards that come out with other bytes (other hardware) and list them in the manifest"
    )
    remove_foreign: bool = Field(False, description="remove what lies in data/ and is no shard of the dataset")


class RetrySettings(_MendSettings):
    """Makes the shards that hold failed rows again and lists them in the manifest."""


class RemakeSettings(BaseModel):
    """Makes one image again from its row and says whether it is the dataset's, byte for byte."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sample_id: str = Field(description="the row's sample_id")
    dataset: str = Field(description="the dataset: a folder or s3://bucket/prefix")
    models: str | None = Field(None, description="where the models lie now (default: where `generate` had them)")
    scorers: str | None = Field(None, description="where the scorers lie now (default: where `generate` had them)")
    output: str | None = Field(None, description="folder or s3:// prefix to put the image in")
