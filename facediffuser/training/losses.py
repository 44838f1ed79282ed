"""Training losses: noise prediction, localization of subjects' attention, min-SNR weights."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def noise_loss(
    predicted: torch.Tensor,
    noise: torch.Tensor,
    mask: torch.Tensor | None = None,
    over: str = "image",
    emphasis: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return each image's mean squared error on the noise, (b,) float32.

    Args:
        predicted: predicted noise (b, c, h, w).
        noise: true noise (b, c, h, w).
        mask: (b, 1, h, w) in [0, 1], multiplies prediction and noise; an image whose mask is empty is not masked.
        over: the masked mean is over the whole "image" (as in the released code) or over the "mask" alone.
        emphasis: (b, 1, h, w) > 0, weight of each cell, scaled to a mean of 1 per image.
    """
    error = (predicted.float() - noise.float()).pow(2).mean(dim=1, keepdim=True)
    if emphasis is not None:
        error = error * emphasis / emphasis.mean(dim=(1, 2, 3), keepdim=True)
    if mask is None:
        return error.mean(dim=(1, 2, 3))
    mask = torch.where(mask.sum(dim=(1, 2, 3), keepdim=True) > 0, mask.float(), 1.0)
    masked = (error * mask.pow(2)).mean(dim=(1, 2, 3))
    return masked if over == "image" else masked / mask.pow(2).mean(dim=(1, 2, 3))


def localization_loss(
    maps: Sequence[torch.Tensor], masks: torch.Tensor, tokens: torch.Tensor, present: torch.Tensor, aspect: float = 1.0
) -> torch.Tensor:
    """Return each image's localization loss, (b,): attention outside of the subjects minus attention inside.

    FastComposer's balanced L1 (arXiv 2305.10431, section 4.2): for the attention map A of a subject's token and its mask
    S, resized to A (bilinear, antialiased), the mean of A outside of S minus the mean of A inside; mean over the
    subjects present, heads and layers; 0 for an image without subjects.

    Args:
        maps: attention probabilities per layer, (b, heads, cells, n) with n text tokens.
        masks: subjects' areas, (b, s, h, w) in [0, 1].
        tokens: index of each subject's token, (b, s) int64.
        present: which of the s places hold a subject, (b, s) bool.
        aspect: height / width of the latents, to recover a layer's grid from its number of cells.
    """
    total = torch.zeros(masks.shape[0], device=masks.device)
    for probabilities in maps:
        batch, heads, cells, _ = probabilities.shape
        height = round(math.sqrt(cells * aspect))
        size = (height, cells // height)
        index = tokens[:, None, None, :].expand(batch, heads, cells, tokens.shape[1])
        attention = probabilities.gather(-1, index).mean(dim=1).transpose(1, 2)  # (b, s, cells)
        inside = F.interpolate(masks.float(), size=size, mode="bilinear", antialias=True).flatten(2)
        total = total + _weighted(_mean(attention, 1 - inside) - _mean(attention, inside), present)
    return total / max(len(maps), 1)


def _mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (values * weights).sum(dim=-1) / weights.sum(dim=-1).clamp(min=1e-5)


def _weighted(values: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    return (values * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)


@torch.no_grad()
def update_average(
    averages: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], decay: float, updates: int
) -> None:
    """Move exponential moving averages of weights towards the present weights, in place.

    Args:
        averages: the averages.
        weights: the present weights, in the same order and shapes.
        decay: the share of the averages that is kept, 0 to below 1; less in the first updates: (1 + n) / (10 + n).
        updates: how many updates there are with this one, n.
    """
    decay = min(decay, (1 + updates) / (10 + updates))
    torch._foreach_lerp_(list(averages), [weight.detach() for weight in weights], 1 - decay)


def min_snr_weights(alphas_cumprod: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return a loss weight per timestep, min(SNR, gamma) / SNR (min-SNR for noise prediction, arXiv 2303.09556).

    Args:
        alphas_cumprod: the schedule's cumulative products, (timesteps,) in (0, 1).
        gamma: SNR above which a timestep counts less, > 0.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=gamma) / snr
