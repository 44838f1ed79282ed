"""What people look at while a model trains: TensorBoard files, the loss on the test split, a grid of samples."""

import io
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from PIL import Image

from facediffuser.faces import crop_turned
from facediffuser.pipeline import FaceDiffuserPipeline
from facediffuser.storage import Store, open_store
from facediffuser.training.batches import Batch
from facediffuser.training.conditioning import mark_caption
from facediffuser.training.denoisers import Parts
from facediffuser.training.losses import noise_loss
from facediffuser.training.records import Records
from facediffuser.training.train_settings import TrainSettings
from facediffuser.training.validation import split_batches

logger = logging.getLogger(__name__)

VALIDATION_TIMES = (100, 300, 500, 700, 900)
# Gentle guidance, and references from the first step on: what the model has learnt shows, not what guidance makes of it.
SAMPLE_STEPS, SAMPLE_GUIDANCE = 20, 2.5
GAP = 4


class Watcher:
    """Writes a run's numbers to TensorBoard files and, as often as the settings say, validation losses and samples."""

    def __init__(
        self, settings: TrainSettings, store: Store, report: Callable[[dict[str, float]], None], step: int = 0
    ):
        """`step`: the one the run goes on from; what an earlier process wrote beyond it is not shown."""
        from torch.utils.tensorboard import SummaryWriter

        self.settings, self.store, self.report = settings, store, report
        self._folder = tempfile.TemporaryDirectory(prefix="facediffuser-tensorboard-")
        self._writer = SummaryWriter(self._folder.name, purge_step=step + 1 if step else None)
        self._batches: list[Batch] = []

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Add numbers of one step to the TensorBoard files."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def is_due(self, step: int, steps: int) -> bool:
        """Whether a validation loss or a grid is wanted after this step."""
        return any(_due(step, steps, every) for every in (self.settings.validate_every, self.settings.sample_every))

    def look(self, step: int, steps: int, parts: Parts) -> None:
        """Compute and write what is due."""
        parts.denoiser.eval()
        state = torch.get_rng_state()
        try:
            if _due(step, steps, self.settings.validate_every):
                self._validate(step, parts)
            if _due(step, steps, self.settings.sample_every):
                self._sample(step, parts)
        finally:
            torch.set_rng_state(state)
            parts.denoiser.train()
            if self.settings.precompute:
                parts.vae.cpu()
                parts.text_encoder.cpu()
        self.upload()

    def upload(self) -> None:
        """Put the TensorBoard files into the output, `tensorboard/`."""
        self._writer.flush()
        for path in sorted(Path(self._folder.name).iterdir()):
            self.store.put(f"tensorboard/{path.name}", path.read_bytes())

    def close(self) -> None:
        """Upload for the last time."""
        self.upload()
        self._writer.close()
        self._folder.cleanup()

    def _validate(self, step: int, parts: Parts) -> None:
        if not self.store_has_test():
            return
        self._batches = self._batches or validation_batches(self.settings, parts)
        loss, count = validation_loss(self._batches, parts), sum(len(batch.noise) for batch in self._batches)
        self.write(step, {"validation_loss": loss})
        logger.info("step %d: validation loss %.4f on %d images", step, loss, count)
        self.report({"step": float(step), "validation_loss": loss})

    def store_has_test(self) -> bool:
        """Whether the prepared data has a test split."""
        return bool(open_store(self.settings.data).list("test/"))

    def _sample(self, step: int, parts: Parts) -> None:
        records = Records(self.settings.data, "test" if self.store_has_test() else "train")
        sheet = sample_grid(records, parts, self.settings)
        buffer = io.BytesIO()
        sheet.save(buffer, format="PNG")
        self.store.put(f"samples/step-{step:08d}.png", buffer.getvalue())


def _due(step: int, steps: int, every: int) -> bool:
    return bool(every) and (step % every == 0 or step == steps)


def validation_batches(settings: TrainSettings, parts: Parts) -> list[Batch]:
    """Return the first rows of the test split: every caption told, every subject with its reference as it is."""
    batches, size = split_batches(settings, parts, "test"), settings.recipe().batch_size
    rows = range(min(settings.validation_images, len(batches.records)))
    some = (list(rows[start : start + size]) for start in range(0, len(rows), size))
    return [batches.make(these, these, plain=True) for these in some]


@torch.no_grad()
def validation_loss(batches: Sequence[Batch], parts: Parts) -> float:
    """Return the mean noise loss of some batches at VALIDATION_TIMES with fixed noise, over the whole images."""
    losses = []
    for batch in batches:
        generator = torch.Generator().manual_seed(0)
        moved = batch.to(parts.device)
        latents, text = parts.latents(moved), parts.text(moved)
        for time in VALIDATION_TIMES:
            noise = torch.randn(batch.noise.shape, generator=generator).to(parts.device)
            times = torch.full_like(moved.times, time)
            with parts.computing():
                predicted, _ = parts.denoiser(parts.schedule.add_noise(latents, noise, times), times, text, moved)
            losses.append(noise_loss(predicted, noise))
    return float(torch.cat(losses).mean())


def sample_grid(records: Records, parts: Parts, settings: TrainSettings) -> Image.Image:
    """Return samples of the first rows' captions from fixed noise, below each the reference for the SDM."""
    role, recipe = settings.role, settings.recipe()
    count = min(settings.sample_images, len(records))
    prompts, references = [], []
    for number in range(count):
        row = records.row(number)
        subjects = sorted({one["end"]: one for one in row["subjects"]}.values(), key=lambda one: one["end"])
        subjects = subjects[: recipe.max_subjects] if role == "sdm" else []
        prompts.append(mark_caption(row["caption"], [one["end"] for one in subjects]))
        references.append([_reference(records, number, row, one) for one in subjects])
    pipeline = _pipeline(parts, role)
    made = pipeline(
        prompt=prompts,
        reference_images=references if role == "sdm" else None,
        num_inference_steps=SAMPLE_STEPS,
        guidance_scale=SAMPLE_GUIDANCE,
        method="fastcomposer" if role == "sdm" else "tdm",
        alpha=1.0,
        height=recipe.resolution,
        width=recipe.resolution,
        generator=[torch.Generator().manual_seed(number) for number in range(count)],
    ).images
    return grid([[image, *pictures] for image, pictures in zip(made, references, strict=True)], recipe.resolution)


def _reference(records: Records, number: int, row: dict, subject: dict) -> Image.Image:
    image = records.image(number)
    if 0 <= subject["face_index"] < len(row["faces"]):
        face = row["faces"][subject["face_index"]]
        return crop_turned(image, face["crop_box"], face["crop_turn"])
    return image.crop(tuple(subject["box"]))


def _pipeline(parts: Parts, role: str) -> DiffusionPipeline:
    trained = dict(parts.trained)
    if role == "tdm":
        trained = {"unet_text": trained["unet"]}
    pipeline = FaceDiffuserPipeline(
        vae=parts.vae.to(parts.device),
        text_encoder=parts.text_encoder.to(parts.device),
        tokenizer=parts.tokenizer,
        scheduler=DPMSolverMultistepScheduler.from_config(parts.schedule.config),
        **trained,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def grid(columns: Sequence[Sequence[Image.Image]], side: int) -> Image.Image:
    """Return columns of pictures side by side, each picture resized to a square of `side` px."""
    rows = max(len(column) for column in columns)
    sheet = Image.new("RGB", (len(columns) * (side + GAP) - GAP, rows * (side + GAP) - GAP), "white")
    for x, column in enumerate(columns):
        for y, picture in enumerate(column):
            sheet.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (x * (side + GAP), y * (side + GAP)))
    return sheet
