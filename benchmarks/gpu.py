"""What has to be measured on a GPU, in runs of a few minutes: every section prints as it goes and stops in time.

    python -m benchmarks.gpu [--seconds 340] [--small] SECTION[:SECONDS] ...

    sampler    the engine's table at full size, how far compiled images are from eager ones, attention kernels, a profile
    training   samples a second of the SDM: plain loop, eager, compiled, and the largest batch that fits
    worker     the shard generator with scorers and PNG beside it, through Ray where Ray is installed: cold, then again in
               another process with the code that the first one kept: seconds to the first image, images/s, share of the
               time that denoising takes, and whether both made the same bytes; then a run that is killed and resumed
    fast       fast mode and each of its means against exact mode and the released way, images/s at full size
    scorers    CLIP and FaceNet in half precision: how far the scores are, and what it gains
    rehearse   `facediffuser rehearse` as far as the machine's libraries go

Sections run in the order given, each in the time that is left, or in SECONDS of it. Two runs of six minutes on a borrowed
machine: `sampler:220 training` and `worker scorers rehearse`; a third for `fast`. --small tries all of it on a CPU. Needed: torch,
diffusers, transformers, facenet-pytorch, pydantic, pyarrow, cachetools; Ray only to measure through Ray, Prefect not at all.
"""

import argparse
import hashlib
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

LEAST_SECONDS = 20
IMAGES_IN_A_RUN = 2
"""Batches of images in a worker's run."""


class Clock:
    """Says how many seconds are left."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


# --- sampler and training ---------------------------------------------------------------------------------------------


def sampler(clock: Clock, options: argparse.Namespace) -> None:
    from benchmarks import sampler as benchmark
    from benchmarks.engines import Bench

    pipe = benchmark.small_random_pipeline() if options.small else benchmark.full_size_pipeline(options.device)
    pipe.set_progress_bar_config(disable=True)
    steps, images, largest = (4, 1, 2) if options.small else (50, 8, 32)
    benchmark.engine_tables(Bench(pipe, steps), images, largest, clock.left)


def fast(clock: Clock, options: argparse.Namespace) -> None:
    from benchmarks.fast import full_size

    full_size(2 if options.small else 32, clock.left, eager=options.small, small=options.small)


def training(clock: Clock, options: argparse.Namespace) -> None:
    from benchmarks import training as benchmark
    from facediffuser.rehearsal.random_data import write_prepared
    from facediffuser.rehearsal.random_models import Size, write_base
    from facediffuser.training.train_settings import TrainSettings

    with tempfile.TemporaryDirectory(prefix="facediffuser-gpu-") as folder:
        root = Path(folder)
        base = "miniature" if options.small else str(write_base(root / "base", Size(), options.device))
        data = write_prepared(root, 8 if options.small else 128, 64 if options.small else 512)
        loaders = 1 if options.small else 8
        say(f"{'way':<34}{'batch':>7}{'samples/s':>11}{'against the plain loop':>24}{'peak GiB':>10}")
        plain = None
        for batch in (2,) if options.small else (8, 32, 24, 16):
            settings = TrainSettings(
                role="sdm", data=str(data), base=base, output=str(root / "run"), batch_size=batch, steps=10**6,
                image_encoder=f"{base}/image_encoder" if not options.small else "miniature",
            )  # fmt: skip
            eager = settings.model_copy(update={"compile": False})
            ways = {"compiled": (settings, 90)}
            if plain is None:
                ways = {
                    "plain loop": (settings, 40), "eager": (eager, 30), "compiled": (settings, 100),
                }  # fmt: skip
            for name, (chosen, seconds) in ways.items():
                if clock.left() < (seconds if not options.small else LEAST_SECONDS):
                    say(f"{name:<34}{batch:>7} left out: {clock.left():.0f} s left, it takes about {seconds}")
                    continue
                make = (
                    (lambda chosen=chosen: benchmark.plain(chosen, options.device))
                    if name == "plain loop"
                    else (lambda chosen=chosen: benchmark.ours(chosen, loaders, options.device))
                )
                try:
                    found = benchmark.measure(make, 2 if options.small else 10, options.device)
                except torch.OutOfMemoryError:
                    say(f"{name:<34}{batch:>7} does not fit")
                    continue
                rate = batch / found.seconds
                plain = plain or rate
                say(f"{name:<34}{batch:>7}{rate:>11.1f}{rate / plain:>23.2f}x{found.peak:>10.1f}")


# --- the worker -------------------------------------------------------------------------------------------------------


def worker(clock: Clock, options: argparse.Namespace) -> None:
    from facediffuser.rehearsal.random_data import write_people
    from facediffuser.rehearsal.random_models import Size, write_models, write_scorers

    with tempfile.TemporaryDirectory(prefix="facediffuser-gpu-") as folder:
        root = Path(folder)
        people = write_people(root / "people", 8, 64 if options.small else 512)
        models = scorers = "miniature"
        if not options.small:
            models = str(write_models(root / "models", Size(), options.device))
            scorers = str(write_scorers(root / "scorers", Size(), options.device))
        (root / "prompts.jsonl").write_text(json.dumps({"prompt": "a photo of a {subject} in the park"}) + "\n")
        say(
            f"models, scorers and people written; {clock.left():.0f} s left; Ray: {_has('ray')}, Prefect: {_has('prefect')}"
        )
        batch = 2 if options.small else 32
        rows = IMAGES_IN_A_RUN * batch + batch // 2  # the last batch is filled up
        given = {
            "models": models, "scorers": scorers, "subjects": str(people), "prompts": str(root / "prompts.jsonl"),
            "images_per_prompt": rows, "subject_sets": 1, "steps": 3 if options.small else 50, "batch_size": batch,
            "shard_size": batch, "compiled_code": str(root / "code"), "max_failed": 1.0,
            "engine": "eager" if options.small else "compiled",
        }  # fmt: skip
        digests = {}
        for name, needed in (("cold", 230), ("with the kept code", 90)):
            if clock.left() < (needed if not options.small else LEAST_SECONDS):
                say(f"worker, {name}: left out, {clock.left():.0f} s left")
                continue
            if _generate(root, name, given | {"output": str(root / name.replace(" ", "-"))}, clock):
                digests[name] = _pixels(root / name.replace(" ", "-"))
        if len(digests) == 2:
            say(f"two processes made the same bytes: {len(set(digests.values())) == 1}")
        if clock.left() > (120 if not options.small else LEAST_SECONDS) and digests:
            if _killed(root, given | {"output": str(root / "killed")}, clock):
                again = _pixels(root / "killed")
                say(f"a killed and resumed run made the same bytes: {again in digests.values()}")


def _generate(root: Path, name: str, settings: dict, clock: Clock) -> bool:
    """Generate in a process with a compiler cache of its own, as on another machine, and print what it says.

    Returns:
        Whether it ended well in the time that is left.
    """
    process = _start(root, name, settings)
    try:
        out, _ = process.communicate(timeout=max(LEAST_SECONDS, clock.left()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # of its Ray, too
        say(f"worker, {name}: cut off")
        return False
    for line in out.splitlines():
        if line.startswith("#") or process.returncode:
            say(f"worker, {name}: {line.removeprefix('#')}")
    return process.returncode == 0


def _killed(root: Path, settings: dict, clock: Clock) -> bool:
    process = _start(root, "killed", settings)
    while (
        process.poll() is None and clock.left() > LEAST_SECONDS and not list((root / "killed").glob("data/*.parquet"))
    ):
        time.sleep(0.2)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return _generate(root, "resumed", settings, clock)


def _start(root: Path, name: str, settings: dict) -> subprocess.Popen:
    place = {"TORCHINDUCTOR_CACHE_DIR": str(root / f"inductor-{name.replace(' ', '-')}"), "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-m", "benchmarks.gpu", "--settings", json.dumps(settings), "one-run"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | place,
        start_new_session=True,
    )


def one_run(clock: Clock, options: argparse.Namespace) -> None:
    """Generate the settings' run, through Ray where it is installed; called in a process of its own."""
    started = time.monotonic()
    logging.basicConfig(level=logging.WARNING)
    from facediffuser.dataset.plan import Layout  # noqa: F401  (the package is imported before the clock is read)
    from facediffuser.generation.generate_settings import GenerateSettings
    from facediffuser.generation.generate_stage import generate_stage
    from facediffuser.generation.job import prepare

    gpu = torch.cuda.is_available()
    prepared = prepare(GenerateSettings(**json.loads(options.settings)), gpu, 1)
    prepared.write()
    job = prepared.job
    stats: list[dict] = []

    def finish(results) -> None:
        stats.extend(results.counts.values())

    store = job.store()
    missing = [n for n in range(job.layout.shards) if not store.exists(job.layout.shard_key(n))]
    stage = generate_stage(job, missing, finish)
    if _has("ray"):
        from facediffuser.tasks.ray_driver import RayDriver

        driver = RayDriver()
    else:
        from facediffuser.tasks.local_driver import LocalDriver

        driver = LocalDriver()
    begun = time.monotonic()
    driver.run(stage)
    took = time.monotonic() - begun
    ok = [one for one in stats if "seconds" in one]
    say(f"#{type(driver).__name__}, {sum(one['rows'] for one in ok)} images in {len(ok)} shards, {job.batch_size} at once, "
        f"{sum(one['failed'] for one in ok)} failed; from the start of the process to the stage {begun - started:.1f} s, the stage "
        f"{took:.1f} s")  # fmt: skip
    for one in sorted(ok, key=lambda one: one["shard"]):
        seconds = one["seconds"]
        say(f"#shard {one['shard']}: {one['rows']} rows, {one['rows'] / seconds['total']:.2f} images/s, denoising "
            f"{100 * seconds['denoise'] / seconds['total']:.1f}% of {seconds['total']:.1f} s; {json.dumps(seconds)}")  # fmt: skip


def _pixels(folder: Path) -> str:
    """Return a digest of all images and scores of a dataset, not of the footers."""
    import pyarrow.parquet as pq

    digest = hashlib.sha256()
    for path in sorted(folder.glob("data/*.parquet")):
        for row in pq.read_table(path, columns=["sample_id", "image_sha256", "ip", "pc"]).to_pylist():
            digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def _has(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# --- scorers and rehearsal --------------------------------------------------------------------------------------------


@torch.no_grad()
def scorers(clock: Clock, options: argparse.Namespace) -> None:
    from facenet_pytorch import InceptionResnetV1
    from transformers import CLIPModel

    from facediffuser.rehearsal.random_models import Size, clip_config

    torch.manual_seed(0)
    device, count = options.device, 4 if options.small else 64
    with torch.device(device):
        networks: dict[str, tuple[Callable, torch.Tensor]] = {
            "FaceNet": (InceptionResnetV1(pretrained=None).eval(), torch.randn(count, 3, 160, 160))
        }
        if not options.small:
            clip = CLIPModel(clip_config(Size())).eval()
            networks["CLIP ViT-L/14"] = (
                lambda x: clip.get_image_features(pixel_values=x).pooler_output, torch.randn(count, 3, 224, 224)
            )  # fmt: skip
    for name, (network, pixels) in networks.items():

        def embed(half: bool, network=network, pixels=pixels) -> torch.Tensor:
            with torch.autocast(
                torch.device(device).type, torch.float16 if device != "cpu" else torch.bfloat16, enabled=half
            ):
                return torch.nn.functional.normalize(network(pixels).float(), dim=1)

        vectors = {half: embed(half) for half in (False, True)}
        cosines = {half: vectors[half] @ vectors[half].T for half in vectors}
        worst = (cosines[True] - cosines[False]).abs().max().item()
        times = {}
        for half in (False, True):
            began = time.perf_counter()
            for _ in range(3):
                embed(half)
            if device != "cpu":
                torch.cuda.synchronize()
            times[half] = (time.perf_counter() - began) / 3 / count
        say(f"{name}: cosines of random pictures differ by at most {worst:.1e} in half precision; "
            f"{1000 * times[False]:.2f} ms a picture in float32, {1000 * times[True]:.2f} in half")  # fmt: skip


def rehearse(clock: Clock, options: argparse.Namespace) -> None:
    from facediffuser.rehearsal.rehearsal import rehearse as run
    from facediffuser.rehearsal.rehearsal import table
    from facediffuser.rehearsal.rehearse_settings import RehearseSettings

    small = {"size": "miniature", "try_pictures": 2, "try_steps": 1, "try_images": 2, "steps": 3, "batch_size": 2}
    with tempfile.TemporaryDirectory(prefix="facediffuser-gpu-") as folder:
        # Eager: compiling is measured above, and a rehearsal of minutes would spend them on it.
        settings = RehearseSettings(
            output=f"{folder}/out", engine="eager", **(small if options.small else {"try_images": 8})
        )
        made = run(
            settings, lambda job: None, lambda one: say(f"{one.stage}: {one.rate:.3g} {one.noun} a second {one.note}")
        )
        say(table(made, None))


SECTIONS: dict[str, Callable[[Clock, argparse.Namespace], None]] = {
    "sampler": sampler, "fast": fast, "training": training, "worker": worker, "scorers": scorers, "rehearse": rehearse,
    "one-run": one_run,
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Run the sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sections", nargs="+", metavar="SECTION", help=f"{', '.join(SECTIONS)}; with :SECONDS at most so many"
    )
    parser.add_argument("--seconds", type=float, default=340, help="time for all sections")
    parser.add_argument("--small", action="store_true", help="small models, to try it on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    whole = Clock(options.seconds)
    for given in options.sections:
        name, _, most = given.partition(":")
        if name not in SECTIONS:
            parser.error(f"{name}: no such section; choose from {', '.join(SECTIONS)}")
        clock = Clock(min(whole.left(), float(most or options.seconds)))
        if name == "one-run":
            one_run(clock, options)
            continue
        if clock.left() < LEAST_SECONDS:
            say(f"== {name}: left out, {clock.left():.0f} s left")
            continue
        say(f"== {name} ({clock.left():.0f} s left)")
        try:
            SECTIONS[name](clock, options)
        except Exception as error:  # a section that fails must not cost the others
            logging.exception("%s failed: %s", name, error)
    say(f"== done, {whole.left():.0f} s left")


if __name__ == "__main__":
    main()
