"""The settings of `facediffuser rehearse`. Without torch."""

from typing import Literal

from pydantic import Field

from facediffuser.engine_options import EngineName
from facediffuser.settings import Device, Output, Seeded, Settings


class RehearsePlan(Settings):
    """What the real run would be: the hours and the money in the table are for it."""

    photographs: int = Field(70_000, ge=1, le=10**9, description="photographs of the real run")
    tdm_samples: int = Field(
        250_000 * 32,
        ge=1,
        le=10**12,
        description="training samples of the TDM of the real run: steps x batch; the paper's unless given",
    )
    sdm_samples: int = Field(
        450_000 * 32,
        ge=1,
        le=10**12,
        description="training samples of the SDM of the real run: steps x batch; the paper's unless given",
    )
    images: int = Field(1_000_000, ge=1, le=10**12, description="images of the real run")
    gpu_hour_price: float | None = Field(
        None, ge=0, le=10**6, allow_inf_nan=False, description="what an hour of this machine costs; adds a column"
    )


class RehearseSettings(RehearsePlan, Device, Seeded):
    """Every stage for a moment at its real size, with random weights, on the hardware at hand."""

    output: Output = Field(description="where dataset and table go, new or empty: a folder or `s3://bucket/prefix`")
    size: Literal["full", "miniature"] = Field(
        "full",
        description="`full`: the published sizes at 512 px; `miniature`: small ones at 64 px, to try the rehearsal",
    )
    try_pictures: int = Field(16, ge=1, le=100_000, description="photographs to look at")
    try_steps: int = Field(4, ge=1, le=100_000, description="training steps to do with each model")
    try_images: int = Field(16, ge=1, le=100_000, description="images to generate")
    steps: int = Field(50, ge=1, le=1000, description="denoising steps of an image")
    batch_size: int | None = Field(None, ge=1, le=1024, description="images of a training step (default: the preset's)")
    engine: EngineName = Field(
        "auto", description="how the models are run: `eager`, `compiled`, or `auto`: what the real run would take"
    )
