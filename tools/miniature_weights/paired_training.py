"""TDM and SDM trained beside each other for so much time, their steps in the paper's ratio, with checkpoints in that ratio.

The rate is constant, so each checkpoint is what a training of so many steps would have ended with.
"""

import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from facediffuser.training.recipe import Role

logger = logging.getLogger(__name__)

RATE = 1.2e-4
"""A tenth of the base's own, as the paper's 1e-5 is of Stable Diffusion's 1e-4 (docs/miniature-notebook.md)."""
RATIO: dict[Role, int] = {"tdm": 250, "sdm": 450}
ENDLESS = 1_000_000
REPORT_STEPS = 5
SLACK_STEPS = 30
"""By how many steps the TDM may be ahead."""
ALONE = "tdm-alone"
"""A file that lets the TDM train without looking at the SDM."""


class TrainingFailedError(RuntimeError):
    """A training ended by a failure with graphs and without."""


@dataclass(frozen=True)
class Progress:
    """What a training reported last."""

    step: int
    loss: float
    images_per_second: float


def role_settings(role: Role, work: Path, batch: int, unit: int):
    """Return the settings of a role's training on `work`/prepared from `work`/base, with a checkpoint every `unit` steps."""
    from facediffuser.training.train_settings import TrainSettings

    own = {} if role == "tdm" else {
        "reference_pairing": "other", "subject_learning_rate": RATE, "encoder_learning_rate": RATE
    }  # fmt: skip
    return TrainSettings(
        role=role, data=str(work / "prepared"), base=str(work / "base"), output=str(work / role), preset="miniature", resume=True,
        steps=ENDLESS, batch_size=batch, learning_rate=RATE, schedule="constant", compile=False,
        checkpoint_every=unit, keep_every=unit, log_every=min(REPORT_STEPS, unit), cache=str(work / "latents"), **own,
    )  # fmt: skip


def begin(work: Path, batch: int, units: dict[Role, int]) -> None:
    """Write what both trainings are, so that models of their step 0 can be made before they run."""
    from facediffuser.storage import open_store
    from facediffuser.training import training_run as runs

    for role, unit in units.items():
        runs.begin_or_resume_training(open_store(str(work / role)), role_settings(role, work, batch, unit))


def train_role(role: Role, work: Path, batch: int, unit: int, device: str, loaders: int, eager: bool) -> None:
    """Train a role, in a process of its own, until the process is ended; the TDM never gets ahead of the ratio."""
    import torch

    from facediffuser.training.loop import train_model
    from facediffuser.training.worker_context import Worker
    from tools.miniature_weights.graphed import graph_denoiser

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    log, parent = open(work / f"{role}.jsonl", "a"), os.getppid()

    def end_with_parent() -> None:
        if os.getppid() != parent:
            os._exit(1)

    while not (work / f"{role}-may-begin").exists():
        end_with_parent()
        time.sleep(0.1)

    def report(numbers: dict[str, float]) -> None:
        end_with_parent()
        log.write(json.dumps({"time": time.time(), **numbers}) + "\n")
        log.flush()
        while role == "tdm" and _ahead(work, numbers["step"]):
            end_with_parent()
            time.sleep(0.05)

    wrap = {} if device == "cpu" or eager else {"wrap": graph_denoiser}
    print(
        role,
        train_model(role_settings(role, work, batch, unit), report, Worker(device=device, loaders=loaders, **wrap)),
    )


def _ahead(work: Path, step: float) -> bool:
    """Whether the TDM has done more steps than the SDM's in the ratio, and is not to train alone."""
    other = progress(work, "sdm")
    most = (other.step if other else 0) * RATIO["tdm"] / RATIO["sdm"] + SLACK_STEPS
    return step > most and not (work / ALONE).exists()


def progress(work: Path, role: Role) -> Progress | None:
    """Return what a training reported last, None before its first report."""
    path = work / f"{role}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    try:
        last = json.loads(lines[-1])
    except (IndexError, ValueError):
        return None
    return Progress(int(last["step"]), last["loss"], last["images_per_second"])


class PairedTraining:
    """Both trainings as processes.

    Args:
        work: has base/ and prepared/; gets tdm/ and sdm/.
        batch: pictures of a step.
        units: steps between checkpoints of each role, in the ratio.
        device: where both run.
        loaders: loader processes of each role.
    """

    def __init__(self, work: Path, batch: int, units: dict[Role, int], device: str, loaders: dict[Role, int]):
        self.work, self.batch, self.units, self.device, self.loaders = work, batch, units, device, loaders
        self.running: dict[Role, subprocess.Popen] = {}
        self.eager: set[Role] = set()

    def start(self, role: Role) -> None:
        """Start a role's process; it begins to train after `let`."""
        words = [sys.executable, "-m", "tools.miniature_weights.paired_training", role, str(self.work), str(self.batch)]
        words += [
            str(self.units[role]),
            self.device,
            str(self.loaders[role]),
            "eager" if role in self.eager else "graphs",
        ]
        with open(self.work / f"{role}.log", "a") as log:
            self.running[role] = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)

    def let(self, role: Role) -> None:
        """Let a role begin to train: its data are prepared."""
        (self.work / f"{role}-may-begin").touch()

    def look_after(self) -> None:
        """Start again, without graphs, what has ended by a failure; TrainingFailedError when that fails as well."""
        for role, process in list(self.running.items()):
            if process.poll() is not None:
                if role in self.eager:
                    raise TrainingFailedError(f"training {role} failed twice: see {role}.log")
                logger.warning("training %s ended with %s: again, without graphs", role, process.returncode)
                self.eager.add(role)
                self.start(role)

    def stop(self, role: Role) -> None:
        """End a role's process; what it did since its last checkpoint is lost."""
        process = self.running.pop(role, None)
        if process and process.poll() is None:
            process.kill()
            process.wait()

    def common_units(self) -> int:
        """Return how many checkpoints both have."""
        from facediffuser.storage import open_store
        from facediffuser.training import training_run as runs

        ends = [
            (runs.checkpoint_steps(open_store(str(self.work / role))) or [0])[-1] // unit
            for role, unit in self.units.items()
        ]
        return min(ends)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    role, work, batch, unit, device, loaders, how = sys.argv[1:]
    train_role(role, Path(work), int(batch), int(unit), device, int(loaders), how == "eager")  # type: ignore[arg-type]
