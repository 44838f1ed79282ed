"""The training loop of one worker, as a function of its settings; it reports through a callback."""

import hashlib
import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from facediffuser.storage import open_store
from facediffuser.training import runs
from facediffuser.training.batches import Batch, Batches
from facediffuser.training.denoisers import Parts, load_parts
from facediffuser.training.losses import localization_loss, min_snr_weights, noise_loss
from facediffuser.training.parameters import select_trained
from facediffuser.training.recipe import Recipe
from facediffuser.training.records import Records, load_moments
from facediffuser.training.settings import TrainSettings

logger = logging.getLogger(__name__)

Report = Callable[[dict[str, float]], None]


class DivergedError(RuntimeError):
    """The loss is no finite number any more; the last checkpoint is still good."""


@dataclass(frozen=True)
class Worker:
    """Which of how many workers this is, and where it computes."""

    rank: int = 0
    count: int = 1
    device: str = "cpu"
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    """Makes a module sum its gradients over the workers."""


def train_model(settings: TrainSettings, report: Report, worker: Worker | None = None) -> dict[str, Any]:
    """Train to the recipe's steps, from the last checkpoint when there is one; return role, step, loss and seconds.

    `report` gets a dict of numbers every `log_every` steps: step, loss, localization, learning_rate, images_per_second.
    Every random choice of a step follows from (seed, step, worker), so a run that was stopped ends as an undisturbed one. Raises
    InputError for settings and data that do not fit, DivergedError when the loss is not finite.
    """
    return _Run(settings, worker or Worker(), report).go()


class _Run:
    def __init__(self, settings: TrainSettings, worker: Worker, report: Report):
        self.settings, self.recipe, self.worker, self.report = settings, settings.recipe(), worker, report
        self.device = torch.device(worker.device)
        self.store = open_store(settings.output)
        self.parts = load_parts(settings)
        named = select_trained(settings.role, self.parts.trained, self.recipe.train_image_encoder_layers)
        self.trained = list(named.values())
        self.parts.denoiser.to(self.device).train()
        if self.recipe.channels_last:
            self.parts.denoiser.unet.to(memory_format=torch.channels_last)
        self.parts.text_encoder.to(self.device)
        self.batches = _batches(settings, self.parts, self.device)
        self.model = worker.wrap(self.parts.denoiser)
        if self.recipe.compile:
            self.model = torch.compile(self.model)
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
        self.step = 0

    def go(self) -> dict[str, Any]:
        started, last = time.monotonic(), {"loss": math.nan}
        self._load_last()
        while self.step < self.recipe.steps:
            begun = time.monotonic()
            last = self._one_step()
            images = self.recipe.batch_size * self.recipe.accumulate * self.worker.count
            last["images_per_second"] = images / (time.monotonic() - begun)
            if self.step % self.settings.log_every == 0 or self.step == self.recipe.steps:
                self.report({"step": float(self.step), **last})
            if self.step % self.settings.checkpoint_every == 0 and self.step < self.recipe.steps:
                self._save_checkpoint()
        result = {
            "role": self.settings.role,
            "step": self.step,
            "loss": last["loss"],
            "seconds": time.monotonic() - started,
        }
        self._save_checkpoint()
        if self.worker.rank == 0:
            self._use_average()
            settings = self.settings.model_dump(mode="json") | {"recipe": self.recipe.model_dump(mode="json")}
            record = {**result, "settings": settings, "content": self.settings.content()}
            runs.save_final(self.store, self.parts.trained, {**record, "base_digests": self.parts.digests})
        return result

    def _one_step(self) -> dict[str, float]:
        recipe, worker = self.recipe, self.worker
        share = learning_rate_share(recipe, self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = group["full_rate"] * share
        totals = {"loss": 0.0, "localization": 0.0}
        per_step = recipe.batch_size * recipe.accumulate * worker.count
        for part in range(recipe.accumulate):
            place = part * worker.count + worker.rank
            torch.manual_seed(step_seed(self.settings.seed, self.step, place))
            rows = self.batches.rows(self.step * per_step + place * recipe.batch_size, recipe.batch_size)
            loss, localization = self._losses(self.batches.make(rows).to(self.device))
            if not torch.isfinite(loss):
                good = (runs.checkpoint_steps(self.store) or [0])[-1]
                raise DivergedError(
                    f"{self.settings.output}: the loss is {float(loss)} at step {self.step}; the last good checkpoint is "
                    f"that of step {good}; go on from it with a lower --learning-rate in a new output"
                )
            (loss / recipe.accumulate).backward()
            totals["loss"] += float(loss.detach()) / recipe.accumulate
            totals["localization"] += float(localization.detach()) / recipe.accumulate
        nn.utils.clip_grad_norm_(self.trained, recipe.max_grad_norm)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self._move_average()
        return {**totals, "learning_rate": recipe.learning_rate * share}

    def _losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        recipe, latents = self.recipe, batch.latents
        times = torch.randint(self.parts.schedule.config.num_train_timesteps, (len(latents),)).to(self.device)
        noise = torch.randn(latents.shape).to(self.device)
        masked = self.settings.role == "sdm" and float(torch.rand(())) < recipe.masked_loss
        noisy = self.parts.schedule.add_noise(latents, noise, times)
        half = recipe.precision == "bf16" or (recipe.precision == "auto" and self.device.type == "cuda")
        with torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext():
            with torch.no_grad():
                text = self.parts.text_encoder(batch.tokens.input_ids).last_hidden_state
            predicted, maps = self.model(noisy, times, text, batch)
        mask = batch.areas.amax(1, keepdim=True) if masked else None
        emphasis = 1 + recipe.face_weight * batch.faces if recipe.face_weight else None
        errors = noise_loss(predicted, noise, mask, recipe.masked_loss_mean, emphasis)
        localization = self._localization(maps, batch)
        return (errors * self.time_weights[times]).mean() + recipe.localization * localization, localization

    def _localization(self, maps: list[torch.Tensor], batch: Batch) -> torch.Tensor:
        if not maps:
            return torch.zeros((), device=self.device)
        slots, (height, width) = batch.areas.shape[1], batch.latents.shape[-2:]
        present = torch.arange(slots, device=self.device) < batch.tokens.subject_counts[:, None]
        order = torch.where(batch.tokens.subject_mask, batch.tokens.subject_mask.cumsum(1) - 1, slots)
        tokens = (order[:, None, :] == torch.arange(slots, device=self.device)[None, :, None]).int().argmax(-1)
        return localization_loss(maps, batch.areas, tokens, present, height / width).mean()

    def _move_average(self) -> None:
        if self.average:
            decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.trained], 1 - decay)

    def _use_average(self) -> None:
        for parameter, mean in zip(self.trained, self.average, strict=bool(self.average)):
            parameter.data.copy_(mean)

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


def step_seed(seed: int, step: int, place: int) -> int:
    """Return the seed of all chance in one batch; far apart for neighbouring steps and workers."""
    digest = hashlib.blake2b(f"{seed}/{step}/{place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


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


def _batches(settings: TrainSettings, parts: Parts, device: torch.device) -> Batches:
    recipe = settings.recipe()
    records = Records(settings.data, "train")
    key = f"{records.digest()[:16]}-{parts.digests['vae'][:16]}-{recipe.resolution}"
    cache = settings.cache or f"{settings.data.rstrip('/')}-latents"
    moments = load_moments(records, parts.vae.to(device), recipe.resolution, cache, key)
    parts.vae.cpu()
    size = parts.denoiser.image_encoder.config.image_size if settings.role == "sdm" else 0
    scale = parts.vae.config.scaling_factor
    return Batches(recipe, settings.seed, records, moments, scale, parts.tokenizer, size)
