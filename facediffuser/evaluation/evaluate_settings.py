"""The settings of `facediffuser evaluate`, in three parts: the table, images of other systems, a benchmark of methods."""

from typing import Annotated

from pydantic import Field, model_validator

from facediffuser.settings import (
    CommaSeparated,
    GenerateWorkers,
    Method,
    Names,
    Repeats,
    Sampling,
    Scoring,
    Seeded,
    Settings,
    SubjectsPerImage,
)


class TableSettings(Scoring, Seeded):
    """Which datasets come into the table, what they are scored with and where the table goes."""

    dataset: Names = Field(
        [], description="datasets that `generate` wrote: folders or `s3://bucket/prefix`; `NAME=URL` names the method"
    )
    scorers: str = Field(
        "paper", description="`paper`, `miniature`, or a folder or `s3://` prefix with `identity/` and `prompt/`"
    )
    add: Names = Field(
        [],
        description="other scorers whose columns are added: `sharpness`, `dlib`, `nsfw`, `onnx-face:PATH`, `aesthetic:HEAD`, an "
        "entry point of `facediffuser.scorers`, or `module:Class`",
    )
    rescore: bool = Field(False, description="score the dataset's images again instead of using its recorded scores")
    output: str | None = Field(
        None,
        description="where `table.parquet`, `table.md`, `plot.png` and `scores.parquet` go, and the datasets of "
        "`--benchmark`; without it nothing is written",
    )


class WithSubjects(Settings):
    """Whom the images show that no dataset describes."""

    subjects: str | None = Field(
        None, description="for `--images` and `--benchmark`: the subjects' folder, as for `generate`"
    )


class ExternalImageSettings(WithSubjects):
    """Folders of images that another system made, and what they show."""

    images: Names = Field(
        [],
        description="folders of images of any system; `NAME=FOLDER` names the method; files are called "
        "`subject_0000_prompt_0000_instance_0000.jpg`, or `--index` says what each shows",
    )
    prompts: str | None = Field(
        None, description="for `--images`: the prompts' file, as for `generate`, or a suite's name"
    )
    subjects_per_image: SubjectsPerImage | None = Field(
        None,
        description="for `--images`: how many subjects every prompt of `--prompts` must name (default: each says it itself)",
    )
    index: str | None = Field(
        None,
        description="for `--images`: CSV with the columns `image`, `subject_ids` (joined by `+`), `prompt_id` or `prompt`",
    )

    @model_validator(mode="after")
    def _check_images(self) -> "ExternalImageSettings":
        if self.images and not self.subjects:
            raise ValueError("--images needs --subjects, the folder of reference pictures")
        if self.images and not (self.prompts or self.index):
            raise ValueError("--images needs --prompts, or an --index with a column prompt")
        return self


class BenchmarkSettings(GenerateWorkers, Sampling, Repeats, WithSubjects):
    """Whose images of which prompts are made before the table; all but `benchmark` is for it alone."""

    benchmark: Names = Field(
        [],
        description="suites (`single-30`, `single-40`, `pairs-20`, `miniature-30`, `miniature-pairs-8`) or files of "
        "prompts: their images of `--subjects` are made with `--models`, what is missing of them; with it the options "
        "for sampling and workers count, as for `generate`",
    )
    models: str | None = Field(None, description="for `--benchmark`: model folder, as for `generate`")
    methods: Annotated[list[Method], CommaSeparated] = Field(
        ["face-diffuser", "tdm", "sdm", "fastcomposer"], min_length=1, description="for `--benchmark`: sampling methods"
    )
    generate_batch_size: int | None = Field(
        None, ge=1, le=1024, description="for `--benchmark`: images denoised together (default: by image size)"
    )


class EvaluateSettings(BenchmarkSettings, ExternalImageSettings, TableSettings):
    """Which images to put in the table, what to score them with, where the table goes."""

    @model_validator(mode="after")
    def _check_parts(self) -> "EvaluateSettings":
        if not self.dataset and not self.images and not self.benchmark:
            raise ValueError("nothing to evaluate; give --dataset or --images, or --benchmark and --models")
        for name in ("models", "subjects", "output"):
            if self.benchmark and not getattr(self, name):
                raise ValueError(f"--benchmark needs --{name}")
        return self
