"""Processes that work off a growing list of tasks in files: scored images of models, sheets of samples, latents.

The list is `tasks.json` in a folder, the most urgent first; whoever writes it may put tasks in front. A worker takes the first
one that nobody has taken, and writes what comes of it as that task's file. So a task that is done stays done, and the
processes may be stopped and continued at any time.

    python -m tools.miniature_weights.task_pool FOLDER [--device cuda]
"""

import argparse
import functools
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

logger = logging.getLogger(__name__)

CLOSED, FAILED = "closed", "failed"
MOST_MEMORY = 2 << 30
"""Bytes of GPU memory that a worker allocates at most."""
FEWEST = 8


@dataclass(frozen=True)
class Task:
    """A task; `file` is where its result goes, below the folder, and its name.

    kind: `scores` (rows of scored images, JSON), `methods` or `base` (a sheet of samples, PNG), `latents` (part of a cache).
    models: a model folder, or for `base` a base's folder.
    method, name: how images are made, and what the rows call it. plain: the SDM's UNet in the TDM's place.
    first, people, start, stop: the people numbered from `first` on, and which of them.
    prompts: `claim`, `choice`, `words` (people's own), `known` (the same in the captions' words), or nothing;
    most_prompts: only the first so many of one person and of two, 0 for all.
    guidance, window, steps, instances, batch, class_word: how images are made.

    For `latents` models is the folder of a training's data and base, and of each array every `stop`-th part from `start` on is
    made. For `methods` window is that of face-diffuser.
    """

    file: str
    kind: str = "scores"
    models: str = ""
    method: str = "face-diffuser"
    name: str = ""
    plain: bool = False
    first: int = 0
    people: int = 0
    start: int = 0
    stop: int = 0
    prompts: str = ""
    guidance: float = 5.0
    window: tuple[int, int] = (3, 11)
    steps: int = 12
    instances: int = 1
    batch: int = 128
    class_word: str | None = None
    most_prompts: int = 0


class TaskList:
    """The tasks in a folder, seen from the process that makes them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tasks: list[Task] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._write()

    def put(self, tasks: Sequence[Task], in_front: bool = False) -> None:
        """Add tasks, at the end or before all others."""
        self.tasks = [*tasks, *self.tasks] if in_front else [*self.tasks, *tasks]
        self._write()

    def _write(self) -> None:
        _replace(self.folder / "tasks.json", json.dumps([asdict(task) for task in self.tasks]).encode())

    def done(self, tasks: Sequence[Task]) -> bool:
        """Whether nothing more is to be expected of these: the results are there, or a task has failed."""
        return all(
            any((folder / task.file).exists() for folder in (self.folder, self.folder / FAILED)) for task in tasks
        )

    def made(self, tasks: Sequence[Task]) -> list[Task]:
        """Return those whose results are there."""
        return [task for task in tasks if (self.folder / task.file).exists()]

    def rows(self, task: Task) -> list[dict]:
        """Return the rows of a task of kind `scores`."""
        return json.loads((self.folder / task.file).read_text())

    def close(self) -> None:
        """Let the workers end when nothing is left to take."""
        (self.folder / CLOSED).touch()


def start_workers(folder: Path, count: int, device: str, log: Path) -> list[subprocess.Popen]:
    """Start so many processes for the tasks of a folder."""
    words = [sys.executable, "-m", "tools.miniature_weights.task_pool", str(folder), "--device", device]
    with open(log, "a") as file:
        return [subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT) for _ in range(count)]


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def _take(folder: Path) -> Task | None:
    for values in json.loads((folder / "tasks.json").read_text()):
        task = Task(**{**values, "window": tuple(values["window"])})
        try:
            taken = folder / "taken" / task.file.replace("/", "--")
            os.close(os.open(taken, os.O_CREAT | os.O_EXCL))
            return task
        except FileExistsError:
            continue
    return None


class Worker:
    """Does tasks; holds scorers, people and pipelines from the first one that needs them."""

    def __init__(self, folder: Path, device: str):
        self.folder, self.device = folder, device
        self.pipeline = functools.cache(self._pipeline)
        self.people = functools.cache(self._people)

    @functools.cached_property
    def scorers(self):
        """The miniature's scorers."""
        from facediffuser.scoring.scorers import load_scorers

        return load_scorers("miniature", self.device)

    def _people(self, first: int, count: int):
        from tools.miniature_weights.methods import unseen_people

        return unseen_people(count, self.scorers, first)

    def _pipeline(self, models: str, plain: bool):
        from tools.miniature_weights.methods import load_pipeline

        pipeline = load_pipeline(models, self.device)
        if plain:
            pipeline = type(pipeline)(**pipeline.components | {"unet_text": pipeline.unet})
            pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def run(self, task: Task) -> None:
        """Do a task and write its file; in smaller batches where there is too little memory."""
        import torch

        while True:
            try:
                result = getattr(self, f"_{task.kind}")(task)
                break
            except torch.OutOfMemoryError:
                if task.batch // 2 < FEWEST:
                    raise
                logger.warning("%s: too little memory for batches of %d", task.file, task.batch)
            # Here and not above: the error holds all that its functions had in memory.
            torch.cuda.empty_cache()
            task = replace(task, batch=task.batch // 2)
        _replace(self.folder / task.file, result)

    def _scores(self, task: Task) -> bytes:
        from tools.miniature_weights.choose import PROMPTS
        from tools.miniature_weights.own_words import PROMPTS as WORDS
        from tools.miniature_weights.scored import Sampler, score_images, suite

        prompts = {
            "claim": lambda: suite("miniature-30") + suite("miniature-pairs-8"),
            "choice": lambda: list(PROMPTS),
            "words": lambda: list(WORDS),
            "known": lambda: [replace(prompt, text=prompt.meaning) for prompt in WORDS],
        }[task.prompts]()
        if task.most_prompts:
            prompts = [one for n in (1, 2) for one in [p for p in prompts if p.subjects == n][: task.most_prompts]]
        sampler = Sampler(task.steps, task.guidance, task.window, task.batch, task.class_word)
        people = self.people(task.first, task.people)[task.start : task.stop]
        pipeline = self.pipeline(task.models, task.plain)
        rows = score_images(
            pipeline, self.scorers, people, prompts, task.method, sampler, task.instances, task.name or None
        )
        return json.dumps(rows).encode()

    def _methods(self, task: Task) -> bytes:
        from facediffuser.picture_grid import png_bytes
        from tools.miniature_weights.methods import Trial, samples

        trial = Trial(self.pipeline(task.models, False), task.steps, task.guidance)
        return png_bytes(samples(trial, self.people(task.first, task.people), task.window))

    def _base(self, task: Task) -> bytes:
        from facediffuser.picture_grid import png_bytes
        from tools.miniature_weights.sheets import base_samples

        return png_bytes(base_samples(Path(task.models), self.device, task.steps, task.guidance))

    def _latents(self, task: Task) -> bytes:
        from facediffuser.batch_stage import WorkerPool
        from facediffuser.training.latent_stage import LatentWorker, latent_stage
        from tools.miniature_weights.paired_training import role_settings

        settings = role_settings("sdm", Path(task.models), 1, 1)
        worker = LatentWorker(settings, 1)
        worker.device = self.device
        for unit in latent_stage(settings, WorkerPool()).units:
            # By the part's own number: the stage lists only what is missing, so places in it change as other tasks go on.
            part = unit.data[-1]
            if part % task.stop == task.start:
                worker(unit)
        return b""


def main() -> None:
    """The command line of one worker."""
    parser = argparse.ArgumentParser(prog="python -m tools.miniature_weights.task_pool")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    import torch

    torch.set_num_threads(1)
    if args.device.startswith("cuda"):
        torch.cuda.set_per_process_memory_fraction(MOST_MEMORY / torch.cuda.mem_get_info()[1])
    worker = Worker(args.folder, args.device)
    (args.folder / "taken").mkdir(parents=True, exist_ok=True)
    parent = os.getppid()
    while os.getppid() == parent:
        task = _take(args.folder)
        if task is None:
            if (args.folder / CLOSED).exists():
                return
            time.sleep(0.1)
            continue
        started = time.monotonic()
        try:
            worker.run(task)
            print(f"{task.file}: {time.monotonic() - started:.1f} s", flush=True)
        except Exception:
            # One task less; the others are worth having without it.
            logger.exception("%s: failed", task.file)
            _replace(args.folder / FAILED / task.file, b"")


if __name__ == "__main__":
    main()
