"""Images of the miniature's methods, made and scored in this process: rows that the tables of `evaluate` take.

The flows make datasets through Ray; here one process on one device makes images of people and prompts and keeps the scores
alone, which is what curves over many models need, also on a machine without Ray and Prefect.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from PIL import Image

from facediffuser.dataset.suites import suite_prompts
from facediffuser.errors import InputError
from facediffuser.pipeline import FaceDiffuserPipeline
from facediffuser.prompts import IMAGE_MARKER
from facediffuser.scoring.scorers import Scorers
from facediffuser.settings import Method
from tools.miniature_weights.methods import Unseen

STEPS, GUIDANCE, WINDOW = 12, 5.0, (3, 11)
"""How the claim samples: steps of DPM-Solver, guidance, first fused step and first step of the SDM alone."""

METHODS: tuple[Method, ...] = ("face-diffuser", "fastcomposer", "sdm", "tdm")

SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()), ("method", pa.string()), ("subject_ids", pa.list_(pa.string())),
        ("prompt_id", pa.string()), ("category", pa.string()), ("ip", pa.float64()), ("pc", pa.float64()),
        ("face_count", pa.int64()), ("status", pa.string()),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """A prompt with a place for each subject: `{0}`, `{1}`; `meaning` says the same in words that the scorer knows."""

    prompt_id: str
    category: str
    text: str
    meaning: str
    subjects: int


def suite(name: str) -> list[Prompt]:
    """Return a benchmark suite's prompts."""
    return [made_prompt(**json.loads(line)) for line in suite_prompts(name).read_text().splitlines()]


def made_prompt(prompt_id: str, category: str, prompt: str, meaning: str | None = None) -> Prompt:
    """Return a prompt from what a suite's line says; `{subject}`, `{subject_1}` and so on are its places."""
    texts = []
    for text in (prompt, meaning or prompt):
        for place in (2, 1):
            text = text.replace(f"{{subject_{place}}}", f"{{{place - 1}}}")
        texts.append(text.replace("{subject}", "{0}"))
    return Prompt(prompt_id, category, *texts, subjects=2 if "{1}" in texts[0] else 1)


@dataclass(frozen=True)
class Sampler:
    """How images are made: steps, guidance, window, images of a batch, and the class word (None: the person's own)."""

    steps: int = STEPS
    guidance: float = GUIDANCE
    window: tuple[int, int] = WINDOW
    batch: int = 45
    class_word: str | None = None


CLAIM = Sampler()


@dataclass(frozen=True)
class _Image:
    people: tuple[int, ...]
    prompt: Prompt
    instance: int
    seed: int


def planned(people: int, prompts: Sequence[Prompt], instances: int) -> list[_Image]:
    """Return the images of all people, or of each person with the next, and all prompts; the seeds are the plan's own."""
    images = []
    for number in range(people):
        for place, prompt in enumerate(prompts):
            who = tuple((number + step) % people for step in range(prompt.subjects))
            for instance in range(instances):
                images.append(_Image(who, prompt, instance, (number * 1000 + place) * 100 + instance))
    return images


def score_images(
    pipeline: FaceDiffuserPipeline,
    scorers: Scorers,
    people: Sequence[Unseen],
    prompts: Sequence[Prompt],
    method: Method,
    sampler: Sampler = CLAIM,
    instances: int = 1,
    name: str | None = None,
) -> list[dict[str, Any]]:
    """Make and score every image of the people and prompts by a method; return a row (of SCHEMA) for each.

    Every method starts from the same noise. Of prompts for two each person is shown with the next one. `name` is what
    the rows call the method, where that is not its own name.
    """
    rows = []
    for some, images in made_images(pipeline, people, prompts, method, sampler, instances):
        references = [[people[who].embedding for who in one.people] for one in some]
        meanings = [one.prompt.meaning.format(*_words(one, people, sampler)) for one in some]
        for one, score in zip(some, scorers.score(images, references, meanings), strict=True):
            rows.append(
                {
                    "sample_id": f"{'+'.join(map(str, one.people))}-{one.prompt.prompt_id}-{one.instance:03d}",
                    "method": name or method,
                    "subject_ids": [str(who) for who in one.people],
                    "prompt_id": one.prompt.prompt_id,
                    "category": one.prompt.category,
                    "ip": score.ip,
                    "pc": score.pc,
                    "face_count": score.face_count,
                    "status": "ok",
                }
            )
    return rows


def made_images(
    pipeline: FaceDiffuserPipeline,
    people: Sequence[Unseen],
    prompts: Sequence[Prompt],
    method: Method,
    sampler: Sampler,
    instances: int,
) -> Iterator[tuple[list[_Image], list[Image.Image]]]:
    """Yield batches of what is planned with the images of it."""
    plan = planned(len(people), prompts, instances)
    for count in sorted({one.prompt.subjects for one in plan}):
        alike = [one for one in plan if one.prompt.subjects == count]
        for start in range(0, len(alike), sampler.batch):
            some = alike[start : start + sampler.batch]
            texts = [
                one.prompt.text.format(*(f"{word} {IMAGE_MARKER}" for word in _words(one, people, sampler)))
                for one in some
            ]
            start_fusion, end_fusion = sampler.window
            fused = {"fusion_start": start_fusion, "fusion_end": end_fusion} if method == "face-diffuser" else {}
            yield (
                some,
                pipeline(
                    texts,
                    [[people[who].face for who in one.people] for one in some],
                    num_inference_steps=sampler.steps,
                    guidance_scale=sampler.guidance,
                    generator=[torch.Generator().manual_seed(one.seed) for one in some],
                    method=method,
                    **fused,
                ).images,
            )


def _words(image: _Image, people: Sequence[Unseen], sampler: Sampler) -> list[str]:
    return [sampler.class_word or people[who].word for who in image.people]


def as_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Return rows as the table that `facediffuser.evaluation.tables.score_table` takes."""
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)


def require_same(folder: Path, made_from: Mapping[str, Any]) -> None:
    """Note in a folder of kept scores what they are made from, or compare that with what is noted there.

    Raises:
        InputError: the folder holds the scores of something else, which would be taken for these.
    """
    path, said = folder / "made-from.json", json.loads(json.dumps(made_from))
    if path.exists():
        earlier = json.loads(path.read_text())
        if other := sorted(name for name in earlier | said if earlier.get(name) != said.get(name)):
            raise InputError(f"{folder}: holds scores with other {', '.join(other)}; give another folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(said, indent=1) + "\n")


def kept_rows(path: Path, make) -> list[dict[str, Any]]:
    """Return the rows in a file, made and written whole first where it is not there: what a run that goes on starts from."""
    if not path.exists():
        rows = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(rows))
        temporary.replace(path)
    return json.loads(path.read_text())
