"""Model folders: where they are found, what they hold, and how two trained runs become one.

A model folder is a diffusers folder with `unet` (SDM), `unet_text` (TDM), `vae`, `text_encoder`, `tokenizer`,
`image_encoder`, `subject_fuser` and `scheduler`; a base folder has one `unet`, and `image_encoder` at choice.
Weights are safetensors.
"""

import importlib.metadata
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from facediffuser.digests import folder_digest
from facediffuser.errors import InputError, first_line
from facediffuser.model_check import check_component, check_component_files, read_json
from facediffuser.storage import local_copy

# torch, diffusers and transformers take seconds to import, and most of this only looks at files.
if TYPE_CHECKING:
    import torch
    from transformers import CLIPVisionModelWithProjection

logger = logging.getLogger(__name__)

IMAGE_ENCODER = "openai/clip-vit-large-patch14"
BASE_PARTS = ("vae", "text_encoder", "tokenizer", "scheduler")
PIPELINE_CLASSES = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "unet_text": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "subject_fuser": ["facediffuser.subject", "SubjectFuser"],
}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ["*.json", "*.txt", "*.safetensors"]
_HUB_UNWANTED = ["safety_checker/*", "*.fp16.*", "*non_ema*", "v1-*", "flax*", "*onnx*"]
_DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"


# --- finding ----------------------------------------------------------------------------------------------------------


def resolve_model(model: str, revision: str | None = None) -> Path:
    """Return the local folder of a model.

    Args:
        model: `miniature`, a folder with model_index.json, an s3:// URL, which is downloaded once, or an id of the Hugging
            Face Hub.
        revision: of a model of the hub: branch, tag or commit.

    Raises:
        InputError: the model cannot be had, or is no model folder.
    """
    if model == "miniature":
        from facediffuser.shipped import models_folder

        return models_folder()
    return _diffusers_folder(model, revision)


def resolve_base(model: str) -> Path:
    """Return the local folder of a base model.

    Args:
        model: as for `resolve_model`, but `miniature` is the miniature's base.

    Raises:
        InputError: the model cannot be had, or is no model folder.
    """
    if model == "miniature":
        from facediffuser.shipped import base_folder

        return base_folder()
    return _diffusers_folder(model, None)


def resolve_image_encoder(model: str = IMAGE_ENCODER) -> Path:
    """Return the local folder of a CLIP model or vision tower.

    Args:
        model: a transformers folder, an s3:// URL, or an id of the Hugging Face Hub.

    Raises:
        InputError: the model cannot be had.
    """
    if model == "miniature":
        return resolve_base(model) / "image_encoder"
    folder = _local(model, None, ["config.json", "preprocessor_config.json", "model*.safetensors*"])
    if not (folder / "config.json").is_file():
        raise InputError(f"{model}: no config.json there; give a transformers folder of a CLIP model")
    return folder


def load_image_encoder(folder: Path) -> "CLIPVisionModelWithProjection":
    """Return a CLIP vision tower with its projection, float32; `folder` holds it alone or a whole CLIP model."""
    import torch
    from transformers import CLIPVisionModelWithProjection

    kind = read_json(Path(folder) / "config.json").get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise InputError(f"{folder}: holds a model of type {kind}; give the folder of a CLIP model")
    encoder, report = CLIPVisionModelWithProjection.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    if report["missing_keys"]:
        raise InputError(f"{folder}: {sorted(report['missing_keys'])[0]} is missing; give the folder of a CLIP model")
    return encoder


def _diffusers_folder(model: str, revision: str | None) -> Path:
    folder = _local(model, revision, _HUB_FILES)
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{model}: no model_index.json there; give a diffusers model folder")
    return folder


def _local(model: str, revision: str | None, patterns: list[str]) -> Path:
    if not model:
        raise InputError("model '': empty name; give a folder, an s3:// URL or a hub id")
    path = Path(model).expanduser()
    if path.exists() or "://" in model:
        folder = local_copy(model if "://" in model else path)
        if not folder.is_dir():
            raise InputError(f"{model}: is a file; give the folder")
        return folder
    if not _HUB_ID.fullmatch(model) or model.startswith("."):
        raise InputError(f"{model}: no such folder; check the path")
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=_HUB_UNWANTED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"{model}: no such folder, and not to be had from the hub ({first_line(error)})") from error


# --- identity ---------------------------------------------------------------------------------------------------------


def model_digests(folder: str | Path) -> dict[str, str]:
    """Return the sha256 of each component of a model or base folder, by its name.

    A digest covers the component's files, names and contents in name order; hidden files and notes (*.md) are left out.

    Args:
        folder: the local folder.
    """
    folder = Path(folder)
    components = _components(folder)
    with ThreadPoolExecutor() as pool:
        return dict(
            zip(
                components,
                pool.map(lambda name: folder_digest(folder / name, _files(folder / name)), components),
                strict=True,
            )
        )


def image_encoder_digest(folder: Path) -> str:
    """Return the sha256 of what is read of an image encoder's folder: its configuration and its weights.

    Args:
        folder: as `resolve_image_encoder` returns it; what else lies there does not count.
    """
    weights = sorted(folder.glob("model*.safetensors*")) or sorted(folder.glob("pytorch_model*.bin*"))
    return folder_digest(folder, [Path("config.json"), *(path.relative_to(folder) for path in weights)])


def same_part(theirs: str | None, ours: str | None) -> bool:
    """Return whether a component is the same as ours, or an earlier one that ours replaces.

    Args:
        theirs: the sha256 that was recorded, None where none was.
        ours: the sha256 here.
    """
    from facediffuser.shipped import EARLIER_PARTS

    return theirs == ours or (theirs is not None and EARLIER_PARTS.get(theirs) == ours)


def _components(folder: Path) -> list[str]:
    index = read_json(folder / "model_index.json")
    named = [name for name, value in index.items() if isinstance(value, list) and value and value[0]]
    extra = [name for name in PIPELINE_CLASSES if (folder / name).is_dir()]
    return sorted({name for name in [*named, *extra] if (folder / name).is_dir()})


def _files(folder: Path) -> list[Path]:
    """The names of a component's files, relative to it, in the order of their digests."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    kept = [name for name in names if not any(p.startswith(".") for p in name.parts) and name.suffix != ".md"]
    return sorted(kept, key=Path.as_posix)


# --- making -----------------------------------------------------------------------------------------------------------


def assemble(base: str | Path, tdm: str, sdm: str, output: str | Path) -> Path:
    """Assemble a model folder from a base model and two runs trained from it, written whole or not at all.

    VAE, text encoder, tokenizer and scheduler are the base's.

    Args:
        base: the base model's folder.
        tdm: path or URL that the training of the TDM wrote to.
        sdm: path or URL that the training of the SDM wrote to.
        output: the folder to write; absent or empty.

    Returns:
        `output`.

    Raises:
        InputError: a run is unfinished, of the other role or trained from another base; its UNet does not fit; or the output
            holds something. Nothing is written.
    """
    base, output = Path(base), Path(output)
    require_free(output)
    runs = {role: _finished_run(url, role, base) for role, url in (("tdm", tdm), ("sdm", sdm))}
    sources = {name: base / name for name in BASE_PARTS}
    sources |= {"unet_text": runs["tdm"] / "unet", "unet": runs["sdm"] / "unet"}
    sources |= {name: runs["sdm"] / name for name in ("image_encoder", "subject_fuser")}
    for name, folder in sources.items():
        check_component_files(folder, name)
    _check_widths(sources)
    for name, folder in sources.items():
        check_component(folder, name)
    with written_whole(output) as temporary:
        for name, folder in sources.items():
            copy_component(folder, temporary / name)
        write_model_index(temporary, base)
    logger.info("%s: assembled from %s, %s and %s", output, base, tdm, sdm)
    return output


def require_free(output: Path) -> None:
    """Check that a folder can be written.

    Args:
        output: the folder.

    Raises:
        InputError: it exists and is not empty.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: already holds something; give a new or an empty folder")


@contextmanager
def written_whole(output: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `output` when the block ends without an error, and is removed otherwise.

    Args:
        output: the folder to write; the temporary one lies beside it.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
    try:
        yield temporary
        temporary.chmod(0o755)
        os.replace(temporary, output)
    except BaseException:
        shutil.rmtree(temporary)
        raise


def copy_component(source: Path, target: Path) -> None:
    """Copy a component's files; weights in a .bin file are read with weights_only and written as safetensors.

    Args:
        source: the component's folder.
        target: the folder to write.
    """
    import torch
    from safetensors.torch import save_file

    target.mkdir(parents=True)
    has_safetensors = any(source.glob("*.safetensors"))
    for file in _files(source):
        if file.suffix != ".bin":
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, target / file)
        elif not has_safetensors:
            state = torch.load(source / file, map_location="cpu", weights_only=True)
            name = file.with_suffix(".safetensors").name.replace("pytorch_model", "model")
            name = name.replace("diffusion_model", _DIFFUSERS_WEIGHTS)
            tensors = {key: value.contiguous() for key, value in state.items()}
            save_file(tensors, target / name, metadata={"format": "pt"})


def save_component(module: "torch.nn.Module", folder: Path) -> None:
    """Write a model as safetensors, without the path it was loaded from in its config.

    The same weights give the same files, and so the same digest, wherever their base lay.

    Args:
        module: a diffusers or transformers model.
        folder: the folder to write.
    """
    module.save_pretrained(folder, safe_serialization=True)
    path = Path(folder) / "config.json"
    config = read_json(path)
    if config.pop("_name_or_path", None) is not None:
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_model_index(folder: Path, base: Path) -> None:
    """Write the model_index.json that makes a folder a FaceDiffuserPipeline.

    Args:
        folder: the model folder.
        base: the base model's folder, whose classes the parts have.
    """
    base_index = read_json(base / "model_index.json")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")["_class_name"]
    classes = dict(PIPELINE_CLASSES, scheduler=["diffusers", scheduler])
    classes |= {name: base_index[name] for name in BASE_PARTS if base_index.get(name)}
    version = base_index.get("_diffusers_version") or importlib.metadata.version("diffusers")
    index = {"_class_name": "FaceDiffuserPipeline", "_diffusers_version": version}
    (folder / "model_index.json").write_text(json.dumps(index | dict(sorted(classes.items())), indent=2) + "\n")


def _finished_run(url: str, role: str, base: Path) -> Path:
    final = local_copy(f"{str(url).rstrip('/')}/final")
    if not (final / "training.json").is_file():
        raise InputError(f"{url}: no final/training.json there; give the URL of a training that has ended")
    run = read_json(final / "training.json")
    if run.get("role") != role:
        raise InputError(f"{url}: was trained as {run.get('role')}; give a {role} run")
    digests = model_digests(base)
    for name, digest in (run.get("base_digests") or {}).items():
        if name in digests and not same_part(digest, digests[name]):
            raise InputError(f"{url}: was trained from another base than {base} ({name} differs); give that base")
    ours, theirs = (_shape_of(folder / "unet") for folder in (base, final))
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise InputError(
                f"{url}: its UNet does not fit {base}: {key} is {theirs.get(key)}, the base's is {ours.get(key)}"
            )
    return final


def _shape_of(folder: Path) -> dict:
    config = read_json(folder / "config.json")
    return {key: value for key, value in config.items() if not key.startswith("_") and key != "sample_size"}


def _check_widths(sources: dict[str, Path]) -> None:
    def config(name: str) -> dict:
        return read_json(sources[name] / "config.json")

    widths = {
        "text_encoder's hidden_size": config("text_encoder").get("hidden_size"),
        "subject_fuser's embed_dim": config("subject_fuser").get("embed_dim"),
        "image_encoder's projection_dim": config("image_encoder").get("projection_dim"),
    }
    if len(set(widths.values())) > 1:
        parts = ", ".join(f"{name} {value}" for name, value in widths.items())
        raise InputError(f"{sources['subject_fuser'].parent}: widths differ ({parts}); give parts of one model")
