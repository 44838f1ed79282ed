"""The settings of the flows that are made of other flows, and of commands without a flow."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from facediffuser.errors import InputError
from facediffuser.miniature.world_names import WorldName
from facediffuser.schedulers import SchedulerName
from facediffuser.settings import MOST_WORKERS, ImagesPerPrompt, Output, Sampling, Seeded, Settings, Steps, Workers
from facediffuser.storage import LocalStore
from facediffuser.storage.reading import parse_json
from facediffuser.training.train_settings import TrainSettings


class DemoSettings(Workers, Seeded):
    """How large the demonstration is; the defaults take a few minutes on two CPU cores."""

    output: str = Field("out/demo", description="where everything goes: a folder or `s3://bucket/prefix`")
    photos: int = Field(480, ge=8, le=10_000_000, description="photographs to render")
    train_steps: int = Field(60, ge=1, description="training steps of each model")
    batch_size: int = Field(32, ge=1, description="images of a training step")
    subjects: int = Field(6, ge=1, description="people to make images of")
    prompts: int = Field(16, ge=1, description="prompts; one in eight, at least one, shows two people")
    steps: Steps = 30

    @property
    def root(self) -> str:
        """Where everything goes, without a slash at its end."""
        return self.output.rstrip("/")

    @property
    def training(self) -> TrainSettings:
        """The settings of the demonstration's training."""
        return TrainSettings(  # type: ignore[call-arg]  # the recipe's fields: see TrainSettings
            role="both",
            data=f"{self.root}/prepared",
            base="miniature",
            # A minute of training from the base alone would hardly know a face: the shipped models are trained on.
            start_from="miniature",
            learning_rate=1e-4,
            subject_learning_rate=1e-4,
            encoder_learning_rate=5e-5,
            output=f"{self.root}/training",
            resume=True,
            steps=self.train_steps,
            batch_size=self.batch_size,
            checkpoint_every=self.train_steps,
            cpus_per_worker=1,
            seed=self.seed,
        )


class ClaimSettings(Sampling, Seeded):
    """The paper's table in small: 15 unseen people x 30 prompts, 15 pairs x 8 prompts, three images of each, 4 methods.

    The defaults fit 20 minutes on two CPU cores. `--people 45` is three sets of 15, each judged by itself, too.
    """

    models: str = Field("miniature", description="model folder to judge, or `miniature` for the shipped one")
    scorers: str = Field("miniature", description="`miniature`, or a folder with `identity/` and `prompt/`")
    output: str = Field("out/claim", description="where people, images and tables go; run again, it resumes")
    people: int = Field(15, ge=2, le=100_000, description="unseen people, and at most as many pairs of them")
    images_per_prompt: ImagesPerPrompt = 3
    steps: Steps = 12
    scheduler: SchedulerName = Field(
        "dpm", description="noise scheduler; at a change of models `pndm`, with a longer memory, mixes their noises"
    )
    fusion_start: int | None = Field(
        None, ge=0, description="first step in which both models are fused (default: 3 of 12)"
    )
    fusion_end: int | None = Field(None, ge=0, description="first step of the SDM alone (default: 11 of 12)")
    choice: Path | None = Field(
        None,
        description="JSON with `steps`, `guidance_scale`, `fusion_start` and `fusion_end`, as `python -m "
        "tools.miniature_weights.choose` writes it; what is given besides goes before it",
    )
    workers: int = Field(2, ge=1, le=MOST_WORKERS, description="Ray workers, each with a core")
    batch_size: int = Field(45, ge=1, le=1024, description="images denoised together")

    def chosen(self) -> "ClaimSettings":
        """Return the settings with what `choice` says in place of what was not given; InputError when it says nothing."""
        if self.choice is None:
            return self
        names = ("steps", "guidance_scale", "fusion_start", "fusion_end")
        try:
            # Through the store, which opens regular files alone: a pipe would be waited for.
            said = parse_json(LocalStore(self.choice.parent).get(self.choice.name))
            chosen = {name: said[name] for name in names if name not in self.model_fields_set}
            return ClaimSettings(**self.model_dump(exclude_unset=True, exclude={"choice"}) | chosen)
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"not a JSON object with {', '.join(names)} that fit ({type(error).__name__})"
            fix = "make it with `python -m tools.miniature_weights.choose`"
            raise InputError(f"{self.choice}: {what}; {fix}") from error

    @property
    def default_fusion_window(self) -> tuple[int, int]:
        """The window that suits the miniature."""
        return round(self.steps * 3 / 12), round(self.steps * 11 / 12)


class AssembleSettings(Settings):
    """Two trained models and the base they were trained from become one model folder."""

    base: str = Field(description="base model: a diffusers folder, an `s3://` URL, a hub id, or `miniature`")
    tdm: str = Field(description="URL that `train tdm` wrote to")
    sdm: str = Field(description="URL that `train sdm` wrote to")
    output: Output = Field(description="model folder to write: a folder or `s3://bucket/prefix`")


class ConvertSettings(Settings):
    """Released Face-diffuser checkpoints become a model folder."""

    base: str = Field(description="Stable Diffusion v1-5: a diffusers folder, an `s3://` URL or a hub id")
    image_encoder: str = Field(description="CLIP ViT-L/14: a transformers folder, an `s3://` URL or a hub id")
    sdm: Path = Field(description="the released `SDM/pytorch_model.bin`")
    tdm: Path = Field(description="the released `TDM/pytorch_model.bin`")
    output: Output = Field(description="model folder to write: a folder or `s3://bucket/prefix`")


class RenderSettings(Seeded):
    """A photo set of the miniature world in the layout of FastComposer's FFHQ, with `subjects/` and `prompts.jsonl`."""

    count: int = Field(ge=1, le=10_000_000, description="number of pictures")
    output: Output = Field(description="folder to write, or `s3://bucket/prefix`")
    size: Literal[64, 128] = Field(64, description="side of a picture, px")
    world: WorldName | None = Field(
        None,
        description="named shares of what is shown: `broad`, what a base model knows, or `ffhq`, photographs of faces close up "
        "(default: portraits in every style and place)",
    )
    pairs: float | None = Field(
        None, ge=0, le=1, description="share of the pictures that show two people (default: 0.15, or the world's)"
    )
    actions: float | None = Field(
        None, ge=0, le=1, description="share of the people who do something (default: 0.3, or the world's)"
    )
    workers: int = Field(1, ge=1, le=MOST_WORKERS, description="processes that render")

    @model_validator(mode="after")
    def _check_shares(self) -> "RenderSettings":
        if self.world and (self.pairs is not None or self.actions is not None):
            raise ValueError(f"world {self.world} has shares of its own; leave --pairs and --actions out")
        return self
