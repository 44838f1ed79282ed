"""A generator that costs nothing: images are noise of the row's own seed, scores are constants.

What is left to measure is the machinery around it. The same seed gives the same bytes here, too.
"""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from facediffuser.batch_stage import WorkerPool
from facediffuser.dataset.inputs import Prompt, Subject, parse_template
from facediffuser.dataset.plan import Layout, Plan, RowSettings
from facediffuser.dataset.schema import SUBJECTS_SCHEMA
from facediffuser.generation.generate_stage import ShardWorker
from facediffuser.generation.job import GenerationJob, Prepared
from facediffuser.runs import fingerprint_of
from facediffuser.scoring.scorers import ImageScore

SUBJECTS = 100


class FreePipeline:
    """Stands where a FaceDiffuserPipeline stands."""

    def encode_prompt(self, prompts):
        return torch.zeros(1, 1, 1)

    def encode_references(self, images):
        return torch.zeros(len(images), 1)

    def fuse(self, prompts, image_embeds, prompt_embeds=None):
        return torch.zeros(1, 1, 1)

    def __call__(self, *, generator, height, width, **others):
        images = [_noise(one.initial_seed(), height, width) for one in generator]
        return SimpleNamespace(images=images, subject_fraction=[0.5] * len(images))


class FreeScorers:
    """Stands where Scorers stand."""

    def __init__(self, digests):
        self.digests = digests

    def score(self, images, references, prompts):
        return [ImageScore(0.5, [0.5], 1, [[0.0, 0.0, 8.0, 8.0]], [1.0], 0.25) for _ in images]


class FreeWorker(ShardWorker):
    """A worker of the pool whose generator costs nothing."""

    def load(self, job):
        return free_generator(job)


def free_generator(job: GenerationJob):
    """Return a ShardGenerator that costs nothing, in this process."""
    from facediffuser.generation.shard_generator import ShardGenerator

    torch.set_num_threads(job.threads)
    return ShardGenerator(job, FreePipeline(), FreeScorers(job.run["scorers"]))


def _noise(seed: int, height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def free_run(output: str, rows: int, shard_size: int, size: int, workers: int) -> Prepared:
    """Return a run of about so many rows of `size` px, to be made by `FreeWorker`."""
    template = parse_template("a photo of a {subject} reading a book in the park", 1, "template")
    people = tuple(Subject(f"person{n:05d}", "man" if n % 2 else "woman", ("1.png",)) for n in range(SUBJECTS))
    prompts = tuple(Prompt(f"p{n:05d}", "action", *template) for n in range(max(1, rows // SUBJECTS)))
    row = RowSettings(method="face-diffuser", num_inference_steps=50, guidance_scale=5.0, fusion_start=16,
                      fusion_end=31, scheduler="PNDMScheduler", height=size, width=size)  # fmt: skip
    plan = Plan(people, prompts, 1, 0, row)
    made = {"seed": 0, **row.model_dump(), "batch_size": 8, "shard_size": shard_size, "image_format": "png",
            "dtype": "float32", "device": "cpu", "provenance": True}  # fmt: skip
    run = {"settings": made, "models": {}, "scorers": {"none": "0"}, "plan": plan.digest()}
    layout = Layout(len(plan), shard_size)
    job = GenerationJob(output, fingerprint_of(run), run, layout, "none", "none", 1, WorkerPool(workers))
    return Prepared(job, plan, _references(people))


def _references(people: tuple[Subject, ...]) -> pa.Table:
    import io

    sink = io.BytesIO()
    Image.new("RGB", (8, 8)).save(sink, "PNG")
    rows = [
        {
            "subject_id": person.subject_id, "class_word": person.class_word, "reference": "1.png",
            "source_sha256": "0", "image": {"bytes": sink.getvalue(), "path": "1.png"}, "crop_box": [0, 0, 8, 8],
            "face_box": [0.0, 0.0, 8.0, 8.0], "face_prob": 1.0, "identity": [1.0],
        }
        for person in people
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=SUBJECTS_SCHEMA)
