"""One call on a GPU machine: how much is done, its clock, its folders, its processes."""

import argparse
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from facediffuser.training.recipe import Role
from tools.miniature_weights.running_clock import RunningClock
from tools.miniature_weights.task_pool import TaskList, start_workers

logger = logging.getLogger("gpu")

LAST_SECONDS = 8.0
"""Kept for packing."""


@dataclass(frozen=True)
class Size:
    """How much is done.

    base_share: of the first call's time that is left when the base's training begins. measure_seconds, measure_share: running time that the
    second call leaves for measuring, the larger of the two. units: steps between checkpoints, in the paper's ratio.
    points: shares of fine-tuning that are measured beside its start. latent_tasks: into how many tasks latents are divided.
    most_prompts, most_units: an end of what is measured and trained, 0 for none.
    """

    broad_pictures: int = 12_000
    base_batch: int = 128
    base_share: float = 0.6
    rate_seconds: float = 12.0
    ffhq_pictures: int = 12_000
    batch: int = 64
    units: tuple[int, int] = (100, 180)
    measure_seconds: float = 60.0
    measure_share: float = 0.22
    points: int = 4
    forgetting_people: int = 6
    choice_people: int = 8
    claim_people: int = 45
    claim_set: int = 15
    words_people: int = 8
    sampling_steps: int = 12
    latent_tasks: int = 12
    workers: int = 5
    guidances: tuple[float, ...] = (2.5, 3.5, 5.0, 7.5)
    starts: tuple[int, ...] = (2, 3, 4)
    ends: tuple[int, ...] = (10, 11)
    most_prompts: int = 0
    most_units: int = 0


SMALL = Size(
    60, 4, 0.4, 1.0, 48, 4, (5, 9), 60, 0.2, 2, 1, 1, 2, 1, 1, 2, 2, 1, guidances=(5.0,), starts=(0,), ends=(1, 2), most_prompts=1,
    most_units=2,
)  # fmt: skip
"""For a try on a CPU."""


class Call:
    """What both calls have in common: folders, clock, cores, device."""

    def __init__(self, options: argparse.Namespace):
        self.size = SMALL if options.small else Size()
        self.work, self.out, self.device, self.cores = options.work, options.out, options.device, options.cores
        self.wall_end = options.started + options.wall
        self.seconds, self.wall = options.seconds, options.wall
        self.clock = RunningClock(options.seconds - LAST_SECONDS, self.wall_end - LAST_SECONDS)
        self.started = options.started
        self.tasks = TaskList(self.work / "measured")
        self.processes = start_workers(self.tasks.folder, self.size.workers, self.device, self.work / "workers.log")
        self._packed = 0.0

    def past(self, share: float) -> bool:
        """Whether this share of the call's time is over, of the running time or of the wall time."""
        return self.clock.ran > share * self.seconds or time.time() - self.started > share * self.wall

    def leaves(self, seconds: float) -> bool:
        """Whether so much running time is left, if the rest of the wall time has as many stops as was planned."""
        return min(self.seconds - self.clock.ran, (self.wall_end - time.time()) * self.seconds / self.wall) > seconds

    def wait(self, ready: Callable[[], bool], name: str, meanwhile: Callable[[], None] = lambda: None) -> bool:
        """Wait until something is so, as long as there is time; return whether it is."""
        started = self.clock.ran
        while not (done := ready()) and self.clock.has(0):
            meanwhile()
            time.sleep(0.2)
        say(f"{name}: {'' if done else 'not done in '}{self.clock.ran - started:.0f} s; {self.clock.left():.0f} s left")
        return done

    def step(self, name: str, do: Callable):
        """Do something and say how long it took."""
        started = self.clock.ran
        result = do()
        say(f"{name}: {self.clock.ran - started:.0f} s; {self.clock.left():.0f} s left")
        return result

    def every(self, seconds: float, do: Callable[[], None]) -> None:
        """Do something where it was last done so long ago."""
        if self.clock.ran - self._packed > seconds:
            do()
            self._packed = self.clock.ran

    def logs(self) -> dict[str, Path]:
        """The logs and the curves of losses."""
        return {path.name: path for pattern in ("*.log", "*.jsonl") for path in sorted(self.work.glob(pattern))}

    def end(self) -> None:
        """End the processes."""
        self.tasks.close()
        for process in self.processes:
            process.kill()
            process.wait()


def say(line: str) -> None:
    """Log a line, with the time."""
    logger.info(line)


def forgetting_people() -> int:
    """First of the people on whom forgetting is measured."""
    from tools.miniature_weights.forgetting import FIRST_PERSON

    return FIRST_PERSON


def window(size: Size) -> tuple[int, int]:
    """The claim's window, for as many steps."""
    return round(size.sampling_steps * 3 / 12), round(size.sampling_steps * 11 / 12)


def roles(size: Size) -> dict[Role, int]:
    """Steps between checkpoints of each role."""
    return {"tdm": size.units[0], "sdm": size.units[1]}


def loaders_of(call: Call) -> dict[Role, int]:
    """Loader processes of each role: the SDM's pictures take longer, and it has more steps."""
    if call.device == "cpu":
        return {"tdm": 0, "sdm": 0}
    return {"tdm": max(1, call.cores // 8), "sdm": max(1, call.cores * 11 // 16)}
