"""Samples a second that training learns from: with the cache, without it, and in a plain loop.

    python -m benchmarks.training [--role sdm|tdm] [--steps 8] [--rounds 2] [--batch-size N] [--threads 1] [--loaders 1]
    python -m benchmarks.training --full-size [--batch-size 8] [--loaders 8]

The plain loop works as the released script does: pictures decoded, varied and put through the VAE, captions through the text
encoder, all four places for subjects through the image encoder, one after the other in the loop; torch's fused attention and
an optimiser that is not fused. All ways have the same data, base, batch size and compute type, and run turn about in one
process; the fastest round of each counts. The CPU time is that of the loop's own process: on a machine with other work it says
more than the wall. Without --full-size it is the miniature on its renderings; with it Stable Diffusion
v1-5 and CLIP ViT-L/14 with random weights at 512 px, on the GPU if there is one, with the peak of its memory.
"""

import argparse
import gc
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from benchmarks.beside import quiet
from benchmarks.engines import kernels
from facediffuser.rehearsal.random_data import write_prepared
from facediffuser.rehearsal.random_models import Size, write_base
from facediffuser.training.loop import TrainingRun
from facediffuser.training.throughput import Throughput
from facediffuser.training.train_settings import TrainSettings
from facediffuser.training.worker_context import Worker

WARM_UP, SLOTS = 2, 4


# --- the ways to compare ----------------------------------------------------------------------------------------------

Step = Callable[[], object]


def ours(settings: TrainSettings, loaders: int, device: str) -> Step:
    """Return a step of our loop."""
    run = TrainingRun(settings, Worker(device=device, loaders=loaders), lambda numbers: None)
    batches, throughput = run.batch_iterator(), Throughput(run.recipe.batch_size)
    return lambda: run.train_step(batches, throughput)


def plain(settings: TrainSettings, device: str) -> Step:
    """Return a step of a loop that does everything in its turn."""
    settings = settings.model_copy(update={"precompute": False, "attention": "sdpa", "ema": 0.0, "compile": False})
    run = TrainingRun(settings, Worker(device=device), lambda numbers: None)
    recipe, places = run.recipe, itertools.count(0, run.recipe.batch_size)
    optimiser = torch.optim.AdamW(run.trained, recipe.learning_rate, weight_decay=recipe.weight_decay, fused=False)

    def step() -> None:
        batch = run.batches[next(places)]
        if settings.role == "sdm":
            batch = replace(batch, references=_all_places(batch.references, recipe.batch_size * SLOTS))
        loss, _ = run.losses(batch.to(run.device))
        loss.backward()
        nn.utils.clip_grad_norm_(run.trained, recipe.max_grad_norm)
        optimiser.step()
        optimiser.zero_grad()
        float(loss.detach())  # printed

    return step


def _all_places(references: torch.Tensor, count: int) -> torch.Tensor:
    """The references, then zeros where no subject is: the image encoder is run on them, its output is not used."""
    return torch.cat([references, references.new_zeros(count - len(references), *references.shape[1:])])


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Seconds a step, CPU seconds a step of the loop's process alone, the peak of the GPU's memory in GiB (0 on a CPU)."""

    seconds: float
    cpu_seconds: float
    peak: float


def measure(make: Callable[[], Step], steps: int, device: str) -> tuple[Measured, Step]:
    """Build a loop, run it warm, and return the time of `steps` steps of it, and the step."""
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = make()
    for _ in range(WARM_UP):
        step()
    if on_gpu:
        torch.cuda.synchronize()
    with quiet():
        started, cpu_started = time.perf_counter(), time.process_time()
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - started) / steps
    cpu_seconds = (time.process_time() - cpu_started) / steps
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    return Measured(seconds, cpu_seconds, peak), step


def profile(step: Step, device: str, steps: int = 3) -> Iterator[str]:
    """Yield the kernels of some steps by their share of the time, and the shares of their kinds."""
    gpu = device.startswith("cuda")
    activities = [torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU]
    with quiet(), torch.profiler.profile(activities=activities) as found:
        for _ in range(steps):
            step()
        if gpu:
            torch.cuda.synchronize()
    yield from kernels(found, gpu, steps, 24)


def compare(settings: TrainSettings, steps: int, rounds: int, loaders: int, device: str) -> dict[str, Measured]:
    """Return each way's fastest round; the ways take turns."""
    without = settings.model_copy(update={"precompute": False})
    ways: dict[str, Callable[[], Step]] = {
        "ours": lambda: ours(settings, loaders, device),
        "ours, no workers ahead": lambda: ours(settings, 0, device),
        "ours, without the cache": lambda: ours(without, loaders, device),
        "plain loop": lambda: plain(settings, device),
    }
    best: dict[str, Measured] = {}
    for _ in range(rounds):
        for name, make in ways.items():
            measured, _ = measure(make, steps, device)
            gc.collect()
            best[name] = min_of(best[name], measured) if name in best else measured
    return best


def min_of(one: Measured, other: Measured) -> Measured:
    """Return the better of each number of two rounds."""
    return Measured(*(min(pair) for pair in zip(astuple(one), astuple(other), strict=True)))


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--role", choices=["tdm", "sdm"], default="sdm")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch-size", type=int, help="default: the preset's")
    parser.add_argument("--threads", type=int, default=1, help="of the loop on a CPU")
    parser.add_argument("--loaders", type=int, default=1)
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--full-size", action="store_true", help="Stable Diffusion v1-5 at 512 px, random weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="facediffuser-benchmark-") as folder:
        root = Path(folder)
        base = str(write_base(root / "base", Size())) if options.full_size else "miniature"
        settings = TrainSettings(
            role=options.role, data=str(write_prepared(root, options.pictures, 512 if options.full_size else 64)),
            base=base, output=str(root / "run"), batch_size=options.batch_size, steps=10**6,
        )  # fmt: skip
        measured = compare(settings, options.steps, options.rounds, options.loaders, options.device)
        batch = settings.recipe().batch_size
    sys.stdout.write(table(measured, batch, options))


def table(measured: dict[str, Measured], batch: int, options: argparse.Namespace) -> str:
    """Return the measurements as text."""
    model = "Stable Diffusion v1-5, 512 px" if options.full_size else "miniature, 64 px"
    where = options.device if options.device != "cpu" else f"cpu, {options.threads} threads"
    lines = [f"{options.role} on {model}, batches of {batch}, {where}, {options.loaders} processes ahead"]
    lines.append(f"{'way':<28}{'samples/s':>12}{'s/step':>10}{'speed-up':>10}{'CPU s/step':>12}{'peak GiB':>10}")
    slowest = measured["plain loop"].seconds
    for name, one in measured.items():
        lines.append(
            f"{name:<28}{batch / one.seconds:>12.1f}{one.seconds:>10.3f}{slowest / one.seconds:>10.2f}{one.cpu_seconds:>12.3f}"
            + (f"{one.peak:>10.1f}" if one.peak else f"{'-':>10}")
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
