"""What can be said of a run before anything is loaded: output, subjects, prompts, the model folder's configuration.

Neither Ray, Prefect nor torch is imported here, so that the command line refuses bad input before it starts them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facediffuser.dataset.consent import require_consent
from facediffuser.dataset.extension import OutputState, last_run, output_state, require_extendable
from facediffuser.dataset.inputs import Prompt, Subject, read_prompts, read_subjects
from facediffuser.dataset.manifest import Part, find_row, read_sound_manifest
from facediffuser.dataset.other_run import require_like_run, run_of_output
from facediffuser.dataset.plan import MOST_ROWS, MOST_SHARDS, Layout, Plan, RowSettings
from facediffuser.dataset.reading import read_footer, require_no_dataset
from facediffuser.dataset.schema import SCHEMA_VERSION, run_schema_version
from facediffuser.dataset.seal import require_sealable
from facediffuser.errors import InputError
from facediffuser.generation.generate_settings import GenerateSettings, RemakeSettings, RepairSettings, RetrySettings
from facediffuser.generation.measured_rate import rate_of_dataset
from facediffuser.generation.speed_settings import FAST_SCHEDULER
from facediffuser.model_check import MODULES, check_component, check_model_files, read_json
from facediffuser.modelfolder import resolve_model
from facediffuser.number_words import counted
from facediffuser.prompts import ids_and_places
from facediffuser.runs import Run
from facediffuser.schedulers import SCHEDULER_CLASSES, choose_scheduler
from facediffuser.scoring.folder import require_scorers
from facediffuser.storage import Store, open_store

OURS = (
    "plan/", "data/", "stats/", "card/", "scores/", "certificate/", "subjects.parquet", "manifest.json", "README.md",
)  # fmt: skip
_WITH_SUBJECTS = ("unet", "image_encoder", "subject_fuser")
NEEDED_BY_METHOD = {
    "face-diffuser": ("unet_text", *_WITH_SUBJECTS),
    "tdm": ("unet_text",),
    "sdm": _WITH_SUBJECTS,
    "fastcomposer": _WITH_SUBJECTS,
}
# Settings of a run document that depend on the device, which Ray knows.
DEFAULT_SHARD_SIZE = 500
OF_THE_DEVICE = ("batch_size", "dtype", "device", "engine", "engine_options")


@dataclass(frozen=True)
class ModelFacts:
    """What a plan needs to know of a model folder; `scheduler` is the run's, `exact_scheduler` that of exact mode."""

    folder: Path
    height: int
    width: int
    scheduler: str
    exact_scheduler: str
    max_subjects: int | None


@dataclass(frozen=True)
class Checked:
    """Checked input: the output, the model folder's facts, and the plan of all images, and what the output holds.

    shard_size: rows of a shard: as given, as the run in the output has it, or a default.
    free_shard_size: whether it may be another: none was given, and no run has begun.
    begun: the first run of the output, if any.
    """

    store: Store
    model: ModelFacts
    plan: Plan
    shard_size: int
    free_shard_size: bool
    there: OutputState
    begun: Run | None

    @property
    def schema_version(self) -> str:
        """The version of the schema that the run is to have: that of the run in the output, where one was begun."""
        return _schema_version(self.begun)


def check_generate(settings: GenerateSettings) -> Checked:
    """Return the plan that the settings stand for; reads configuration and lists only, and writes nothing.

    Weights and pictures are not opened: `prepare` does that.

    Raises:
        InputError: the output holds something else or another run, or subjects, prompts or the model folder cannot be
            used.
    """
    store = open_store(settings.output)
    store.require_writable()
    require_empty_or_dataset(store)
    begun = run_of_output(store)
    model = model_facts(settings, begun)
    subjects = read_subjects(settings.subjects)
    if settings.require_consent:
        require_consent(subjects, settings.subjects)
    if settings.subjects_per_image and len(subjects) < settings.subjects_per_image:
        raise InputError(
            f"{settings.subjects}: {counted(len(subjects), 'subject')} for {settings.subjects_per_image} in an image; add "
            "subjects or lower --subjects-per-image"
        )
    prompts = read_prompts(settings.prompts_url, settings.subjects_per_image)
    _require_sizes(settings, model, len(subjects), prompts)
    _require_room(model, subjects, prompts, settings)
    if settings.scorers:
        require_scorers(settings.scorers)
    if settings.measured_by:
        rate_of_dataset(settings.measured_by)
    plan = Plan(
        tuple(subjects), tuple(prompts), settings.images_per_prompt, settings.seed,
        RowSettings(
            method=settings.method, guidance_scale=settings.guidance_scale, **settings.row_settings(model.scheduler),
            height=settings.height or model.height, width=settings.width or model.width,
        ),
        settings.subject_sets,
    )  # fmt: skip
    begun_with = begun.document.get("settings", {}).get("shard_size") if begun else None
    shard_size = settings.shard_size or begun_with or DEFAULT_SHARD_SIZE
    _require_plan_fits(plan, shard_size)
    known = settings_document(settings, plan, shard_size, model.exact_scheduler, _schema_version(begun))
    there = output_state(store)
    recorded = last_run(store, there) if settings.extend else None
    if recorded is not None:
        require_extendable(store, there.manifest, recorded.document, known, plan, undecided=OF_THE_DEVICE)
    else:
        require_like_run(store, known, OF_THE_DEVICE, plan)
        if there.manifest is not None and there.manifest.retractions:
            raise InputError(f"{store.url}: a subject was taken out of this dataset, so its first run is not repeated; "
                             "--extend adds to it")  # fmt: skip
    return Checked(store, model, plan, shard_size, settings.shard_size is None and begun is None, there, begun)


def check_models(name: str) -> None:
    """Check that a folder of models is there, with the parts that every method needs.

    Raises:
        InputError: it is not, or lacks a part.
    """
    check_model_files(resolve_model(name), MODULES)


def check_repair(settings: RepairSettings | RetrySettings) -> None:
    """Check that a finished dataset is there to be written to, and that its models and scorers can be had.

    Raises:
        InputError: one of these is not so.
    """
    store = open_store(settings.url)
    store.require_writable()
    manifest = read_sound_manifest(store)
    _check_places(settings, manifest.made_from)
    if isinstance(settings, RetrySettings):
        require_sealable(store)
        _require_any_places(store, settings, [part for part in manifest.parts if part.failed])


def _require_any_places(store: Store, settings: RetrySettings, parts: Sequence[Part]) -> None:
    """Raise InputError where models or scorers are missing for each of the parts; a part has its own."""
    refused = []
    for part in parts:
        try:
            for name, check in (
                ("models", lambda place: check_model_files(resolve_model(place))),
                ("scorers", require_scorers),
            ):
                place = getattr(settings, name) or part.made_from.get(name)
                if not place:
                    raise InputError(f"{store.url}: does not say where its {name} are; give --{name}")
                with naming_option(name):
                    check(place)
        except InputError as error:
            refused.append(error)
    if refused and len(refused) == len(parts):
        raise refused[0]


@contextmanager
def naming_option(option: str) -> Iterator[None]:
    """Add to an InputError which option says where the models or scorers of a dataset lie now."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{error}; where the dataset's {option} lie now is given with --{option}") from error


def check_remake(settings: RemakeSettings) -> None:
    """Check that the dataset has the row, and that the image can be written where a place is named.

    Raises:
        InputError: one of these is not so.
    """
    if settings.output:
        output = open_store(settings.output)
        output.require_writable()
        require_no_dataset(output)
    store = open_store(settings.dataset)
    manifest = read_sound_manifest(store)
    _check_places(settings, manifest.made_from)
    for key in manifest.planned_keys():
        _require_object(store, key)
    part, shard, _ = find_row(store, manifest, settings.sample_id)
    _require_object(store, part.layout.shard_key(shard))
    read_footer(store, part.layout.shard_key(shard))


def _require_object(store: Store, key: str) -> None:
    if not store.exists(key):
        raise InputError(f"{store.url_of(key)}: missing; let `facediffuser repair` make it again")


def _check_places(settings: RepairSettings | RetrySettings | RemakeSettings, made_from: Mapping[str, str]) -> None:
    """Raise InputError for models and scorers named that are not there; those of the manifest may have moved."""
    models, scorers = (getattr(settings, name) or made_from.get(name) for name in ("models", "scorers"))
    if settings.models and models:
        check_model_files(resolve_model(models))
    if settings.scorers and scorers:
        require_scorers(scorers)


def _schema_version(begun: Run | None) -> str:
    return run_schema_version(begun.document) if begun else SCHEMA_VERSION


def settings_document(
    settings: GenerateSettings,
    plan: Plan,
    shard_size: int,
    exact_scheduler: str,
    schema_version: str = SCHEMA_VERSION,
) -> dict[str, Any]:
    """Return the part of a run's document that neither the device, nor the models, nor the pictures decide.

    Args:
        settings: the settings.
        plan: every row.
        shard_size: the rows of a shard.
        exact_scheduler: the class name of the scheduler of exact mode.
        schema_version: the version of the dataset's columns.
    """
    given = {
        "subjects_per_image": plan.subjects_per_image,
        "images_per_prompt": plan.images_per_prompt,
        "subject_sets": plan.subject_sets,
        "seed": plan.seed,
        **plan.row.model_dump(),
        "shard_size": shard_size,
        "image_format": settings.image_format,
        "reference_crop": settings.reference_crop,
        "reference_margin": settings.reference_margin,
        "provenance": settings.provenance,
    }
    if schema_version != "1":
        given["embeddings"] = settings.embeddings
    if settings.negative_prompt:
        # Only where one is given: a run without keeps the fingerprint it had before there were negative prompts.
        given["negative_prompt"] = settings.negative_prompt
    if settings.accelerated:
        given["speed"] = {
            "means": settings.means.as_document(),
            "exact": settings.exact_settings(exact_scheduler),
        }
    return {"settings": given, "plan": plan.digest()}


def require_empty_or_dataset(store: Store) -> None:
    """Check that the output is empty or a dataset.

    Raises:
        InputError: it holds what no dataset holds, or a dataset without its plan.
    """
    present = [info.key for info in store.list()]
    foreign = [key for key in present if not key.startswith(OURS)]
    if foreign:
        raise InputError(f"{store.url}: holds {foreign[0]!r}, which is not of a dataset; give an empty output")
    if present and not any(key.startswith("plan/") for key in present):
        raise InputError(f"{store.url}: holds {present[0]!r} but no plan; give an empty output")


# --- the models -------------------------------------------------------------------------------------------------------


def model_facts(settings: GenerateSettings, begun: Run | None) -> ModelFacts:
    """Return what the model folder's configuration says.

    Args:
        settings: of the run.
        begun: the run that the output holds, if any. Where no scheduler is named and that run's is the model's own, it
            is kept, however few the steps: the same command resumes a run that an earlier version began.

    Raises:
        InputError: the model cannot make what is asked for.
    """
    folder = resolve_model(settings.models)
    needs_subject = settings.method != "tdm"
    if needs_subject and not (folder / "subject_fuser").is_dir():
        raise InputError(f"{settings.models}: no subject_fuser there; give a whole model folder or --method tdm")
    check_model_files(folder, NEEDED_BY_METHOD[settings.method])
    unet = read_json(folder / ("unet_text" if settings.method == "tdm" else "unet") / "config.json")
    cell = 2 ** (len(read_json(folder / "vae" / "config.json")["block_out_channels"]) - 1)
    sample = unet["sample_size"]
    rows, columns = (sample, sample) if isinstance(sample, int) else sample
    for name in ("height", "width"):
        value = getattr(settings, name)
        if value is not None and value % cell:
            raise InputError(f"--{name} {value}: this model makes multiples of {cell} px; give {value // cell * cell}")
    own = read_json(folder / "scheduler" / "scheduler_config.json")["_class_name"]
    fuser = folder / "subject_fuser" / "config.json"
    limit = read_json(fuser).get("max_subjects", 4) if needs_subject else None
    if limit is not None and (settings.subjects_per_image or 0) > limit:
        raise InputError(f"--subjects-per-image {settings.subjects_per_image}: this model takes up to {limit}")
    keeps_own = settings.scheduler is None and _recorded_scheduler(begun) == own
    exact = own if keeps_own else choose_scheduler(settings.scheduler, own, settings.steps)
    fewer = settings.sampled_steps < settings.steps
    scheduler = SCHEDULER_CLASSES[settings.fast_scheduler or FAST_SCHEDULER] if fewer else exact
    return ModelFacts(folder, rows * cell, columns * cell, scheduler, exact, limit)


def _recorded_scheduler(begun: Run | None) -> str | None:
    if begun is None:
        return None
    settings = begun.document["settings"]
    return settings.get("speed", {}).get("exact", settings).get("scheduler")


# --- the prompts ------------------------------------------------------------------------------------------------------


def _require_sizes(settings: GenerateSettings, model: ModelFacts, subjects: int, prompts: Sequence[Prompt]) -> None:
    """Raise InputError for a prompt that shows more subjects than there are, or than the model takes."""
    for prompt in prompts:
        if model.max_subjects is not None and prompt.subjects > model.max_subjects:
            raise InputError(
                f"{settings.prompts_url}: prompt {prompt.prompt_id} shows {counted(prompt.subjects, 'subject')}, this model takes up "
                f"to {model.max_subjects}; name fewer in the prompt or remove it"
            )
        if prompt.subjects > subjects:
            raise InputError(
                f"{settings.prompts_url}: prompt {prompt.prompt_id} shows {counted(prompt.subjects, 'subject')}, {settings.subjects} "
                f"has {subjects}; add subjects or remove the prompt"
            )


def _require_plan_fits(plan: Plan, shard_size: int) -> None:
    """Raise InputError for a plan of more rows or shards than a dataset can have; nothing of it is made yet."""
    rows, shards = len(plan), Layout(len(plan), shard_size).shards
    if rows > MOST_ROWS or shards > MOST_SHARDS:
        sets = sum(plan.count_sets(size) for size in plan.sizes)
        raise InputError(
            f"{counted(len(plan.prompts), 'prompt')} x {counted(sets, 'set')} of subjects x "
            f"{counted(plan.images_per_prompt, 'image')} are {counted(rows, 'row')} in {counted(shards, 'shard')}, at most "
            f"{MOST_ROWS:,} and {MOST_SHARDS:,}; lower --images-per-prompt or --subject-sets, or raise --shard-size"
        )


def _require_room(
    model: ModelFacts, subjects: Sequence[Subject], prompts: Sequence[Prompt], settings: GenerateSettings
) -> None:
    """Raise InputError for a prompt whose subject would lie behind the text encoder's last token."""
    from transformers import CLIPTokenizer

    if settings.method == "tdm":
        return
    check_component(model.folder / "tokenizer", "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(model.folder / "tokenizer")
    longest = max({subject.class_word for subject in subjects}, key=len)
    for prompt in prompts:
        try:
            ids_and_places(tokenizer, prompt.text([longest] * prompt.subjects))
        except InputError as error:
            raise InputError(f"prompt {prompt.prompt_id}: {error}") from None
