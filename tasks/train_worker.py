"""What runs in the processes of Ray Train: one worker of a training, and the actor that keeps its numbers.

What a worker needs is imported in it: this module is imported by the actor and by Ray Train's own processes, too.
"""

import logging
import os
from typing import TYPE_CHECKING, Any

from facediffuser.errors import InputError
from facediffuser.json_log import about, log_json

if TYPE_CHECKING:
    import torch

    from facediffuser.training.train_settings import TrainSettings

MAX_LOADERS = 8


class TrainNumbers:
    """An actor: the first worker writes its numbers here, and the driver reads them."""

    def __init__(self):
        self.numbers: dict[str, float] = {}
        self.error: Exception | None = None

    def fail(self, error: Exception) -> None:
        # The first: what other workers raise next may follow from it.
        self.error = self.error or error

    def failure(self) -> Exception | None:
        return self.error

    def write(self, numbers: dict[str, float]) -> None:
        self.numbers |= numbers

    def read(self) -> dict[str, float]:
        return self.numbers


def train_in_worker(config: dict[str, Any]) -> None:
    """Train in one worker; Ray Train calls it in each worker's process."""
    import ray.train.torch
    import torch

    from facediffuser.training.loop import DivergedError, train_model
    from facediffuser.training.train_settings import TrainSettings
    from facediffuser.training.worker_context import Worker

    settings, metrics = TrainSettings.model_validate(config["settings"]), config["metrics"]
    context = ray.train.get_context()
    if os.path.isdir(config["folder"]):
        # Ray Train puts its workers into a folder of its own; relative paths are the driver's.
        os.chdir(config["folder"])
    torch.set_num_threads(config["threads"])
    rank, device = context.get_world_rank(), ray.train.torch.get_device()
    worker = Worker(
        rank=rank,
        count=context.get_world_size(),
        device=str(device),
        loaders=_loaders(settings, config["threads"], device, context.get_local_world_size()),
        wrap=_data_parallel if context.get_world_size() > 1 else (lambda module: module),
    )

    def report(numbers: dict[str, float]) -> None:
        if rank == 0:
            metrics.write.remote(numbers)

    if config["json_lines"]:
        log_json(logging.getLogger("facediffuser"))
    try:
        with about(run=settings.output, worker=f"{settings.role} {rank}"):
            result = train_model(settings, report, worker)
    except (InputError, DivergedError) as error:
        # Trying again would end the same way. A worker alone just ends; where there are others, they may wait for this
        # one, so it fails: then `EndTraining` ends all of them.
        ray.get(metrics.fail.remote(error))
        if worker.count > 1:
            raise
        return
    if rank == 0:
        ray.get(metrics.write.remote({**result, "step": float(result["step"])}))


def _loaders(settings: "TrainSettings", threads: int, device: "torch.device", neighbours: int) -> int:
    """Return how many processes make batches for a worker that shares its machine with some others like it."""
    if settings.loaders is not None:
        return settings.loaders
    if device.type == "cpu":
        # The work is shared out between two processes on the same cores; on a single one that gains nothing.
        return min(1, threads - 1)
    return max(1, min(MAX_LOADERS, len(os.sched_getaffinity(0)) // neighbours - 1))


def _data_parallel(module: "torch.nn.Module") -> "torch.nn.Module":
    import torch

    # A batch may have no subjects, so parts of the SDM may get no gradient.
    return torch.nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)
