"""The models in training: the UNet with its conditioning as one module per role, and the frozen parts beside it."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from facediffuser.errors import InputError
from facediffuser.model_check import check_model_folder
from facediffuser.modelfolder import (
    image_encoder_digest,
    load_image_encoder,
    model_digests,
    resolve_base,
    resolve_image_encoder,
    resolve_model,
    same_part,
)
from facediffuser.subject import SubjectFuser
from facediffuser.training.attention import AttentionMaps, record_cross_attention
from facediffuser.training.batches import Batch
from facediffuser.training.latent_cache import encode_moments, load_text_encoder, load_vae
from facediffuser.training.recipe import Recipe
from facediffuser.training.train_check import UNET, require_stable_diffusion, require_start, start_parts
from facediffuser.training.train_settings import TrainSettings

EAGER_SIDE = 32


class TextDenoiser(nn.Module):
    """The TDM in training: predicts the noise in latents from the caption."""

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.unet = unet

    def forward(self, noisy: torch.Tensor, times: torch.Tensor, text: torch.Tensor, batch: Batch):
        """Return predicted noise and no attention maps.

        Args:
            noisy: noisy latents, (b, c, h, w).
            times: timesteps, (b,).
            text: embeddings of the captions, (b, n, d).
            batch: the batch, of which the TDM needs nothing more.

        Returns:
            Noise, (b, c, h, w), and an empty list.
        """
        return self.unet(noisy, times, text).sample, []


class SubjectDenoiser(nn.Module):
    """The SDM in training: predicts the noise from the caption with reference pictures fused into it."""

    def __init__(self, unet: UNet2DConditionModel, image_encoder: nn.Module, subject_fuser: SubjectFuser, maps: bool):
        super().__init__()
        self.unet, self.image_encoder, self.subject_fuser = unet, image_encoder, subject_fuser
        self._attention = AttentionMaps()
        self._localizes = maps
        if maps:
            record_cross_attention(unet, self._attention)

    def forward(self, noisy: torch.Tensor, times: torch.Tensor, text: torch.Tensor, batch: Batch):
        """Return predicted noise (b, c, h, w) and the attention maps, (b, heads, cells, tokens) per layer.

        Args:
            noisy: noisy latents (b, c, h, w).
            times: timesteps (b,).
            text: plain caption embeddings (b, n, d).
            batch: the batch, for its references, subject mask and counts.
        """
        counts, slots = batch.tokens.subject_counts, batch.areas.shape[1]
        embeds = text.new_zeros(len(text), slots, text.shape[-1])
        if len(batch.references):
            present = torch.arange(slots, device=text.device) < counts[:, None]
            image_embeds = self.image_encoder(batch.references).image_embeds
            embeds = embeds.masked_scatter(present[..., None], image_embeds.to(text.dtype))
        fused = self.subject_fuser(text, embeds, batch.tokens.subject_mask, counts)
        if not self._localizes:
            return self.unet(noisy, times, fused).sample, []
        with self._attention:
            predicted = self.unet(noisy, times, fused).sample
        return predicted, self._attention.maps


@dataclass
class Parts:
    """The loaded base model for one role: `denoiser` is trained (at least in part), the rest is frozen.

    `digests` are those of the base's parts; `inputs` those of all that was read: `base`, and `start_from` and
    `image_encoder` where the training starts from them.
    """

    denoiser: nn.Module
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    vae: AutoencoderKL
    schedule: DDPMScheduler
    digests: dict[str, str]
    inputs: dict[str, Any]
    compute_type: torch.dtype

    @property
    def trained(self) -> dict[str, nn.Module]:
        """The components that a finished run saves, by name."""
        return dict(self.denoiser.named_children())

    @property
    def device(self) -> torch.device:
        """The denoiser's device."""
        return next(self.denoiser.parameters()).device

    def autocast(self) -> AbstractContextManager:
        """Return the context in which the denoiser computes in the recipe's precision."""
        half = self.compute_type == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext()

    @torch.no_grad()
    def latents(self, batch: Batch) -> torch.Tensor:
        """Return the batch's clean latents, sampled and scaled as the UNet takes them, (b, c, h, w) float32."""
        moments = encode_moments(self.vae, batch.pixels) if batch.moments is None else batch.moments
        mean, logvar = moments.float().chunk(2, dim=1)
        return (mean + (0.5 * logvar.clamp(-30, 20)).exp() * batch.draw) * self.vae.config.scaling_factor

    @torch.no_grad()
    def text(self, batch: Batch) -> torch.Tensor:
        """Return the plain embeddings of the batch's captions, (b, n, d) float32."""
        if batch.text is None:
            return self.text_encoder(batch.tokens.input_ids).last_hidden_state.float()
        return batch.text.float()


def load_parts(settings: TrainSettings, device: str = "cpu") -> Parts:
    """Return the base model in float32, its denoiser on the device and in training mode.

    Args:
        settings: settings of a single role (base, `start_from`, image encoder, recipe).
        device: torch device of the denoiser; the frozen parts stay on the CPU.

    Raises:
        InputError: a part is missing, damaged, or does not fit the others.
    """
    base, recipe = resolve_base(settings.base), settings.recipe()
    require_stable_diffusion(settings.base, base)
    check_model_folder(base, ("unet",))
    digests = model_digests(base)
    inputs: dict[str, Any] = {"base": digests}
    start = _start_folder(settings)
    if start:
        theirs = model_digests(start)
        _require_start_of(settings, theirs, digests)
        inputs["start_from"] = {name: theirs[name] for name in start_parts(settings.role)}
    unet = UNet2DConditionModel.from_pretrained(start / UNET[settings.role] if start else base / "unet").float()
    text_encoder, vae = load_text_encoder(base), load_vae(base)
    eager = attention_implementation(recipe, torch.device(device), vae) == "eager"
    unet.set_attn_processor(AttnProcessor() if eager else AttnProcessor2_0())
    if recipe.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    denoiser: nn.Module = TextDenoiser(unet)
    if settings.role == "sdm":
        encoder_folder = (start or base) / "image_encoder"
        if not encoder_folder.is_dir():
            encoder_folder = resolve_image_encoder(settings.image_encoder)
            inputs["image_encoder"] = image_encoder_digest(encoder_folder)
        encoder = load_image_encoder(encoder_folder).float()
        encoder.set_attn_implementation("eager" if eager else "sdpa")
        width = text_encoder.config.hidden_size
        if encoder.config.projection_dim != width:
            raise InputError(
                f"--image-encoder: its embeddings have {encoder.config.projection_dim} numbers, the text encoder's {width}; "
                "give the image encoder that belongs to the base model"
            )
        torch.manual_seed(settings.seed)
        fuser = SubjectFuser(width, recipe.max_subjects)
        if start:
            fuser = SubjectFuser.from_pretrained(start / "subject_fuser").float()
        denoiser = SubjectDenoiser(unet, encoder, fuser, recipe.localization > 0)
    denoiser.to(device).train()
    if recipe.channels_last:
        unet.to(memory_format=torch.channels_last)
    return Parts(
        denoiser=denoiser,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(base / "tokenizer"),
        vae=vae,
        schedule=DDPMScheduler.from_pretrained(base / "scheduler"),
        digests=digests,
        inputs=inputs,
        compute_type=compute_type(recipe, torch.device(device)),
    )


def _start_folder(settings: TrainSettings) -> Path | None:
    """Return the local folder of `start_from`, None without; InputError when it lacks what the role starts from."""
    if settings.start_from is None:
        return None
    folder = resolve_model(settings.start_from)
    require_start(settings, folder)
    return folder


def _require_start_of(settings: TrainSettings, theirs: dict[str, str], digests: dict[str, str]) -> None:
    """Raise InputError when `start_from` does not belong to the base."""
    for name in ("vae", "text_encoder"):
        if not same_part(theirs.get(name), digests.get(name)):
            raise InputError(
                f"--start-from {settings.start_from}: was trained from another base than {settings.base} ({name} differs); "
                "give that base"
            )


def latent_shape(vae: AutoencoderKL, resolution: int) -> tuple[int, int, int]:
    """Return (c, h, w) of the latents of square pictures of `resolution` px."""
    side = resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    return vae.config.latent_channels, side, side


def attention_implementation(recipe: Recipe, device: torch.device, vae: AutoencoderKL) -> str:
    """Return the attention implementation: "eager" (plain matrix products) or "sdpa" (torch's fused attention).

    On a CPU the backward pass of fused attention in bf16 takes several times as long as plain matrix products. Their
    memory grows with the square of the latent cells, so they are chosen for small latents only.

    Args:
        recipe: names the implementation, or leaves it open with "auto".
        device: where the model is trained.
        vae: says how large latents are.
    """
    if recipe.attention != "auto":
        return recipe.attention
    small = latent_shape(vae, recipe.resolution)[1] <= EAGER_SIDE
    return "eager" if device.type == "cpu" and small else "sdpa"


def compute_type(recipe: Recipe, device: torch.device) -> torch.dtype:
    """Return the type of matrix products, bfloat16 or float32; trained weights are always float32."""
    if recipe.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" or _cpu_has_bf16() else torch.float32
    return torch.bfloat16 if recipe.precision == "bf16" else torch.float32


def _cpu_has_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
