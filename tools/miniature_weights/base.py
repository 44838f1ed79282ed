"""The miniature's Stable Diffusion: a text encoder and a UNet that learn together to draw its world from captions."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, UNet2DConditionModel
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from facediffuser.modelfolder import save_component
from facediffuser.training.losses import min_snr_weights
from tools.miniature_weights.fitting import Average, fit, with_plain_attention
from tools.miniature_weights.graphed import graphed_loss
from tools.miniature_weights.photo_stream import PhotoSet
from tools.miniature_weights.tokenizer import MAX_LENGTH, token_ids
from tools.miniature_weights.vae import LATENT_CHANNELS, encode

logger = logging.getLogger(__name__)

WIDTH = 96
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
}
FACE_WEIGHT = 2.0
CAPTION_DROP = 0.1
MIN_SNR_GAMMA = 5.0
PICTURES = 20_000
SAVE_STEPS = 250


def new_text_encoder(tokenizer: CLIPTokenizer, width: int = WIDTH, layers: int = 2) -> CLIPTextModel:
    """An untrained CLIP text model whose pooling takes the tokenizer's own end token."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet() -> UNet2DConditionModel:
    """An untrained UNet in Stable Diffusion's shape: three resolutions, cross-attention at the lower two."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 96, 128),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )


def new_scheduler() -> PNDMScheduler:
    """The sampler of Stable Diffusion v1-5, but begun at the last timestep: with few steps a later start costs prompt and faces."""
    return PNDMScheduler(**SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False, timestep_spacing="trailing")


class Latents:
    """The latents of photographs and of their mirror images, with what a training step needs of each."""

    def __init__(self, vae: AutoencoderKL, photos: PhotoSet, tokenizer: CLIPTokenizer, most: int = PICTURES):
        every = torch.arange(min(len(photos), most))
        texts = photos.captions[: len(every)], photos.full_captions[: len(every)]
        self.latents = torch.stack([encode(vae, photos, every, flip) for flip in (False, True)], 1).half()
        self.faces = F.interpolate(photos.face_masks(every)[:, None], size=16, mode="area").half()
        self.ids = torch.stack([token_ids(tokenizer, some) for some in texts], 1).int()
        self.empty = token_ids(tokenizer, [""]).int()
        # Two people are named from left to right, so only pictures of one may be mirrored.
        self.alone = torch.from_numpy(photos.who[: len(every), 1] < 0)

    def to(self, device: str) -> "Latents":
        """Move everything to a device; `batch` then takes a generator there."""
        for name in ("latents", "faces", "ids", "empty", "alone"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def batch(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random latents (b, 8, 16, 16), face masks (b, 1, 16, 16), and token ids (b, 77) of one of the two captions or none."""
        device = self.ids.device
        index = torch.randint(len(self.ids), (size,), generator=generator, device=device)
        mirrored = (torch.rand(size, generator=generator, device=device) < 0.5) & self.alone[index]
        full = torch.rand(size, generator=generator, device=device) < 0.5
        faces = self.faces[index].float()
        ids = self.ids[index, full.long()]
        dropped = torch.rand(size, generator=generator, device=device) < CAPTION_DROP
        ids = torch.where(dropped[:, None], self.empty, ids)
        faces = torch.where(mirrored[:, None, None, None], faces.flip(-1), faces)
        return self.latents[index, mirrored.long()].float(), faces, ids


def train_base(
    vae: AutoencoderKL,
    photos: PhotoSet,
    tokenizer: CLIPTokenizer,
    steps: int,
    keep: Path,
    batch_size: int = 64,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[], float] | None = None,
    after_save: Callable[[int], None] | None = None,
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Train UNet and text encoder together on predicting noise; return their averages.

    `progress` makes it a training of so much time, as `fit` says; `after_save` is called with the number of steps behind
    each saved pair.

    The text encoder begins as CLIP's tower, in `keep`. The loss is weighted by min-SNR (arXiv 2303.09556, gamma 5) and towards
    faces. Every 250 steps the present averages are saved to `keep`; a UNet that is there already is where training goes on.
    """
    generator = torch.Generator(device).manual_seed(seed)
    torch.manual_seed(seed)
    data = Latents(vae.to(device), photos, tokenizer, max(PICTURES, len(photos)) if progress else PICTURES).to(device)
    logger.info("base: %d latents", len(data.ids))
    text = CLIPTextModel.from_pretrained(keep / "text_encoder").float()
    unet = UNet2DConditionModel.from_pretrained(keep / "unet").float() if (keep / "unet").exists() else new_unet()
    unet, text = unet.to(device).train(), text.to(device).train()
    if device == "cpu":
        unet, text = with_plain_attention(unet), with_plain_attention(text)
    averages = Average(unet, 0.9985), Average(text, 0.9985)
    noise_schedule = DDPMScheduler(**SCHEDULE, clip_sample=False)
    alphas = noise_schedule.alphas_cumprod
    weights = min_snr_weights(alphas, MIN_SNR_GAMMA).to(device)

    def compute(latents, faces, ids, times, noise) -> torch.Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16, cache_enabled=device == "cpu"):
            states = text(ids).last_hidden_state
            predicted = unet(noise_schedule.add_noise(latents, noise, times), times, states).sample
        weight = 1 + FACE_WEIGHT * faces
        error = (predicted.float() - noise).pow(2).mul(weight).mean(dim=(1, 2, 3)) / weight.mean(dim=(1, 2, 3))
        return (error * weights[times]).mean()

    def inputs() -> list[torch.Tensor]:
        latents, faces, ids = data.batch(batch_size, generator)
        times = torch.randint(1000, (batch_size,), generator=generator, device=device)
        return [latents, faces, ids, times, torch.randn(latents.shape, generator=generator, device=device)]

    parameters = [*unet.parameters(), *text.parameters()]
    step_loss = graphed_loss(compute, inputs(), parameters) if device != "cpu" else compute

    def loss(step: int) -> torch.Tensor:
        return step_loss(*inputs())

    def save(step: int) -> None:
        save_fp16(averages[0].module, keep / "unet")
        save_fp16(averages[1].module, keep / "text_encoder")
        if after_save:
            after_save(step)

    def after_step(step: int) -> None:
        averages[0].update(unet)
        averages[1].update(text)
        if step % SAVE_STEPS == 0:
            save(step)

    log_seconds = 5.0 if progress else 30.0
    done = fit(
        "base",
        loss,
        parameters,
        steps,
        1.2e-3,
        hold=0.6,
        after_step=after_step,
        progress=progress,
        log_seconds=log_seconds,
    )
    save(done)
    return averages[0].module, averages[1].module


def save_fp16(model: torch.nn.Module, folder: Path) -> None:
    """Write a diffusers or transformers model as fp16 safetensors, leaving the model itself as it is."""
    save_component(copy.deepcopy(model).half(), folder)
