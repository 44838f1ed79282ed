"""The stages of sampling: which of the two models runs at a step, on which conditions, and the noise they predict.

A step is one of the scheduler's timesteps, counted from 0; PNDM has 51 of them for 50 inference steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Literal, get_args

import torch

from facediffuser import snf
from facediffuser.errors import InputError

Method = Literal["face-diffuser", "tdm", "sdm", "fastcomposer"]
METHODS = get_args(Method)
Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Stage(StrEnum):
    """What a step runs. In brackets: the model, its baseline and its condition; two UNet rows per image and model."""

    TEXT = "text"  # the TDM alone: (TDM, null, text)
    FUSION = "fusion"  # both, fused by saliency: (TDM, null, text) and (SDM, text, subject)
    SUBJECT = "subject"  # the SDM alone: (SDM, text, subject); its baseline is the plain text
    DELAY = "delay"  # FastComposer's first steps: (SDM, null, text)
    DELAYED = "delayed"  # FastComposer's other steps: (SDM, null, subject)

    @property
    def components(self) -> tuple[str, ...]:
        """The UNets the stage needs, by their names in the pipeline."""
        return {Stage.TEXT: ("unet_text",), Stage.FUSION: ("unet_text", "unet")}.get(self, ("unet",))

    @property
    def needs_subject(self) -> bool:
        """Whether the stage reads the subject-augmented embedding."""
        return self not in (Stage.TEXT, Stage.DELAY)


@dataclass(frozen=True)
class Conditions:
    """Prompt embeddings (b, n, d): of the null prompt, the plain prompt, and the prompt with its subjects fused in."""

    null: torch.Tensor
    text: torch.Tensor
    subject: torch.Tensor | None
    _pairs: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def pair(self, baseline: str, condition: str) -> torch.Tensor:
        """Return two of the embeddings by name, one below the other, (2b, n, d): the same tensor at every step."""
        names = baseline, condition
        if names not in self._pairs:
            self._pairs[names] = torch.cat([getattr(self, baseline), getattr(self, condition)])
        return self._pairs[names]


@dataclass(frozen=True)
class Guidance:
    """Guidance scale s and SNF's two temperatures (1 in the paper)."""

    scale: float = 5.0
    text_temperature: float = 1.0
    subject_temperature: float = 1.0


@dataclass(frozen=True)
class Prediction:
    """A step's noise (b, c, h, w) and who made it: `mask` (b, 1, h, w) bool is true where the SDM did.

    The saliencies (b, 1, h, w) are None for a model that did not run, or when it was not asked for.
    """

    noise: torch.Tensor
    mask: torch.Tensor
    text_saliency: torch.Tensor | None = None
    subject_saliency: torch.Tensor | None = None


def plan_stages(
    method: Method, timesteps: int, steps: int, fusion_start: int, fusion_end: int, alpha: float = 0.5
) -> list[Stage]:
    """Return the stage of each of the scheduler's timesteps.

    face-diffuser: i < fusion_start is the TDM's, fusion_start <= i < fusion_end is fused, the rest is the SDM's (so
    fusion_end <= fusion_start means no fusion). fastcomposer: the first (1 - alpha) of the steps read the plain text.

    Args:
        method: one of METHODS.
        timesteps: length of the scheduler's timesteps (PNDM: 51 for 50 steps).
        steps: inference steps.
        fusion_start: index of the first fused timestep, >= 0.
        fusion_end: index of the first timestep of the SDM alone, >= 0.
        alpha: FastComposer's share of steps conditioned on the subject, 0..1.

    Raises:
        InputError: an unknown method, or a number outside its range.
    """
    if method not in METHODS:
        raise InputError(f"method {method!r}: unknown; choose one of {', '.join(METHODS)}")
    if min(fusion_start, fusion_end) < 0:
        raise InputError(f"fusion window {fusion_start} to {fusion_end}: steps are counted from 0; give 0 or more")
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha {alpha}: give a share of the steps, from 0 to 1")
    if method == "tdm":
        return [Stage.TEXT] * timesteps
    if method == "sdm":
        return [Stage.SUBJECT] * timesteps
    if method == "fastcomposer":
        delay = round((1 - alpha) * steps, 6)  # 0.3 * 50 is 15, not 15.000000000000002
        return [Stage.DELAY if i < delay else Stage.DELAYED for i in range(timesteps)]
    return [
        Stage.TEXT if i < fusion_start else Stage.FUSION if i < fusion_end else Stage.SUBJECT for i in range(timesteps)
    ]


def predict(
    stage: Stage,
    unet_text: Denoiser | None,
    unet: Denoiser | None,
    latents: torch.Tensor,
    conditions: Conditions,
    guidance: Guidance,
    with_saliency: bool = False,
) -> Prediction:
    """Return the guided noise of one step.

    Args:
        stage: decides which denoisers are called, once each (`stage.components`).
        unet_text: the TDM, called with latents (2b, c, h, w) and embeddings (2b, n, d); returns noise (2b, c, h, w).
        unet: the SDM, called likewise.
        latents: (b, c, h, w), scaled as the scheduler wants them.
        conditions: embeddings of b images.
        guidance: guidance scale and SNF's temperatures.
        with_saliency: compute the saliency of whichever model runs in every stage; the fusion stage always has both.
    """
    saliency_text = partial(snf.saliency, temperature=guidance.text_temperature)
    saliency_subject = partial(snf.saliency, temperature=guidance.subject_temperature)
    if stage is Stage.TEXT:
        response, noise = _guided(unet_text, latents, conditions.pair("null", "text"), guidance.scale)
        return Prediction(
            noise, _everywhere(False, latents), text_saliency=saliency_text(response) if with_saliency else None
        )
    if stage is Stage.FUSION:
        return _fused(unet_text, unet, latents, conditions, guidance, saliency_text, saliency_subject)
    baseline = "text" if stage is Stage.SUBJECT else "null"
    condition = "text" if stage is Stage.DELAY else "subject"
    response, noise = _guided(unet, latents, conditions.pair(baseline, condition), guidance.scale)
    return Prediction(
        noise, _everywhere(True, latents), subject_saliency=saliency_subject(response) if with_saliency else None
    )


def _fused(unet_text, unet, latents, conditions, guidance, saliency_text, saliency_subject) -> Prediction:
    text_response, text_noise = _guided(unet_text, latents, conditions.pair("null", "text"), guidance.scale)
    subject_response, subject_noise = _guided(unet, latents, conditions.pair("text", "subject"), guidance.scale)
    text_saliency, subject_saliency = saliency_text(text_response), saliency_subject(subject_response)
    mask = snf.subject_mask(text_saliency, subject_saliency)
    return Prediction(snf.fuse(text_noise, subject_noise, mask), mask, text_saliency, subject_saliency)


def _guided(denoiser, latents, embeds, scale) -> tuple[torch.Tensor, torch.Tensor]:
    noise = denoiser(torch.cat([latents, latents]), embeds)
    without, with_condition = noise.chunk(2)
    return snf.guide(without, with_condition, scale)


def _everywhere(value: bool, latents: torch.Tensor) -> torch.Tensor:
    return torch.full_like(latents[:, :1], value, dtype=torch.bool)
