"""The noise schedulers: which a run may name, which samples where none is named, how a pipeline gets it. Without torch."""

import functools
import logging
from typing import Literal

logger = logging.getLogger(__name__)

SchedulerName = Literal["ddim", "pndm", "dpm", "euler", "euler-ancestral", "unipc"]
SCHEDULER_CLASSES = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}

SCHEDULER_HELP = "noise scheduler (default: the model's own; dpm where that is pndm and there are fewer than 50 steps)"

FEWEST_STEPS = {"PNDMScheduler": 50}
"""Steps below which a scheduler fails at the method. PNDM adds up the noises of four steps, which around a change of models
are two models': on the miniature IP at guidance 5 falls from 0.51 (50 steps, the paper's) to 0.44 (40), 0.13 (30) and 0.00 (20)."""

FEW_STEPS_SCHEDULER = "dpm"
"""What takes the place of such a scheduler: DPM-Solver of second order (the same IP: 0.58 at 50 and 30 steps, 0.55 at 12)."""


def choose_scheduler(named: SchedulerName | None, own: str, steps: int) -> str:
    """Return the diffusers class of the scheduler that samples.

    Args:
        named: what the user gave; it is kept, with a warning where it does not bear so few steps.
        own: the class of the model's own scheduler; DPM-Solver takes its place where it does not bear so few steps.
        steps: inference steps.
    """
    chosen = SCHEDULER_CLASSES[named] if named else own
    fewest = FEWEST_STEPS.get(chosen, 1)
    if steps >= fewest:
        return chosen
    if named:
        warn_of_few_steps(chosen, steps)
        return chosen
    other = SCHEDULER_CLASSES[FEW_STEPS_SCHEDULER]
    log_once(
        logging.INFO,
        f"scheduler: {other}, because the model's own, {own}, wants {fewest} steps or more and these are {steps}; "
        f"--scheduler {_name_of(own)} keeps it",
    )
    return other


def warn_of_few_steps(kind: str, steps: int) -> None:
    """Warn, once in a process, of a scheduler that needs more steps.

    Args:
        kind: the scheduler's class in diffusers.
        steps: inference steps.
    """
    fewest = FEWEST_STEPS.get(kind, 1)
    if steps < fewest:
        other = SCHEDULER_CLASSES[FEW_STEPS_SCHEDULER]
        log_once(
            logging.WARNING,
            f"scheduler {kind}: {steps} steps are too few for it (it wants {fewest} or more), images may lose their people; "
            f"{other} bears them",
        )


@functools.cache
def log_once(level: int, text: str) -> None:
    """Log a text once in this process: input is checked more than once, and a pipeline is called often.

    Args:
        level: of the standard logging module.
        text: the message.
    """
    logger.log(level, text)


def set_scheduler(pipeline, kind: str) -> None:
    """Give a pipeline a scheduler with the configuration of its own, unless it is of that class already.

    Args:
        pipeline: a diffusers pipeline.
        kind: the scheduler's class in diffusers.
    """
    if type(pipeline.scheduler).__name__ == kind:
        return
    import diffusers

    # Latents have no bounds; DDIM would clip to [-1, 1] where the configuration of the model's own does not say.
    config = {"clip_sample": False, **pipeline.scheduler.config}
    pipeline.register_modules(scheduler=getattr(diffusers, kind).from_config(config))


def _name_of(kind: str) -> str:
    return next(name for name, known in SCHEDULER_CLASSES.items() if known == kind)
