"""The training loop of one worker, as a function of its settings; it reports through a callback."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed
from torch import nn

from facediffuser.engine import can_compile
from facediffuser.errors import RunError
from facediffuser.runs import check_provenance, current_provenance
from facediffuser.storage import open_store
from facediffuser.training import training_run as runs
from facediffuser.training.batches import Batch, image_seed
from facediffuser.training.data_loading import split_batches
from facediffuser.training.denoisers import load_parts
from facediffuser.training.losses import localization_loss, min_snr_weights, noise_loss, update_average
from facediffuser.training.monitoring import TrainingMonitor
from facediffuser.training.parameters import select_trained
from facediffuser.training.prefetch import DeviceBatches, prefetch_batches
from facediffuser.training.recipe import Recipe
from facediffuser.training.throughput import Throughput
from facediffuser.training.train_check import data_fingerprint
from facediffuser.training.train_settings import TrainSettings
from facediffuser.training.worker_context import Worker

logger = logging.getLogger(__name__)

HIGH_LOSS, HIGH_STEPS = 5.0, 20
"""A noise loss starts near 1 (the cost of predicting 0): above 5 for 20 steps in a row the weights are broken."""

Report = Callable[[dict[str, float]], None]


class DivergedError(RunError):
    """Loss or gradient is not finite, or the loss stays far above its start; the last checkpoint is still good."""


def train_model(settings: TrainSettings, report: Report, worker: Worker | None = None) -> dict[str, Any]:
    """Train one model to the recipe's number of steps, resuming from the last checkpoint when there is one.

    Every random choice about an image follows from the seed and the image's position in the sequence of all images. A
    resumed run therefore ends with the weights of an uninterrupted one, and two workers see the images that one worker
    with twice the batch size sees.

    Args:
        settings: settings of a single role.
        report: called every `log_every` steps with a dict of numbers: step, loss, localization, learning_rate,
            grad_norm, images_per_second, waiting (share of the time spent waiting for batches, 0..1).
        worker: this process among the workers; a single CPU worker by default.

    Returns:
        `role`, `step` (the last one), `loss` (of the last step) and `seconds`.

    Raises:
        InputError: the settings, the base model or the data do not fit together.
        DivergedError: loss or gradient is not finite, or the loss stays far above its start.
    """
    return TrainingRun(settings, worker or Worker(), report).run()


class TrainingRun:
    """One worker's part of a run: `run` does all of it; or call `train_step` with the iterator of `batch_iterator`.

    Args:
        settings: settings of a single role.
        worker: this process among the workers.
        report: as for `train_model`.
    """

    def __init__(self, settings: TrainSettings, worker: Worker, report: Report):
        self.settings, self.recipe, self.worker, self.report = settings, settings.recipe(), worker, report
        self.device = torch.device(worker.device)
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        self.provenance = current_provenance(torch.get_num_threads(), gpu)
        self.store = open_store(settings.output)
        self.parts = load_parts(settings, worker.device)
        named = select_trained(settings.role, self.parts.trained, self.recipe.train_image_encoder_layers)
        self.trained = list(named.values())
        self.batches = split_batches(settings, self.parts, "train", worker)
        self.monitor: TrainingMonitor | None = None
        wanted = self.device.type == "cuda" if self.recipe.compile is None else self.recipe.compile
        compiled = wanted and can_compile(self.device)
        if compiled:
            self.parts.denoiser.unet.compile()
        self.provenance["engine"] = "compiled" if compiled else "eager"
        self.model = worker.wrap(self.parts.denoiser)
        self.optimiser = torch.optim.AdamW(
            _parameter_groups(named, self.recipe),
            betas=(0.9, self.recipe.beta2),
            weight_decay=self.recipe.weight_decay,
            fused=True,
        )
        self.average = [p.detach().clone() for p in self.trained] if self.recipe.ema else []
        alphas = self.parts.schedule.alphas_cumprod
        weights = min_snr_weights(alphas, self.recipe.min_snr) if self.recipe.min_snr else torch.ones_like(alphas)
        self.time_weights = weights.to(self.device)
        self.step = self.high_loss_steps = 0

    def run(self) -> dict[str, Any]:
        """Train from the last checkpoint to the last step and write the result; return what `train_model` does."""
        settings, steps = self.settings, self.recipe.steps
        if self.worker.rank == 0:
            inputs = {"data": data_fingerprint(settings.data), **self.parts.inputs}
            runs.begin_or_resume_training(self.store, settings, inputs, self.worker.count)
        self._load_last_checkpoint()
        if self.worker.rank == 0:
            self.monitor = TrainingMonitor(settings, self.store, self.report, self.step)
        if self.step == 0:
            self._validate_if_due()
        started, last = time.monotonic(), {"loss": math.nan}
        batches = self.batch_iterator()
        throughput = Throughput(self.recipe.batch_size * self.recipe.accumulate * self.worker.count)
        while self.step < steps:
            last = self.train_step(batches, throughput)
            if self.step % settings.log_every == 0 or self.step == steps:
                last |= throughput.rates()
                self.report({"step": float(self.step), **last})
                if self.monitor:
                    self.monitor.log(self.step, last)
            with throughput.paused():
                self._validate_if_due()
                if self.step % settings.checkpoint_every == 0 and self.step < steps:
                    self._save_checkpoint()
        result = {"role": settings.role, "step": self.step, "loss": last["loss"], "seconds": time.monotonic() - started}
        self._save_checkpoint()
        if self.worker.rank == 0:
            self._save_final(result)
        return result

    def _validate_if_due(self) -> None:
        """Write the validation loss and the sample grid that are due after this step, with the averaged weights."""
        if self.monitor and self.monitor.is_due(self.step, self.recipe.steps):
            with self._ema_weights():
                self.monitor.validate(self.step, self.recipe.steps, self.parts)

    def _save_final(self, result: dict[str, Any]) -> None:
        settings = self.settings.model_dump(mode="json") | {"recipe": self.recipe.model_dump(mode="json")}
        used = {"device": self.device.type, "compute_type": str(self.parts.compute_type).removeprefix("torch.")}
        record = {**result, **used, "settings": settings, "content": self.settings.content()}
        record["workers"] = self.worker.count
        record["computed_with"] = self.provenance
        with self._ema_weights():
            runs.save_final(self.store, self.parts.trained, {**record, "base_digests": self.parts.digests})
        if self.monitor:
            self.monitor.close()

    def batch_iterator(self) -> DeviceBatches:
        """Return this worker's batches from its current step to the last, prepared by the loader processes."""
        recipe, worker = self.recipe, self.worker
        first, last = (step * recipe.accumulate for step in (self.step, recipe.steps))
        all_workers = recipe.batch_size * worker.count
        positions = range(first * all_workers + worker.rank * recipe.batch_size, last * all_workers, all_workers)
        prepared = prefetch_batches(self.batches, positions, worker.loaders, pin_memory=self.device.type == "cuda")
        return DeviceBatches(prepared, self.device)

    def train_step(self, batches: DeviceBatches, throughput: Throughput) -> dict[str, float]:
        """Do one optimiser step.

        Args:
            batches: what `batch_iterator` returned; `recipe.accumulate` of its batches are taken.
            throughput: counts the step and the time spent waiting for the batches.

        Returns:
            `loss`, `localization`, `learning_rate` and `grad_norm` (before clipping), means over all workers.

        Raises:
            DivergedError: before the weights change, when loss or gradient cannot be used.
        """
        recipe = self.recipe
        share = learning_rate_share(recipe, self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = group["full_rate"] * share
        # Random numbers drawn during the step (a model's dropout) are the same after a restart.
        torch.manual_seed(image_seed(self.settings.seed, self.step))
        sums = torch.zeros(2, device=self.device)
        for part in range(recipe.accumulate):
            with throughput.waiting():
                batch = next(batches)
            with nullcontext() if part == recipe.accumulate - 1 else self._without_gradient_sync():
                losses = self.losses(batch)
                (losses[0] / recipe.accumulate).backward()
            with throughput.waiting():
                batches.start_next()
            sums += torch.stack([loss.detach() for loss in losses]) / recipe.accumulate
        norm = nn.utils.clip_grad_norm_(self.trained, recipe.max_grad_norm)
        if self.worker.count > 1:
            torch.distributed.all_reduce(sums)
            sums /= self.worker.count
        # One device synchronisation per step.
        loss, localization, norm = torch.stack([*sums, norm]).tolist()
        self._check_divergence(loss, norm)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        throughput.step()
        self._update_ema()
        rate = recipe.learning_rate * share
        return {"loss": loss, "localization": localization, "learning_rate": rate, "grad_norm": norm}

    def _without_gradient_sync(self) -> AbstractContextManager:
        """Return a context in which gradients accumulate locally: more batches follow before the step."""
        return self.model.no_sync() if self.worker.count > 1 else nullcontext()

    def losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a batch's total loss (the one with a gradient) and its localization loss alone, two scalars."""
        recipe, noise, times = self.recipe, batch.noise, batch.times
        with self.parts.autocast():
            noisy = self.parts.schedule.add_noise(self.parts.latents(batch), noise, times)
            predicted, maps = self.model(noisy, times, self.parts.text(batch), batch)
        # The loss covers the whole image where it is not masked or has no subjects.
        inside = batch.areas.amax(1, keepdim=True)
        mask = torch.where(batch.masked[:, None, None, None], inside, 1.0) if self.settings.role == "sdm" else None
        emphasis = 1 + recipe.face_weight * batch.faces if recipe.face_weight else None
        errors = noise_loss(predicted, noise, mask, recipe.masked_loss_mean, emphasis)
        localization = self._localization(maps, batch)
        return (errors * self.time_weights[times]).mean() + recipe.localization * localization, localization

    def _localization(self, maps: list[torch.Tensor], batch: Batch) -> torch.Tensor:
        if not maps:
            return torch.zeros((), device=self.device)
        slots, (height, width) = batch.areas.shape[1], batch.noise.shape[-2:]
        present = torch.arange(slots, device=self.device) < batch.tokens.subject_counts[:, None]
        order = torch.where(batch.tokens.subject_mask, batch.tokens.subject_mask.cumsum(1) - 1, slots)
        tokens = (order[:, None, :] == torch.arange(slots, device=self.device)[None, :, None]).int().argmax(-1)
        return localization_loss(maps, batch.areas, tokens, present, height / width).mean()

    def _update_ema(self) -> None:
        if self.average:
            update_average(self.average, self.trained, self.recipe.ema, self.step)

    @contextmanager
    def _ema_weights(self) -> Iterator[None]:
        """Put the averaged weights (EMA), if there are any, in place of the trained ones during the block."""
        trained = [p.detach().clone() for p in self.trained] if self.average else []
        for parameter, mean in zip(self.trained, self.average, strict=bool(self.average)):
            parameter.data.copy_(mean)
        try:
            yield
        finally:
            for parameter, own in zip(self.trained, trained, strict=bool(trained)):
                parameter.data.copy_(own)

    def _check_divergence(self, loss: float, norm: float) -> None:
        """Raise DivergedError when the gradient is not finite or the loss was too high for HIGH_STEPS steps."""
        if math.isfinite(norm):
            self.high_loss_steps = self.high_loss_steps + 1 if loss > HIGH_LOSS else 0
            if self.high_loss_steps < HIGH_STEPS:
                return
        good = (runs.checkpoint_steps(self.store) or [0])[-1]
        raise DivergedError(
            f"{self.settings.output}: the loss is {loss:.4g} and the gradient's norm {norm:.4g} at step {self.step}; the last "
            f"good checkpoint is that of step {good}; start from lower --learning-rate in a new output"
        )

    def _save_checkpoint(self) -> None:
        if self.worker.rank == 0:
            state = {
                "step": self.step,
                "content": self.settings.content(),
                "trained": [p.detach().cpu() for p in self.trained],
                "average": [p.cpu() for p in self.average],
                "optimiser": self.optimiser.state_dict(),
            }
            keep = self.settings.keep_last, self.settings.keep_every
            runs.save_checkpoint(self.store, self.step, state, *keep, computed_with=self.provenance)
            if self.monitor:
                self.monitor.upload()

    def _load_last_checkpoint(self) -> None:
        steps = runs.checkpoint_steps(self.store)
        if not steps:
            return
        if self.settings.exact:
            recorded = runs.recorded_provenances(self.store)
            check_provenance(self.settings.output, recorded, self.provenance, exact=True)
        state = runs.load_checkpoint(self.store, steps[-1])
        with torch.no_grad():
            for current, saved in ((self.trained, state["trained"]), (self.average, state["average"])):
                for parameter, value in zip(current, saved, strict=True):
                    parameter.copy_(value)
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]
        logger.info("%s: resuming from step %d", self.settings.output, self.step)


def learning_rate_share(recipe: Recipe, step: int) -> float:
    """Return the factor on the full learning rate at a step, in (0, 1].

    It rises linearly during the warm-up, then stays 1 or, with the `decay` schedule, falls linearly to 0.02 over the
    second half of the steps.

    Args:
        recipe: steps, warm-up steps and schedule.
        step: number of the step, counted from 0.
    """
    rising = min(1.0, (step + 1) / max(1, recipe.warmup_steps))
    half = recipe.steps / 2
    falling = 1.0 if recipe.schedule == "constant" or step < half else max(0.02, (recipe.steps - step) / half)
    return rising * falling


def _parameter_groups(named: dict[str, nn.Parameter], recipe: Recipe) -> list[dict[str, Any]]:
    rates = {
        "unet": recipe.learning_rate,
        "subject_fuser": recipe.subject_learning_rate or recipe.learning_rate,
        "image_encoder": recipe.encoder_learning_rate or recipe.learning_rate,
    }
    groups = [
        {"params": [p for name, p in named.items() if name.split(".")[0] == part], "lr": rate, "full_rate": rate}
        for part, rate in rates.items()
    ]
    return [group for group in groups if group["params"]]
