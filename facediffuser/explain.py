"""One picture that explains the method: what each model responds to, who wins which cell, and the image so far."""

import io
import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image

from facediffuser.devices import pick_device
from facediffuser.errors import InputError
from facediffuser.explain_settings import ExplainSettings
from facediffuser.number_words import counted
from facediffuser.pictures import open_picture, to_rgb
from facediffuser.pipeline import FaceDiffuserPipeline
from facediffuser.prompts import require_marked_words, without_markers
from facediffuser.schedulers import choose_scheduler, set_scheduler
from facediffuser.stages import Stage, plan_stages
from facediffuser.storage import open_store
from facediffuser.storage.output import store_and_key

logger = logging.getLogger(__name__)

ROWS = ("TDM response", "SDM response", "mask (yellow: SDM)", "estimate")
STAGE_NAMES = {Stage.TEXT: "TDM alone", Stage.FUSION: "fused", Stage.SUBJECT: "SDM alone"}
_CELL_INCHES = 1.25
_MASK_COLOURS = ListedColormap(["#2b2d5c", "#f2c14e"])


@dataclass(frozen=True)
class Frame:
    """One step: its index and stage, both saliency maps (h, w), the mask (h, w), and the estimate as RGB (H, W, 3)."""

    index: int
    stage: Stage
    text_saliency: np.ndarray | None
    subject_saliency: np.ndarray | None
    mask: np.ndarray
    estimate: np.ndarray


def explain(settings: ExplainSettings) -> str:
    """Draw one picture that explains a run: TDM response, SDM response, mask and decoded estimate over the steps.

    Responses are the maps Omega that are compared, each scaled to its own largest value; a model that does not run at a
    step leaves its place empty.

    Args:
        settings: models, prompt, references, sampling and output.

    Returns:
        The path or URL of the PNG.

    Raises:
        InputError: references or prompt cannot be used. Nothing is written.
    """
    require_marked_words(settings.prompt, "--prompt")
    store, key = store_and_key(settings.output)
    references = [open_picture(open_store(path.parent), path.name)[0] for path in settings.reference]
    pipe = FaceDiffuserPipeline.from_pretrained(settings.models)
    pipe.set_progress_bar_config(disable=True)
    set_scheduler(pipe, choose_scheduler(settings.scheduler, type(pipe.scheduler).__name__, settings.steps))
    pipe.to(pick_device(settings.device))
    frames, result = record(pipe, settings, references)
    figure = draw(frames, references, result, without_markers(settings.prompt))
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    store.put(key, data.getvalue())
    logger.info("%s: %d of %s drawn", settings.output, len(frames), counted(settings.steps, "step"))
    return settings.output


def record(
    pipe: FaceDiffuserPipeline, settings: ExplainSettings, references: list[Image.Image]
) -> tuple[list[Frame], Image.Image]:
    """Run the pipeline and keep what the picture shows of some steps.

    Args:
        pipe: the pipeline.
        settings: prompt, sampling, and `columns`, the number of steps shown, first and last included.
        references: the subjects' pictures.

    Returns:
        The frames and the resulting image.

    Raises:
        InputError: the models' numbers are not finite.
    """
    alphas = _alphas(pipe.scheduler)
    start, end = settings.fusion_window
    pipe.scheduler.set_timesteps(settings.steps)
    count = len(pipe.scheduler.timesteps)
    stages = plan_stages("face-diffuser", count, settings.steps, start, end)
    shown = set(np.linspace(0, count - 1, min(settings.columns, count)).round().astype(int).tolist())
    side, unet = pipe.unet.config.sample_size, pipe.unet.config
    sides = (side, side) if isinstance(side, int) else tuple(side)
    noise = torch.randn(1, unet.in_channels, *sides, generator=torch.Generator().manual_seed(settings.seed))
    frames: list[Frame] = []
    before = noise.to(pipe.device)

    def watch(pipe, i, t, tensors):
        nonlocal before
        if i in shown:
            clean = _clean(before, tensors["noise_pred"], alphas[int(t)])
            mask = _map(tensors["mask"])
            assert mask is not None  # every step has one, of zeros or ones where one model runs alone
            frames.append(Frame(
                i, stages[i], _map(tensors["text_saliency"]), _map(tensors["subject_saliency"]), mask,
                pipe.decode_latents(clean, "np")[0],
            ))  # fmt: skip
        before = tensors["latents"]

    out = pipe(
        settings.prompt, references, settings.steps, settings.guidance_scale, start, end, latents=noise,
        callback_on_step_end=watch,
        callback_on_step_end_tensor_inputs=["latents", "noise_pred", "mask", "text_saliency", "subject_saliency"],
    )  # fmt: skip
    if out.errors[0]:
        raise InputError(f"{settings.models}: {out.errors[0]}; give models whose weights are finite")
    return frames, out.images[0]


def draw(frames: list[Frame], references: list[Image.Image], result: Image.Image, title: str) -> Figure:
    """Return the figure: a row per map, a column per step, the references at the left and the result at the right.

    Args:
        frames: of the steps shown.
        references: the subjects' pictures.
        result: the final image.
        title: above the figure.
    """
    columns = len(frames) + 2
    figure = Figure(figsize=(_CELL_INCHES * columns, _CELL_INCHES * (len(ROWS) + 0.6)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(len(ROWS), columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, name in enumerate(ROWS):
        axes[row][0].text(1.0, 0.2, name, ha="right", va="center", fontsize=8, transform=axes[row][0].transAxes)
    for row, image in zip(range(len(ROWS)), references, strict=False):
        box = axes[row][0].inset_axes((0.45, 0.4, 0.55, 0.55))
        box.imshow(to_rgb(image))
        box.set_axis_off()
    for column, frame in enumerate(frames, start=1):
        axes[0][column].set_title(f"step {frame.index}\n{STAGE_NAMES[frame.stage]}", fontsize=7)
        _show_map(axes[0][column], frame.text_saliency)
        _show_map(axes[1][column], frame.subject_saliency)
        axes[2][column].imshow(frame.mask, cmap=_MASK_COLOURS, vmin=0, vmax=1, interpolation="nearest")
        axes[3][column].imshow(frame.estimate)
    axes[3][-1].imshow(result)
    axes[3][-1].set_title("result", fontsize=7)
    return figure


def _show_map(axis, values: np.ndarray | None) -> None:
    if values is None:
        axis.text(0.5, 0.5, "not run", ha="center", va="center", fontsize=7, color="0.5", transform=axis.transAxes)
    else:
        axis.imshow(values, cmap="magma", vmin=values.min(), vmax=values.max(), interpolation="nearest")


def _clean(noisy: torch.Tensor, noise: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return the estimate of the clean latents: (x_t - sqrt(1 - a) eps) / sqrt(a)."""
    return (noisy - math.sqrt(1 - alpha) * noise) / math.sqrt(alpha)


def _alphas(scheduler) -> list[float]:
    kind = type(scheduler).__name__
    plain = scheduler.config.get("prediction_type", "epsilon") == "epsilon" and float(scheduler.init_noise_sigma) == 1
    if not plain or not hasattr(scheduler, "alphas_cumprod"):
        raise InputError(f"scheduler {kind}: the estimate cannot be drawn; give pndm, ddim or dpm")
    return scheduler.alphas_cumprod.tolist()


def _map(values: torch.Tensor | None) -> np.ndarray | None:
    return None if values is None else values[0, 0].float().cpu().numpy()
