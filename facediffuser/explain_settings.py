"""The settings of `facediffuser explain`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from facediffuser.settings import CommaSeparated, Device, Output, Sampling, Seeded


class ExplainSettings(Device, Seeded, Sampling):
    """One prompt sampled with the Face-diffuser method, drawn step by step as one PNG."""

    models: str = Field(description="model folder: a folder, an `s3://` URL, a hub id, or `miniature`")
    prompt: str = Field(description="prompt with `<|image|>` after each word that names a subject")
    reference: Annotated[list[Path], CommaSeparated] = Field(
        description="reference pictures, one per `<|image|>`, in order"
    )
    output: Output = Field("explain.png", description="the PNG to write: a path or an `s3://` URL")
    columns: int = Field(10, ge=2, le=1000, description="steps to draw, spread evenly over the run")
