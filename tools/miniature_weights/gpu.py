"""The miniature's two worlds on one GPU machine: render, prepare, train the base and both models, measure forgetting and the claim.

    python -m tools.miniature_weights.gpu WORK --results OUT [--seconds 420] [--small] [--cores 16]

Everything that is made lies in WORK, and a second call with the same WORK goes on where the first one stopped: trainings from
their last checkpoint, measurements from what they kept. What is to be taken home (weights in half precision, CSV, PNG, Markdown, the
log) is copied to OUT at the end of each call. Needed: torch, diffusers, transformers, facenet-pytorch, pydantic, pyarrow, scipy and
matplotlib; neither Ray nor Prefect. --small does all of it in a few minutes on a CPU, with numbers that mean nothing.

Planned for two calls of 7 minutes on an H100 or H200 with 16 cores: the base goes on from the shipped one on the world `broad`, TDM and
SDM side by side from that base on the world `ffhq` with 250 steps of the TDM to 450 of the SDM, one constant learning rate, and each
its own losses.
"""

import argparse
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger("gpu")

LEARNING_RATE = 6e-4
"""Of both UNets, as the SDM's recipe has it; constant, as in the paper."""


@dataclass(frozen=True)
class Size:
    """How much is done. tdm_steps : sdm_steps is the paper's 250 : 450; `points`: shares of them that are measured."""

    broad_pictures: int = 20_000
    base_steps: int = 2000
    ffhq_pictures: int = 40_000
    batch: int = 128
    tdm_steps: int = 1800
    sdm_steps: int = 3240
    points: int = 4
    forgetting_people: int = 8
    choice_people: int = 8
    claim_people: int = 45
    claim_instances: int = 3
    denoised: int = 270
    sampling_steps: int = 12


SMALL = Size(60, 2, 48, 4, 10, 18, 2, 1, 1, 2, 1, 16, 2)
"""For a try on a CPU."""


class Clock:
    """Says how many seconds are left."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until the call should end."""
        return self.end - time.monotonic()

    def has(self, seconds: float) -> bool:
        """Whether there is time for something that takes so long."""
        return self.left() > seconds


def say(line: str) -> None:
    """Log a line, with the time."""
    logger.info(line)


# --- data -------------------------------------------------------------------------------------------------------------


def render_ffhq(work: Path, size: Size, cores: int) -> Path:
    """Render the fine-tuning set."""
    from facediffuser.miniature.render import render_set

    folder = work / "ffhq"
    if not (folder / "prompts_pairs.jsonl").exists():
        shutil.rmtree(folder, ignore_errors=True)
        render_set(size.ffhq_pictures, 1, folder, world="ffhq", workers=cores)
    return folder


def _prepare_unit(job, unit):
    from facediffuser.preprocess.preprocess_stage import PartWorker

    global _WORKER
    if _WORKER is None:
        _WORKER = PartWorker(job)
    return unit.key, _WORKER(unit)


_WORKER = None


def prepare(source: Path, output: Path, cores: int) -> Path:
    """Prepare a rendered set, as `facediffuser preprocess` does, in processes of this machine; return `output`."""
    from facediffuser.batch_stage import Results
    from facediffuser.preprocess.parts import (
        MANIFEST,
        begin_or_resume_prepared,
        finished_parts,
        run_identity,
        split_into_parts,
    )
    from facediffuser.preprocess.photo_stages import Job
    from facediffuser.preprocess.prepared_manifest import build_manifest, write_manifest
    from facediffuser.preprocess.preprocess_settings import PreprocessSettings
    from facediffuser.preprocess.preprocess_stage import prepare_stage
    from facediffuser.preprocess.required_models import require_models
    from facediffuser.preprocess.sources import list_source
    from facediffuser.storage import open_store

    settings = PreprocessSettings(source=str(source), output=str(output), format="ffhq-fastcomposer", cpus_per_worker=1)
    store, listing = open_store(settings.output), list_source(settings.source, settings.format)
    models = require_models(settings, listing)
    run, there = begin_or_resume_prepared(store, run_identity(settings, listing, models, {}), listing)
    if MANIFEST in there:
        return output
    parts = dict(enumerate(split_into_parts(listing.records, settings.part_size)))
    done = finished_parts(store, there, run.fingerprint, len(parts))
    job = Job(settings, listing.format, run.fingerprint, device="cpu", models=models)
    missing = {part: records for part, records in parts.items() if part not in done}

    def finish(results: Results) -> None:
        made = {one["part"]: {k: v for k, v in one.items() if k != "seconds"} for one in results.counts.values()}
        every = done | made
        write_manifest(store, build_manifest(run, listing, [every[part] for part in sorted(every)]))

    stage, results = prepare_stage(job, run.document, listing, missing, False, finish), Results()
    # New processes, not forked ones: torch has threads here, and on a GPU machine a CUDA context.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores, mp_context=context) as pool:
        for key, counts in pool.map(_prepare_unit, [job] * len(stage.units), stage.units):
            results.add(key, counts)
    stage.finish(results)
    return output


# --- training ---------------------------------------------------------------------------------------------------------


def train_base_part(work: Path, size: Size, cores: int, device: str) -> Path:
    """Let the shipped base go on with the world `broad`; return the new base's folder."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTokenizer

    from facediffuser.shipped import base_folder
    from tools.miniature_weights.base import save_fp16, train_base
    from tools.miniature_weights.photo_stream import load_photos

    base, making = work / "parts" / "base", work / "base-making"
    if base.exists():
        return base
    shutil.rmtree(making, ignore_errors=True)
    shutil.copytree(base_folder(), making)
    photos = load_photos(size.broad_pictures, BROAD_PEOPLE, work / "photos", cores, world="broad")
    vae, tokenizer = (
        AutoencoderKL.from_pretrained(making / "vae").float(),
        CLIPTokenizer.from_pretrained(making / "tokenizer"),
    )
    unet, text = train_base(vae, photos, tokenizer, size.base_steps, making, size.batch, device=device)
    save_fp16(unet.cpu(), making / "unet")
    save_fp16(text.cpu(), making / "text_encoder")
    base.parent.mkdir(exist_ok=True)
    return making.rename(base)


BROAD_PEOPLE = 4_000_000
"""First person of the broad world's pictures: nobody of a scorer's, of a photo set's or of a test's."""


def train_role(role: str, work: Path, size: Size, device: str, loaders: int) -> None:
    """Train one model to its last step, from its last checkpoint where there is one. In a process of its own."""
    from facediffuser.training.loop import train_model
    from facediffuser.training.train_settings import TrainSettings
    from facediffuser.training.worker_context import Worker

    steps = size.tdm_steps if role == "tdm" else size.sdm_steps
    other = {"reference_pairing": "other"} if role == "sdm" else {}
    settings = TrainSettings(
        role=role, data=str(work / "prepared"), base=str(work / "parts" / "base"), output=str(work / role), preset="miniature", resume=True,
        steps=steps, batch_size=size.batch, learning_rate=LEARNING_RATE, schedule="constant", compile=False,
        checkpoint_every=steps // size.points, keep_every=steps // size.points, log_every=max(1, steps // 40), **other,
    )  # fmt: skip
    result = train_model(
        settings, lambda numbers: print(role, numbers, flush=True), Worker(device=device, loaders=loaders)
    )
    print(role, result, flush=True)


def train_both(work: Path, options: argparse.Namespace, clock: Clock, keep: float) -> bool:
    """Train TDM and SDM beside each other until both end or `keep` seconds are left; return whether both have ended."""
    from facediffuser.storage import open_store
    from facediffuser.training import training_run as runs

    def ended(role: str) -> bool:
        return runs.finished_step(open_store(str(work / role))) is not None

    running = {}
    for role in ("tdm", "sdm"):
        if not ended(role):
            words = [sys.executable, "-m", "tools.miniature_weights.gpu", str(work), "--train", role]
            words += ["--cores", str(options.cores), "--device", options.device] + ["--small"] * options.small
            log = open(work / f"{role}.log", "a")
            running[role] = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
    while any(process.poll() is None for process in running.values()) and clock.has(keep):
        time.sleep(0.5)
    for role, process in running.items():
        if process.poll() is None:
            # What it did since its last checkpoint is done again in the next call.
            process.terminate()
            process.wait()
        elif process.returncode:
            raise SystemExit(f"training {role} ended with {process.returncode}: see {work / role}.log")
    return ended("tdm") and ended("sdm")


# --- the whole --------------------------------------------------------------------------------------------------------


def everything(work: Path, options: argparse.Namespace, size: Size, clock: Clock) -> None:
    """Do what is still to be done, in order, as far as the time reaches."""
    from tools.miniature_weights.make import make_models

    device, cores = options.device, options.cores
    step(clock, "render ffhq", lambda: render_ffhq(work, size, cores))
    step(clock, "prepare", lambda: prepare(work / "ffhq", work / "prepared", cores))
    step(clock, "base", lambda: train_base_part(work, size, cores, device))
    if not step(clock, "train both", lambda: train_both(work, options, clock, 25)):
        say("trainings go on in the next call")
        return
    if not (work / "parts" / "models").exists():
        make_models(work / "parts", str(work / "tdm"), str(work / "sdm"))
    step(clock, "measure", lambda: measured(work, size, device, clock))


def measured(work: Path, size: Size, device: str, clock: Clock) -> None:
    """Measure forgetting, choose window and guidance, measure the claim and people's own words."""
    from tools.miniature_weights import choose, forgetting, own_words
    from tools.miniature_weights.claim_here import chosen_sampler, claim_here
    from tools.miniature_weights.scored import Sampler

    results, models = work / "results", str(work / "parts" / "models")
    results.mkdir(exist_ok=True)
    steps = size.sampling_steps
    window = (round(steps * 3 / 12), round(steps * 11 / 12))
    sampler = Sampler(steps, window=window, batch=size.denoised)
    forgetting.measure(
        results / "forgetting", str(work / "tdm"), str(work / "sdm"), size.forgetting_people, 1, sampler, device,
        time_left=lambda: clock.has(40),
    )  # fmt: skip
    choice = results / "choice.json"
    if not choice.exists() and clock.has(60):
        candidates = {} if steps == 12 else {"guidances": (5.0,), "starts": (0,), "ends": (1, 2), "steps": steps}
        choose.choose(choice, models, size.choice_people, device, **candidates, batch=size.denoised)
    if choice.exists():
        said = chosen_sampler(choice)
        sampler = Sampler(said.steps, said.guidance, said.window, size.denoised)
        claim_here(
            results / "claim", models, size.claim_people, size.claim_instances, sampler, device, lambda: clock.has(20)
        )
    if clock.has(30):
        own_words.measure(models, size.forgetting_people, device, results / "words", sampler)


def step(clock: Clock, name: str, do: Callable):
    """Do something and say how long it took."""
    started = time.monotonic()
    result = do()
    say(f"{name}: {time.monotonic() - started:.0f} s; {clock.left():.0f} s left")
    return result


def take_home(work: Path, output: Path) -> None:
    """Copy to `output` what is to be taken home: base and models as they are shipped, but for links; numbers, pictures, logs."""
    output.mkdir(parents=True, exist_ok=True)
    for path in sorted((work / "parts").rglob("*")):
        if path.is_file() and not path.is_symlink():
            target = output / path.relative_to(work)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    for path in work.glob("*.log"):
        shutil.copy(path, output)
    for path in sorted((work / "results").rglob("*")):
        kept = {"kept", "points", "choice.kept"} & set(path.relative_to(work).parts)
        if path.is_file() and not kept:
            target = output / path.relative_to(work / "results")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.miniature_weights.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("work", type=Path, help="folder for all that is made; the same one goes on")
    parser.add_argument("--results", type=Path, help="where what is to be taken home is copied to")
    parser.add_argument("--seconds", type=float, default=420.0, help="after which this call should end")
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--device", help="default: cuda where there is a GPU")
    parser.add_argument("--small", action="store_true", help="a try on a CPU, in a few minutes")
    parser.add_argument("--train", choices=["tdm", "sdm"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    import torch

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    size = SMALL if options.small else Size()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.train:
        loaders = 0 if options.device == "cpu" else max(1, options.cores // 3)
        train_role(options.train, options.work, size, options.device, loaders)
        return
    handlers = [logging.StreamHandler(sys.stdout), logging.FileHandler(options.work / "gpu.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    clock = Clock(options.seconds)
    try:
        everything(options.work, options, size, clock)
    finally:
        if options.results:
            take_home(options.work, options.results)


if __name__ == "__main__":
    main()
