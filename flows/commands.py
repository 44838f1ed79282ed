"""The commands: each checks its settings, runs the flow or the library call behind it, and prints the result.

The parameters are the settings models, whose fields are the options; the docstrings are the help texts. Prefect, Ray and
torch are imported after the input has been checked.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from cyclopts import Parameter

from facediffuser.curation.curation_settings import (
    ExportSettings,
    MergeSettings,
    PublishSettings,
    RetractSettings,
    VerifySettings,
)
from facediffuser.evaluation.evaluate_settings import EvaluateSettings
from facediffuser.evaluation.score_settings import CopySettings, ScoreSettings
from facediffuser.evaluation.weights_settings import CheckSettings
from facediffuser.explain_settings import ExplainSettings
from facediffuser.extras import require_extra
from facediffuser.flows.flow_settings import (
    AssembleSettings,
    ClaimSettings,
    ConvertSettings,
    DemoSettings,
    RenderSettings,
)
from facediffuser.flows.terminal import warnings_held_back
from facediffuser.generation.generate_settings import GenerateSettings, RemakeSettings, RepairSettings, RetrySettings
from facediffuser.number_words import counted
from facediffuser.preprocess.preprocess_settings import PreprocessSettings
from facediffuser.rehearsal.rehearse_settings import RehearseSettings
from facediffuser.settings import Dataset
from facediffuser.storage.output import output_folder
from facediffuser.training.train_settings import TrainSettings

logger = logging.getLogger(__name__)

FIELDS = Parameter(name="*")
"""The fields of a settings model are the options of a command."""


@contextmanager
def _starting(text: str, *arguments: Any, extra: str = "all") -> Iterator[None]:
    """Log what a command starts, then let the caller check its input.

    Raises InputError when a library of the extra that the command needs is not installed; a flow needs `all`.
    """
    logger.info(text, *arguments)
    require_extra(extra)
    with warnings_held_back():
        yield


def demo(settings: Annotated[DemoSettings | None, FIELDS] = None) -> None:
    """The whole factory at a small scale: photographs to scored dataset.

    ```
    facediffuser demo --output out/demo
    ```
    """
    settings = settings or DemoSettings()
    with _starting("Making the demonstration in %s: photographs, training, dataset", settings.output):
        from facediffuser.flows.flow_check import check_demo

        check_demo(settings)
    from facediffuser.flows.demo import demo as flow

    result = flow(settings)
    print(f"\nThe dataset is in {result['output']}: {_counts(result)}.\n\n{result['table']}\n")
    print("Look at its card (README.md and card/index.html there), then make one of your own people:\n")
    print(f"  facediffuser verify {result['output']}")
    print(
        f"  facediffuser generate --models {result['models']} --scorers miniature --subjects YOUR_PEOPLE "
        "--prompts YOUR_PROMPTS.jsonl --output out/mine"
    )


def preprocess(settings: Annotated[PreprocessSettings, FIELDS]) -> None:
    """Prepare photographs for training: faces, captions, segments and splits as Parquet.

    ```
    facediffuser preprocess --source photos --output out/prepared
    facediffuser preprocess --source s3://bucket/ffhq.tgz --output s3://bucket/prepared --workers 4
    ```
    """
    with _starting("Preparing the photographs of %s in %s", settings.source, settings.output):
        from facediffuser.preprocess.preprocess_check import check_preprocess

        check_preprocess(settings)
    from facediffuser.flows.preprocess_ffhq import preprocess_ffhq

    _print_fields(preprocess_ffhq(settings))


def train(settings: Annotated[TrainSettings, FIELDS]) -> None:
    """Train the TDM, the SDM or both from prepared Parquet.

    ```
    facediffuser train both --data out/prepared --base miniature --output out/training
    facediffuser train sdm --data s3://bucket/prepared --base sd15 --output s3://bucket/sdm --workers 4 --resume
    ```
    """
    with _starting("Training %s from %s in %s", " and ".join(settings.roles), settings.data, settings.output):
        from facediffuser.training.train_check import check_train

        check_train(settings)
    from facediffuser.flows.train import train as flow

    for result in flow(settings).values():
        _print_fields(result)


def rehearse(settings: Annotated[RehearseSettings, FIELDS]) -> None:
    """Try every stage for a moment at its real size, with random weights, and print what the real run would take here.

    ```
    facediffuser rehearse --output out/rehearsal --gpu-hour-price 2.5
    facediffuser rehearse --output out/rehearsal --size miniature --steps 12
    ```
    """
    with _starting("Rehearsing the %s size in %s", settings.size, settings.output):
        from facediffuser.rehearsal.rehearse_check import check_rehearse

        check_rehearse(settings)
    from facediffuser.flows.rehearse import rehearse as flow

    print(flow(settings)["table"])


def assemble(settings: Annotated[AssembleSettings, FIELDS]) -> None:
    """Put two trained models and their base together as one model folder.

    ```
    facediffuser assemble --base miniature --tdm out/training/tdm --sdm out/training/sdm --output out/models
    ```
    """
    logger.info("Assembling %s and %s in %s", settings.tdm, settings.sdm, settings.output)
    from facediffuser.flows.flow_check import check_new_folder

    check_new_folder(settings.output)
    from facediffuser.modelfolder import assemble as assemble_models
    from facediffuser.modelfolder import resolve_base

    with output_folder(settings.output, "model_index.json") as folder:
        assemble_models(resolve_base(settings.base), settings.tdm, settings.sdm, folder)
    print(settings.output)


def convert(settings: Annotated[ConvertSettings, FIELDS]) -> None:
    """Convert the released checkpoints to a model folder.

    ```
    facediffuser convert --base sd15 --image-encoder clip-vit-large-patch14 --sdm SDM/pytorch_model.bin \
        --tdm TDM/pytorch_model.bin --output out/models
    ```
    """
    logger.info("Converting %s and %s to %s", settings.tdm, settings.sdm, settings.output)
    from facediffuser.flows.flow_check import check_new_folder

    check_new_folder(settings.output)
    from facediffuser.checkpoints import convert as convert_checkpoints

    with output_folder(settings.output, "model_index.json") as folder:
        convert_checkpoints(settings.base, settings.image_encoder, settings.sdm, settings.tdm, folder)
    print(settings.output)


def generate(settings: Annotated[GenerateSettings, FIELDS]) -> None:
    """Generate a scored image dataset from subjects and prompts; run it again to resume.

    ```
    facediffuser generate --models miniature --subjects people --prompts prompts.jsonl --output out/mine
    facediffuser generate --models MODELS --subjects people --benchmark single-30 --output s3://bucket/dataset
    facediffuser generate --config generate.yaml --dry-run
    ```
    """
    with _starting("Generating images of %s with %s in %s", settings.subjects, settings.models, settings.output):
        from facediffuser.generation.generate_check import check_generate

        check_generate(settings)
    from facediffuser.flows.generate_dataset import generate_dataset

    result = generate_dataset(settings)
    if settings.dry_run:
        _print_fields(result)
        return
    print(f"\n{result['output']}: {_counts(result)}\n\n{result['table']}")


def evaluate(settings: Annotated[EvaluateSettings | None, FIELDS] = None) -> None:
    """Tabulate IP and PC of datasets, of methods on a benchmark, of folders of images.

    ```
    facediffuser evaluate --dataset out/mine --output out/table
    facediffuser evaluate --models MODELS --subjects people --benchmark single-30,pairs-20 --output out/methods
    facediffuser evaluate --images theirs=out/theirs --subjects people --prompts single-30 --dataset out/mine
    ```
    """
    settings = settings or EvaluateSettings()
    with _starting("Evaluating %s", ", ".join([*settings.dataset, *settings.images, *settings.benchmark])):
        from facediffuser.evaluation.evaluate_check import check_evaluate

        check_evaluate(settings)
    from facediffuser.flows.evaluate import evaluate as flow

    print(flow(settings))


def score(settings: Annotated[ScoreSettings, FIELDS]) -> None:
    """Add the columns of other scorers to a dataset.

    ```
    facediffuser score out/mine --add sharpness,my_package:Aesthetic
    facediffuser score out/mine --add faces
    ```
    """
    with _starting("Scoring %s with %s", settings.url, ", ".join(settings.add)):
        from facediffuser.evaluation.evaluate_check import check_score

        check_score(settings)
    from facediffuser.flows.score import score as flow

    for key in flow(settings):
        print(f"{settings.url}/{key}")


def copies(settings: Annotated[CopySettings, FIELDS]) -> None:
    """Flag copied training faces, pasted references and near-duplicates in a dataset.

    ```
    facediffuser copies out/mine --training out/prepared
    ```
    """
    with _starting("Searching %s for copies", settings.url):
        from facediffuser.evaluation.evaluate_check import check_copies

        check_copies(settings)
    from facediffuser.flows.score import copies as flow

    _print_fields(flow(settings))


def verify(settings: Annotated[VerifySettings, FIELDS]) -> int:
    """Check every object of a dataset against its manifest; exit with 1 when something is wrong.

    ```
    facediffuser verify s3://bucket/dataset
    facediffuser verify out/mine --absent ada
    ```
    """
    logger.info("Verifying %s", settings.url)
    from facediffuser.dataset.verify import inspect

    found = inspect(settings.url)
    for line in [*found.problems, *found.notes]:
        print(line)
    count = len(found.problems)
    print(
        f"{settings.url}: {counted(count, 'problem')}"
        if count
        else f"{settings.url}: every object is as the manifest says"
    )
    if settings.absent is None:
        return 1 if count else 0
    from facediffuser.dataset.mentions import find_mentions
    from facediffuser.storage import open_store

    absence = find_mentions(open_store(settings.url), settings.absent)
    for line in [*absence.mentions, *absence.notes]:
        print(line)
    read = f"{counted(absence.objects, 'object')}, {counted(absence.bytes, 'byte')} read"
    print(f"{settings.url}: {counted(len(absence.mentions), 'mention')} of {settings.absent!r} ({read})" if absence.mentions
          else f"{settings.url}: nothing of {settings.absent!r} is left ({read})")  # fmt: skip
    return 1 if count or absence.mentions else 0


def merge(settings: Annotated[MergeSettings, FIELDS]) -> None:
    """Join finished datasets as one, by copying; run it again to resume.

    ```
    facediffuser merge out/mine s3://bucket/theirs --output s3://bucket/both
    ```
    """
    with _starting("Merging %s in %s", ", ".join(settings.urls), settings.output):
        from facediffuser.curation.curation_check import check_merge

        check_merge(settings)
    from facediffuser.flows.curate import merge as flow

    _print_fields(flow(settings))


def retract(settings: Annotated[RetractSettings, FIELDS]) -> None:
    """Take a person out of a dataset: every row that shows them, and all that was made of them.

    ```
    facediffuser retract s3://bucket/dataset --subject ada
    ```
    """
    with _starting("Taking a subject out of %s", settings.url):
        from facediffuser.curation.curation_check import check_retract

        check_retract(settings)
    from facediffuser.flows.curate import retract as flow

    _print_fields(flow(settings))
    print(f"Now `facediffuser verify {settings.url} --absent SUBJECT` proves it; take the person out of the folder of "
          "subjects, too, or `generate --extend` adds them.")  # fmt: skip


def export(settings: Annotated[ExportSettings, FIELDS]) -> None:
    """Write a subset of a dataset in the format of a trainer; run it again to resume.

    ```
    facediffuser export out/mine --to webdataset --where "ip > 0.5 and pc > 0.2" --output out/subset
    facediffuser export s3://bucket/dataset --to faces --test-share 0.1 --output s3://bucket/faces
    ```
    """
    with _starting("Exporting %s in %s", settings.url, settings.output, extra="export"):
        from facediffuser.curation.curation_check import check_export

        require_extra("all")
        check_export(settings)
    from facediffuser.flows.curate import export as flow

    _print_fields(flow(settings))


def publish(settings: Annotated[PublishSettings, FIELDS]) -> None:
    """Put a finished dataset on the Hugging Face Hub; run it again to resume.

    ```
    facediffuser publish out/mine hf://datasets/ORG/NAME
    ```
    """
    with _starting("Publishing %s at %s", settings.dataset, settings.target):
        from facediffuser.curation.curation_check import check_publish

        check_publish(settings)
    from facediffuser.flows.curate import publish as flow

    _print_fields(flow(settings))


def repair(settings: Annotated[RepairSettings, FIELDS]) -> int:
    """Make what `verify` finds missing or damaged, and nothing else; exit with 1 when something is left.

    ```
    facediffuser repair s3://bucket/dataset
    ```
    """
    with _starting("Repairing %s", settings.url):
        from facediffuser.generation.generate_check import check_repair

        check_repair(settings)
    from facediffuser.flows.repair_dataset import repair_dataset

    result = repair_dataset(settings)
    for name in ("found", "left"):
        for line in result[name]:
            print(f"{name}: {line}")
    print(f"{settings.url}: {counted(len(result['found']), 'problem')} found, {len(result['left'])} left")
    return 1 if result["left"] else 0


def retry_failed(settings: Annotated[RetrySettings, FIELDS]) -> int:
    """Make the shards that hold failed rows anew; exit with 1 when rows are still failed.

    ```
    facediffuser retry-failed s3://bucket/dataset
    ```
    """
    with _starting("Retrying the failed rows of %s", settings.url):
        from facediffuser.generation.generate_check import check_repair

        check_repair(settings)
    from facediffuser.flows.repair_dataset import retry_failed as flow

    result = flow(settings)
    print(f"{settings.url}: {counted(result['rows'], 'image')}, {result['ok']} ok, {result['failed']} failed")
    return 1 if result["failed"] else 0


def remake(settings: Annotated[RemakeSettings, FIELDS]) -> int:
    """Make one image anew from its row and compare the bytes; exit with 1 when they differ.

    ```
    facediffuser remake ada~reading~0 --dataset out/mine --output out/remade
    ```
    """
    with _starting("Making %s of %s anew", settings.sample_id, settings.dataset, extra="pipeline"):
        from facediffuser.generation.generate_check import check_remake

        check_remake(settings)
    import torch

    from facediffuser.generation.repair import remake as remake_image
    from facediffuser.storage import open_store

    made = remake_image(settings, gpu=torch.cuda.is_available())
    beside = f"in a batch of {made.batch_rows}" if made.batch_rows > 1 else "alone"
    if settings.output and made.row["image"]:
        store = open_store(settings.output)
        store.put(made.row["image"]["path"], made.row["image"]["bytes"])
        print(store.url_of(made.row["image"]["path"]))
    if made.equal:
        print(f"{settings.sample_id}: equal, image and scores, made {beside}")
    else:
        print(f"{settings.sample_id}: differs in {', '.join(made.differing)}, made {beside}")
    return 0 if made.equal else 1


def card(settings: Annotated[Dataset, FIELDS]) -> None:
    """Write a dataset's card anew: README.md and card/index.html.

    ```
    facediffuser card out/mine
    ```
    """
    logger.info("Writing the card of %s", settings.url)
    from facediffuser.cards.dataset_card import rewrite_card
    from facediffuser.storage import open_store

    rewrite_card(open_store(settings.url))


def check(settings: Annotated[CheckSettings | None, FIELDS] = None) -> int:
    """Compare your weights with the published ones and run them on known inputs; exit with 1 when something is wrong.

    ```
    facediffuser check --models MODELS --scorers SCORERS
    ```
    """
    settings = settings or CheckSettings()
    with _starting(
        "Checking the weights of %s", " and ".join(filter(None, (settings.models, settings.scorers))), extra="pipeline"
    ):
        from facediffuser.evaluation.weights_check import check_places, check_weights

        check_places(settings)
    from facediffuser.devices import pick_device

    good = True
    for finding in check_weights(settings, pick_device(settings.device)):
        print(finding)
        good = good and finding.good
    return 0 if good else 1


def explain(settings: Annotated[ExplainSettings, FIELDS]) -> None:
    """Draw what both models respond to and which of them each cell follows, step by step.

    ```
    facediffuser explain --models miniature --prompt "a woman <|image|> on the beach" --reference ada.png
    ```
    """
    logger.info("Drawing %s with %s", settings.prompt, settings.models)
    from facediffuser.flows.flow_check import check_explain

    check_explain(settings)
    from facediffuser.explain import explain as draw_steps

    print(draw_steps(settings))


def render(settings: Annotated[RenderSettings, FIELDS]) -> None:
    """Render a photo set of the miniature world, with subjects and prompts.

    ```
    facediffuser miniature render --count 480 --output out/photos
    facediffuser miniature render --count 40000 --world ffhq --workers 8 --output out/ffhq
    ```
    """
    logger.info("Rendering %s in %s", counted(settings.count, "picture"), settings.output)
    from facediffuser.flows.flow_check import check_new_folder

    check_new_folder(settings.output)
    from facediffuser.miniature.render import render_set

    with output_folder(settings.output, "prompts.jsonl") as folder:
        render_set(
            settings.count,
            settings.seed,
            folder,
            settings.size,
            settings.pairs,
            settings.actions,
            settings.world,
            settings.workers,
        )
    print(f"{settings.output}: {counted(settings.count, 'picture')}, subjects/ and prompts.jsonl")


def claim(settings: Annotated[ClaimSettings | None, FIELDS] = None) -> int:
    """Compare all methods on the miniature's benchmark; exit with 1 when the paper's ordering fails on it.

    ```
    facediffuser miniature claim --output out/claim
    ```
    """
    settings = settings or ClaimSettings()
    with _starting("Comparing the methods with %s in %s", settings.models, settings.output):
        from facediffuser.flows.flow_check import check_claim

        check_claim(settings)
    from facediffuser.flows.claim import claim as flow

    text, holds = flow(settings)
    print(text)
    return 0 if holds else 1


def _counts(result: dict[str, Any]) -> str:
    kept = f", {counted(result['shards_kept'], 'shard')} of them from before" if result["shards_kept"] else ""
    return f"{counted(result['rows'], 'image')}, {result['ok']} ok, {result['failed']} failed{kept}"


def _print_fields(result: dict[str, Any]) -> None:
    for name, value in result.items():
        print(f"{name}: {value}")
