"""The flow `demo`: the whole factory at a small scale, from rendered photographs to a scored dataset."""

import logging
import tempfile
from itertools import zip_longest
from pathlib import Path

from prefect import task

from facediffuser.flows.flow_check import check_demo
from facediffuser.flows.flow_settings import DemoSettings
from facediffuser.flows.generate_dataset import generate_dataset
from facediffuser.flows.preprocess_ffhq import preprocess_ffhq
from facediffuser.flows.product_flow import product_flow
from facediffuser.flows.train import train
from facediffuser.generation.generate_settings import GenerateSettings
from facediffuser.miniature.render import render_set
from facediffuser.modelfolder import assemble, resolve_base
from facediffuser.number_words import counted
from facediffuser.preprocess.preprocess_settings import PreprocessSettings
from facediffuser.storage import open_store
from facediffuser.storage.output import put_folder
from facediffuser.storage.reading import parse_json
from facediffuser.tasks.retrying import RETRIES

logger = logging.getLogger(__name__)


@task(name="render-photographs", **RETRIES)
def render_photographs(settings: DemoSettings, url: str) -> str:
    """Render the photo set, with subjects and prompts, to `url`, unless it is there already; return `url`.

    The last object written is `prompts.jsonl`, so a set that has it is whole.
    """
    store = open_store(url)
    if store.exists("prompts.jsonl"):
        logger.info("%s: photographs are there already", url)
        return url
    with tempfile.TemporaryDirectory(prefix="facediffuser-photos-") as folder:
        rendered = Path(folder) / "photos"
        render_set(settings.photos, settings.seed, rendered, subjects=settings.subjects)
        _keep_some_prompts(rendered, settings.prompts, pairs=_pair_prompts(settings))
        put_folder(store, rendered, "prompts.jsonl")
    logger.info("%s: %s", url, counted(settings.photos, "photograph"))
    return url


def _pair_prompts(settings: DemoSettings) -> int:
    """How many of the prompts show two people: one in eight, at least one where there are two prompts and two people."""
    return max(1, settings.prompts // 8) if min(settings.prompts, settings.subjects) > 1 else 0


def _keep_some_prompts(folder: Path, count: int, pairs: int) -> None:
    """Keep `count` prompts in `prompts.jsonl`, the last `pairs` of them of two people, of all categories in turn."""
    path = folder / "prompts.jsonl"
    single, double = _categories_in_turn(path), _categories_in_turn(folder / "prompts_pairs.jsonl")
    path.write_text("".join(f"{line}\n" for line in [*single[: count - pairs], *double[:pairs]]))


def _categories_in_turn(path: Path) -> list[str]:
    categories: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        categories.setdefault(parse_json(line)["category"], []).append(line)
    return [line for lines in zip_longest(*categories.values()) for line in lines if line]


@task(name="assemble-models", **RETRIES)
def assemble_models(tdm: str, sdm: str, url: str) -> str:
    """Put the trained TDM and SDM together as a model folder at `url`, unless it is there already; return `url`."""
    store = open_store(url)
    if store.exists("model_index.json"):
        return url
    with tempfile.TemporaryDirectory(prefix="facediffuser-models-") as folder:
        models = assemble(resolve_base("miniature"), tdm, sdm, Path(folder) / "models")
        put_folder(store, models, "model_index.json")
    return url


@product_flow("demo", "demo in {settings.output}")
def demo(settings: DemoSettings) -> dict:
    """Photographs, prepared data, two trained models, a dataset: each under its own name in `settings.output`.

    Run again it keeps what is finished and makes what is missing.
    """
    check_demo(settings)
    root = settings.root
    photos = render_photographs(settings, f"{root}/photos")
    prepared = f"{root}/prepared"
    preprocess_ffhq(PreprocessSettings(source=photos, format="ffhq-fastcomposer", output=prepared))
    trained = settings.training.output
    train(settings.training)
    models = assemble_models(f"{trained}/tdm", f"{trained}/sdm", f"{root}/models")
    result = generate_dataset(
        GenerateSettings(
            models=models,
            scorers="miniature",
            subjects=f"{photos}/subjects",
            prompts=f"{photos}/prompts.jsonl",
            output=f"{root}/dataset",
            steps=settings.steps,
            guidance_scale=2.5,  # what suits pictures of 64 px: more burns paintings and sketches out
            subject_sets=settings.subjects,  # everybody alone, and as many pairs
            seed=settings.seed,
            workers=settings.workers,
            shard_size=24,
        )
    )
    return {**result, "models": models}
