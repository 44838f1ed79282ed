"""Saliency-adaptive noise fusion (SNF): which of two models decides which cell of the latent, at one step.

Symbols, as in section 3.3 of the paper (arXiv 2311.10329):

    R_T = s (e_T(text) - e_T(null))         R_S = s (e_S(subject) - e_S(text))         `guide`
    eps_T = e_T(null) + R_T                 eps_S = e_S(text) + R_S                    `guide`
    Omega = softmax over cells (k * mean over channels of Smooth(|R|))                 `saliency`
    M = 1 where Omega_S > Omega_T, else 0                                              `subject_mask`
    eps = M eps_S + (1 - M) eps_T                                                      `fuse`

T is the text-driven model (TDM), S the subject-augmented one (SDM), s the guidance scale, k a temperature (1 in the
paper; the idea and the temperatures are MagicFusion's, arXiv 2303.13126). Every map is normalised to sum 1, so the mask
asks where each model's response is concentrated, not which response is larger. Pure functions of tensors.
"""

import torch
import torch.nn.functional as F

from facediffuser.errors import InputError

SMOOTHING_WINDOW = 4
SMOOTHING_PADDING = 1
SMALLEST_SIDE = SMOOTHING_WINDOW - 2 * SMOOTHING_PADDING


def guide(baseline: torch.Tensor, conditioned: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a model's response R and its guided noise estimate eps, both (b, c, h, w).

    Args:
        baseline: noise predicted from the baseline prompt, (b, c, h, w).
        conditioned: noise predicted from the condition, (b, c, h, w).
        scale: guidance scale s.

    Returns:
        R and eps in float32; in float64 when the predictions are.
    """
    baseline, conditioned = _at_least_float32(baseline), _at_least_float32(conditioned)
    response = scale * (conditioned - baseline)
    return response, baseline + response


def smooth(maps: torch.Tensor) -> torch.Tensor:
    """Return maps blurred by a 4 x 4 mean and resized to their former size.

    The mean has stride 1 and one cell of zero padding, which counts as cells, so it gives (h - 1) x (w - 1); a bilinear
    resize with antialiasing makes it h x w again.

    Args:
        maps: (b, c, h, w).

    Returns:
        (b, c, h, w).
    """
    pooled = F.avg_pool2d(maps, SMOOTHING_WINDOW, stride=1, padding=SMOOTHING_PADDING)
    return F.interpolate(pooled, size=maps.shape[-2:], mode="bilinear", align_corners=False, antialias=True)


def saliency(response: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Return Omega, (b, 1, h, w), float32: where a response (b, c, h, w) is concentrated; each map sums to 1.

    Computed in float32 whatever the response's type: over 4096 cells, half precision makes ties of most differences.

    Args:
        response: R, (b, c, h, w).
        temperature: k, > 0; 1 in the paper.

    Raises:
        InputError: the latents have less than 2 x 2 cells.
    """
    height, width = response.shape[-2:]
    if min(height, width) < SMALLEST_SIDE:
        raise InputError(f"latents of {height} x {width} cells: too small for saliency; give at least 2 x 2 cells")
    energy = smooth(_at_least_float32(response).abs()).mean(dim=1)
    return torch.softmax(temperature * energy.flatten(1), dim=1).view(-1, 1, height, width)


def subject_mask(text_saliency: torch.Tensor, subject_saliency: torch.Tensor) -> torch.Tensor:
    """Return the mask of the cells that the SDM denoises: those where its saliency is the larger; ties go to the TDM.

    Args:
        text_saliency: the TDM's, (b, 1, h, w).
        subject_saliency: the SDM's, (b, 1, h, w).

    Returns:
        M, (b, 1, h, w) bool.
    """
    return subject_saliency > text_saliency


def fuse(text_noise: torch.Tensor, subject_noise: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the fused noise: the SDM's where the mask is true, the TDM's elsewhere.

    Args:
        text_noise: the TDM's, (b, c, h, w).
        subject_noise: the SDM's, (b, c, h, w).
        mask: (b, 1, h, w) bool.

    Returns:
        eps, (b, c, h, w).
    """
    return torch.where(mask, subject_noise, text_noise)


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
