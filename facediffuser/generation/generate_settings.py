"""The settings of `facediffuser generate`, `repair`, `retry-failed` and `remake`, and of their flows."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from facediffuser.batch_stage import Limits, WorkerPool
from facediffuser.dataset.suites import suite_prompts, suite_subjects
from facediffuser.engine_options import EngineName
from facediffuser.generation.speed_settings import SpeedSettings
from facediffuser.prompts import IMAGE_MARKER
from facediffuser.settings import (
    MOST_WORKERS,
    Dataset,
    Exact,
    GenerateWorkers,
    Limited,
    Method,
    Moved,
    Observed,
    Repeats,
    Seeded,
    Settings,
    SubjectsPerImage,
    Workers,
)


class PlanSettings(Settings):
    """What images are made of and where they go."""

    models: str = Field(description="model folder: a folder, an `s3://` URL, a hub id, or `miniature`")
    subjects: str = Field(
        description="folder or `s3://` prefix of `<subject_id>/*.jpg` (png, webp, ...), and, if you like, `subjects.csv` beside them"
    )
    prompts: str | None = Field(
        None, description="JSONL, CSV or Parquet with the column `prompt`, optionally `prompt_id` and `category`"
    )
    benchmark: str | None = Field(
        None,
        description="instead of prompts: `single-30`, `single-40`, `pairs-20`, `miniature-30` or `miniature-pairs-8`; it "
        "decides how many subjects an image shows",
    )
    output: str = Field(description="where the dataset goes: a folder or `s3://bucket/prefix`")
    subjects_per_image: SubjectsPerImage | None = Field(
        None,
        description="how many subjects every prompt must show (default: each prompt says by its places how many it shows)",
    )
    method: Method = Field("face-diffuser", description="sampling method")

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
        if str(given.get("subjects_per_image") or count) != str(count):
            raise ValueError(f"benchmark {benchmark} shows {count} in an image; leave --subjects-per-image out")
        return given | {"subjects_per_image": count}

    @property
    def prompts_url(self) -> str:
        """Where the prompts are: the file given, or the benchmark's."""
        if self.benchmark:
            return str(suite_prompts(self.benchmark))
        assert self.prompts is not None  # one of the two is given
        return self.prompts


class GenerateSettings(Exact, Limited, Observed, GenerateWorkers, SpeedSettings, Seeded, Repeats, PlanSettings):
    """Subjects x prompts x images to a scored image dataset; run again, it resumes where it stopped."""

    height: int | None = Field(None, ge=8, le=4096, description="image height, px (default: the model's)")
    width: int | None = Field(None, ge=8, le=4096, description="image width, px (default: the model's)")
    negative_prompt: str = Field(
        "",
        description="what images should not show: takes the place of the empty text in the guidance of the TDM's steps "
        "(alone and fused) and of FastComposer's; the SDM is guided from the plain text, so its part does not read it",
    )
    min_workers: int | None = Field(
        None, ge=1, le=MOST_WORKERS, description="fewest workers of a pool that grows and shrinks by itself"
    )
    max_workers: int | None = Field(
        None, ge=1, le=MOST_WORKERS, description="most workers of a pool that grows and shrinks by itself"
    )
    batch_size: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] | None = Field(
        None,
        description="images denoised together, or `auto`: as many as pay and fit the GPU's memory (default: `auto` for the "
        "compiled engine, else by image size)",
    )
    engine: EngineName = Field(
        "auto",
        description="how the models are run: `eager`, `compiled`, or `auto`: compiled on a GPU when the run is long enough to "
        "pay for compiling",
    )
    compiled_code: str | None = Field(
        None,
        description="folder or `s3://` prefix where compiled code is kept and found; it is run, so nobody else may write there "
        "(default: this machine's cache)",
    )
    scorers: str | None = Field(
        None,
        description="`paper` (FaceNet and CLIP), `miniature`, or a folder or `s3://` prefix with `identity/` and `prompt/` "
        "(default: `miniature` for models that come from it, else `paper`)",
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
    embeddings: bool = Field(True, description="keep each face's identity embedding (float16) in the column `faces`")
    provenance: bool = Field(True, description="mark images and Parquet as synthetic")
    require_consent: bool = Field(
        False, description="refuse subjects whose `consent` in subjects.csv is empty, or whose `expires` has passed"
    )
    extend: bool = Field(
        False,
        description="add to a finished dataset what the subjects, prompts and images per prompt have more of; rows that "
        "are there stay as they are, other settings are refused",
    )
    dry_run: bool = Field(
        False,
        description="check the input, make one batch in memory, say what a run would make and take, write nothing",
    )
    measured_by: str | None = Field(
        None,
        description="for --dry-run and the size of shards: a dataset made before, whose rate is taken instead of a batch's",
    )

    @model_validator(mode="after")
    def _fits(self) -> "GenerateSettings":
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
    def limits(self) -> Limits:
        """When the run stops by itself."""
        return Limits(self.max_hours, self.max_cost, self.gpu_hour_price, self.stop_within)

    @property
    def pool(self) -> WorkerPool:
        """How many workers there are."""
        return WorkerPool(self.workers, self.min_workers, self.max_workers)


class RepairSettings(Exact, Workers, Moved, Dataset):
    """Restores what `verify` finds missing or damaged, and nothing else; the bytes are the manifest's."""

    accept: bool = Field(
        False, description="keep shards that come out with other bytes (other hardware) and list them in the manifest"
    )
    remove_foreign: bool = Field(False, description="remove files in `data/` that are no shard of the dataset")


class RetrySettings(Exact, Workers, Moved, Dataset):
    """Makes the shards that hold failed rows anew and lists them in the manifest."""


class Row(Settings):
    """One image of a dataset."""

    positional: ClassVar[str | None] = "sample_id"

    sample_id: str = Field(description="the row's `sample_id`")
    dataset: str = Field(description="the dataset: a folder or `s3://bucket/prefix`")


class RemakeSettings(Moved, Row):
    """Makes one image anew from its row and says whether it is the dataset's, byte for byte."""

    output: str | None = Field(None, description="folder or `s3://` prefix to put the image in")
