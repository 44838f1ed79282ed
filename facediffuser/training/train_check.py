"""Checks of a training before anything is loaded: output, data, and the configuration of the base model.

Neither Ray, Prefect nor torch is imported here, so that the command line refuses bad input before it starts them.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from facediffuser.errors import InputError
from facediffuser.model_check import check_model_files, read_json
from facediffuser.modelfolder import resolve_base, resolve_model
from facediffuser.preprocess.parts import MANIFEST
from facediffuser.preprocess.prepared_schema import SCHEMA_KEY, SCHEMA_VERSION
from facediffuser.storage import Store, open_store
from facediffuser.storage.reading import parse_json, reading
from facediffuser.training import training_run as runs
from facediffuser.training.train_settings import TrainSettings

FIX = "copy it again or run `facediffuser preprocess` again"
"""What can be done about a damaged file of prepared data."""

UNET = {"tdm": "unet_text", "sdm": "unet"}
"""The UNet component of each role in a model folder."""


def check_train(settings: TrainSettings) -> None:
    """Check what a training reads and writes, before anything is loaded; nothing is written.

    Reads lists and configuration. A base that is not on this machine is looked at by the workers: they, not the machine
    that starts them, need its files.

    Raises:
        InputError: the output holds another run, or data or base cannot be trained from.
    """
    for role in settings.roles:
        role_settings = settings.for_role(role)
        store = open_store(role_settings.output)
        store.require_writable()
        runs.require_startable(store, role_settings)
    require_prepared(settings.data, open_store(settings.data), "train")
    # The digests of the models are compared by the training: to read gigabytes takes longer than a check may.
    fingerprint = data_fingerprint(settings.data)
    for role in settings.roles:
        role_settings = settings.for_role(role)
        runs.require_same_inputs(open_store(role_settings.output), role_settings, {"data": fingerprint})
    if is_local_model(settings.base):
        base = resolve_base(settings.base)
        require_stable_diffusion(settings.base, base)
        check_model_files(base, ("unet",))
    if settings.start_from and is_local_model(settings.start_from):
        start = resolve_model(settings.start_from)
        for role in settings.roles:
            require_start(settings.for_role(role), start)
        check_model_files(start)


def require_prepared(url: str, store: Store, split: str) -> None:
    """Check that prepared data is whole and of this schema version.

    Args:
        url: the data, for errors.
        store: the data.
        split: `train` or `test`, of which it must have files.

    Raises:
        InputError: it is not.
    """
    keys = [info.key for info in store.list(f"{split}/") if info.key.endswith(".parquet")]
    if not keys:
        raise InputError(f"{url}: no {split}/*.parquet there; give a folder that `facediffuser preprocess` wrote")
    if not store.exists(MANIFEST):
        raise InputError(
            f"{url}: no {MANIFEST} there, which preprocess writes last; run `facediffuser preprocess` again"
        )
    _require_files(url, store)
    with reading(store.url_of(keys[0]), "Parquet", FIX), store.open(keys[0]) as source:
        require_schema(url, pq.read_schema(source))


def _require_files(url: str, store: Store) -> None:
    """Raise InputError unless the files that the manifest lists are there, each of the size it had."""
    try:
        files = parse_json(store.get(MANIFEST))["files"]
        sizes = {key: int(entry["bytes"]) for key, entry in files.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"{url}/{MANIFEST}: not a manifest of prepared data; prepare it again") from None
    found = {info.key: info.size for folder in ("train/", "test/") for info in store.list(folder)}
    for key, size in sizes.items():
        if key.startswith(("train/", "test/")) and found.get(key) != size:
            what = "missing" if key not in found else f"{found[key]} bytes, the manifest says {size}"
            raise InputError(f"{url}/{key}: {what}; {FIX}")


def data_fingerprint(url: str) -> str | None:
    """Return the fingerprint of the run that prepared the data, None when its manifest does not say."""
    store = open_store(url)
    return parse_json(store.get(MANIFEST)).get("fingerprint") if store.exists(MANIFEST) else None


def require_schema(url: str, schema: pa.Schema) -> None:
    """Check that prepared data has the schema version that is read here.

    Raises:
        InputError: it has another, or none.
    """
    version = (schema.metadata or {}).get(SCHEMA_KEY, b"").decode() or "none"
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{url}: prepared with schema version {version}, this reads {SCHEMA_VERSION}; prepare it again"
        )


def require_stable_diffusion(name: str, base: Path) -> None:
    """Check that a base folder holds the parts of Stable Diffusion v1 or v2 and that they fit each other.

    Args:
        name: what the user gave, for messages.
        base: its local folder.

    Raises:
        InputError: a part is missing, of another architecture, or of another width.
    """
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        if not (base / part).is_dir():
            raise InputError(f"{name}: has no {part}/; give a Stable Diffusion v1 or v2 folder")
    unet, vae, text = (read_json(base / part / "config.json") for part in ("unet", "vae", "text_encoder"))
    if unet.get("_class_name") != "UNet2DConditionModel":
        raise InputError(f"{name}: its unet is a {unet.get('_class_name')}; give a Stable Diffusion v1 or v2 folder")
    if unet.get("addition_embed_type") or unet.get("class_embed_type"):
        raise InputError(
            f"{name}: its unet takes other conditions than text (as SDXL does); give a Stable Diffusion v1 or v2 folder"
        )
    widths = unet.get("cross_attention_dim"), text.get("hidden_size")
    if widths[0] != widths[1]:
        raise InputError(
            f"{name}: its unet takes text embeddings of width {widths[0]}, its text encoder gives {widths[1]}; give a "
            "folder whose parts belong together"
        )
    channels = unet.get("in_channels"), unet.get("out_channels"), vae.get("latent_channels")
    if len(set(channels)) > 1:
        raise InputError(
            f"{name}: its unet takes {channels[0]} channels and gives {channels[1]}, latents have {channels[2]} (models for "
            "inpainting differ so); give a Stable Diffusion v1 or v2 folder"
        )
    prediction = read_json(base / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon")
    if prediction != "epsilon":
        raise InputError(
            f"{name}: predicts {prediction}, training supports noise prediction only; give a model with prediction_type epsilon"
        )


def start_parts(role: str) -> tuple[str, ...]:
    """Return the parts of a model folder that a role is trained on from."""
    return (UNET[role], "image_encoder", "subject_fuser") if role == "sdm" else (UNET[role],)


def require_start(settings: TrainSettings, folder: Path) -> None:
    """Check that a model folder has what a role is trained on from.

    Raises:
        InputError: a part is missing.
    """
    for name in start_parts(settings.role):
        if not (folder / name).is_dir():
            raise InputError(f"--start-from {settings.start_from}: has no {name}; give a whole model folder")


def is_local_model(model: str) -> bool:
    """Whether a model lies on this machine, or should: its name is a path, and neither a URL nor a hub's."""
    path = Path(model).expanduser()
    return model == "miniature" or path.exists() or (path.is_absolute() and "://" not in model)
