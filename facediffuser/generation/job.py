"""From settings to a checked run: what goes in is read and measured, the output compared, nothing written yet."""

import functools
import hashlib
import logging
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from facediffuser.dataset.other_run import require_same_run, run_there
from facediffuser.dataset.plan import Layout, Plan, write_plan
from facediffuser.dataset.references import encode_references, references_digest
from facediffuser.dataset.schema import (
    DATASET_SCHEMA,
    PLAN_SCHEMA,
    SUBJECTS_KEY,
    SUBJECTS_SCHEMA,
    canonical_json,
    with_marks,
)
from facediffuser.dataset.shards import shard_mark
from facediffuser.errors import InputError
from facediffuser.generation.generate_check import check_generate, known_document
from facediffuser.generation.generate_settings import GenerateSettings, Pool
from facediffuser.generation.reference_pictures import prepare_references
from facediffuser.model_check import check_model_folder
from facediffuser.modelfolder import model_digests
from facediffuser.scoring.scorers import load_scorers
from facediffuser.shipped import base_folder
from facediffuser.storage import Store, open_store

logger = logging.getLogger(__name__)

# Pixels denoised together: on a GPU 8 images of 512 px; on a CPU small images gain from company, large ones do not.
GPU_BATCH_PIXELS, GPU_MAX_BATCH = 8 * 512 * 512, 64
CPU_BATCH_PIXELS, CPU_MAX_BATCH = 8 * 64 * 64, 8


@dataclass(frozen=True)
class GenerationJob:
    """A run, ready for workers: picklable and small. `run` is the document that `fingerprint` is the sha256 of."""

    output: str
    fingerprint: str
    run: dict[str, Any] = field(repr=False)
    layout: Layout
    models: str
    scorers: str
    pool: Pool = Pool()
    max_failed: float = 1.0

    @property
    def made(self) -> dict[str, Any]:
        """The settings that decide the bytes."""
        return self.run["settings"]

    @property
    def batch_size(self) -> int:
        return self.made["batch_size"]

    @property
    def device(self) -> str:
        return self.made["device"]

    @functools.cached_property
    def shard_schema(self) -> pa.Schema:
        """The dataset's schema with this run's marks."""
        return with_marks(DATASET_SCHEMA, self.fingerprint, self.run, self.made["provenance"])

    def store(self) -> Store:
        """The place of the dataset."""
        return open_store(self.output)


@dataclass(frozen=True)
class Prepared:
    """A checked run with what is written before its pixels: the plan and the references."""

    job: GenerationJob
    plan: Plan
    references: pa.Table = field(repr=False)

    def write(self) -> int:
        """Write the plan and the references, what is missing of them; return how many objects were written.

        Raises InputError when another run took the output since it was looked at.
        """
        job, store = self.job, self.job.store()
        require_same_run(store, job.fingerprint, job.run, self.plan, self.references)
        marks = {"fingerprint": job.fingerprint, "run": job.run, "synthetic": False}
        try:
            written = write_plan(store, self.plan, job.layout, with_marks(PLAN_SCHEMA, **marks))
        except FileExistsError:
            raise InputError(f"{store.url}: another run has just begun there; give another output") from None
        if shard_mark(store, SUBJECTS_KEY) != job.fingerprint:
            store.put(SUBJECTS_KEY, encode_references(self.references, with_marks(SUBJECTS_SCHEMA, **marks)))
            written += 1
        # Where a server lets both of two conditional puts win, one of the two runs finds the other's mark here.
        require_same_run(store, job.fingerprint, job.run, self.plan, self.references)
        return written


def prepare(settings: GenerateSettings, gpu: bool = False, threads: int | None = None) -> Prepared:
    """Return the run that the settings stand for; reads and checks everything, writes nothing.

    `gpu`: whether workers have one (it decides precision and batch size, and so the pixels); `threads`: how many
    threads a worker without one computes with (by default torch's here). A run that is taken up again keeps its threads
    unless --cpus-per-worker is given: the last bits of an image depend on them. Raises InputError for everything a user
    can mend, the quick checks first.
    """
    checked = check_generate(settings)
    store, plan = checked.store, checked.plan
    check_model_folder(checked.model.folder)
    digests = model_digests(checked.model.folder)
    scorers_name = settings.scorers or default_scorers(settings.models, digests)
    scorers = load_scorers(scorers_name, "cuda" if gpu and _has_cuda() else "cpu")
    references = prepare_references(
        open_store(settings.subjects), plan.subjects, scorers, settings.reference_crop, settings.reference_margin
    )
    height, width = plan.row.height, plan.row.width
    batch_size = min(settings.batch_size or default_batch_size(height, width, gpu), settings.shard_size)
    threads = settings.cpus_per_worker or _threads_of(store) or threads or _torch_threads()
    run = run_document(settings, plan, digests, scorers.digests, references, batch_size, gpu, None if gpu else threads)
    fingerprint = hashlib.sha256(canonical_json(run).encode()).hexdigest()
    require_same_run(store, fingerprint, run, plan, references)
    job = GenerationJob(
        store.url, fingerprint, run, Layout(len(plan), settings.shard_size), settings.models, scorers_name,
        settings.pool, settings.max_failed,
    )  # fmt: skip
    return Prepared(job, plan, references)


def run_document(
    settings: GenerateSettings,
    plan: Plan,
    models: dict[str, str],
    scorers: dict[str, str],
    references: pa.Table,
    batch_size: int,
    gpu: bool,
    threads: int | None,
) -> dict[str, Any]:
    """Return all that decides the dataset's bytes on one kind of hardware; workers and places are not in it."""
    dtype = settings.dtype if settings.dtype != "auto" else "float16" if gpu else "float32"
    known = known_document(settings, plan)
    of_the_device = {
        "batch_size": batch_size,
        "dtype": dtype,
        "device": "cuda" if gpu else "cpu",
        "threads": threads,
    }
    return {
        **known,
        "settings": {**known["settings"], **of_the_device},
        "models": models,
        "scorers": scorers,
        "subjects": references_digest(references),
    }


def _threads_of(store: Store) -> int | None:
    there = run_there(store)
    return there[1]["settings"].get("threads") if there else None


def default_scorers(models: str, digests: dict[str, str]) -> str:
    """Return `miniature` for the miniature and for models trained from it (they share its VAE), `paper` for others."""
    if models == "miniature":
        return "miniature"
    try:
        return "miniature" if digests.get("vae") == model_digests(base_folder())["vae"] else "paper"
    except InputError:
        return "paper"  # the shipped parts are not there, so nothing was made from them


def default_batch_size(height: int, width: int, gpu: bool) -> int:
    """Return how many images of a size are denoised together."""
    pixels, most = (GPU_BATCH_PIXELS, GPU_MAX_BATCH) if gpu else (CPU_BATCH_PIXELS, CPU_MAX_BATCH)
    return max(1, min(most, pixels // (height * width)))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()
