"""The fine-tuning set on a GPU machine: rendered, prepared and encoded by processes of the machine, without Ray."""

import multiprocessing
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tools.miniature_weights.gpu_call import Call
from tools.miniature_weights.task_pool import Task


def render_ffhq(folder: Path, pictures: int, cores: int) -> Path:
    """Render the fine-tuning set."""
    from facediffuser.miniature.render import render_set

    if not (folder / "prompts_pairs.jsonl").exists():
        shutil.rmtree(folder, ignore_errors=True)
        render_set(pictures, 1, folder, world="ffhq", workers=cores)
    return folder


def _prepare_unit(job, unit):
    from facediffuser.preprocess.preprocess_stage import PartWorker

    global _WORKER
    if _WORKER is None:
        _WORKER = PartWorker(job)
    return unit.key, _WORKER(unit)


_WORKER = None


def prepare(source: Path, output: Path, cores: int, stages: Path | None = None) -> Path:
    """Prepare a rendered set, as `facediffuser preprocess` does, in processes of this machine; return `output`.

    What each stage finds is kept in `stages` and not looked for again.
    """
    from facediffuser.batch_stage import Results
    from facediffuser.preprocess.parts import (
        MANIFEST,
        begin_or_resume_prepared,
        finished_parts,
        run_identity,
        split_into_parts,
        to_json,
    )
    from facediffuser.preprocess.photo_stages import Job
    from facediffuser.preprocess.prepared_manifest import build_manifest
    from facediffuser.preprocess.preprocess_settings import PreprocessSettings
    from facediffuser.preprocess.preprocess_stage import PartWorker, part_stage
    from facediffuser.preprocess.required_models import require_models
    from facediffuser.preprocess.sources import list_source
    from facediffuser.storage import open_store

    settings = PreprocessSettings(
        source=str(source),
        output=str(output),
        format="ffhq-fastcomposer",
        cpus_per_worker=1,
        stages=stages and str(stages),
    )
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
        store.put(MANIFEST, to_json(build_manifest(run, listing, [every[part] for part in sorted(every)])))

    stage, results = part_stage(PartWorker, job, run.document, listing, missing, False, finish), Results()
    # New processes, not forked ones: torch has threads here, and on a GPU machine a CUDA context.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores, mp_context=context) as pool:
        for key, counts in pool.map(_prepare_unit, [job] * len(stage.units), stage.units):
            results.add(key, counts)
    stage.finish(results)
    return output


def encode(call: Call, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Fill the cache of latents; where a task fails, the trainings fill the gap themselves."""
    count = call.size.latent_tasks
    tasks = [Task(f"latents/{n}", "latents", str(call.work), start=n, stop=count) for n in range(count)]
    call.tasks.put(tasks, in_front=True)
    call.wait(lambda: call.tasks.done(tasks) or call.past(0.9), "latents", meanwhile)
