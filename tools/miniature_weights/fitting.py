"""The loop that all small parts are fitted with: so many steps, a warm-up, a decay, an averaged copy."""

import copy
import logging
import time
from collections.abc import Callable, Iterable

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from facediffuser.training.losses import update_average

logger = logging.getLogger(__name__)


def with_plain_attention(model: nn.Module) -> nn.Module:
    """Return the model with attention as plain matrix products: on a CPU in bfloat16 the fused kernel's backward pass is slow.

    At the base UNet's size it alone takes a third of a training step. The weights and the results are the same.
    """
    if isinstance(model, UNet2DConditionModel):
        model.set_attn_processor(AttnProcessor())
    else:
        model.set_attn_implementation("eager")
    return model


class Average:
    """An exponential moving average of a module's weights, warm at the start."""

    def __init__(self, module: nn.Module, decay: float = 0.999):
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move towards the module's present weights."""
        self.updates += 1
        update_average(list(self.module.parameters()), list(module.parameters()), self.decay, self.updates)
        for own, other in zip(self.module.buffers(), module.buffers(), strict=True):
            own.copy_(other)


def fit(
    name: str,
    loss: Callable[[int], torch.Tensor],
    parameters: Iterable[nn.Parameter],
    steps: int,
    learning_rate: float,
    weight_decay: float = 1e-2,
    warmup_steps: int = 50,
    hold: float = 0.5,
    after_step: Callable[[int], None] | None = None,
    log_seconds: float = 30.0,
    progress: Callable[[], float] | None = None,
) -> int:
    """Minimise `loss(step)` with AdamW for `steps` steps; return how many were done.

    The learning rate is held for the first `hold` share of them, then goes down linearly to 2%. With `progress` the share
    that is done is what it returns, 0 to 1, and training ends at 1, or after `steps`. A loss without a gradient has left
    its gradients in the parameters already. Logs the mean loss.
    """
    parameters = [p for p in parameters if p.requires_grad]
    optimiser = torch.optim.AdamW(
        parameters, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.99), fused=True
    )
    started = logged = time.monotonic()
    total, count = 0.0, 0
    step = 0
    while step < steps and (done := progress() if progress else step / steps) < 1:
        decay = 1.0 if done < hold else max(0.02, (1 - done) / (1 - hold))
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * decay * min(1.0, (step + 1) / warmup_steps)
        value = loss(step)
        if value.requires_grad:
            optimiser.zero_grad(set_to_none=True)
            value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        # On a GPU this waits for the step: no more than one is ever queued, so that a stop of the process stops its work.
        total, count, step = total + float(value.detach()), count + 1, step + 1
        if after_step:
            after_step(step)
        if time.monotonic() - logged >= log_seconds or step == steps:
            seconds = time.monotonic() - started
            logger.info("%s: step %d of %d in %.0f s, loss %.4f", name, step, steps, seconds, total / count)
            total, count, logged = 0.0, 0, time.monotonic()
    return step
