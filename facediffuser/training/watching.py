"""What people look at while a model trains: TensorBoard files, the loss on the test split, a grid of samples."""

import io
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, PNDMScheduler
from PIL import Image

from facediffuser.pipeline import FaceDiffuserPipeline
from facediffuser.preprocess.faces import crop_square
from facediffuser.storage import Store
from facediffuser.training.batches import Batches
from facediffuser.training.conditioning import mark_caption
from facediffuser.training.denoisers import Parts
from facediffuser.training.losses import noise_loss
from facediffuser.training.records import Records
from facediffuser.training.settings import TrainSettings

logger = logging.getLogger(__name__)

VALIDATION_TIMES = (100, 300, 500, 700, 900)
SAMPLE_STEPS, SAMPLE_GUIDANCE = 20, 5.0
GAP = 4


class Watcher:
    """Writes a run's numbers to TensorBoard files and, as often as the settings say, validation losses and samples."""

    def __init__(self, settings: TrainSettings, store: Store, report: Callable[[dict[str, float]], None]):
        from torch.utils.tensorboard import SummaryWriter

        self.settings, self.store, self.report = settings, store, report
        self._folder = tempfile.TemporaryDirectory(prefix="facediffuser-tensorboard-")
        self._writer = SummaryWriter(self._folder.name)
        self._batches: Batches | None = None

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
        from facediffuser.training.loop import split_batches

        if not self.store_has_test():
            return
        if self._batches is None:
            self._batches = split_batches(self.settings, parts, "test")
        count = min(self.settings.validation_images, len(self._batches.records))
        loss = validation_loss(self._batches, parts, count, self.settings.recipe().batch_size)
        self.write(step, {"validation_loss": loss})
        logger.info("step %d: validation loss %.4f on %d images", step, loss, count)
        self.report({"step": float(step), "validation_loss": loss})

    def store_has_test(self) -> bool:
        """Whether the prepared data has a test split."""
        from facediffuser.storage import open_store

        return bool(open_store(self.settings.data).list("test/"))

    def _sample(self, step: int, parts: Parts) -> None:
        records = Records(self.settings.data, "test" if self.store_has_test() else "train")
        sheet = sample_grid(records, parts, self.settings)
        buffer = io.BytesIO()
        sheet.save(buffer, format="PNG")
        self.store.put(f"samples/step-{step:08d}.png", buffer.getvalue())


def _due(step: int, steps: int, every: int) -> bool:
    return bool(every) and (step % every == 0 or step == steps)


@torch.no_grad()
def validation_loss(batches: Batches, parts: Parts, count: int, batch_size: int) -> float:
    """Return the mean noise loss of the first `count` rows at fixed timesteps with fixed noise.

    Every caption is told, every subject carries its reference as it is, and the loss is over the whole image.
    """
    total = 0.0
    for time in VALIDATION_TIMES:
        for start in range(0, count, batch_size):
            rows = list(range(start, min(start + batch_size, count)))
            batch = batches.make(rows, [row * 1000 + time for row in rows], plain=True).to(parts.device)
            times = torch.full_like(batch.times, time)
            noisy = parts.schedule.add_noise(parts.latents(batch), batch.noise, times)
            predicted, _ = parts.denoiser(noisy, times, parts.text(batch), batch)
            total += float(noise_loss(predicted, batch.noise).sum())
    return total / (count * len(VALIDATION_TIMES))


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
        height=recipe.resolution,
        width=recipe.resolution,
        generator=[torch.Generator().manual_seed(number) for number in range(count)],
    ).images
    return grid([[image, *pictures] for image, pictures in zip(made, references, strict=True)], recipe.resolution)


def _reference(records: Records, number: int, row: dict, subject: dict) -> Image.Image:
    image = records.image(number)
    if 0 <= subject["face_index"] < len(row["faces"]):
        return crop_square(image, row["faces"][subject["face_index"]]["crop_box"])
    return image.crop(tuple(subject["box"]))


def _pipeline(parts: Parts, role: str) -> DiffusionPipeline:
    trained = dict(parts.trained)
    if role == "tdm":
        trained = {"unet_text": trained["unet"]}
    pipeline = FaceDiffuserPipeline(
        vae=parts.vae.to(parts.device),
        text_encoder=parts.text_encoder.to(parts.device),
        tokenizer=parts.tokenizer,
        scheduler=PNDMScheduler.from_config(parts.schedule.config, skip_prk_steps=True),
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
