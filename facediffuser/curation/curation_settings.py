"""The settings of `merge`, `retract`, `export` and `publish`, and of their flows."""

from typing import ClassVar, Literal

from pydantic import Field

from facediffuser.settings import LARGEST, Dataset, Names, Output, Settings, Workers

ExportFormat = Literal["webdataset", "imagefolder", "lmdb", "faces", "faces-lmdb"]


class Datasets(Settings):
    """Several finished datasets, the first arguments of a command."""

    positional: ClassVar[str | None] = "urls"

    urls: Names = Field(min_length=2, description="the datasets: folders or `s3://bucket/prefix`, two or more")


class MergeSettings(Workers, Datasets):
    """Joins finished datasets as one; run again, it resumes."""

    output: Output = Field(description="where the merged dataset goes: an empty folder or `s3://bucket/prefix`")


class VerifySettings(Dataset):
    """Checks a dataset."""

    absent: str | None = Field(
        None,
        min_length=1,
        description="a `subject_id`: also prove, by reading every byte, that nothing of them is left",
    )


class RetractSettings(Workers, Dataset):
    """Takes a person out of a dataset: every row that shows them, their references, and what was made of them."""

    subject: str = Field(min_length=1, description="the `subject_id` of the person")


class ExportSettings(Workers, Dataset):
    """Writes a subset of a dataset in the format of a trainer; run again, it resumes."""

    to: ExportFormat = Field(
        description="`webdataset`: tar files; `imagefolder`: a folder for each set of subjects; `lmdb`: LMDB; `faces`, "
        "`faces-lmdb`: aligned crops of 112 px, a folder or a label for each subject"
    )
    output: Output = Field(description="where the subset goes: an empty folder or `s3://bucket/prefix`")
    where: str | None = Field(
        None,
        min_length=1,
        description="an SQL condition on the columns, also added ones, such as `ip > 0.5 and pc > 0.2`",
    )
    test_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the subjects whose images are for testing; no image shows people of both sides",
    )
    seed: int = Field(0, ge=0, le=LARGEST, description="decides which subjects are for testing")
    rows_per_file: int = Field(
        1000, ge=1, le=1_000_000, description="images of a tar or LMDB, the unit of work and of resuming"
    )
    scorers: str | None = Field(
        None,
        description="for faces of a dataset without the column `faces`: what finds them (default: the dataset's own)",
    )


class PublishSettings(Settings):
    """Puts a finished dataset on the Hugging Face Hub; run again, it resumes."""

    positional: ClassVar[str | None] = "places"

    places: Names = Field(min_length=2, max_length=2, description="the dataset, and `hf://datasets/ORG/NAME`")
    private: bool = Field(False, description="make the repository a private one, where it is made")

    @property
    def dataset(self) -> str:
        """The dataset's URL."""
        return self.places[0]

    @property
    def target(self) -> str:
        """Where it goes."""
        return self.places[1]
