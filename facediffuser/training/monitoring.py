"""Monitoring of a training run: TensorBoard files, validation loss on the test split, grids of samples."""

import logging
import tempfile
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from PIL import Image

from facediffuser.faces import crop_turned
from facediffuser.number_words import counted
from facediffuser.picture_grid import fit, picture_grid, png_bytes
from facediffuser.pipeline import FaceDiffuserPipeline
from facediffuser.prompts import ids_and_places
from facediffuser.storage import Store, open_store
from facediffuser.training.batches import Batch
from facediffuser.training.conditioning import mark_caption, subjects_in_caption
from facediffuser.training.data_loading import split_batches
from facediffuser.training.denoisers import Parts
from facediffuser.training.losses import noise_loss
from facediffuser.training.records import Records
from facediffuser.training.train_settings import TrainSettings

logger = logging.getLogger(__name__)

VALIDATION_TIMES = (100, 300, 500, 700, 900)
# Low guidance, and references from the first step on: samples show what the model has learnt, not the effect of guidance.
SAMPLE_STEPS, SAMPLE_GUIDANCE = 20, 2.5
GAP = 4


class TrainingMonitor:
    """Writes a run's numbers to TensorBoard files and, at the intervals of the settings, validation losses and samples.

    Args:
        settings: intervals, numbers of images, data and recipe of a single role.
        store: the run's output.
        report: called with `step` and `validation_loss` after each validation.
        step: step from which the run is resumed; what an earlier process logged beyond it is not shown.
    """

    def __init__(
        self, settings: TrainSettings, store: Store, report: Callable[[dict[str, float]], None], step: int = 0
    ):
        from torch.utils.tensorboard import SummaryWriter

        self.settings, self.store, self.report = settings, store, report
        self._folder = tempfile.TemporaryDirectory(prefix="facediffuser-tensorboard-")
        self._writer = SummaryWriter(self._folder.name, purge_step=step + 1 if step else None)
        self._batches: list[Batch] = []

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Add the numbers of one step to the TensorBoard files."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def is_due(self, step: int, steps: int) -> bool:
        """Return whether a validation loss or a grid of samples is due after this step of `steps`."""
        return any(_due(step, steps, every) for every in (self.settings.validate_every, self.settings.sample_every))

    def validate(self, step: int, steps: int, parts: Parts) -> None:
        """Compute and write the validation loss and the samples that are due; random state and modes are restored."""
        parts.denoiser.eval()
        state = torch.get_rng_state()
        try:
            if _due(step, steps, self.settings.validate_every):
                self._write_validation_loss(step, parts)
            if _due(step, steps, self.settings.sample_every):
                self._write_samples(step, parts)
        finally:
            torch.set_rng_state(state)
            parts.denoiser.train()
            if self.settings.precompute:
                parts.vae.cpu()
                parts.text_encoder.cpu()
        self.upload()

    def upload(self) -> None:
        """Copy the TensorBoard files to `tensorboard/` in the output."""
        self._writer.flush()
        for path in sorted(Path(self._folder.name).iterdir()):
            self.store.put(f"tensorboard/{path.name}", path.read_bytes())

    def close(self) -> None:
        """Upload the TensorBoard files and delete the local ones."""
        self.upload()
        self._writer.close()
        self._folder.cleanup()

    def _write_validation_loss(self, step: int, parts: Parts) -> None:
        if not self.has_test_split():
            return
        self._batches = self._batches or validation_batches(self.settings, parts)
        loss, count = validation_loss(self._batches, parts), sum(len(batch.noise) for batch in self._batches)
        self.log(step, {"validation_loss": loss})
        logger.info("step %d: validation loss %.4f on %s", step, loss, counted(count, "image"))
        self.report({"step": float(step), "validation_loss": loss})

    def has_test_split(self) -> bool:
        """Return whether the prepared data has a test split."""
        return bool(open_store(self.settings.data).list("test/"))

    def _write_samples(self, step: int, parts: Parts) -> None:
        records = Records(self.settings.data, "test" if self.has_test_split() else "train")
        data = png_bytes(sample_grid(records, parts, self.settings))
        self.store.put(f"samples/step-{step:08d}.png", data)


def _due(step: int, steps: int, every: int) -> bool:
    return bool(every) and (step % every == 0 or step == steps)


def validation_batches(settings: TrainSettings, parts: Parts) -> list[Batch]:
    """Return batches of the test split's first rows, without dropout, mirroring or augmentation."""
    batches, size = split_batches(settings, parts, "test"), settings.recipe().batch_size
    rows = range(min(settings.validation_images, len(batches.records)))
    chunks = (list(rows[start : start + size]) for start in range(0, len(rows), size))
    return [batches.collate(chunk, chunk, plain=True) for chunk in chunks]


@torch.no_grad()
def validation_loss(batches: Sequence[Batch], parts: Parts) -> float:
    """Return the mean noise loss of batches at the timesteps VALIDATION_TIMES, with fixed noise and no mask."""
    losses = []
    for batch in batches:
        generator = torch.Generator().manual_seed(0)
        on_device = batch.to(parts.device)
        latents, text = parts.latents(on_device), parts.text(on_device)
        for time in VALIDATION_TIMES:
            noise = torch.randn(batch.noise.shape, generator=generator).to(parts.device)
            times = torch.full_like(on_device.times, time)
            with parts.autocast():
                predicted, _ = parts.denoiser(parts.schedule.add_noise(latents, noise, times), times, text, on_device)
            losses.append(noise_loss(predicted, noise))
    return float(torch.cat(losses).mean())


def sample_grid(records: Records, parts: Parts, settings: TrainSettings) -> Image.Image:
    """Return one sheet of samples from the first rows' captions, with fixed noise.

    Args:
        records: rows whose captions and references are used.
        parts: the model in training.
        settings: a single role's settings; for the SDM each sample's references stand below it.

    Returns:
        RGB picture, `sample_images` columns of squares of the recipe's resolution.
    """
    role, recipe = settings.role, settings.recipe()
    count = min(settings.sample_images, len(records))
    prompts, references = [], []
    for number in range(count):
        row = records.row(number)
        subjects = subjects_in_caption(row, recipe.max_subjects if role == "sdm" else 0)
        with records.naming(number):
            marked = mark_caption(row["caption"], [subject["end"] for subject in subjects])
            _, places = ids_and_places(parts.tokenizer, marked, "drop")
        # As in training: a subject behind the end of the text encoder's input is left out, with its reference.
        subjects = subjects[: len(places)]
        prompts.append(mark_caption(row["caption"], [subject["end"] for subject in subjects]))
        references.append([_reference(records, number, row, subject) for subject in subjects])
    pipeline = _pipeline(parts, role)
    samples = pipeline(
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
    side = recipe.resolution
    columns = [[image, *pictures] for image, pictures in zip(samples, references, strict=True)]
    blank = Image.new("RGB", (side, side), "white")
    return picture_grid([[fit(one, side, side) for one in row] for row in zip_longest(*columns, fillvalue=blank)], GAP)


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
