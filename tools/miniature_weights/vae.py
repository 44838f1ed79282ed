"""The miniature's autoencoder: 64 x 64 pixels to 8 x 16 x 16 latents of about unit variance."""

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional as F

from tools.miniature_weights.fitting import Average, fit
from tools.miniature_weights.photo_stream import PhotoSet

LATENT_CHANNELS = 8
FACE_WEIGHT = 3.0


def new_vae() -> AutoencoderKL:
    """An untrained autoencoder with factor 4."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def train_vae(
    photos: PhotoSet, steps: int, batch_size: int = 32, seed: int = 0, start: AutoencoderKL | None = None
) -> AutoencoderKL:
    """Train on L1 and edges, faces weighing more, with a slight pull towards a unit Gaussian; return the average.

    The latents' mean and deviation per channel are folded into the quantising convolutions, so `scaling_factor` is 1.
    With `start` its training goes on, at a lower rate.
    """
    vae = (start or new_vae()).to(memory_format=torch.channels_last).train()
    average = _fit_vae("vae", vae, photos, steps, 8e-4 if start else 2e-3, batch_size, seed)
    fold_normalisation(average, photos)
    return average


def train_decoder(
    photos: PhotoSet, steps: int, start: AutoencoderKL, batch_size: int = 32, seed: int = 1
) -> AutoencoderKL:
    """Go on with the decoder alone: the latents stay what they are, so a UNet trained on them still fits."""
    vae = start.to(memory_format=torch.channels_last).train()
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    return _fit_vae("vae decoder", vae, photos, steps, 1.2e-3, batch_size, seed)


def _fit_vae(
    name: str, vae: AutoencoderKL, photos: PhotoSet, steps: int, learning_rate: float, batch_size: int, seed: int
) -> AutoencoderKL:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    average = Average(vae, 0.998)
    encoder_learns = vae.quant_conv.weight.requires_grad

    def loss(step: int) -> torch.Tensor:
        index = torch.randint(len(photos), (batch_size,), generator=generator)
        pixels = photos.pixels(index).contiguous(memory_format=torch.channels_last)
        weight = 1 + FACE_WEIGHT * photos.face_masks(index)[:, None]
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(encoder_learns):
                posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean() if encoder_learns else 0.0
        return reconstruction_loss(decoded.float(), pixels, weight) + 1e-4 * kl

    fit(name, loss, vae.parameters(), steps, learning_rate, 1e-4, after_step=lambda step: average.update(vae))
    return average.module.eval().to(memory_format=torch.contiguous_format)


def reconstruction_loss(decoded: torch.Tensor, pixels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted L1 of pixels (n, 3, h, w) and of their differences to the right and lower neighbour; weight (n, 1, h, w)."""
    error = decoded - pixels
    plain = (error.abs() * weight).mean()
    edges = (error.diff(dim=-1).abs() * weight[..., 1:]).mean() + (error.diff(dim=-2).abs() * weight[..., 1:, :]).mean()
    return (plain + error.pow(2).mul(weight).mean() + edges) / weight.mean()


@torch.no_grad()
def fold_normalisation(vae: AutoencoderKL, photos: PhotoSet, count: int = 1024) -> None:
    """Make the latents of `photos` zero-mean and unit-variance per channel by changing the 1 x 1 convolutions around them."""
    latents = encode(vae, photos, torch.arange(min(count, len(photos))))
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    into, out = vae.quant_conv, vae.post_quant_conv
    half = LATENT_CHANNELS
    _scale_rows(into, slice(0, half), 1 / deviation, -mean / deviation)
    into.bias.data[half:] -= 2 * deviation.log()
    out.bias.data += (out.weight.data[:, :, 0, 0] * mean[None]).sum(1)
    out.weight.data *= deviation[None, :, None, None]


def _scale_rows(conv: nn.Conv2d, rows: slice, scale: torch.Tensor, shift: torch.Tensor) -> None:
    conv.weight.data[rows] *= scale[:, None, None, None]
    conv.bias.data[rows] = conv.bias.data[rows] * scale + shift


@torch.no_grad()
def encode(
    vae: AutoencoderKL, photos: PhotoSet, index: torch.Tensor, flip: bool = False, batch: int = 128
) -> torch.Tensor:
    """The mean latents (n, 8, 16, 16) of the photographs, mirrored if asked."""
    parts = []
    for some in index.split(batch):
        pixels = photos.pixels(some).to(vae.device)
        with torch.autocast(vae.device.type, torch.bfloat16):
            parts.append(vae.encode(pixels.flip(-1) if flip else pixels).latent_dist.mean.float().cpu())
    return torch.cat(parts)


@torch.no_grad()
def round_trip_psnr(vae: AutoencoderKL, photos: PhotoSet, count: int = 256) -> float:
    """Peak signal-to-noise ratio in dB of pictures decoded from their own mean latents."""
    index = torch.arange(min(count, len(photos)))
    pixels = photos.pixels(index)
    decoded = vae.decode(encode(vae, photos, index)).sample.clamp(-1, 1)
    return float(-10 * torch.log10(F.mse_loss(decoded / 2, pixels / 2)))
