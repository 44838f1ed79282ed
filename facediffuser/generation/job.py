"""From settings to a checked run: what goes in is read and measured, the output compared, nothing written yet."""

import functools
import hashlib
import importlib.metadata
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from facediffuser import __version__
from facediffuser.dataset.inputs import Prompt, Subject, read_prompts, read_subjects
from facediffuser.dataset.plan import Layout, Plan, RowSettings, write_plan
from facediffuser.dataset.schema import (
    DATASET_SCHEMA,
    FINGERPRINT_KEY,
    PLAN_SCHEMA,
    RUN_KEY,
    SUBJECTS_KEY,
    SUBJECTS_SCHEMA,
    canonical_json,
    with_marks,
)
from facediffuser.dataset.shards import shard_mark
from facediffuser.dataset.subjects import encode_references, prepare_references, references_digest
from facediffuser.errors import InputError
from facediffuser.generation.settings import GenerateSettings, Pool
from facediffuser.miniature.parts import base_folder
from facediffuser.modelfolder import model_digests, resolve_model
from facediffuser.prompts import tokenize_with_markers
from facediffuser.schedulers import SCHEDULER_CLASSES
from facediffuser.scoring import load_scorers
from facediffuser.storage import Store, open_store

logger = logging.getLogger(__name__)

OURS = ("plan/", "data/", "stats/", "card/", "scores/", "subjects.parquet", "manifest.json", "README.md")
LIBRARIES = ("torch", "diffusers", "transformers", "facenet-pytorch", "pillow", "numpy", "pyarrow")
# Pixels denoised together: on a GPU 8 images of 512 px; on a CPU small images gain from company, large ones do not.
GPU_BATCH_PIXELS, GPU_MAX_BATCH = 8 * 512 * 512, 64
CPU_BATCH_PIXELS, CPU_MAX_BATCH = 8 * 64 * 64, 8
SHOWN_DIFFERENCES = 4


@dataclass(frozen=True)
class ModelFacts:
    """What a plan needs to know of a model folder."""

    folder: Path
    height: int
    width: int
    scheduler: str
    max_subjects: int
    digests: dict[str, str] = field(repr=False)


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
        require_same_run(store, job.fingerprint, job.run)
        marks = {"fingerprint": job.fingerprint, "run": job.run, "synthetic": False}
        try:
            written = write_plan(store, self.plan, job.layout, with_marks(PLAN_SCHEMA, **marks))
        except FileExistsError:
            raise InputError(f"{store.url}: another run has just begun there; give another output") from None
        if shard_mark(store, SUBJECTS_KEY) != job.fingerprint:
            store.put(SUBJECTS_KEY, encode_references(self.references, with_marks(SUBJECTS_SCHEMA, **marks)))
            written += 1
        # Where a server lets both of two conditional puts win, one of the two runs finds the other's mark here.
        require_same_run(store, job.fingerprint, job.run)
        return written


def prepare(settings: GenerateSettings, gpu: bool = False, threads: int | None = None) -> Prepared:
    """Return the run that the settings stand for; reads and checks everything, writes nothing.

    `gpu`: whether workers have one (it decides precision and batch size, and so the pixels); `threads`: how many
    threads a worker without one computes with (by default torch's here). A run that is taken up again keeps its threads
    unless --cpus-per-worker is given: the last bits of an image depend on them. Raises InputError for everything a user
    can mend, the quick checks first.
    """
    store = open_store(settings.output)
    store.require_writable()
    require_ours(store)
    model = model_facts(settings)
    subjects = read_subjects(settings.subjects)
    if len(subjects) < settings.subjects_per_image:
        raise InputError(
            f"{settings.subjects}: {len(subjects)} subjects for {settings.subjects_per_image} subjects an image; add "
            "subjects or lower --subjects-per-image"
        )
    prompts = read_prompts(settings.prompts_url, settings.subjects_per_image)
    _require_room(model, subjects, prompts, settings)
    scorers_name = settings.scorers or default_scorers(settings.models, model.digests)
    scorers = load_scorers(scorers_name, "cuda" if gpu and _has_cuda() else "cpu")
    references = prepare_references(
        open_store(settings.subjects), subjects, scorers, settings.reference_crop, settings.reference_margin
    )
    height, width = settings.height or model.height, settings.width or model.width
    start, end = settings.fusion_window
    plan = Plan(
        tuple(subjects), tuple(prompts), settings.subjects_per_image, settings.images_per_prompt, settings.seed,
        RowSettings(
            method=settings.method, num_inference_steps=settings.steps, guidance_scale=settings.guidance_scale,
            fusion_start=start, fusion_end=end, scheduler=model.scheduler, height=height, width=width,
        ),
        settings.subject_sets,
    )  # fmt: skip
    batch_size = min(settings.batch_size or default_batch_size(height, width, gpu), settings.shard_size)
    threads = settings.cpus_per_worker or _threads_of(store) or threads or _torch_threads()
    run = run_document(
        settings, plan, model.digests, scorers.digests, references, batch_size, gpu, None if gpu else threads
    )
    fingerprint = hashlib.sha256(canonical_json(run).encode()).hexdigest()
    require_same_run(store, fingerprint, run)
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
    made = {
        "subjects_per_image": plan.subjects_per_image,
        "images_per_prompt": plan.images_per_prompt,
        "subject_sets": plan.subject_sets,
        "seed": plan.seed,
        **plan.row.model_dump(),
        "batch_size": batch_size,
        "shard_size": settings.shard_size,
        "image_format": settings.image_format,
        "reference_crop": settings.reference_crop,
        "reference_margin": settings.reference_margin,
        "dtype": dtype,
        "device": "cuda" if gpu else "cpu",
        "threads": threads,
        "provenance": settings.provenance,
    }
    if settings.negative_prompt:
        # Only where one is given: a run without keeps the fingerprint it had before there were negative prompts.
        made["negative_prompt"] = settings.negative_prompt
    return {
        "settings": made,
        "models": models,
        "scorers": scorers,
        "plan": plan.digest(),
        "subjects": references_digest(references),
        **code_and_libraries(),
    }


def code_and_libraries() -> dict[str, Any]:
    """Return the versions of this code and of the libraries that pixels pass through."""
    return {"libraries": {name: importlib.metadata.version(name) for name in LIBRARIES}, "code": __version__}


# --- the output -------------------------------------------------------------------------------------------------------


def require_ours(store: Store) -> None:
    """Raise InputError when the output holds what no dataset holds, or a dataset without its plan."""
    present = [info.key for info in store.list()]
    foreign = [key for key in present if not key.startswith(OURS)]
    if foreign:
        raise InputError(f"{store.url}: holds {foreign[0]!r}, which is not of a dataset; give an empty output")
    if present and not any(key.startswith("plan/") for key in present):
        raise InputError(f"{store.url}: holds {present[0]!r} but no plan; give an empty output")


def require_same_run(store: Store, fingerprint: str, run: dict[str, Any]) -> None:
    """Raise InputError, telling the difference, when the output holds another run."""
    there = run_there(store)
    if there is None or there[0] == fingerprint:
        return
    other = there[1]
    found = differences(other, run)
    shown = "; ".join(found[:SHOWN_DIFFERENCES]) + (f"; {len(found) - SHOWN_DIFFERENCES} more" if found[4:] else "")
    raise InputError(f"{store.url}: holds another run ({shown}); repeat that run's options or give another output")


def run_there(store: Store) -> tuple[str, dict[str, Any]] | None:
    """Return fingerprint and run document of the run that the output holds, None when it holds none."""
    plans = [info.key for info in store.list("plan/")]
    if not plans:
        return None
    try:
        with store.open(plans[0]) as source:
            marks = pq.read_schema(source).metadata or {}
        return marks[FINGERPRINT_KEY].decode(), json.loads(marks[RUN_KEY])
    except (pa.ArrowInvalid, KeyError, ValueError):
        raise InputError(f"{store.url}: {plans[0]} is no plan of ours; give an empty output") from None


def _threads_of(store: Store) -> int | None:
    there = run_there(store)
    return there[1]["settings"].get("threads") if there else None


def differences(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> list[str]:
    """Return how two run documents differ, as "settings.steps 30 there, 50 here"; digests are shortened."""
    found = []
    for name in sorted(there.keys() | here.keys()):
        one, two = there.get(name), here.get(name)
        if isinstance(one, dict) and isinstance(two, dict):
            found += differences(one, two, f"{prefix}{name}.")
        elif one != two:
            found.append(f"{prefix}{name} {_short(one)} there, {_short(two)} here")
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 40 else f"{text[:12]}..."


# --- the models -------------------------------------------------------------------------------------------------------


def model_facts(settings: GenerateSettings) -> ModelFacts:
    """Return what the model folder's configuration says; InputError when it cannot make what is asked for."""
    folder = resolve_model(settings.models)
    unet = _config(folder, "unet_text" if settings.method == "tdm" else "unet")
    cell = 2 ** (len(_config(folder, "vae")["block_out_channels"]) - 1)
    sample = unet["sample_size"]
    rows, columns = (sample, sample) if isinstance(sample, int) else sample
    for name in ("height", "width"):
        value = getattr(settings, name)
        if value is not None and value % cell:
            raise InputError(f"--{name} {value}: this model makes multiples of {cell} px; give {value // cell * cell}")
    own = _config(folder, "scheduler", "scheduler_config.json")["_class_name"]
    fuser = folder / "subject_fuser" / "config.json"
    needs_subject = settings.method != "tdm"
    if needs_subject and not fuser.is_file():
        raise InputError(f"{settings.models}: no subject_fuser there; give a whole model folder or --method tdm")
    limit = json.loads(fuser.read_text()).get("max_subjects", 4) if needs_subject else settings.subjects_per_image
    if settings.subjects_per_image > limit:
        raise InputError(f"--subjects-per-image {settings.subjects_per_image}: this model takes up to {limit}")
    scheduler = SCHEDULER_CLASSES[settings.scheduler] if settings.scheduler else own
    return ModelFacts(folder, rows * cell, columns * cell, scheduler, limit, model_digests(folder))


def _config(folder: Path, part: str, name: str = "config.json") -> dict[str, Any]:
    try:
        return json.loads((folder / part / name).read_text())
    except FileNotFoundError:
        raise InputError(f"{folder}: no {part}/{name}; give a whole model folder") from None
    except ValueError:
        raise InputError(f"{folder}/{part}/{name}: not JSON; give a whole model folder") from None


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


def _require_room(
    model: ModelFacts, subjects: list[Subject], prompts: list[Prompt], settings: GenerateSettings
) -> None:
    """Raise InputError for a prompt whose subject would lie behind the text encoder's last token."""
    from transformers import CLIPTokenizer

    if settings.method == "tdm":
        return
    tokenizer = CLIPTokenizer.from_pretrained(model.folder / "tokenizer")
    longest = max({subject.class_word for subject in subjects}, key=len)
    for prompt in prompts:
        text = prompt.text([longest] * settings.subjects_per_image)
        try:
            tokenize_with_markers(tokenizer, [text])
        except InputError as error:
            raise InputError(f"prompt {prompt.prompt_id}: {error}") from None


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()
