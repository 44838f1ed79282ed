"""What `facediffuser evaluate` and the flow `evaluate` are told."""

from pydantic import BaseModel, ConfigDict, Field, model_validator


class EvaluateSettings(BaseModel):
    """Which images to put in the table, what to score them with, where the table goes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str | None = Field(
        None, description="datasets that `generate` wrote: a folder or s3://bucket/prefix, several separated by commas"
    )
    images: str | None = Field(
        None,
        description="folders of images of any system, several separated by commas; NAME=FOLDER names the method; files "
        "are called subject_0000_prompt_0000_instance_0000.jpg, or --index says what each shows",
    )
    subjects: str | None = Field(None, description="for --images: the subjects' folder, as for generate")
    prompts: str | None = Field(
        None, description="for --images: the prompts' file, as for generate, or a suite: single-30, single-40, pairs-20"
    )
    subjects_per_image: int = Field(
        1, ge=1, le=4, description="for --images: how many subjects each prompt of --prompts names"
    )
    index: str | None = Field(
        None, description="for --images: CSV with the columns image, subject_ids (joined by +), prompt_id or prompt"
    )
    scorers: str = Field(
        "paper", description="paper, miniature, or a folder or s3:// prefix holding identity/ and prompt/"
    )
    rescore: bool = Field(False, description="score the dataset's images again instead of using its recorded scores")
    output: str | None = Field(
        None, description="where table.parquet, table.md, plot.png and scores.parquet go; without it nothing is written"
    )
    batch_size: int = Field(16, ge=1, description="images scored at a time")
    device: str = Field("auto", description="where the scorers run: auto, cpu, cuda, cuda:1, ...")
    seed: int = Field(0, ge=0, description="seed of the bootstrap intervals")

    @model_validator(mode="after")
    def _something_to_score(self) -> "EvaluateSettings":
        if not self.dataset and not self.images:
            raise ValueError("nothing to evaluate; give --dataset or --images")
        if self.images and not self.subjects:
            raise ValueError("--images needs --subjects, the folder of reference pictures")
        if self.images and not (self.prompts or self.index):
            raise ValueError("--images needs --prompts, or an --index with a column prompt")
        return self
