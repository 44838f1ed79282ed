"""What trains: the UNet with its conditioning, as one module per role."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from facediffuser.errors import InputError
from facediffuser.modelfolder import load_image_encoder, model_digests, resolve_base, resolve_image_encoder
from facediffuser.subject import SubjectFuser
from facediffuser.training.attention import AttentionMaps, record_cross_attention
from facediffuser.training.batches import Batch
from facediffuser.training.settings import TrainSettings


class TextDenoiser(nn.Module):
    """The TDM in training: predicts the noise in latents from the caption."""

    def __init__(self, unet: UNet2DConditionModel):
        super().__init__()
        self.unet = unet

    def forward(self, noisy: torch.Tensor, times: torch.Tensor, text: torch.Tensor, batch: Batch):
        """Return predicted noise (b, c, h, w) and no attention maps."""
        return self.unet(noisy, times, text).sample, []


class SubjectDenoiser(nn.Module):
    """The SDM in training: predicts the noise from the caption into which reference pictures are fused."""

    def __init__(self, unet: UNet2DConditionModel, image_encoder: nn.Module, subject_fuser: SubjectFuser, maps: bool):
        super().__init__()
        self.unet, self.image_encoder, self.subject_fuser = unet, image_encoder, subject_fuser
        self._attention = AttentionMaps()
        self._localizes = maps
        if maps:
            record_cross_attention(unet, self._attention)

    def forward(self, noisy: torch.Tensor, times: torch.Tensor, text: torch.Tensor, batch: Batch):
        """Return predicted noise (b, c, h, w) and the attention maps, one (b, heads, cells, tokens) a layer."""
        rows, slots = batch.references.shape[:2]
        embeds = self.image_encoder(batch.references.flatten(0, 1)).image_embeds.unflatten(0, (rows, slots))
        fused = self.subject_fuser(text, embeds, batch.tokens.subject_mask, batch.tokens.subject_counts)
        if not self._localizes:
            return self.unet(noisy, times, fused).sample, []
        with self._attention:
            predicted = self.unet(noisy, times, fused).sample
        return predicted, self._attention.maps


@dataclass
class Parts:
    """The base model's parts for one role; `denoiser` trains (some of it), the rest is frozen."""

    denoiser: nn.Module
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    vae: AutoencoderKL
    schedule: DDPMScheduler
    digests: dict[str, str]

    @property
    def trained(self) -> dict[str, nn.Module]:
        """The parts that a finished run saves, by name."""
        return dict(self.denoiser.named_children())


def load_parts(settings: TrainSettings) -> Parts:
    """Load the base model in fp32; raises InputError when a part is missing or does not fit."""
    base = resolve_base(settings.base)
    unet = UNet2DConditionModel.from_pretrained(base / "unet").float()
    text_encoder = CLIPTextModel.from_pretrained(base / "text_encoder").float().eval().requires_grad_(False)
    vae = AutoencoderKL.from_pretrained(base / "vae").float().eval().requires_grad_(False)
    recipe = settings.recipe()
    if recipe.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    denoiser: nn.Module = TextDenoiser(unet)
    if settings.role == "sdm":
        encoder = load_image_encoder(_encoder_folder(settings, base)).float()
        width = text_encoder.config.hidden_size
        if encoder.config.projection_dim != width:
            raise InputError(
                f"--image-encoder: its embeddings have {encoder.config.projection_dim} numbers, the text encoder's {width}; "
                "give the image encoder that belongs to the base model"
            )
        torch.manual_seed(settings.seed)
        denoiser = SubjectDenoiser(unet, encoder, SubjectFuser(width, recipe.max_subjects), recipe.localization > 0)
    return Parts(
        denoiser=denoiser,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(base / "tokenizer"),
        vae=vae,
        schedule=DDPMScheduler.from_pretrained(base / "scheduler"),
        digests=model_digests(base),
    )


def _encoder_folder(settings: TrainSettings, base: Path) -> Path:
    if (base / "image_encoder").is_dir():
        return base / "image_encoder"
    return resolve_image_encoder(settings.image_encoder)
