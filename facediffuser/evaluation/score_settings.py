"""The settings of `facediffuser score` and `facediffuser copies`: what is added to a finished dataset."""

from pydantic import Field

from facediffuser.settings import Dataset, Device, Names, Scoring, Workers


class ScoreSettings(Workers, Scoring, Dataset):
    """Adds the columns of other scorers to a finished dataset."""

    add: Names = Field(
        ["sharpness"],
        description="scorers: `sharpness`, `faces`, `face-quality`, `dlib`, `nsfw`, `onnx-face:PATH`, `aesthetic:HEAD`, an entry "
        "point of `facediffuser.scorers`, or `module:Class`",
    )

    scorers: str | None = Field(
        None,
        description="for `faces`: whose face network, `paper`, `miniature`, or a folder with `identity/` and `prompt/` "
        "(default: what the dataset was scored with)",
    )
    embeddings: bool = Field(True, description="for `faces`: keep each face's identity embedding (float16)")


class CopySettings(Device, Dataset):
    """Flags copies in a finished dataset: of training faces, of the references' pixels, of other images in it."""

    training: str | None = Field(
        None,
        description="what the models were trained on: the output of `preprocess`, or a folder of pictures; without it no "
        "training faces are searched",
    )
    scorers: str | None = Field(
        None,
        description="whose face network: `paper`, `miniature`, or a folder with `identity/` and `prompt/` (default: what "
        "the dataset was scored with)",
    )
    face_threshold: float = Field(
        0.9, ge=0, le=1, description="flag faces whose cosine similarity to a training face reaches this"
    )
    paste_threshold: float = Field(
        0.92, ge=0, le=1, description="flag faces whose pixels correlate with those of a reference at least this much"
    )
    duplicate_threshold: float = Field(
        0.99, ge=0, le=1, description="flag images that correlate with another one of the dataset at least this much"
    )
