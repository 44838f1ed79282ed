"""What has to be measured on a GPU, in runs of a few minutes: every section prints as it goes and stops in time.

    python -m benchmarks.gpu [--seconds 340] [--compile 100] [--beside COMMAND] [--small] SECTION[:SECONDS] ...

    sampler    the engine's table at full size, how far compiled images are from eager ones, attention kernels, a profile
    fast       fast mode and each of its means against exact mode and the released way, images/s at full size
    training   samples a second of the SDM: plain loop, eager, compiled, and the largest batch that fits; a profile
    worker     the shard generator with scorers and PNG beside it, through Ray where Ray is installed: cold until its first
               shard, then in another process with the code that the first one kept: seconds to the first image,
               images/s, share of the time that denoising takes, and whether both made the same bytes
    fast-worker  the worker in fast mode: whether scoring and PNG keep up with several times the images
    resume     the worker's cold run, which was killed, is resumed and compared with the undisturbed one
    scorers    CLIP and FaceNet in half precision: how far the scores are, and what it gains
    rehearse   `facediffuser rehearse` as far as the machine's libraries go

Sections run in the order given, each in the time that is left, or in SECONDS of it. Most of a short run is compiling, so
--compile lets processes beside the sections compile what later ones run, whenever nothing is timed; the worker's cold run
then takes place first, for so many seconds at most, and the sampler takes the code that it kept. --beside runs another command
so instead. With --folder a second run finds what the first one wrote and compiled.
--small tries all of it on a CPU. Needed: torch, diffusers, transformers, facenet-pytorch, pydantic, pyarrow, cachetools; Ray only to
measure through Ray, Prefect not at all.
"""

import argparse
import contextlib
import gc
import hashlib
import importlib.util
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.beside import Beside, quiet
from benchmarks.gpu_load import GpuLoad

if TYPE_CHECKING:
    from benchmarks.engines import Bench
    from facediffuser.pipeline import FaceDiffuserPipeline
    from facediffuser.training.train_settings import TrainSettings

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


@dataclass
class Shared:
    """What sections give each other.

    Attributes:
        root: a folder for all that is written.
        bench: the models of the sampler's tables.
        exact: a pipeline of them that runs exact mode.
        spent: seconds an image of the released way and of exact mode.
    """

    root: Path
    bench: "Bench | None" = None
    exact: "FaceDiffuserPipeline | None" = None
    spent: dict[str, float] = field(default_factory=dict)


# --- sampler and training ---------------------------------------------------------------------------------------------


def sampler(clock: Clock, options: argparse.Namespace, shared: Shared) -> None:
    from benchmarks.sampler import engine_tables

    bench = _bench(options, shared)
    images, largest = (1, 2) if options.small else (8, 32)
    kept = _take_kept_code(shared.root / "code")
    shared.exact, shared.spent = engine_tables(bench, images, largest, clock.left, options.ways, kept)


def fast(clock: Clock, options: argparse.Namespace, shared: Shared) -> None:
    from benchmarks.engines import EXACT as EXACT_WAY
    from benchmarks.engines import RELEASED
    from benchmarks.fast import EXACT, full_size

    bench = _bench(options, shared)
    _take_kept_code(shared.root / "code")
    names = {EXACT_WAY: EXACT.name, RELEASED: RELEASED}
    known = {names[name]: seconds for name, seconds in shared.spent.items() if name in names}
    full_size(2 if options.small else 32, clock.left, options.small, bench, shared.exact, known)


def _take_kept_code(folder: Path) -> bool:
    """Give this process's compiler the code that workers kept; return whether there was any."""
    from facediffuser.compiled_code import CompiledCode
    from facediffuser.storage import open_store

    return any([CompiledCode(open_store(str(folder)), path.name).load() for path in folder.glob("*.torch")])


def _bench(options: argparse.Namespace, shared: Shared) -> "Bench":
    from benchmarks import sampler as benchmark
    from benchmarks.engines import Bench

    if shared.bench is None:
        pipe = benchmark.small_random_pipeline() if options.small else benchmark.full_size_pipeline(options.device)
        pipe.set_progress_bar_config(disable=True)
        shared.bench = Bench(pipe, 4 if options.small else 50)
    return shared.bench


def training(clock: Clock, options: argparse.Namespace, shared: Shared) -> None:
    from benchmarks import training as benchmark

    settings = _training_settings(options, shared.root)
    loaders = 1 if options.small else 8
    say(f"{'way':<34}{'batch':>7}{'samples/s':>11}{'peak GiB':>10}")
    rates: dict[tuple[str, int], float] = {}
    for batch in options.batches:
        for name in TRAINED if batch == options.batches[0] else TRAINED[:1]:
            if clock.left() < (30 if not options.small else LEAST_SECONDS):
                say(f"{name:<34}{batch:>7} left out: {clock.left():.0f} s left")
                continue
            chosen = settings.model_copy(update={"batch_size": batch, "compile": False if name == "eager" else None})

            def make(name: str = name, chosen: "TrainSettings" = chosen) -> Callable[[], object]:
                if name == "plain loop":
                    return benchmark.plain(chosen, options.device)
                return benchmark.ours(chosen, loaders, options.device)

            try:
                found, step = benchmark.measure(
                    make, 2 if options.small else 4 if name == "plain loop" else 10, options.device
                )
            except torch.OutOfMemoryError:
                say(f"{name:<34}{batch:>7} does not fit")
                continue
            rates[name, batch] = batch / found.seconds
            say(f"{name:<34}{batch:>7}{rates[name, batch]:>11.1f}{found.peak:>10.1f}")
            if name == "compiled" and batch == options.batches[0]:
                for line in benchmark.profile(step, options.device):
                    say(line)
            del step
            gc.collect()
    for (name, batch), rate in rates.items():
        if name != "plain loop" and ("plain loop", options.batches[0]) in rates:
            say(f"{name}, {batch} at once: {rate / rates['plain loop', options.batches[0]]:.2f} times the plain loop")


TRAINED = ("compiled", "plain loop", "eager")
"""Ways of training, the most important first; further batch sizes only compiled."""


def _training_settings(options: argparse.Namespace, root: Path) -> "TrainSettings":
    from facediffuser.rehearsal.random_data import write_prepared
    from facediffuser.training.train_settings import TrainSettings

    base = "miniature" if options.small else str(_base(root, options))
    data = root / "prepared" / "data"
    if not data.exists():
        data = write_prepared(root / "prepared", 8 if options.small else 64, 64 if options.small else 512)
    return TrainSettings(
        role="sdm", data=str(data), base=base, output=str(root / "run"), steps=10**6,
        image_encoder=f"{base}/image_encoder" if not options.small else "miniature",
    )  # fmt: skip


def _base(root: Path, options: argparse.Namespace) -> Path:
    from facediffuser.rehearsal.random_models import Size, write_base

    return root / "base" if (root / "base").exists() else write_base(root / "base", Size(), options.device)


# --- compiling before -------------------------------------------------------------------------------------------------


AT_ONCE = 2
"""Processes that compile beside each other; each has threads of its own."""


def compile_jobs(sections: list[str], options: argparse.Namespace) -> list[str]:
    """Return what is compiled for these sections beside them, by name: each is a process of its own."""
    jobs = ["condition"] * ("fast" in sections or "fast-worker" in sections)
    jobs += [f"training {batch}" for batch in options.batches] * ("training" in sections)
    return jobs + ["deep", "encoder"] * ("fast" in sections)


def compile_job(name: str, options: argparse.Namespace, shared: Shared) -> None:
    """Compile one of them."""
    from benchmarks.fast import compile_function
    from benchmarks.training import ours

    kind, _, number = name.partition(" ")
    if kind == "training":
        settings = _training_settings(options, shared.root).model_copy(update={"batch_size": int(number)})
        step = ours(settings, 1, options.device)
        step()
    else:
        compile_function(kind, 2 if options.small else 32, _bench(options, shared))


def compile_all(jobs: list[str], options: argparse.Namespace) -> None:
    """Compile all of them, AT_ONCE at a time; this process is run beside the sections."""
    words = [sys.executable, "-m", "benchmarks.gpu", "--folder", str(options.folder), "--device", options.device]
    words += ["--small"] * options.small

    def run(job: str) -> None:
        started = time.monotonic()
        ended = subprocess.run([*words, "--job", job, "compile-job"])
        say(f"compiled {job}: {time.monotonic() - started:.0f} s, stops included; exit {ended.returncode}")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(run, jobs))


def _compiling_beside(sections: list[str], options: argparse.Namespace, shared: Shared) -> str | None:
    """Write what the jobs read, and return the command that runs them; None without any."""
    jobs = compile_jobs(sections, options)
    if "training" in sections:
        _training_settings(options, shared.root)  # written once, before processes look for it
    words = [sys.executable, "-m", "benchmarks.gpu", "--folder", str(shared.root), "--device", options.device]
    words += ["--small"] * options.small + [f"--job={job}" for job in jobs] + ["compile-all"]
    return shlex.join(words) if jobs else None


# --- the worker -------------------------------------------------------------------------------------------------------


def worker(clock: Clock, options: argparse.Namespace, shared: Shared) -> None:
    if not (shared.root / "killed").exists():
        _killed(options, shared, clock)
    if clock.left() < (60 if not options.small else LEAST_SECONDS):
        say(f"worker, undisturbed: left out, {clock.left():.0f} s left")
    elif _worker_run("undisturbed", "undisturbed", options, shared, clock):
        say(f"two processes made the same bytes: {_same_pixels(shared, 'shard-00000-*')}")


def fast_worker(clock: Clock, options: argparse.Namespace, shared: Shared) -> None:
    """Generate in fast mode, with the code that was compiled beside; the first shard has the compiling in it."""
    settings = {"speed": "fast", "images_per_prompt": 6 if options.small else 384, "steps": 50}
    settings |= {} if options.small else {"shard_size": 128}
    _worker_run("fast", "fast", options, shared, clock, settings)


def resume(clock: Clock, options: argparse.Namespace, shared: Shared) -> None:
    """Resume the run that was killed, with the code that it kept, and compare it with the undisturbed one."""
    if _worker_run("resumed", "killed", options, shared, clock):
        say(f"a killed and resumed run made the bytes of an undisturbed one: {_same_pixels(shared)}")


def _killed(options: argparse.Namespace, shared: Shared, clock: Clock) -> None:
    """Generate without kept code, and kill all of it after its first shard."""
    settings = _worker_settings(options, shared) | {"output": str(shared.root / "killed")}
    say(f"worker: models, scorers and people are written; {clock.left():.0f} s left; Ray: {_has('ray')}")
    started = time.monotonic()
    process = _start(shared.root, "killed", settings)
    while process.poll() is None and clock.left() > 0 and not _shards(shared.root / "killed"):
        time.sleep(0.1)
    took, ended = time.monotonic() - started, process.poll()
    if ended is None:
        os.killpg(process.pid, signal.SIGKILL)  # of its Ray, too
        process.wait()
        first = f"its first shard of {2 if options.small else 32} images"
        reached = f"{took:.1f} s from its start to {first}, then killed"
        say(
            f"worker, cold: {reached if _shards(shared.root / 'killed') else f'cut off after {took:.1f} s, before {first}'}"
        )
    else:
        say(f"worker, cold: ended with {ended} before it was killed: {_said(shared.root, 'killed')[-1500:]}")


def _worker_run(
    name: str, folder: str, options: argparse.Namespace, shared: Shared, clock: Clock, others: dict | None = None
) -> bool:
    settings = _worker_settings(options, shared) | (others or {})
    output = shared.root / folder
    with quiet(), GpuLoad() as load:
        started = time.monotonic()
        ended = _generate(shared.root, name, settings | {"output": str(output)}, clock)
    say(f"worker, {name}: {time.monotonic() - started:.1f} s in all; {load.line()}")
    return ended


def _same_pixels(shared: Shared, shards: str = "*") -> bool:
    """Whether both runs have these shards, and the same images and scores in them."""
    names = [[path.name for path in _shards(shared.root / run, shards)] for run in ("killed", "undisturbed")]
    same_shards = names[0] == names[1] != []
    return same_shards and _pixels(shared.root / "killed", shards) == _pixels(shared.root / "undisturbed", shards)


def _shards(folder: Path, shards: str = "*") -> list[Path]:
    return sorted(folder.glob(f"data/{shards}.parquet"))


def _worker_settings(options: argparse.Namespace, shared: Shared) -> dict:
    from facediffuser.rehearsal.random_data import write_people
    from facediffuser.rehearsal.random_models import Size, write_models, write_scorers

    root, size = shared.root, Size()
    models = scorers = "miniature"
    people = root / "people" / "subjects"
    if not people.exists():
        people = write_people(people.parent, 8, 64 if options.small else 512)
    if not options.small:
        models, scorers = str(root / "models"), str(root / "scorers")
        if not (root / "models").exists():
            write_models(root / "models", size, options.device)
            write_scorers(root / "scorers", size, options.device)
    (root / "prompts.jsonl").write_text(json.dumps({"prompt": "a photo of a {subject} in the park"}) + "\n")
    batch = 2 if options.small else 32
    rows = IMAGES_IN_A_RUN * batch + batch // 2  # the last batch is filled up
    return {
        "models": models, "scorers": scorers, "subjects": str(people), "prompts": str(root / "prompts.jsonl"),
        "images_per_prompt": rows, "subject_sets": 1, "steps": 3 if options.small else 50, "batch_size": batch,
        "shard_size": batch, "compiled_code": str(root / "code"), "max_failed": 1.0,
        "engine": "eager" if options.small else "compiled",
    }  # fmt: skip


def _generate(root: Path, name: str, settings: dict, clock: Clock) -> bool:
    """Generate in a process with a compiler cache of its own, as on another machine, and print what it says.

    Returns:
        Whether it ended well in the time that is left.
    """
    there, started = len(_shards(Path(settings["output"]))), time.monotonic()
    process, end = _start(root, name, settings), Clock(max(LEAST_SECONDS, clock.left()))
    while process.poll() is None and end.left() > 0 and len(_shards(Path(settings["output"]))) == there:
        time.sleep(0.1)
    took, came = time.monotonic() - started, len(_shards(Path(settings["output"]))) > there
    first = f"its first shard of {settings['shard_size']}"
    say(f"worker, {name}: {took:.1f} s from its start {f'to {first}' if came else f'on, without {first}'}")
    while process.poll() is None and end.left() > 0:
        time.sleep(0.1)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)  # of its Ray, too
        process.wait()
        say(f"worker, {name}: cut off")
    for line in _said(root, name).splitlines():
        if line.startswith("#") or process.returncode:
            say(f"worker, {name}: {line.removeprefix('#')[:2000]}")
    return process.returncode == 0


def _start(root: Path, name: str, settings: dict) -> subprocess.Popen:
    place = {
        # Another machine's: none but what the fast one compiles beside.
        "TORCHINDUCTOR_CACHE_DIR": str(root / ("inductor" if name == "fast" else f"inductor-{name}")),
        "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "benchmarks.gpu", "--settings", json.dumps(settings), "one-run"]
    log = (root / f"{name}.log").open("ab")
    return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | place, start_new_session=True)


def _said(root: Path, name: str) -> str:
    return (root / f"{name}.log").read_text(errors="replace")


def one_run(options: argparse.Namespace) -> None:
    """Generate the settings' run, through Ray where it is installed; called in a process of its own."""
    started = time.monotonic()
    logging.basicConfig(level=logging.WARNING)

    def reached(what: str) -> None:
        say(f"#{time.monotonic() - started:.1f} s after the start: {what}")

    from facediffuser.batch_stage import ThisMachine
    from facediffuser.dataset.plan import Layout  # noqa: F401  (the package is imported before the clock is read)
    from facediffuser.generation.generate_settings import GenerateSettings
    from facediffuser.generation.generate_stage import generate_stage
    from facediffuser.generation.job import prepare

    gpu = torch.cuda.is_available()
    prepared = prepare(GenerateSettings(**json.loads(options.settings)), ThisMachine(int(gpu), 1))
    prepared.write()
    reached("checked, the plan is written")
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
    reached(f"{len(missing)} shards to make")
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


def _pixels(folder: Path, shards: str) -> str:
    """Return a digest of all images and scores of a dataset, not of the footers."""
    import pyarrow.parquet as pq

    digest = hashlib.sha256()
    for path in _shards(folder, shards):
        for row in pq.read_table(path, columns=["sample_id", "image_sha256", "ip", "pc"]).to_pylist():
            digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def _has(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# --- scorers and rehearsal --------------------------------------------------------------------------------------------


@torch.no_grad()
def scorers(clock: Clock, options: argparse.Namespace, shared: Shared) -> None:
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


def rehearse(clock: Clock, options: argparse.Namespace, shared: Shared) -> None:
    """Rehearse in a process of its own, which is ended when the time is over."""
    words = [sys.executable, "-m", "benchmarks.gpu", "--folder", str(shared.root), "--device", options.device]
    with quiet():
        process = subprocess.Popen([*words, *["--small"] * options.small, "rehearsal"], start_new_session=True)
        try:
            process.wait(max(LEAST_SECONDS, clock.left()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            say("rehearse: cut off")


def rehearsal(options: argparse.Namespace) -> None:
    """Rehearse, and print each stage as soon as it is measured."""
    from facediffuser.rehearsal.rehearsal import rehearse as run
    from facediffuser.rehearsal.rehearsal import table
    from facediffuser.rehearsal.rehearse_settings import RehearseSettings

    small = {"size": "miniature", "try_pictures": 2, "try_steps": 1, "try_images": 2, "steps": 3, "batch_size": 2}
    # Eager images: compiling is measured elsewhere. Batches of 8, as in the section on training, whose code is kept.
    chosen = small if options.small else {"try_images": 8, "batch_size": 8}
    settings = RehearseSettings(
        output=str(options.folder / "rehearsed"), engine="eager", device=options.device, **chosen
    )
    made = run(
        settings, lambda job: None, lambda one: say(f"{one.stage}: {one.rate:.3g} {one.noun} a second {one.note}")
    )
    say(table(made, None))


SECTIONS: dict[str, Callable[[Clock, argparse.Namespace, Shared], None]] = {
    "sampler": sampler, "fast": fast, "training": training, "worker": worker,
    "fast-worker": fast_worker, "resume": resume, "scorers": scorers, "rehearse": rehearse,
}  # fmt: skip


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(argv: list[str] | None = None) -> None:
    """Run the sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sections", nargs="+", metavar="SECTION", help=f"{', '.join(SECTIONS)}; with :SECONDS at most so many"
    )
    parser.add_argument("--seconds", type=float, default=340, help="time for all sections")
    parser.add_argument(
        "--compile",
        type=float,
        default=0,
        help="compile beside the sections; seconds at most for the cold run before them",
    )
    parser.add_argument("--ways", type=int, help="sampler: so many of its ways alone (default: all)")
    parser.add_argument("--batches", type=_numbers, default=[8, 32], help="training: batch sizes (default: 8,32)")
    parser.add_argument("--beside", help="command that runs while nothing is timed")
    parser.add_argument("--small", action="store_true", help="small models, to try it on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="for all that is written (default: a temporary one)")
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    parser.add_argument("--job", action="append", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.sections == ["one-run"]:
        one_run(options)
        return
    logging.basicConfig(level=logging.WARNING)
    with contextlib.ExitStack() as stack:
        root = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="facediffuser-gpu-")))
        root.mkdir(parents=True, exist_ok=True)
        shared = Shared(root)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(root / "inductor"))
        if options.sections == ["rehearsal"]:
            rehearsal(options)
            return
        if options.sections == ["compile-job"]:
            compile_job(options.job[0], options, shared)
            return
        if options.sections == ["compile-all"]:
            compile_all(options.job, options)
            return
        names = [given.partition(":")[0] for given in options.sections]
        for name in names:
            if name not in SECTIONS:
                parser.error(f"{name}: no such section; choose from {', '.join(SECTIONS)}")
        beside = options.beside or (_compiling_beside(names, options, shared) if options.compile else None)
        if beside:
            stack.enter_context(Beside(beside, root / "beside.log"))
        _run_sections(options, shared)
        if beside:
            for line in (root / "beside.log").read_text().strip().splitlines()[-12:]:
                say(f"beside: {line[:200]}")


def _run_sections(options: argparse.Namespace, shared: Shared) -> None:
    whole = Clock(options.seconds)
    reads_code = {"sampler", "fast", "worker", "resume"} & {given.partition(":")[0] for given in options.sections}
    if options.compile and reads_code and not (shared.root / "killed").exists():
        say(f"== the worker's cold run ({options.compile:.0f} s at most)")
        _killed(options, shared, Clock(options.compile))
    for given in options.sections:
        name, _, most = given.partition(":")
        clock = Clock(min(whole.left(), float(most or options.seconds)))
        if clock.left() < LEAST_SECONDS:
            say(f"== {name}: left out, {clock.left():.0f} s left")
            continue
        say(f"== {name} ({clock.left():.0f} s left)")
        try:
            SECTIONS[name](clock, options, shared)
        except Exception as error:  # a section that fails must not cost the others
            logging.exception("%s failed: %s", name, error)
    say(f"== done, {whole.left():.0f} s left")


if __name__ == "__main__":
    main()
