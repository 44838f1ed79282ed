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

from facediffuser.storage import open_store
from facediffuser.training import training_run as runs
from facediffuser.training.ahead import ahead
from facediffuser.training.batches import Batch, image_seed
from facediffuser.training.denoisers import load_parts
from facediffuser.training.losses import localization_loss, min_snr_weights, noise_loss
from facediffuser.training.parameters import select_trained
from facediffuser.training.recipe import Recipe
from facediffuser.training.speed import Speed
from facediffuser.training.train_settings import TrainSettings
from facediffuser.training.validation import split_batches
from facediffuser.training.watching import Watcher
from facediffuser.training.worker_context import Worker

logger = logging.getLogger(__name__)

HIGH_LOSS, HIGH_STEPS = 5.0, 20
"""A noise loss starts near 1, what guessing 0 costs: one of 5 for 20 steps on end comes from broken weights."""

Report = Callable[[dict[str, float]], None]


class DivergedError(RuntimeError):
    """The loss is no finite number any more, or far beyond what it was; the last checkpoint is still good."""


def train_model(settings: TrainSettings, report: Report, worker: Worker | None = None) -> dict[str, Any]:
    """Train to the recipe's steps, from the last checkpoint when there is one; return role, step, loss and seconds.

    `report` gets a dict of numbers every `log_every` steps: step, loss, localization,
    learning_rate, images_per_second, waiting (the share of the time spent waiting for batches), grad_norm.
    Every random choice about an image follows from the seed and its place in the sequence of all images, so a run that was
    stopped ends as an undisturbed one, and two workers see what one with the doubled batch sees. Raises InputError for
    settings and data that do not fit, DivergedError when loss or gradient is not finite.
    """
    return TrainingRun(settings, worker or Worker(), report).go()


class TrainingRun:
    """A run of one worker: `go` for all of it, or `one_step` after another on what `upcoming` gives."""

    def __init__(self, settings: TrainSettings, worker: Worker, report: Report):
        self.settings, self.recipe, self.worker, self.report = settings, settings.recipe(), worker, report
        self.device = torch.device(worker.device)
        self.store = open_store(settings.output)
        self.parts = load_parts(settings, worker.device)
        named = select_trained(settings.role, self.parts.trained, self.recipe.train_image_encoder_layers)
        self.trained = list(named.values())
        self.batches = split_batches(settings, self.parts, "train", worker)
        self.watcher: Watcher | None = None
        if self.recipe.compile:
            self.parts.denoiser.unet.compile()
        self.model = worker.wrap(self.parts.denoiser)
        self.optimiser = torch.optim.AdamW(
            _groups(named, self.recipe),
            betas=(0.9, self.recipe.beta2),
            weight_decay=self.recipe.weight_decay,
            fused=True,
        )
        self.average = [p.detach().clone() for p in self.trained] if self.recipe.ema else []
        alphas = self.parts.schedule.alphas_cumprod
        weights = min_snr_weights(alphas, self.recipe.min_snr) if self.recipe.min_snr else torch.ones_like(alphas)
        self.time_weights = weights.to(self.device)
        self.step = self.high = 0

    def go(self) -> dict[str, Any]:
        settings, steps = self.settings, self.recipe.steps
        if self.worker.rank == 0:
            runs.start(self.store, settings)
        self._load_last()
        if self.worker.rank == 0:
            self.watcher = Watcher(settings, self.store, self.report, self.step)
        if self.step == 0:
            self._look()
        started, last = time.monotonic(), {"loss": math.nan}
        upcoming = self.upcoming()
        speed = Speed(self.recipe.batch_size * self.recipe.accumulate * self.worker.count)
        while self.step < steps:
            last = self.one_step(upcoming, speed)
            if self.step % settings.log_every == 0 or self.step == steps:
                last |= speed.since_last()
                self.report({"step": float(self.step), **last})
                if self.watcher:
                    self.watcher.write(self.step, last)
            with speed.paused():
                self._look()
                if self.step % settings.checkpoint_every == 0 and self.step < steps:
                    self._save_checkpoint()
        result = {"role": settings.role, "step": self.step, "loss": last["loss"], "seconds": time.monotonic() - started}
        self._save_checkpoint()
        if self.worker.rank == 0:
            self._save_final(result)
        return result

    def _look(self) -> None:
        if self.watcher and self.watcher.is_due(self.step, self.recipe.steps):
            with self._averaged():
                self.watcher.look(self.step, self.recipe.steps, self.parts)

    def _save_final(self, result: dict[str, Any]) -> None:
        settings = self.settings.model_dump(mode="json") | {"recipe": self.recipe.model_dump(mode="json")}
        used = {"device": self.device.type, "compute_type": str(self.parts.compute_type).removeprefix("torch.")}
        record = {**result, **used, "settings": settings, "content": self.settings.content()}
        with self._averaged():
            runs.save_final(self.store, self.parts.trained, {**record, "base_digests": self.parts.digests})
        self.watcher.close()

    def upcoming(self) -> Iterator[Batch]:
        """Return this worker's batches from the step it is at, made ahead."""
        recipe, worker = self.recipe, self.worker
        first, last = (step * recipe.accumulate for step in (self.step, recipe.steps))
        all_workers = recipe.batch_size * worker.count
        places = range(first * all_workers + worker.rank * recipe.batch_size, last * all_workers, all_workers)
        return ahead(self.batches, places, worker.loaders, pin=self.device.type == "cuda")

    def one_step(self, upcoming: Iterator[Batch], speed: Speed) -> dict[str, float]:
        """Learn from the next batches; return loss, localization, learning_rate and grad_norm."""
        recipe = self.recipe
        share = learning_rate_share(recipe, self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = group["full_rate"] * share
        # Whatever draws numbers on the way (a model's dropout) draws the same ones after a restart.
        torch.manual_seed(image_seed(self.settings.seed, self.step))
        sums = torch.zeros(2, device=self.device)
        for part in range(recipe.accumulate):
            with speed.waiting():
                batch = next(upcoming)
            with nullcontext() if part == recipe.accumulate - 1 else self._alone():
                losses = self.losses(batch.to(self.device))
                (losses[0] / recipe.accumulate).backward()
            sums += torch.stack([one.detach() for one in losses]) / recipe.accumulate
        norm = nn.utils.clip_grad_norm_(self.trained, recipe.max_grad_norm)
        if self.worker.count > 1:
            torch.distributed.all_reduce(sums)
            sums /= self.worker.count
        # One look at the device's numbers a step.
        loss, localization, norm = torch.stack([*sums, norm]).tolist()
        self._require_sound(loss, norm)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        speed.step()
        self._move_average()
        rate = recipe.learning_rate * share
        return {"loss": loss, "localization": localization, "learning_rate": rate, "grad_norm": norm}

    def _alone(self) -> AbstractContextManager:
        """Gradients are not exchanged: those of more batches come before the step."""
        return self.model.no_sync() if self.worker.count > 1 else nullcontext()

    def losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what a batch's gradient is of, and its localization loss by itself."""
        recipe, noise, times = self.recipe, batch.noise, batch.times
        with self.parts.computing():
            noisy = self.parts.schedule.add_noise(self.parts.latents(batch), noise, times)
            predicted, maps = self.model(noisy, times, self.parts.text(batch), batch)
        # An image that is not to be masked, and one without subjects, count whole.
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

    def _move_average(self) -> None:
        if self.average:
            decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.trained], 1 - decay)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights, if there are any, in place of the trained ones for as long as the block lasts."""
        kept = [p.detach().clone() for p in self.trained] if self.average else []
        for parameter, mean in zip(self.trained, self.average, strict=bool(self.average)):
            parameter.data.copy_(mean)
        try:
            yield
        finally:
            for parameter, own in zip(self.trained, kept, strict=bool(kept)):
                parameter.data.copy_(own)

    def _require_sound(self, loss: float, norm: float) -> None:
        """Raise DivergedError before a step that would spoil the weights, or when the loss has been far too high for long."""
        if math.isfinite(norm):
            self.high = self.high + 1 if loss > HIGH_LOSS else 0
            if self.high < HIGH_STEPS:
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
            runs.save_checkpoint(self.store, self.step, state, self.settings.keep_last, self.settings.keep_every)
            self.watcher.upload()

    def _load_last(self) -> None:
        steps = runs.checkpoint_steps(self.store)
        if not steps:
            return
        state = runs.load_checkpoint(self.store, steps[-1])
        with torch.no_grad():
            for mine, theirs in ((self.trained, state["trained"]), (self.average, state["average"])):
                for parameter, value in zip(mine, theirs, strict=True):
                    parameter.copy_(value)
        self.optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]
        logger.info("%s: going on from step %d", self.settings.output, self.step)


def learning_rate_share(recipe: Recipe, step: int) -> float:
    """Return the share of the full learning rate at a step: rising in the warm-up, then constant or going down to 2%."""
    rising = min(1.0, (step + 1) / max(1, recipe.warmup_steps))
    half = recipe.steps / 2
    falling = 1.0 if recipe.schedule == "constant" or step < half else max(0.02, (recipe.steps - step) / half)
    return rising * falling


def _groups(named: dict[str, nn.Parameter], recipe: Recipe) -> list[dict[str, Any]]:
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
