"""What each command of the command line does: call its flow, or the library for what is no batch work."""

import logging
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

logger = logging.getLogger(__name__)


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AssembleSettings(_Settings):
    """Two trained models and the base they were trained from become one model folder."""

    base: str = Field(description="base model: a diffusers folder, an s3:// URL, a hub id, or `miniature`")
    tdm: str = Field(description="URL that `train tdm` wrote to")
    sdm: str = Field(description="URL that `train sdm` wrote to")
    output: Path = Field(description="the model folder to make")


class ConvertSettings(_Settings):
    """Released Face-diffuser checkpoints become a model folder."""

    base: str = Field(description="Stable Diffusion v1-5: a diffusers folder, an s3:// URL or a hub id")
    image_encoder: str = Field(description="CLIP ViT-L/14: a transformers folder, an s3:// URL or a hub id")
    sdm: Path = Field(description="the released SDM/pytorch_model.bin")
    tdm: Path = Field(description="the released TDM/pytorch_model.bin")
    output: Path = Field(description="the model folder to make")


class DatasetSettings(_Settings):
    """One of our datasets."""

    url: str = Field(description="the dataset: a folder or s3://bucket/prefix")


class RenderSettings(_Settings):
    """A photo set of the miniature world in the ffhq-fastcomposer layout, with subjects/ and prompts.jsonl."""

    count: int = Field(ge=1, description="pictures")
    seed: int = Field(0, ge=0, description="the same seed renders the same pictures")
    output: Path = Field(description="folder to write")
    size: Literal[64, 128] = Field(64, description="side of a picture, px")
    pairs: float = Field(0.15, ge=0, le=1, description="share of the pictures on which two people stand")
    actions: float = Field(0.3, ge=0, le=1, description="share of the people who do something")


def demo(settings) -> None:
    """Run the flow `demo`; print where its dataset is, its scores, and what to type next."""
    from facediffuser.flows.demo import demo as flow

    result = flow(settings)
    print(f"\nThe dataset is in {result['output']}: {_counts(result)}.\n\n{result['table']}\n")
    print("Look at its card (README.md and card/index.html there), then make one of your own people:\n")
    print(f"  facediffuser verify {result['output']}")
    print(
        f"  facediffuser generate --models {result['models']} --scorers miniature --subjects YOUR_PEOPLE "
        "--prompts YOUR_PROMPTS.jsonl --output out/mine"
    )


def preprocess(settings) -> None:
    """Run the flow `preprocess-ffhq`."""
    from facediffuser.flows.preprocess_ffhq import preprocess_ffhq

    _print_fields(preprocess_ffhq(settings))


def train(settings) -> None:
    """Run the flow `train`."""
    from facediffuser.flows.train import train as flow

    for result in flow(settings).values():
        _print_fields(result)


def generate(settings) -> None:
    """Run the flow `generate-dataset`."""
    from facediffuser.flows.generate_dataset import generate_dataset

    result = generate_dataset(settings)
    if settings.dry_run:
        _print_fields(result)
        return
    print(f"\n{result['output']}: {_counts(result)}\n\n{result['table']}")


def _counts(result: dict) -> str:
    kept = f", {result['shards_kept']} shards of them from before" if result["shards_kept"] else ""
    return f"{result['rows']} images, {result['ok']} ok, {result['failed']} failed{kept}"


def _print_fields(result) -> None:
    for name, value in (result if isinstance(result, dict) else result.model_dump()).items():
        print(f"{name}: {value}")


def evaluate_images(settings) -> None:
    """Run the flow `evaluate` and print its table."""
    from facediffuser.flows.evaluate import evaluate

    print(evaluate(settings))


def score_dataset(settings) -> None:
    """Run the flow `score` and print what it wrote."""
    from facediffuser.flows.score import score

    for key in score(settings):
        print(f"{settings.url}/{key}")


def flag_copies(settings) -> None:
    """Run the flow `copies` and print how many images each flag is raised on."""
    from facediffuser.flows.score import copies

    _print_fields(copies(settings))


def assemble_models(settings: AssembleSettings) -> None:
    """Make the model folder."""
    from facediffuser.checkpoints import assemble, resolve_base

    print(assemble(resolve_base(settings.base), settings.tdm, settings.sdm, settings.output))


def convert_checkpoints(settings: ConvertSettings) -> None:
    """Make the model folder."""
    from facediffuser.checkpoints import convert

    print(convert(settings.base, settings.image_encoder, settings.sdm, settings.tdm, settings.output))


def verify_dataset(settings: DatasetSettings) -> int:
    """Print what is wrong with the dataset, a line each; return 1 when anything is."""
    from facediffuser.dataset.verify import verify

    problems = verify(settings.url)
    for problem in problems:
        print(problem)
    print(
        f"{settings.url}: {len(problems)} problems"
        if problems
        else f"{settings.url}: every shard is as the manifest says"
    )
    return 1 if problems else 0


def repair(settings) -> int:
    """Run the flow `repair-dataset`; print what was found and what is left; return 1 when anything is."""
    from facediffuser.flows.repair_dataset import repair_dataset

    result = repair_dataset(settings)
    for name in ("found", "left"):
        for line in result[name]:
            print(f"{name}: {line}")
    print(f"{settings.url}: {len(result['found'])} problems found, {len(result['left'])} left")
    return 1 if result["left"] else 0


def retry(settings) -> int:
    """Run the flow `retry-failed`; print the counts; return 1 when rows are still failed."""
    from facediffuser.flows.repair_dataset import retry_failed

    result = retry_failed(settings)
    print(f"{settings.url}: {result['rows']} images, {result['ok']} ok, {result['failed']} failed")
    return 1 if result["failed"] else 0


def remake_image(settings) -> int:
    """Print whether the image comes out as it is in the dataset, and what differs; return 1 when it does."""
    import torch

    from facediffuser.generation.repair import remake
    from facediffuser.storage import open_store

    made = remake(settings, gpu=torch.cuda.is_available())
    beside = f"in a batch of {made.company}" if made.company > 1 else "alone"
    if settings.output and made.row["image"]:
        store = open_store(settings.output)
        store.put(made.row["image"]["path"], made.row["image"]["bytes"])
        print(store.url_of(made.row["image"]["path"]))
    if made.equal:
        print(f"{settings.sample_id}: equal, image and scores, made {beside}")
    else:
        print(f"{settings.sample_id}: differs in {', '.join(made.differing)}, made {beside}")
    return 0 if made.equal else 1


def card(settings: DatasetSettings) -> None:
    """Write the dataset's card again."""
    from facediffuser.cards.dataset_card import write_card
    from facediffuser.storage import open_store

    write_card(open_store(settings.url))


def explain_picture(settings) -> None:
    """Draw the picture."""
    from facediffuser.explain import explain

    print(explain(settings))


def render(settings: RenderSettings) -> None:
    """Render the photo set."""
    from facediffuser.miniature.render import render_set

    render_set(settings.count, settings.seed, settings.output, settings.size, settings.pairs, settings.actions)
    print(f"{settings.output}: {settings.count} pictures, subjects/ and prompts.jsonl")


def claim(settings) -> int:
    """Run the flow `claim`, print its tables and judgement; return 1 when the paper's ordering does not hold."""
    from facediffuser.flows.claim import claim as flow

    text, holds = flow(settings)
    print(text)
    return 0 if holds else 1
