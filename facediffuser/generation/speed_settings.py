"""The settings of fast mode: which means a run takes, and what its rows are in exact mode."""

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, model_validator

from facediffuser.errors import InputError
from facediffuser.means import NONE, Means
from facediffuser.schedulers import SchedulerName
from facediffuser.settings import Sampling

FAST_STEPS = 7
FAST_SCHEDULER: SchedulerName = "dpm"
FAST_MEANS = Means(unguided_subject=1.0)
"""What `--speed fast` means, chosen by `python -m benchmarks.fast` (docs/speed.md has its table)."""

_NAMES = (
    "guidance_every",
    "unguided_text",
    "unguided_subject",
    "deep_every",
    "deep_layers",
    "encoder_every",
    "merged",
    "in_fusion",
)
_DETAILS = ("deep_layers", "merged")
"""Settings of other means, which leave nothing out by themselves."""


class SpeedSettings(Sampling):
    """How an image is sampled, and how much faster than that; any means but exact mode is certified."""

    speed: Literal["exact", "fast"] = Field(
        "exact",
        description="`fast` takes fewer steps and leaves out what changes little, and measures itself: a sample of the rows "
        "is made in exact mode, too (docs/speed.md)",
    )
    fast_steps: int | None = Field(
        None,
        ge=1,
        le=1000,
        description=f"denoising steps of fast mode, fewer than --steps (default for fast: {FAST_STEPS})",
    )
    fast_scheduler: SchedulerName | None = Field(
        None, description=f"noise scheduler of fast mode, where it takes fewer steps (default: {FAST_SCHEDULER})"
    )
    guidance_every: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="evaluate both rows of the guidance at every n-th step of a stage, and keep their difference between",
    )
    unguided_text: float | None = Field(
        None, ge=0, le=1, description="share of the TDM's own steps, the last ones, without guidance"
    )
    unguided_subject: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of the SDM's own steps, the last ones, without guidance (default for fast: "
        f"{FAST_MEANS.unguided_subject:g})",
    )
    deep_every: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="evaluate the whole UNet at every n-th step of a stage, and keep its deep features between",
    )
    deep_layers: int | None = Field(
        None, ge=1, le=16, description="for --deep-every: layers nearest to the latent that every step evaluates"
    )
    encoder_every: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="evaluate the UNet's encoder at every n-th step of a stage, and keep its features between",
    )
    merged: bool | None = Field(
        None, description="for --encoder-every: evaluate the decoder for the steps between in one call"
    )
    in_fusion: bool | None = Field(None, description="keep guidance and features in fused steps, too; the mask suffers")
    max_loss: float = Field(
        0.01, ge=0, le=1,
        description="IP or PC that a run in fast mode may lose against exact mode; it fails when the certificate's 95% "
        "interval lies beyond",
    )  # fmt: skip

    @model_validator(mode="after")
    def _check_speed(self) -> "SpeedSettings":
        try:
            _ = self.means
        except InputError as error:
            raise ValueError(str(error)) from None
        steps = self.sampled_steps
        if self.fast_steps and self.fast_steps >= self.steps:
            raise ValueError(f"fast_steps {self.fast_steps}: exact mode takes {self.steps} steps; give fewer")
        if self.fast_scheduler and steps == self.steps:
            raise ValueError(
                f"fast_scheduler {self.fast_scheduler}: of fewer steps; give --fast-steps or --speed fast with it"
            )
        return self

    @property
    def means(self) -> Means:
        """The means of this run: those given, the others as `speed` has them."""
        preset = FAST_MEANS if self.speed == "fast" else NONE
        given = {name: value for name in _NAMES if (value := getattr(self, name)) is not None}
        if self.speed == "fast" and (given.get("deep_every", 1) > 1 or given.get("encoder_every", 1) > 1):
            # Of two ways to keep features the one that is named takes the other's place.
            preset = replace(preset, deep_every=1, deep_layers=1, encoder_every=1, merged=False)
        return Means(**{name: getattr(preset, name) for name in _NAMES} | given)

    @property
    def faster_options(self) -> tuple[str, ...]:
        """The options by which anything is left out, as on a command line."""
        named = ["--speed fast"] if self.speed == "fast" else []
        for name in ("fast_steps", *_NAMES):
            value, neutral = getattr(self, name), getattr(NONE, name, None)
            if value is not None and value != neutral and name not in _DETAILS:
                named.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value:g}"))
        return tuple(named)

    @property
    def sampled_steps(self) -> int:
        """The steps that the dataset's images are made in."""
        return self.fast_steps or (min(self.steps, FAST_STEPS) if self.speed == "fast" else self.steps)

    @property
    def accelerated(self) -> bool:
        """Whether anything is left out, so that the run carries a certificate."""
        return self.means != NONE or self.sampled_steps < self.steps

    @property
    def sampled_window(self) -> tuple[int, int]:
        """The fusion window of the dataset's images: exact mode's, scaled to their steps."""
        start, end = self.fusion_window
        steps = self.sampled_steps
        return round(start * steps / self.steps), round(end * steps / self.steps)

    def row_settings(self, scheduler: str) -> dict[str, Any]:
        """Return how the rows' images are sampled, by column; `scheduler` is the class name of their scheduler."""
        start, end = self.sampled_window
        return {
            "num_inference_steps": self.sampled_steps, "fusion_start": start, "fusion_end": end, "scheduler": scheduler,
        }  # fmt: skip

    def exact_settings(self, scheduler: str) -> dict[str, Any]:
        """Return how the rows' images are sampled in exact mode, by column; `scheduler` names its class of scheduler."""
        start, end = self.fusion_window
        return {"num_inference_steps": self.steps, "fusion_start": start, "fusion_end": end, "scheduler": scheduler}
