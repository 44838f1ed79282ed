"""The settings of the flows that are made of other flows, and what is checked of them first; without Prefect and Ray."""

from pydantic import BaseModel, ConfigDict, Field, model_validator

from facediffuser.generation.generate_check import check_models
from facediffuser.schedulers import SchedulerName
from facediffuser.scoring.folder import require_scorers
from facediffuser.storage import open_store
from facediffuser.training import training_run as runs
from facediffuser.training.train_settings import TrainSettings
from facediffuser.window import fusion_window


class DemoSettings(BaseModel):
    """How large the demonstration is; the defaults take a few minutes on two CPU cores."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    output: str = Field("out/demo", description="where everything goes: a folder or s3://bucket/prefix")
    photos: int = Field(480, ge=8, description="photographs to render")
    train_steps: int = Field(60, ge=1, description="training steps of each model")
    batch_size: int = Field(32, ge=1, description="images a training step")
    subjects: int = Field(6, ge=1, description="people to make images of")
    prompts: int = Field(16, ge=1, description="prompts for each of them")
    steps: int = Field(30, ge=1, description="denoising steps an image")
    seed: int = Field(0, ge=0, description="the same seed makes the same dataset")
    workers: int | None = Field(None, ge=1, description="Ray workers (default: the GPUs, or 1)")

    @property
    def root(self) -> str:
        """Where everything goes, without a slash at its end."""
        return self.output.rstrip("/")

    @property
    def training(self) -> TrainSettings:
        """The settings of the demonstration's training."""
        return TrainSettings(
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


def check_demo(settings: DemoSettings) -> None:
    """Raise InputError when the output cannot be written to, holds another training, or the shipped parts are missing."""
    open_store(settings.root).require_writable()
    check_models("miniature")
    require_scorers("miniature")
    for role in settings.training.roles:
        of_role = settings.training.of(role)
        runs.require_startable(open_store(of_role.output), of_role)


class ClaimSettings(BaseModel):
    """The paper's table in small: 15 unseen people x 30 prompts, 15 pairs x 8 prompts, three images of each, 4 methods.

    The defaults fit 20 minutes on two CPU cores.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: str = Field("miniature", description="model folder to judge, or `miniature` for the shipped one")
    scorers: str = Field("miniature", description="miniature, or a folder with identity/ and prompt/")
    output: str = Field("out/claim", description="where people, images and tables go; run again, it goes on")
    people: int = Field(15, ge=2, description="unseen people, and at most as many pairs of them")
    images_per_prompt: int = Field(3, ge=1, description="images of each prompt and subjects, each from its own seed")
    steps: int = Field(12, ge=1, le=1000, description="denoising steps of an image")
    guidance_scale: float = Field(
        5.0, ge=0, le=100, description="strength of the guidance, the paper's; less suits pictures of 64 px better"
    )
    scheduler: SchedulerName = Field(
        "dpm", description="noise scheduler; at a change of models pndm, with a longer memory, mixes their noises"
    )
    fusion_start: int | None = Field(None, ge=0, description="first step of both models (default: 3 of 12)")
    fusion_end: int | None = Field(None, ge=0, description="first step of the SDM alone (default: 11 of 12)")
    seed: int = Field(0, ge=0, description="seed of all images")
    workers: int = Field(2, ge=1, description="Ray workers, each with a core")
    batch_size: int = Field(45, ge=1, le=1024, description="images made together")

    @property
    def fusion_window(self) -> tuple[int, int]:
        """First step of both models and first step of the SDM alone; what suits the miniature where none is given."""
        suits = round(self.steps * 3 / 12), round(self.steps * 11 / 12)
        return fusion_window(self.steps, self.fusion_start, self.fusion_end, suits)

    @model_validator(mode="after")
    def _has_a_window(self) -> "ClaimSettings":
        _ = self.fusion_window
        return self


def check_claim(settings: ClaimSettings) -> None:
    """Raise InputError when the output cannot be written to, or models or scorers cannot be had."""
    open_store(settings.output).require_writable()
    check_models(settings.models)
    require_scorers(settings.scorers)
