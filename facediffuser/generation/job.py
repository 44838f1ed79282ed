"""From settings to a checked run: what goes in is read and measured, the output compared, nothing written yet."""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import torch

from facediffuser.batch_stage import Limits, Machines, ThisMachine, WorkerPool
from facediffuser.dataset.extension import (
    NewRows,
    SampleIds,
    last_run,
    part_of_plan,
    planned_ids,
    references_key,
    require_extendable,
)
from facediffuser.dataset.other_run import begin_or_resume_dataset, require_same_run
from facediffuser.dataset.plan import Layout, Plan, Rows, write_plan
from facediffuser.dataset.references import encode_references, references_digest, references_marks
from facediffuser.dataset.schema import (
    PLAN_SCHEMA,
    SCHEMA_VERSION,
    SUBJECTS_KEY,
    schema_of_run,
    with_marks,
)
from facediffuser.dataset.shards import read_marks, shard_mark
from facediffuser.engine_options import COMPILED, EngineOptions, choose_engine
from facediffuser.errors import InputError
from facediffuser.generation.generate_check import Checked, check_generate, settings_document
from facediffuser.generation.generate_settings import GenerateSettings
from facediffuser.generation.reference_pictures import prepare_references
from facediffuser.means import Means
from facediffuser.model_check import check_model_folder
from facediffuser.modelfolder import model_digests
from facediffuser.runs import Document, Run, check_provenance, fingerprint_of, provenance_of, software
from facediffuser.scoring.scorers import load_scorers
from facediffuser.shipped import base_folder
from facediffuser.storage import Store, open_store

logger = logging.getLogger(__name__)

# Pixels denoised together: on a GPU 8 images of 512 px; on a CPU small images gain from a batch, large ones do not.
GPU_BATCH_PIXELS, GPU_MAX_BATCH = 8 * 512 * 512, 64
CPU_BATCH_PIXELS, CPU_MAX_BATCH = 8 * 64 * 64, 8
# With `--batch-size auto`: 32 images of 512 px are 7% faster than 8 on an H200, more gain nothing.
AUTO_BATCH_PIXELS, AUTO_MAX_BATCH = 32 * 512 * 512, 256
# GiB of a GPU that models and scorers take, and an image of 512 px while it is denoised and decoded, in half precision.
MODELS_GIB, IMAGE_GIB = 9.0, 0.75


@dataclass(frozen=True)
class Listed:
    """What a manifest says of a shard: the SHA-256 of its bytes, and the provenance in its footer if there is one."""

    sha256: str
    computed_with: dict[str, Any] | None


@dataclass(frozen=True)
class GenerationJob:
    """A run, ready for workers: picklable and small.

    output: where the dataset goes.
    fingerprint, run: the run's document and its SHA-256.
    layout: how rows lie in shards.
    models, scorers: where they are.
    threads: CPU threads of a worker without a GPU; None on a GPU.
    pool: how many workers.
    max_failed: share of failed rows above which the run fails.
    max_loss: IP or PC that a run in fast mode may lose.
    faster_options: the options that make it faster, for messages.
    exact: refuse to go on with another provenance than that of the shards that are there.
    references_key: where the references of the subjects lie in the output.
    required: with `exact`, the provenances of those shards.
    compiled_code: where compiled code is kept and found; None: in this machine's cache.
    limits: when it stops by itself; all of its stages count towards them.
    """

    output: str
    fingerprint: str
    run: dict[str, Any] = field(repr=False)
    layout: Layout
    models: str
    scorers: str
    threads: int | None = None
    pool: WorkerPool = WorkerPool()
    max_failed: float = 1.0
    max_loss: float = 1.0
    faster_options: tuple[str, ...] = ()
    exact: bool = False
    required: tuple[Document, ...] = ()
    compiled_code: str | None = None
    limits: Limits = Limits()
    references_key: str = SUBJECTS_KEY

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that decide the bytes."""
        return self.run["settings"]

    @property
    def batch_size(self) -> int:
        """How many images are denoised together."""
        return self.settings["batch_size"]

    @property
    def engine(self) -> EngineOptions | None:
        """The options of a compiled run; None for an eager one, as all were before there was an engine."""
        if self.settings.get("engine") != "compiled":
            return None
        return EngineOptions.from_document(self.settings["engine_options"])

    @property
    def device(self) -> str:
        """The kind of device: cpu or cuda."""
        return self.settings["device"]

    @property
    def means(self) -> Means:
        """What is left out of steps; nothing in exact mode."""
        return Means.from_document(self.settings.get("speed", {}).get("means", {}))

    @property
    def exact_settings(self) -> dict[str, Any] | None:
        """How rows are sampled in exact mode, by column; None where the run is in exact mode."""
        return self.settings["speed"]["exact"] if "speed" in self.settings else None

    @functools.cached_property
    def shard_schema(self) -> pa.Schema:
        """The dataset's schema with this run's marks."""
        return self.schema_with(None)

    def schema_with(self, computed_with: dict[str, Any] | None) -> pa.Schema:
        """Return the dataset's schema with this run's marks and, unless None, a provenance."""
        marks = self.fingerprint, self.run, self.settings["provenance"]
        return with_marks(schema_of_run(self.run), *marks, computed_with=computed_with)

    def with_recorded(self, recorded: Sequence[Document]) -> "GenerationJob":
        """Return the job for an output whose shards have these provenances; another one here is warned of.

        Raises:
            InputError: libraries, code or threads differ here, and `exact` is set.
        """
        check_provenance(self.output, recorded, {**software(), "threads": self.threads}, self.exact)
        return replace(self, required=tuple(recorded) if self.exact else ())

    def set_threads(self) -> None:
        """Let torch compute in this process with as many threads as the run does; on a GPU they are left as they are."""
        if self.threads:
            torch.set_num_threads(self.threads)

    def store(self) -> Store:
        """The place of the dataset."""
        return open_store(self.output)


@dataclass(frozen=True)
class Prepared:
    """A checked run with what is written before its pixels: the plan and the references.

    free_shard_size: whether its shards may have another size: none was given, and no run has begun in the output.
    plan: all that the inputs stand for.
    rows: what of it is to be made; another thing than `plan` where a dataset is extended.
    resumes: the run is an earlier one whose inputs were fewer; its plan and references are in the output.
    """

    job: GenerationJob
    plan: Plan
    references: pa.Table = field(repr=False)
    free_shard_size: bool = False
    rows: Rows | None = None
    resumes: bool = False

    def with_shard_size(self, rows: int) -> "Prepared":
        """Return the run with shards of `rows` rows; nothing of it must have been written."""
        job = self.job
        settings = {**job.settings, "shard_size": rows, "batch_size": min(job.batch_size, rows)}
        run = {**job.run, "settings": settings}
        job = replace(job, run=run, fingerprint=fingerprint_of(run), layout=Layout(job.layout.rows, rows))
        return replace(self, job=job, free_shard_size=False)

    def with_limits(self, limits: Limits) -> "Prepared":
        """Return the run with these limits; what a flow makes one after another shares them."""
        return replace(self, job=replace(self.job, limits=limits))

    def write(self) -> int:
        """Write the plan and the references, what is missing of them; return how many objects were written.

        Raises:
            InputError: another run took the output since it was looked at.
        """
        job, store = self.job, self.job.store()
        if self.resumes or not job.layout.rows:
            return 0
        run, name = Run(job.run, job.fingerprint), job.layout.name
        require_same_run(store, run, self.plan, self.references, name)
        plan_schema, subjects_schema = (
            with_marks(schema, job.fingerprint, job.run, synthetic=False)
            for schema in (PLAN_SCHEMA, self.references.schema.remove_metadata())
        )
        written = 0
        if name and shard_mark(store, job.references_key) != job.fingerprint:
            # Before the plan: a part whose plan is there can be finished without the inputs that it was made of.
            store.put(job.references_key, encode_references(self.references, subjects_schema))
            written += 1
        try:
            written += write_plan(store, self.rows or self.plan, job.layout, plan_schema)
        except FileExistsError:
            raise InputError(f"{store.url}: another run has just begun there; give another output") from None
        if job.fingerprint not in references_marks(store, job.references_key):
            store.put(job.references_key, encode_references(self.references, subjects_schema))
            written += 1
        # Where a server lets both of two conditional puts win, one of the two runs finds the other's mark here.
        require_same_run(store, run, self.plan, self.references, name)
        return written


def prepare(settings: GenerateSettings, machines: Machines | None = None) -> Prepared:
    """Return the run that the settings stand for; reads and checks everything, writes nothing, the quick checks first.

    A resumed run keeps its engine, batch size and threads unless those are given: the last bits of an image depend on
    them.

    Args:
        settings: the settings.
        machines: what workers run on: whether they have a GPU decides precision and batch size, and so the pixels;
            without one they share the cores. None: this process. Asked only once the input has been found good.

    Raises:
        InputError: something cannot be used; the error names it.
    """
    machines = machines or ThisMachine()
    checked = check_generate(settings)
    store, plan = checked.store, checked.plan
    check_model_folder(checked.model.folder)
    digests = model_digests(checked.model.folder)
    scorers_name = settings.scorers or default_scorers(settings.models, digests)
    scorers = load_scorers(scorers_name, "cuda" if torch.cuda.is_available() and machines.gpus else "cpu")
    references = prepare_references(
        open_store(settings.subjects), plan.subjects, scorers, settings.reference_crop, settings.reference_margin
    )
    gpu = machines.gpus > 0
    height, width = plan.row.height, plan.row.width
    begun = checked.begun.document["settings"] if checked.begun else {}
    engine, why = choose_engine(
        settings.engine, len(plan), height, width, gpu, begun.get("engine", "eager") if checked.begun else None
    )
    logger.info("engine: %s (%s)", engine, why)
    batch_size = settings.batch_size if isinstance(settings.batch_size, int) else begun.get("batch_size")
    if batch_size is None and gpu and (settings.batch_size == "auto" or engine == "compiled"):
        memory = machines.gpu_gib
        batch_size = automatic_batch_size(height, width, memory, settings.dtype == "float32")
        logger.info("batch size: %d, for a GPU of %.0f GiB", batch_size, memory)
    batch_size = min(batch_size or default_batch_size(height, width, gpu), checked.shard_size)
    identity = run_identity(
        settings, plan, checked.shard_size, digests, scorers.digests, references, batch_size, gpu,
        checked.model.exact_scheduler, checked.schema_version,
    )  # fmt: skip
    if engine == "compiled":
        # An eager run's document says nothing of engines, so that runs begun before there were any are the same.
        identity["settings"] |= {
            "engine": engine,
            "engine_options": begun.get("engine_options", COMPILED.as_document()),
        }
    part = _part(settings, checked, identity, references)
    run = part.run
    threads = None
    if not gpu:
        recorded = _recorded_threads(store, checked.begun)
        threads = settings.cpus_per_worker or recorded or _threads(settings, machines.cpus)
    job = GenerationJob(
        store.url, run.fingerprint, dict(run.document), part.layout, settings.models,
        scorers_name, threads, replace(settings.pool, cpus=threads or 1, gpu=gpu), settings.max_failed, settings.max_loss,
        settings.faster_options, settings.exact, compiled_code=settings.compiled_code,
        limits=settings.limits,
        references_key=references_key(part.layout.name, run.fingerprint),
    )  # fmt: skip
    return Prepared(job, plan, references, checked.free_shard_size, part.rows, part.resumes)


@dataclass(frozen=True)
class _Part:
    """What a run makes of a dataset: all of it, or what is added to it."""

    run: Run
    layout: Layout
    rows: Rows
    resumes: bool = False


def _part(settings: GenerateSettings, checked: Checked, identity: dict[str, Any], references: pa.Table) -> _Part:
    """Return what is to be made now: the whole plan, an earlier run that was interrupted, or the rows that are new."""
    store, plan, there = checked.store, checked.plan, checked.there
    recorded = last_run(store, there) if settings.extend else None
    if recorded is None:
        run = begin_or_resume_dataset(store, identity, plan, references)
        return _Part(run, Layout(len(plan), checked.shard_size), plan)
    require_extendable(store, there.manifest, recorded.document, identity, plan, references)
    if there.begun and (resumable := part_of_plan(store, there.begun[0])):
        run, layout = resumable
        if run.fingerprint in references_marks(store, references_key(layout.name, run.fingerprint)):
            logger.info("%s: rows that were begun earlier are made first", store.url)
            return _Part(run, layout, plan, resumes=True)
    if there.manifest is None:
        # Not even the plan of the first run is whole: only its own inputs can complete it.
        return _Part(
            begin_or_resume_dataset(store, identity, plan, references), Layout(len(plan), checked.shard_size), plan
        )
    rows = NewRows(plan, SampleIds(planned_ids(store, (part.name for part in there.manifest.parts))))
    document = {**identity, "plan": rows.digest()}
    run, name = Run(document, fingerprint_of(document)), there.begun[0] if there.begun else there.next_name
    if there.begun and run.fingerprint != recorded.fingerprint:
        raise InputError(f"{store.url}: other rows were begun and their plan is not whole; finish them with the subjects "
                         f"and prompts they were begun with, or remove plan/part-{name}-*")  # fmt: skip
    return _Part(run, Layout(len(rows), checked.shard_size, name), rows)


def run_identity(
    settings: GenerateSettings,
    plan: Plan,
    shard_size: int,
    models: dict[str, str],
    scorers: dict[str, str],
    references: pa.Table,
    batch_size: int,
    gpu: bool,
    exact_scheduler: str,
    schema_version: str = SCHEMA_VERSION,
) -> dict[str, Any]:
    """Return what decides the dataset, as a run document; workers, places and versions of libraries are not in it.

    Args:
        settings: the settings.
        plan: every row.
        shard_size: the rows of a shard.
        models: the SHA-256 of each model by its part.
        scorers: the SHA-256 of each scorer's part.
        references: a table of SUBJECTS_SCHEMA.
        batch_size: how many images are denoised together.
        gpu: whether workers have GPUs.
        exact_scheduler: the class name of the scheduler of exact mode.
        schema_version: that of the dataset's columns. A run that an earlier version of this code began keeps its own.
    """
    dtype = settings.dtype if settings.dtype != "auto" else "float16" if gpu else "float32"
    known = settings_document(settings, plan, shard_size, exact_scheduler, schema_version)
    of_the_device = {
        "batch_size": batch_size,
        "dtype": dtype,
        "device": "cuda" if gpu else "cpu",
    }
    schema = {}
    if schema_version != "1":
        size = len(references["identity"][0]) if settings.embeddings else 0
        schema = {"schema": {"version": schema_version, "embedding_size": size}}
    return {
        **known,
        **schema,
        "settings": {**known["settings"], **of_the_device},
        "models": models,
        "scorers": scorers,
        "subjects": references_digest(references),
    }


def _recorded_threads(store: Store, run: Run | None) -> int | None:
    """The threads that the run in the output was computed with so far; None when it does not say."""
    known = provenance_of(run.document) if run else {}
    shards = (info.key for info in store.list("data/")) if run and not known else ()
    marks = next((found for key in shards if (found := read_marks(store, key))), None)
    return (known or (marks.provenance if marks else {})).get("threads")


def default_scorers(models: str, digests: dict[str, str]) -> str:
    """Return `miniature` for the miniature and for models trained from it (they share its VAE), `paper` for others."""
    if models == "miniature":
        return "miniature"
    try:
        return "miniature" if digests.get("vae") == model_digests(base_folder())["vae"] else "paper"
    except InputError:
        return "paper"  # the shipped parts are not there, so nothing was made from them


def default_batch_size(height: int, width: int, gpu: bool) -> int:
    """Return how many images are denoised together.

    Args:
        height: that of an image in px.
        width: that of an image in px.
        gpu: whether workers have GPUs.
    """
    pixels, most = (GPU_BATCH_PIXELS, GPU_MAX_BATCH) if gpu else (CPU_BATCH_PIXELS, CPU_MAX_BATCH)
    return max(1, min(most, pixels // (height * width)))


def automatic_batch_size(height: int, width: int, gib: float, float32: bool = False) -> int:
    """Return how many images of a size are denoised together on a GPU with so much memory: what pays, if it fits.

    Args:
        height: that of an image in px.
        width: that of an image in px.
        gib: memory of the smallest GPU.
        float32: whether the models compute in float32, which takes twice as much.
    """
    share = height * width / (512 * 512)
    fits = int((gib / (2 if float32 else 1) - MODELS_GIB) / (IMAGE_GIB * share))
    return max(1, min(AUTO_MAX_BATCH, AUTO_BATCH_PIXELS // (height * width), fits))


def _threads(settings: GenerateSettings, cpus: int) -> int:
    """The threads of a worker without a GPU: its share of the cores; torch's number where those are not known."""
    if cpus:
        return max(1, cpus // (settings.workers or settings.max_workers or 1))
    return torch.get_num_threads()
