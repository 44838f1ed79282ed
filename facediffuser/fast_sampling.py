"""Steps by the means of fast mode: which rows and which part of a UNet each step evaluates, and the noise it gives.

`plan_steps` says it before the first step, for all images alike; `FastPredictor` does it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Literal

import torch

from facediffuser import snf
from facediffuser.means import Means
from facediffuser.stages import Conditions, Guidance, Prediction, Stage
from facediffuser.unet_parts import Encoded, decode, encode, last_layers

Part = Literal["whole", "decoder", "layers"]
Denoiser = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
BASELINE, CONDITION = "baseline", "condition"

_READ = {
    ("unet_text", Stage.TEXT): ("null", "text"),
    ("unet_text", Stage.FUSION): ("null", "text"),
    ("unet", Stage.FUSION): ("text", "subject"),
    ("unet", Stage.SUBJECT): ("text", "subject"),
    ("unet", Stage.DELAY): ("null", "text"),
    ("unet", Stage.DELAYED): ("null", "subject"),
}
"""The baseline and the condition that a UNet reads in a stage, by their names in `Conditions`."""


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        stage: its stage.
        guidance: `full` evaluates baseline and condition, `kept` the condition with the difference of an earlier step,
            `none` the condition alone.
        part: `whole`, the `decoder` on an earlier step's encoder, or the last `layers` on an earlier step's features.
        group: the step whose features it reads; its own number where it is evaluated whole.
    """

    stage: Stage
    guidance: Literal["full", "kept", "none"]
    part: Part
    group: int

    @property
    def rows(self) -> tuple[str, ...]:
        """The rows of an image that each UNet of the stage evaluates."""
        return (BASELINE, CONDITION) if self.guidance == "full" else (CONDITION,)


def plan_steps(stages: Sequence[Stage], means: Means) -> list[Step]:
    """Return what every step evaluates.

    Args:
        stages: the stage of each step, as `plan_stages` returns them.
        means: what is left out.
    """
    steps: list[Step] = []
    part: Part = "layers" if means.deep_every > 1 else "decoder"
    every = max(means.deep_every, means.encoder_every)
    for stage, group in groupby(stages):
        length = len(list(group))
        whole = stage is Stage.FUSION and not means.in_fusion
        unguided = {Stage.TEXT: means.unguided_text, Stage.DELAY: means.unguided_text, Stage.FUSION: 0.0}
        # Halves are rounded up, whatever the number of steps: round() would take 2 of 3 but 2 of 5.
        guided = length - int(unguided.get(stage, means.unguided_subject) * length + 0.5)
        key = len(steps)
        for place in range(length):
            number = len(steps)
            if whole:
                steps.append(Step(stage, "full", "whole", number))
                continue
            guidance: Literal["full", "kept", "none"] = "full" if place % means.guidance_every == 0 else "kept"
            if place >= guided:
                guidance = "none"
            step = Step(stage, guidance, part, key)
            # Features are kept of rows that were evaluated: a step that needs another row begins anew.
            if place == 0 or number - key >= every or not set(step.rows) <= set(steps[key].rows):
                key = number
                step = Step(stage, guidance, "whole", number)
            steps.append(step)
    return steps


def row_equivalents(steps: Sequence[Step], shares: Mapping[str, float]) -> float:
    """Return what an image costs, in evaluations of one row by a whole UNet.

    Args:
        steps: as `plan_steps` returns them.
        shares: the share of a whole evaluation's operations that each part takes (`part_shares`).
    """
    return sum(len(step.rows) * len(step.stage.components) * shares[step.part] for step in steps)


def part_shares(unet, layers: int = 1) -> dict[str, float]:
    """Return the share of a UNet's floating-point operations that each part takes, at the UNet's own size.

    Args:
        unet: a UNet2DConditionModel; it is evaluated on one row of zeros.
        layers: the `deep_layers` of the means.
    """
    from torch.utils.flop_counter import FlopCounterMode

    side = unet.config.sample_size
    sides = (side, side) if isinstance(side, int) else tuple(side)
    where = {"device": unet.device, "dtype": unet.dtype}
    rows = torch.zeros(1, unet.config.in_channels, *sides, **where)
    embeds = torch.zeros(1, 77, unet.config.cross_attention_dim, **where)
    t = torch.zeros((), device=unet.device)

    def operations(run: Callable[[], object]) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    with torch.no_grad():
        encoded = encode(unet, rows, t, embeds)
        deep = decode(unet, encoded, t, embeds, layers)[1]
    whole = operations(lambda: decode(unet, encode(unet, rows, t, embeds), t, embeds))
    return {
        "whole": 1.0,
        "decoder": operations(lambda: decode(unet, encoded, t, embeds)) / whole,
        "layers": operations(lambda: last_layers(unet, rows, t, embeds, deep, layers)) / whole,
    }


class FastPredictor:
    """Predicts the noise of the steps of one call, in their order.

    Args:
        means: what is left out.
        stages: the stage of each step.
        timesteps: the time of each step, on the device.
        unets: the UNets by name, for what is evaluated in parts.
        denoise: evaluates a UNet, by name, as a whole: (name) -> function of rows (b, c, h, w), t and embeddings.
        conditions: the embeddings of b images.
        guidance: guidance scale and SNF's temperatures.
        evaluate: runs a function of a UNet in parts as an engine runs the UNet: (name, function, first, t, embeddings, ...);
            by default the function is called as it is.
    """

    def __init__(
        self,
        means: Means,
        stages: Sequence[Stage],
        timesteps: torch.Tensor,
        unets: Mapping[str, torch.nn.Module | None],
        denoise: Callable[[str], Denoiser],
        conditions: Conditions,
        guidance: Guidance,
        evaluate: Callable | None = None,
    ):
        self.means, self.timesteps, self.conditions, self.guidance = means, timesteps, conditions, guidance
        self.steps = plan_steps(stages, means)
        self._models = {
            name: _Model(denoise(name), partial(evaluate, name) if evaluate else partial(_as_it_is, unet), means)
            for name, unet in unets.items()
            if unet is not None
        }
        self._pairs: dict[tuple, torch.Tensor] = {}

    def __call__(self, number: int, latents: torch.Tensor, with_saliency: bool = False) -> Prediction:
        """Return the noise of a step, as `facediffuser.stages.predict` does.

        Args:
            number: the step's.
            latents: (b, c, h, w), scaled as the scheduler wants them.
            with_saliency: compute the saliency of whichever model runs in every stage.
        """
        step = self.steps[number]
        made = {name: self._guided(name, number, latents) for name in step.stage.components}
        fused = step.stage is Stage.FUSION
        kinds = {"unet_text": self.guidance.text_temperature, "unet": self.guidance.subject_temperature}
        saliencies = {
            name: snf.saliency(response, kinds[name]) for name, (response, _) in made.items() if fused or with_saliency
        }
        of_text, of_subject = saliencies.get("unet_text"), saliencies.get("unet")
        if fused:
            mask = snf.subject_mask(of_text, of_subject)
            noise = snf.fuse(made["unet_text"][1], made["unet"][1], mask)
        else:
            (name,) = step.stage.components
            mask = torch.full_like(latents[:, :1], name == "unet", dtype=torch.bool)
            noise = made[name][1]
        return Prediction(noise, mask, of_text, of_subject)

    def _guided(self, name: str, number: int, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a model's response and its guided noise at a step."""
        step, model, scale = self.steps[number], self._models[name], self.guidance.scale
        rows = dict(zip(step.rows, self._evaluate(name, number, latents), strict=True))
        if step.guidance == "full":
            response, noise = snf.guide(rows[BASELINE], rows[CONDITION], scale)
            model.response = response
            return response, noise
        condition = rows[CONDITION] if rows[CONDITION].dtype == torch.float64 else rows[CONDITION].float()
        if step.guidance == "none":
            return torch.zeros_like(condition), condition
        assert model.response is not None  # the first step of a stage is evaluated in full
        # baseline + s (condition - baseline), with baseline = condition - the difference that was kept.
        return model.response, condition + model.response * ((scale - 1) / scale if scale else 0.0)

    def _evaluate(self, name: str, number: int, latents: torch.Tensor) -> list[torch.Tensor]:
        step, model, b = self.steps[number], self._models[name], len(latents)
        if step.part == "decoder" and self.means.merged:
            return model.ahead.pop(number)
        rows = torch.cat([latents] * len(step.rows))
        followers = [(n, one) for n, one in enumerate(self.steps) if one.group == number and n != number]
        noise = model(step, rows, self.timesteps[number], self._embeds(name, step, step.rows), bool(followers))
        if followers and self.means.merged:
            self._decode_ahead(name, step, followers, b)
        return list(noise.split(b))

    def _decode_ahead(self, name: str, step: Step, followers: Sequence[tuple[int, Step]], b: int) -> None:
        """Evaluate the decoder for all steps that read this step's features, in one call."""
        model = self._models[name]
        wanted = [(number, row) for number, one in followers for row in one.rows]
        places = torch.tensor([step.rows.index(row) for _, row in wanted])
        index = (places[:, None] * b + torch.arange(b)).flatten().to(self.timesteps.device)
        times = torch.stack([self.timesteps[number] for number, _ in wanted]).repeat_interleave(b)
        embeds = self._embeds(name, step, tuple(row for _, row in wanted))
        made = model.decode(index, times, embeds).split(b)
        for (number, _), noise in zip(wanted, made, strict=True):
            model.ahead.setdefault(number, []).append(noise)

    def _embeds(self, name: str, step: Step, rows: tuple[str, ...]) -> torch.Tensor:
        """Return embeddings, one set below the other: the same tensor whenever the same rows are asked for."""
        baseline, condition = _READ[name, step.stage]
        names = tuple(baseline if row == BASELINE else condition for row in rows)
        if names not in self._pairs:
            self._pairs[names] = torch.cat([getattr(self.conditions, one) for one in names])
        return self._pairs[names]


class _Model:
    """One UNet with what is kept of its earlier evaluations."""

    def __init__(self, denoise: Denoiser, run: Callable, means: Means):
        self.denoise, self.run, self.means = denoise, run, means
        self.response: torch.Tensor | None = None
        self.ahead: dict[int, list[torch.Tensor]] = {}
        self._encoded: Encoded | None = None
        self._deep: torch.Tensor | None = None

    def __call__(self, step: Step, rows: torch.Tensor, t: torch.Tensor, embeds: torch.Tensor, keep: bool):
        """Return the noise of rows (r, c, h, w); `keep`: later steps read its features."""
        if step.part == "whole":
            if not keep:
                return self.denoise(rows, t, embeds)
            layers = self.means.deep_layers if self.means.deep_every > 1 else 0
            encoded = self.run(encode, rows, t, embeds)
            noise, self._deep = self.run(decode, encoded, t, embeds, layers)
            self._encoded = None if layers else encoded
            return noise
        # Of baseline and condition, one below the other, the condition's rows are the last.
        if step.part == "layers":
            assert self._deep is not None
            return self.run(last_layers, rows, t, embeds, self._deep[-len(rows) :], self.means.deep_layers)
        assert self._encoded is not None
        return self.run(decode, _rows(self._encoded, slice(-len(rows), None)), t, embeds)[0]

    def decode(self, index: torch.Tensor, times: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """Return the noise by the decoder of some rows of the encoder's features, each at its own time."""
        assert self._encoded is not None
        return self.run(decode, _rows(self._encoded, index), times, embeds)[0]


def _as_it_is(unet, function: Callable, *arguments):
    return function(unet, *arguments)


def _rows(encoded: Encoded, index) -> Encoded:
    return Encoded(encoded.middle[index], tuple(skip[index] for skip in encoded.skips))
