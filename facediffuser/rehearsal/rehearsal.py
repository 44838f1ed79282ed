"""The rehearsal: the stages one after another in this process, each timed, with the peaks of memory it took."""

import gc
import json
import logging
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from facediffuser.batch_stage import ThisMachine
from facediffuser.dataset.plan import read_shard_rows
from facediffuser.devices import pick_device
from facediffuser.engine_options import choose_engine
from facediffuser.errors import first_line
from facediffuser.generation.generate_settings import GenerateSettings
from facediffuser.generation.job import GenerationJob, prepare
from facediffuser.generation.shard_generator import ShardGenerator
from facediffuser.number_words import counted
from facediffuser.pictures import stored_picture
from facediffuser.preprocess.segmenter import Segmenter
from facediffuser.rehearsal.random_data import write_people, write_prepared
from facediffuser.rehearsal.random_models import (
    Size,
    captioner,
    write_base,
    write_models,
    write_scorers,
    write_segmenter,
)
from facediffuser.rehearsal.rehearse_settings import RehearseSettings
from facediffuser.scoring.face_detector import FaceDetector
from facediffuser.training.loop import TrainingRun
from facediffuser.training.recipe import Role
from facediffuser.training.throughput import Throughput
from facediffuser.training.train_settings import TrainSettings
from facediffuser.training.worker_context import Worker

logger = logging.getLogger(__name__)

FULL_PX, MINIATURE_PX = 512, 64
TOGETHER = 8
"""Pictures of a batch for captioner and segmenter: the default of `preprocess`."""
CAPTION_TOKENS = 40
WARM_STEPS = 2
MOST_PEOPLE = 8


@dataclass
class Measured:
    """A stage as it went.

    Attributes:
        stage: its name.
        noun: what it is counted in.
        planned: how many of them the real run has.
        items, seconds: how many were done, in what time; 0 items where it did not fit.
        gpu_gib, host_gib: the highest memory of the GPU and of this process, GiB.
        note: what a reader should know of it.
    """

    stage: str
    noun: str
    planned: int
    items: int = 0
    seconds: float = 0.0
    gpu_gib: float = 0.0
    host_gib: float = 0.0
    note: str = ""

    @property
    def fits(self) -> bool:
        """Whether the stage had memory enough."""
        return self.items > 0

    @property
    def rate(self) -> float:
        """Items a second; 0 where it did not fit."""
        return self.items / self.seconds if self.fits else 0.0

    @property
    def hours(self) -> float:
        """Hours that the real run's items take here, with one worker; 0 where it did not fit."""
        return self.planned / self.rate / 3600 if self.fits else 0.0


@dataclass
class Rehearsed:
    """All stages, and on what they ran."""

    hardware: str
    size: str
    stages: list[Measured] = field(default_factory=list)

    def as_document(self) -> dict[str, Any]:
        """Return everything measured, to be kept as JSON."""
        stages = [asdict(one) | {"rate": one.rate, "hours": one.hours, "fits": one.fits} for one in self.stages]
        return {"hardware": self.hardware, "size": self.size, "stages": stages}


def rehearse(
    settings: RehearseSettings, finish: Callable[[GenerationJob], Any], say: Callable[[Measured], None]
) -> Rehearsed:
    """Run every stage for a moment.

    A stage whose memory does not suffice is said not to fit, and the others go on.

    Args:
        settings: sizes and the real run's numbers.
        finish: finishes the dataset, which lies in `dataset/` of the output, and verifies it.
        say: called with each stage as soon as it is measured.
    """
    device = pick_device(settings.device)
    gpu = device.startswith("cuda")
    hardware = torch.cuda.get_device_name(device) if gpu else f"CPU, {counted(torch.get_num_threads(), 'thread')}"
    rehearsed = Rehearsed(hardware, settings.size)
    with tempfile.TemporaryDirectory(prefix="facediffuser-rehearsal-") as folder:
        stage = _Stages(settings, Path(folder), device, finish)
        plans = [
            ("faces", "photographs", settings.photographs, stage.faces),
            ("captions", "photographs", settings.photographs, stage.captions),
            ("segments", "photographs", settings.photographs, stage.segments),
            ("latents and text embeddings", "photographs", settings.photographs, stage.latents),
            ("train the TDM", "samples", settings.tdm_samples, lambda one: stage.train(one, "tdm")),
            ("train the SDM", "samples", settings.sdm_samples, lambda one: stage.train(one, "sdm")),
            ("generate and score", "images", settings.images, stage.generate),
        ]
        for name, noun, planned, run in plans:
            measured = Measured(name, noun, planned)
            logger.info("Rehearsing: %s", name)
            with _peaks(measured, device):
                try:
                    run(measured)
                except (torch.OutOfMemoryError, MemoryError) as error:
                    measured.items = 0
                    measured.note = f"does not fit: {first_line(error)}"
            rehearsed.stages.append(measured)
            say(measured)
    return rehearsed


class _Stages:
    """What each stage does; made once, so that data and models are written once."""

    def __init__(self, settings: RehearseSettings, root: Path, device: str, finish: Callable[[GenerationJob], Any]):
        self.settings, self.root, self.device, self.finish = settings, root, device, finish
        self.full = settings.size == "full"
        self.side = FULL_PX if self.full else MINIATURE_PX
        people = write_people(root / "people", MOST_PEOPLE, self.side)
        files = sorted(people.rglob("*.png"))
        pictures = [stored_picture(path.read_bytes(), path.name) for path in files]
        self.people, self.pictures = people, [pictures[n % len(pictures)] for n in range(settings.try_pictures)]
        self._base: str | None = None
        self._data: str | None = None

    # --- photographs ----------------------------------------------------------------------------------------------------

    def faces(self, one: Measured) -> None:
        detector = FaceDetector(self.device)
        detector.detect(self.pictures[:1])
        found = self._timed(one, lambda: detector.detect(self.pictures), len(self.pictures))
        one.note = f"MTCNN, {sum(bool(faces) for faces in found)} of {len(found)} drawings show it a face"

    @torch.no_grad()
    def captions(self, one: Measured) -> None:
        model, side = captioner(self.full, self.device)
        half = torch.float16 if self._gpu else torch.float32
        model.to(self.device, half).eval()
        pixels = torch.rand(min(TOGETHER, len(self.pictures)), 3, side, side, device=self.device, dtype=half)

        def caption(count: int, tokens: int) -> None:
            for _ in range(0, count, len(pixels)):
                model.generate(pixel_values=pixels, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

        caption(1, 2)
        rounds = -(-len(self.pictures) // len(pixels))
        self._timed(one, lambda: caption(len(self.pictures), CAPTION_TOKENS), rounds * len(pixels))
        one.note = f"BLIP-2, {CAPTION_TOKENS} tokens each: an upper bound"

    def segments(self, one: Measured) -> None:
        segmenter = Segmenter(write_segmenter(self.root / "segmenter", self.full), self.device)
        segmenter.segment(self.pictures[:1])

        def segment() -> None:
            for start in range(0, len(self.pictures), TOGETHER):
                segmenter.segment(self.pictures[start : start + TOGETHER])

        self._timed(one, segment, len(self.pictures))
        one.note = "Mask2Former"

    # --- training -------------------------------------------------------------------------------------------------------

    def latents(self, one: Measured) -> None:
        settings = self._training("tdm")
        started = time.perf_counter()
        TrainingRun(settings, Worker(device=self.device), lambda numbers: None)
        # Loading the base is in it; its share falls with the number of photographs.
        one.items, one.seconds = self.settings.try_pictures, time.perf_counter() - started
        one.note = "VAE and text encoder, loading included"

    def train(self, one: Measured, role: Role) -> None:
        settings = self._training(role)
        run = TrainingRun(settings, Worker(device=self.device), lambda numbers: None)
        batches, throughput = run.batch_iterator(), Throughput(run.recipe.batch_size)
        for _ in range(WARM_STEPS):
            run.train_step(batches, throughput)

        def steps() -> None:
            for _ in range(self.settings.try_steps):
                run.train_step(batches, throughput)

        self._timed(one, steps, self.settings.try_steps * run.recipe.batch_size)
        one.note = f"batches of {run.recipe.batch_size}, {run.provenance['engine']}"

    def _training(self, role: Role) -> TrainSettings:
        if self._base is None:
            self._base = str(write_base(self.root / "base", Size(), self.device)) if self.full else "miniature"
            self._data = str(write_prepared(self.root / "data", self.settings.try_pictures, self.side))
        return TrainSettings(  # type: ignore[call-arg]  # the recipe's fields: see TrainSettings
            role=role, data=self._data, base=self._base, output=str(self.root / "training" / role), steps=10**6,
            image_encoder=f"{self._base}/image_encoder" if self.full else "miniature", seed=self.settings.seed,
            batch_size=self.settings.batch_size, cache=str(self.root / "latents"),
        )  # fmt: skip

    # --- images ---------------------------------------------------------------------------------------------------------

    def generate(self, one: Measured) -> None:
        given, dataset = self.settings, f"{self.settings.output.rstrip('/')}/dataset"
        models = str(write_models(self.root / "models", Size(), self.device)) if self.full else "miniature"
        scorers = str(write_scorers(self.root / "scorers", Size(), self.device)) if self.full else "miniature"
        engine, why = choose_engine(given.engine, given.images, self.side, self.side, self._gpu)
        chosen = GenerateSettings(
            models=models, scorers=scorers, subjects=str(self.people), output=dataset, engine=engine,
            prompts=str(self._prompts()), images_per_prompt=given.try_images, subject_sets=1, steps=given.steps,
            shard_size=given.try_images, max_failed=1.0, seed=given.seed,
        )  # fmt: skip
        job = _prepared(chosen, self._gpu, self.device)
        generator = ShardGenerator(job)
        layout = job.layout
        # Compiled and warm before the clock runs.
        generator.rows(read_shard_rows(job.store(), layout, 0, job.fingerprint)[: job.batch_size])
        made = self._timed(one, lambda: [generator(shard) for shard in range(layout.shards)], layout.rows)
        failed = sum(stats["failed"] for stats in made)
        one.note = f"{engine} ({why}), {job.batch_size} at once, {failed} failed"
        self.finish(job)

    def _prompts(self) -> Path:
        path = self.root / "prompts.jsonl"
        path.write_text(json.dumps({"prompt": "a photo of a {subject} in the park", "prompt_id": "rehearsal"}) + "\n")
        return path

    # --- timing ---------------------------------------------------------------------------------------------------------

    @property
    def _gpu(self) -> bool:
        return self.device.startswith("cuda")

    def _timed(self, one: Measured, run: Callable[[], Any], items: int) -> Any:
        if self._gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        result = run()
        if self._gpu:
            torch.cuda.synchronize()
        one.items, one.seconds = items, time.perf_counter() - started
        return result


def _prepared(settings: GenerateSettings, gpu: bool, device: str) -> GenerationJob:
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30 if gpu else 0.0
    prepared = prepare(settings, ThisMachine(int(gpu), torch.get_num_threads(), memory))
    prepared.write()
    return prepared.job


@contextmanager
def _peaks(measured: Measured, device: str) -> Iterator[None]:
    """Note the highest memory of the GPU and of this process during the block."""
    gc.collect()
    gpu = device.startswith("cuda")
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    _forget_host_peak()
    yield
    if gpu:
        measured.gpu_gib = torch.cuda.max_memory_allocated(device) / 2**30
    measured.host_gib = _host_peak()


def _forget_host_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # where the kernel does not offer it, the peak is that of the whole process so far


def _host_peak() -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def table(rehearsed: Rehearsed, price: float | None) -> str:
    """Return the stages as a table in Markdown: rate, memory, and what the real run takes on this hardware.

    Args:
        rehearsed: the stages.
        price: of an hour; None leaves the money out.
    """
    head = ["stage", "a second", "peak GPU GiB", "peak host GiB", "real run", "hours"]
    rows = []
    for one in rehearsed.stages:
        memory = [f"{one.gpu_gib:.1f}" if one.gpu_gib else "-", f"{one.host_gib:.1f}"]
        real = f"{one.planned:,} {one.noun}"
        if not one.fits:
            rows.append([one.stage, "does not fit", *memory, real, "-", *(["-"] if price is not None else [])])
            continue
        cost = [f"{one.hours * price:,.0f}"] if price is not None else []
        rows.append([one.stage, f"{one.rate:.3g} {one.noun}", *memory, real, f"{one.hours:,.1f}", *cost])
    hours = sum(one.hours for one in rehearsed.stages)
    cost = [f"{hours * price:,.0f}"] if price is not None else []
    rows.append(["all", "", "", "", "", f"{hours:,.1f}", *cost])
    head += ["money"] if price is not None else []
    lines = [head, ["---"] * len(head), *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    missing = [one.stage for one in rehearsed.stages if not one.fits]
    fits = f"These do not fit: {', '.join(missing)}." if missing else "Every stage fits."
    notes = "\n".join(f"- {one.stage}: {one.note}" for one in rehearsed.stages if one.note)
    return f"On {rehearsed.hardware}, {rehearsed.size} size, one worker. {fits}\n\n{text}\n\n{notes}\n"
