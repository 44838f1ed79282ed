"""The training stage: Ray Train runs the loop on one or many workers; the driver shows how far it is."""

import logging
import os
import tempfile
import threading
from typing import Any

import ray
from prefect import task
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from facediffuser.errors import InputError
from facediffuser.json_log import json_requested
from facediffuser.number_words import counted
from facediffuser.runs import check_provenance, software
from facediffuser.storage import open_store
from facediffuser.tasks.end_training import EndTraining
from facediffuser.tasks.progress import Progress
from facediffuser.tasks.ray_session import cluster_cpus, cluster_gpus, connect_ray
from facediffuser.tasks.retrying import RETRIES
from facediffuser.tasks.train_worker import TrainNumbers, train_in_worker
from facediffuser.training import training_run as runs
from facediffuser.training.train_check import check_train
from facediffuser.training.train_settings import TrainSettings

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0


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
    # A process more for each training; it would tell the workers of a node's end, which the loop does not ask for.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    workers = count_workers(settings, runs.recorded_workers(store), cluster_gpus(), cluster_cpus(), side_by_side)
    on_gpu = cluster_gpus() >= workers
    cpus = settings.cpus_per_worker or (1 if on_gpu else max(1, cluster_cpus() // (workers * side_by_side)))
    metrics = ray.remote(num_cpus=0)(TrainNumbers).remote()
    with tempfile.TemporaryDirectory(prefix="facediffuser-ray-train-") as folder:
        trainer = TorchTrainer(
            train_in_worker,
            train_loop_config={
                "settings": settings.model_dump(),
                "metrics": metrics,
                "threads": cpus,
                "folder": os.getcwd(),
                "json_lines": json_requested(),
            },
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=on_gpu,
                resources_per_worker={"GPU" if on_gpu else "CPU": 1 if on_gpu else cpus},
            ),
            run_config=RunConfig(
                storage_path=folder,
                failure_config=FailureConfig(max_failures=settings.max_failures),
                callbacks=[EndTraining(metrics)],
            ),
        )
        _fit(trainer, metrics, settings)
    last = ray.get(metrics.read.remote())
    return {"role": settings.role, "output": settings.output, **last}


def count_workers(settings: TrainSettings, recorded: int | None, gpus: int, cpus: int, side_by_side: int) -> int:
    """Return how many workers train a model: as many as given, else as before, else one for each GPU.

    Args:
        settings: those of one role.
        recorded: how many the run had so far, None where that is not known.
        gpus: of the cluster.
        cpus: its cores.
        side_by_side: how many trainings share the cluster.

    Raises:
        InputError: the run had more workers than the cluster has GPUs, or cores where it has none.
    """
    if settings.workers:
        return settings.workers
    if not recorded:
        return max(1, gpus // side_by_side)
    if recorded > (gpus or cpus):
        here = counted(gpus, "GPU") if gpus else counted(cpus, "core")
        raise InputError(
            f"{settings.output}: was trained so far by {counted(recorded, 'worker')}, this cluster has {here}; resume it "
            f"where there are as many, or give --workers {recorded} to train on what there is, or another output"
        )
    return recorded


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
