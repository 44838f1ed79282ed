"""Checks of what a caller gives the pipeline; every complaint is one line that names the thing and the mend."""

import math
from collections.abc import Sequence

import torch
from PIL import Image

from facediffuser.errors import InputError
from facediffuser.prompts import count_markers

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
References = Image.Image | Sequence[Image.Image] | Sequence[Sequence[Image.Image]]


def as_list(prompts: str | Sequence[str]) -> list[str]:
    """Return one prompt or several as a list; InputError for none at all or what is no text."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise InputError("no prompts; give at least one")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise InputError(f"prompt {prompt!r} is no text; give a string or a list of strings")
    return prompts


def check_references(prompts: Sequence[str], references: Sequence[Sequence], max_subjects: int | None) -> None:
    """Raise InputError unless every prompt has one reference per marker and not more than the model takes."""
    if len(references) != len(prompts):
        raise InputError(f"{len(references)} lists of references for {len(prompts)} prompts; give one list per prompt")
    for prompt, group in zip(prompts, references, strict=True):
        markers = count_markers(prompt)
        if len(group) != markers:
            raise InputError(
                f"{prompt!r}: {len(group)} reference images for {markers} <|image|> markers; give one image per marker"
            )
        if max_subjects is not None and markers > max_subjects:
            raise InputError(f"{prompt!r}: {markers} subjects; this model takes up to {max_subjects}")


def check_sampling(
    guidance_scale: float,
    steps: int,
    images_per_prompt: int,
    output_type: str,
    callback_inputs: Sequence[str],
    known_callback_inputs: Sequence[str],
) -> None:
    """Raise InputError for numbers and names that mean nothing to the sampler."""
    if not math.isfinite(guidance_scale):
        raise InputError(f"guidance_scale {guidance_scale}: give a finite number")
    for name, value in (("num_inference_steps", steps), ("num_images_per_prompt", images_per_prompt)):
        if value < 1:
            raise InputError(f"{name} {value}: give 1 or more")
    if output_type not in OUTPUT_TYPES:
        raise InputError(f"output_type {output_type!r}: unknown; choose one of {', '.join(OUTPUT_TYPES)}")
    unknown = [name for name in callback_inputs if name not in known_callback_inputs]
    if unknown:
        raise InputError(f"callback tensor {unknown[0]!r}: unknown; choose from {', '.join(known_callback_inputs)}")


def repeat_rows(name: str, embeds: torch.Tensor, rows: int, repeats: int) -> torch.Tensor:
    """Return embeddings (1 or rows, n, d) as (rows * repeats, n, d), each row `repeats` times in a row."""
    if embeds.ndim != 3 or len(embeds) not in (1, rows):
        raise InputError(f"{name} embeddings of shape {tuple(embeds.shape)}; give ({rows}, tokens, width)")
    return embeds.expand(rows, -1, -1).repeat_interleave(repeats, dim=0)
