"""How a model is trained: every number of it, and the presets in one table."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Role = Literal["tdm", "sdm"]
Preset = Literal["paper-tdm", "paper-sdm", "released", "miniature"]


class Augmentation(BaseModel):
    """What is done to a reference picture in training; each with its own probability, in this order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    zoom: float = Field(0.5, ge=0, le=1, description="probability of a zoom")
    zoom_to: float = Field(2.0, ge=1, description="the largest zoom")
    rotate: float = Field(0.75, ge=0, le=1, description="probability of a rotation")
    degrees: float = Field(30.0, ge=0, le=180, description="the largest rotation, degrees")
    jitter: float = Field(0.5, ge=0, le=1, description="probability of changed brightness, contrast, saturation, hue")
    jitter_strength: float = Field(0.5, ge=0, le=1, description="strength of that; hue by a fifth of it")
    blur: float = Field(0.5, ge=0, le=1, description="probability of a Gaussian blur (5 px, deviation 0.1 to 2)")
    grey: float = Field(0.1, ge=0, le=1, description="probability of losing the colours")
    flip: float = Field(0.5, ge=0, le=1, description="probability of a mirror image")
    elastic: float = Field(0.5, ge=0, le=1, description="probability of an elastic distortion")


class Recipe(BaseModel):
    """All that decides what is learnt, given the data, the base and the seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(ge=1, description="optimiser steps")
    batch_size: int = Field(ge=1, description="images a step and worker")
    accumulate: int = Field(1, ge=1, description="batches whose gradients make one step")
    learning_rate: float = Field(1e-5, gt=0, description="AdamW's learning rate")
    subject_learning_rate: float | None = Field(
        None, gt=0, description="another learning rate for the subject fuser (default: the same)"
    )
    encoder_learning_rate: float | None = Field(
        None, gt=0, description="another learning rate for the image encoder (default: the same)"
    )
    schedule: Literal["constant", "decay"] = Field(
        "constant", description="learning rate after the warm-up: constant, or falling to 2% over the second half"
    )
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises from 0")
    weight_decay: float = Field(1e-2, ge=0, description="AdamW's weight decay")
    beta2: float = Field(0.999, gt=0, lt=1, description="AdamW's second beta; the first is 0.9")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    resolution: int = Field(512, ge=32, description="side of a training image, px")
    reference_resolution: int = Field(
        224, ge=16, description="side at which reference pictures are augmented, px; the image encoder has its own"
    )
    caption_drop: float = Field(0.1, ge=0, le=1, description="probability of an empty caption without subjects")
    subject_keep: float = Field(0.9, ge=0, le=1, description="probability that a subject keeps its reference")
    max_subjects: int = Field(4, ge=1, description="most subjects of an image")
    masked_loss: float = Field(0.0, ge=0, le=1, description="probability of a loss over the subjects' pixels alone")
    masked_loss_mean: Literal["image", "mask"] = Field(
        "image", description="the masked loss is the mean over the whole image (as released) or over the mask"
    )
    face_weight: float = Field(0.0, ge=0, description="how much more a cell counts in the loss when a face is there")
    localization: float = Field(0.0, ge=0, description="weight of the localization loss")
    min_snr: float | None = Field(None, gt=0, description="gamma of min-SNR loss weights (default: no weights)")
    train_image_encoder_layers: int = Field(
        2, ge=-1, description="last layers of the image encoder that are trained; -1: the whole image encoder"
    )
    reference_source: Literal["segment", "face"] = Field(
        "segment", description="a reference is the subject's segment before noise, or the square around its face"
    )
    reference_pairing: Literal["same", "other"] = Field(
        "same", description="a reference is from the image itself or, where identities are known, from another one"
    )
    augmentation: Augmentation = Field(Augmentation(), description="what is done to reference pictures")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of averaged weights, which become the result; 0: none")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="compute type; auto is bf16 on a GPU and on a CPU with instructions for it, else fp32; "
        "trained weights are always fp32"
    )  # fmt: skip
    attention: Literal["auto", "sdpa", "eager"] = Field(
        "auto",
        description="torch's fused attention or plain matrix products; auto is plain on a CPU with small latents",
    )
    channels_last: bool = Field(False, description="lay image tensors out with channels last")
    gradient_checkpointing: bool = Field(False, description="save memory by computing activations twice")
    compile: bool | None = Field(None, description="compile the UNet (where neither is given: on a GPU)")


NO_AUGMENTATION = dict(zoom=0, rotate=0, jitter=0, blur=0, grey=0, flip=0, elastic=0)

_PAPER: dict[str, Any] = dict(batch_size=8, learning_rate=1e-5, resolution=512, channels_last=True)
_SUBJECT: dict[str, Any] = dict(masked_loss=0.5, localization=1e-3)
_SMALL: dict[str, Any] = dict(
    steps=1500, batch_size=32, resolution=64, reference_resolution=64, schedule="decay", beta2=0.99,
    min_snr=5.0, face_weight=2.0, ema=0.995, max_subjects=2,
)  # fmt: skip

PRESETS: dict[tuple[Preset, Role], Recipe] = {
    ("paper-tdm", "tdm"): Recipe(**_PAPER, steps=250_000),
    ("paper-sdm", "sdm"): Recipe(**_PAPER, **_SUBJECT, steps=450_000),
    ("released", "tdm"): Recipe(**_PAPER | dict(batch_size=4), steps=150_000),
    ("released", "sdm"): Recipe(**_PAPER, **_SUBJECT, steps=150_000),
    ("miniature", "tdm"): Recipe(**_SMALL, learning_rate=3e-4, warmup_steps=20),
    ("miniature", "sdm"): Recipe(
        **_SMALL, **_SUBJECT, learning_rate=6e-4, subject_learning_rate=1e-3, encoder_learning_rate=3e-4,
        warmup_steps=20, masked_loss_mean="mask", train_image_encoder_layers=-1, reference_source="face",
        augmentation=Augmentation(
            **NO_AUGMENTATION | dict(zoom=0.3, zoom_to=1.2, rotate=0.5, degrees=10.0, jitter=0.3, flip=0.5),
            jitter_strength=0.1,
        ),
    ),
}  # fmt: skip
"""The paper's numbers (section 4), those of the released scripts, and what suits the miniature world.

Batch sizes are per GPU: the paper and the scripts use four. The paper and the scripts do without EMA.
"""
