"""The noise schedulers a run may name, and diffusers' classes for them. Without torch."""

from typing import Literal

SchedulerName = Literal["ddim", "pndm", "dpm", "euler", "euler-ancestral", "unipc"]
SCHEDULER_CLASSES = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}
