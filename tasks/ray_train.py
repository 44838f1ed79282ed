"""The training stage: Ray Train runs the loop on one or many workers; the driver shows how far it is."""

import logging
import os
import tempfile
import threading
from typing import Any

import ray
import ray.train
import torch
from prefect import task
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from facediffuser.errors import InputError
from facediffuser.number_words import counted
from facediffuser.runs import check_provenance, software
from facediffuser.storage import open_store
from facediffuser.tasks.progress import Progress
from facediffuser.tasks.ray_session import cluster_cpus, cluster_gpus, connect_ray
from facediffuser.tasks.retrying import RETRIES
from facediffuser.training import training_run as runs
from facediffuser.training.loop import DivergedError, train_model
from facediffuser.training.train_check import check_train
from facediffuser.training.train_settings import TrainSettings
from facediffuser.training.worker_context import Worker

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
MAX_LOADERS = 8


@ray.remote(num_cpus=0)
class _MetricsActor:
    """Where the first worker writes its numbers and the driver reads them."""

    def __init__(self):
        self.numbers: dict[str, float] = {}
        self.error: Exception | None = None

    def fail(self, error: Exception) -> None:
        self.error = error

    def failure(self) -> Exception | None:
        return self.error

    def write(self, numbers: dict[str, float]) -> None:
        self.numbers |= numbers

    def read(self) -> dict[str, float]:
        return self.numbers


@task(name="train-model", **RETRIES)
def train_on_ray(settings: TrainSettings, side_by_side: int = 1) -> dict[str, Any]:
    """Train one model on Ray.

    A finished run of as many steps is left as it is. A lost worker restarts the workers from the last checkpoint, up to
    `max_failures` times.

    Args:
        settings: those of one role.
        side_by_side: how many trainings share the cluster; each takes its share of GPUs or cores unless the settings
            say otherwise.

    Returns:
        role, step, loss, seconds and output.

    Raises:
        InputError: the output holds another run; nothing is written.
        DivergedError: the loss is not finite.
    """
    check_train(settings)
    store = open_store(settings.output)
    check_provenance(settings.output, runs.recorded_provenances(store), software(), settings.exact)
    done = runs.finished_step(store)
    if done is not None and done >= settings.recipe().steps:
        logger.info("%s: %s is trained already (%s)", settings.output, settings.role, counted(done, "step"))
        return {"role": settings.role, "step": done, "output": settings.output, "seconds": 0.0}
    connect_ray()
    workers = settings.workers or max(1, cluster_gpus() // side_by_side)
    on_gpu = cluster_gpus() >= workers
    cpus = settings.cpus_per_worker or (1 if on_gpu else max(1, cluster_cpus() // (workers * side_by_side)))
    metrics = _MetricsActor.remote()  # type: ignore[attr-defined]  # Ray's decorator adds it
    with tempfile.TemporaryDirectory(prefix="facediffuser-ray-train-") as folder:
        trainer = TorchTrainer(
            _train_in_worker,
            train_loop_config={
                "settings": settings.model_dump(),
                "metrics": metrics,
                "threads": cpus,
                "folder": os.getcwd(),
            },
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=on_gpu,
                resources_per_worker={"GPU" if on_gpu else "CPU": 1 if on_gpu else cpus},
            ),
            run_config=RunConfig(storage_path=folder, failure_config=FailureConfig(max_failures=settings.max_failures)),
        )
        _fit(trainer, metrics, settings)
    last = ray.get(metrics.read.remote())
    return {"role": settings.role, "output": settings.output, **last}


def _fit(trainer: TorchTrainer, metrics: Any, settings: TrainSettings) -> None:
    """Run the trainer in a thread and show its progress; raises what it raised."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="ray-train")
    with Progress(settings.recipe().steps, "steps", f"Train {settings.role}") as progress:
        thread.start()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            numbers = ray.get(metrics.read.remote())
            if numbers:
                _show(progress, numbers, settings.log_every)
    failure = ray.get(metrics.failure.remote())
    if failure is not None:
        raise failure
    if errors:
        raise errors[0]


def _show(progress: Progress, numbers: dict[str, float], log_every: int) -> None:
    steps = int(numbers["step"]) - progress.done
    if not progress.done and steps > log_every:
        # A run that goes on from a checkpoint.
        progress.skip(steps)
        return
    formats = {
        "loss": "loss {:.4f}", "localization": "localization {:.3f}", "validation_loss": "validation {:.4f}",
        "learning_rate": "learning rate {:.1e}", "images_per_second": "{:.1f} images/s",
    }  # fmt: skip
    progress.advance(steps, ", ".join(text.format(numbers[name]) for name, text in formats.items() if name in numbers))


def _train_in_worker(config: dict[str, Any]) -> None:
    """Train in one worker; Ray Train calls it in each worker's process."""
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

    try:
        result = train_model(settings, report, worker)
    except (InputError, DivergedError) as error:
        # Trying again would end the same way, so this is no failure to Ray; all workers come to the same end.
        ray.get(metrics.fail.remote(error))
        return
    if rank == 0:
        ray.get(metrics.write.remote({**result, "step": float(result["step"])}))


def _loaders(settings: TrainSettings, threads: int, device: torch.device, neighbours: int) -> int:
    """Return how many processes make batches for a worker that shares its machine with some others like it."""
    if settings.loaders is not None:
        return settings.loaders
    if device.type == "cpu":
        # The work is shared out between two processes on the same cores; on a single one that gains nothing.
        return min(1, threads - 1)
    return max(1, min(MAX_LOADERS, len(os.sched_getaffinity(0)) // neighbours - 1))


def _data_parallel(module: torch.nn.Module) -> torch.nn.Module:
    # A batch may have no subjects, so parts of the SDM may get no gradient.
    return torch.nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)
