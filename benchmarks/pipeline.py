"""What the machinery costs beside the models' work: `python -m benchmarks.pipeline machinery|memory|denoising`.

machinery   a generator that costs nothing: rows/s and bytes/s from the plan to verified shards, to a local folder and,
            with --s3, to the tests' S3 server
memory      the same with tiny images, for each number of --rows: the driver's highest resident memory, by stage
denoising   the miniature: the share of the wall time in which denoising runs, and images/s beside a plain loop that
            makes batches of 8, and scores and saves them afterwards, as the released test script does
"""

import argparse
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from facediffuser.dataset.verify import verify
from facediffuser.storage import open_store

MODES = ("machinery", "memory", "denoising")
LOOP_BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--rows", type=int, nargs="*", help="rows (machinery: 20000; memory: 10000 100000 1000000)")
    parser.add_argument("--size", type=int, default=64, help="machinery: side of an image, px")
    parser.add_argument(
        "--workers", type=int, default=2, help="machinery, memory: Ray workers; 0: no Ray, this process"
    )
    parser.add_argument("--s3", action="store_true", help="machinery: to S3, too (`make .swift/ready` installs it)")
    parser.add_argument("--images", type=int, default=64, help="denoising: images")
    parser.add_argument("--steps", type=int, default=30, help="denoising: steps an image")
    parser.add_argument("--turns", type=int, default=3, help="denoising: times each way is run, the best counts")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    {"machinery": machinery, "memory": memory, "denoising": denoising}[args.mode](args)


# --- the machinery alone ----------------------------------------------------------------------------------------------


def machinery(args: argparse.Namespace) -> None:
    """Print rows/s and bytes/s to each kind of place."""
    rows = (args.rows or [20_000])[0]
    print(f"{rows:,} rows of {args.size} px, {args.workers} workers, a generator that costs nothing; {_machine()}")
    print(f"{'to':<8}{'rows':>9}{'MB':>9}{'plan s':>9}{'shards s':>10}{'verify s':>10}{'rows/s':>9}{'MB/s':>8}")
    with ExitStack() as stack:
        # The server first: Ray's workers have the environment, and so the credentials, of when Ray was started.
        bucket = stack.enter_context(_bucket()) if args.s3 else None
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="facediffuser-bench-"))
        _print_machinery("local", f"{folder}/dataset", rows, args)
        if bucket:
            _print_machinery("S3", f"{bucket}/dataset", rows, args)


def _print_machinery(name: str, url: str, rows: int, args: argparse.Namespace) -> None:
    spent = _run_free(url, rows, args)
    started = time.perf_counter()
    problems = verify(url)
    seconds = time.perf_counter() - started
    assert problems == [], problems[:3]
    size = sum(info.size for info in open_store(url).list("data/"))
    all_seconds = spent["plan"] + spent["shards"] + seconds
    print(f"{name:<8}{rows:>9,}{size / 1e6:>9.1f}{spent['plan']:>9.1f}{spent['shards']:>10.1f}{seconds:>10.1f}"
          f"{rows / all_seconds:>9.0f}{size / all_seconds / 1e6:>8.1f}", flush=True)  # fmt: skip


def _run_free(url: str, rows: int, args: argparse.Namespace, note: Callable[[str], None] = lambda stage: None) -> dict:
    from benchmarks.free import FreeWorker, free_generator, free_run
    from facediffuser.tasks.generate import finish_dataset, generate_shards
    from facediffuser.tasks.ray_session import connect_ray

    if args.workers:
        connect_ray()
    note("start")
    prepared = free_run(url, rows, 500, args.size, args.workers or None)

    def make() -> None:
        if args.workers:
            generate_shards.fn(prepared.job, FreeWorker)
            return
        generator = free_generator(prepared.job)
        for shard in range(prepared.job.layout.shards):
            generator(shard)

    spent = {}
    for stage, work in (
        ("plan", prepared.write),
        ("shards", make),
        ("finish", lambda: finish_dataset.fn(prepared.job)),
    ):
        started = time.perf_counter()
        work()
        spent[stage] = time.perf_counter() - started
        note(stage)
    return spent


@contextmanager
def _bucket() -> Iterator[str]:
    import boto3

    from tests.swift import SwiftS3

    with SwiftS3() as server:
        os.environ.update(server.environment())
        boto3.client("s3").create_bucket(Bucket="bench")
        yield "s3://bench"


# --- the driver's memory ----------------------------------------------------------------------------------------------


def memory(args: argparse.Namespace) -> None:
    """Print the driver's highest memory after each stage; each number of rows in a process of its own."""
    if args.one:
        peaks = {}
        with tempfile.TemporaryDirectory(prefix="facediffuser-bench-") as folder:
            args.size = 8
            started = time.perf_counter()
            _run_free(f"{folder}/dataset", args.rows[0], args, lambda stage: peaks.update({stage: _peak_mib()}))
            seconds = time.perf_counter() - started
        shown = "".join(f"{peaks[stage]:>10.0f}" for stage in ("start", "plan", "shards", "finish"))
        print(f"{args.rows[0]:>10,}{seconds:>10.0f}{shown}", flush=True)
        return
    print(f"the driver's highest memory (MiB) after each stage; {args.workers} workers; {_machine()}")
    print(f"{'rows':>10}{'seconds':>10}{'start':>10}{'plan':>10}{'shards':>10}{'finish':>10}", flush=True)
    for rows in args.rows or (10_000, 100_000, 1_000_000):
        words = [sys.executable, "-m", "benchmarks.pipeline", "memory", "--one", "--rows", str(rows),
                 "--workers", str(args.workers)]  # fmt: skip
        subprocess.run(words, check=True)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- the miniature beside a plain loop --------------------------------------------------------------------------------


def denoising(args: argparse.Namespace) -> None:
    """Print the share of the wall time in which one worker denoises, and images/s beside a plain loop."""
    from facediffuser.generation.generate_settings import GenerateSettings
    from facediffuser.generation.job import prepare
    from facediffuser.generation.shard_generator import ShardGenerator
    from facediffuser.miniature.render import render_set

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="facediffuser-bench-") as folder:
        photos = Path(folder) / "photos"
        render_set(16, 0, photos)
        settings = GenerateSettings(
            models="miniature", scorers="miniature", subjects=str(photos / "subjects"), steps=args.steps,
            prompts=str(photos / "prompts.jsonl"), output=f"{folder}/dataset", shard_size=args.images, batch_size=8,
        )  # fmt: skip
        prepared = prepare(settings)
        prepared.write()
        generator = ShardGenerator(prepared.job)
        rows = next(prepared.plan.tables(args.images)).to_pylist()
        generator.rows(rows[:LOOP_BATCH])  # warm
        images = len(rows)
        ours, loops, shares, stages = [], [], [], {}
        for turn in range(args.turns):
            started = _clocks()
            stats = generator.again(0)
            ours.append(_spent(started))
            shares.append(stats["seconds"]["denoise"] / stats["seconds"]["total"])
            stages = stats["seconds"]
            started = _clocks()
            _plain_loop(generator, rows, Path(folder) / f"loop{turn}")
            loops.append(_spent(started))
    print(f"{images} images of 64 px, {args.steps} steps, batches of 8, one worker of 1 thread; {_machine()}")
    print(f"denoising runs {100 * max(shares):.1f}% of the worker's wall time; seconds by stage, last turn: "
          + ", ".join(f"{name} {value:.1f}" for name, value in stages.items()))  # fmt: skip
    print(f"{'':<12}{'images/s':>10}{'CPU s/image':>14}    best of {args.turns} turns each, in turn")
    for name, spent in (("worker", ours), ("plain loop", loops)):
        wall, cpu = (min(turn[kind] for turn in spent) for kind in (0, 1))
        print(f"{name:<12}{images / wall:>10.2f}{cpu / images:>14.3f}")


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _spent(started: tuple[float, float]) -> tuple[float, float]:
    return time.perf_counter() - started[0], time.process_time() - started[1]


def _plain_loop(generator, rows: list[dict], folder: Path) -> None:
    """The released test script's order: every batch made whole and saved, one after the other; then all is scored."""
    from facediffuser.dataset.references import load_references
    from facediffuser.prompts import without_markers
    from facediffuser.scoring.identity import subject_embedding

    folder.mkdir()
    pipeline, scorers = generator.pipeline, generator.scorers
    references = load_references(generator.store, {name for row in rows for name in row["subject_ids"]})
    identities = {name: subject_embedding(found.identities) for name, found in references.items()}
    made = []
    for start in range(0, len(rows), LOOP_BATCH):
        batch = rows[start : start + LOOP_BATCH]
        first = batch[0]
        out = pipeline(
            prompt=[row["prompt"] for row in batch],
            reference_images=[[references[name].images[0] for name in row["subject_ids"]] for row in batch],
            num_inference_steps=first["num_inference_steps"], guidance_scale=first["guidance_scale"],
            fusion_start=first["fusion_start"], fusion_end=first["fusion_end"], method=first["method"],
            height=first["height"], width=first["width"],
            generator=[torch.Generator("cpu").manual_seed(row["seed"]) for row in batch],
        )  # fmt: skip
        for row, image in zip(batch, out.images, strict=True):
            image.save(folder / f"{row['sample_id']}.png")
            made.append((row, image))
    for start in range(0, len(made), LOOP_BATCH):
        part = made[start : start + LOOP_BATCH]
        scorers.score(
            [image for _, image in part],
            [[identities[name] for name in row["subject_ids"]] for row, _ in part],
            [without_markers(row["prompt"]) for row, _ in part],
        )


def _machine() -> str:
    return f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start"


if __name__ == "__main__":
    main()
