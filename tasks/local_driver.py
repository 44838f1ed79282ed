"""A driver that does a stage's units one after another in this process: for tests and a debugger."""

from collections.abc import Iterator
from typing import Any

from facediffuser.batch_stage import Counts, Stage
from facediffuser.tasks.driver import run_stage


class LocalDriver:
    """Runs stages in this process, with one worker, without Ray."""

    gpus, gpu_gib = 0, 0.0

    def __init__(self, cpus: int = 1):
        self.cpus = cpus

    def run(self, stage: Stage) -> Any:
        """Do the units of a stage and finish it; return what its `finish` returns. See `driver.Driver.run`."""
        return run_stage(stage, _Execution(stage))


class _Execution:
    def __init__(self, stage: Stage):
        self.stage, self.stopping = stage, False

    @property
    def workers(self) -> int:
        return 1

    def __iter__(self) -> Iterator[tuple[str, Counts]]:
        worker = self.stage.worker()
        for unit in self.stage.read() if self.stage.read else self.stage.units:
            if self.stopping:
                return
            yield unit.key, worker(unit)

    def stop(self) -> None:
        self.stopping = True

    def describe(self, unfinished: int) -> str:
        return ""
