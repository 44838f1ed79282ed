"""Checks of a model folder before anything is done with it: files, safetensors headers, shapes, finite values.

`check_model_files` reads JSON and headers only and imports neither torch nor diffusers; `check_model_folder` also builds
each model from its configuration on the meta device, compares names and shapes, and reads all values.
"""

import functools
import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from facediffuser.errors import InputError, first_line
from facediffuser.storage import LocalStore
from facediffuser.storage.reading import parse_json

CONFIGS = {"tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json"}
"""Configuration file of a component; `config.json` for all others."""
WEIGHTS = {"text_encoder": "model", "image_encoder": "model"}
"""Name of a component's weight file without its ending; diffusers' own name for all others."""
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"
CLASSES = {"unet": "UNet2DConditionModel", "unet_text": "UNet2DConditionModel", "vae": "AutoencoderKL",
           "subject_fuser": "SubjectFuser"}  # fmt: skip
MODEL_TYPES = {"text_encoder": ("clip_text_model",), "image_encoder": ("clip_vision_model", "clip")}
MODULES = (*CLASSES, *MODEL_TYPES)
COMPONENTS = (*MODULES, "tokenizer", "scheduler")
HEADER_LIMIT = 100_000_000
"""Bytes of a safetensors header, at most (the format's own limit)."""
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
MOST = {"num_hidden_layers": 1000, "layers_per_block": 1000, "transformer_layers_per_block": 1000,
        "num_train_timesteps": 100_000}  # fmt: skip
"""What a configuration can ask for, at most: modules are made, on no memory, before their weights are looked at."""
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file.

    Raises:
        InputError: the file is missing, cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        content = parse_json(LocalStore(path.parent).get(path.name))
    except FileNotFoundError:
        raise InputError(f"{path}: missing; give a whole model folder") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a whole model folder") from None
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); give a whole model folder") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no JSON object; give a whole model folder")
    return content


def safetensors_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return type and shape of each tensor of a safetensors file, by name; the values are not read.

    Raises:
        InputError: the file is empty, truncated, or its header does not describe its bytes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, HEADER_LIMIT):
            raise InputError(f"{path}: {size} bytes that are no safetensors file; copy it again")
        try:
            header = parse_json(file.read(length))
            tensors = {name: value for name, value in header.items() if name != "__metadata__"}
            found = {name: (value["dtype"], tuple(value["shape"])) for name, value in tensors.items()}
            spans = sorted((*value["data_offsets"], name) for name, value in tensors.items())
        except (ValueError, TypeError, KeyError, AttributeError):
            raise InputError(f"{path}: its safetensors header is damaged; copy it again") from None
    end = 0
    for first, last, name in spans:
        dtype, shape = found[name]
        if first != end or last - first != SIZES.get(dtype, 0) * math.prod(shape):
            raise InputError(f"{path}: its safetensors header is damaged at {name}; copy it again")
        end = last
    if size != 8 + length + end:
        raise InputError(f"{path}: {size} bytes, its header describes {8 + length + end}; copy it again")
    return found


def check_model_files(
    folder: str | Path, required: Iterable[str] = (), skip: Iterable[str] = (), variant: str | None = None
) -> list[str]:
    """Check the files of a model or base folder without torch, and return the names of its components.

    Configurations must be JSON of the right class, weights whole safetensors files (or a .bin file, which is not looked
    into here), the tokenizer's files there. Reads a few kilobytes per component.

    Args:
        folder: local diffusers folder with model_index.json.
        required: components that must be there; others may be absent when model_index.json does not name them.
        skip: components that are not looked at.
        variant: the word in the names of the weight files, as diffusers takes it; a component without such files is
            looked at by its plain ones.

    Raises:
        InputError: one line that names the file.
    """
    folder = Path(folder)
    index = read_json(folder / "model_index.json")
    named = [name for name in COMPONENTS if isinstance(index.get(name), list) and index[name] and index[name][0]]
    for name, value in index.items():
        if name in COMPONENTS and not (isinstance(value, list) and len(value) == 2):
            raise InputError(f"{folder}/model_index.json: {name} is {value!r}; it must be [library, class]")
    wanted = {*named, *required, "vae", "text_encoder", "tokenizer", "scheduler"}
    present = [name for name in COMPONENTS if name not in skip and (name in wanted or (folder / name).is_dir())]
    for name in present:
        check_component_files(folder / name, name, variant)
    if variant and not any(name in MODULES and has_variant(folder / name, variant) for name in present):
        raise InputError(f"{folder}: no weight file of variant {variant!r} in it; leave the variant out")
    _check_fit(folder, present)
    return present


def check_component_files(folder: Path, name: str, variant: str | None = None) -> None:
    """Check the files of one component as `check_model_files` does.

    Args:
        folder: the component's.
        name: `unet`, `vae`, ...
        variant: that of the weights, such as `fp16`.

    Raises:
        InputError: a file is missing, damaged or of another model; the error names it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: the {name} is missing; give a whole model folder")
    if name == "tokenizer":
        _check_tokenizer_files(folder)
        return
    path = folder / CONFIGS.get(name, "config.json")
    config = read_json(path)
    if name in CLASSES and config.get("_class_name") != CLASSES[name]:
        raise InputError(f"{path}: of class {config.get('_class_name')}; the {name} must be a {CLASSES[name]}")
    if name in MODEL_TYPES and config.get("model_type") not in MODEL_TYPES[name]:
        raise InputError(
            f"{path}: holds a model of type {config.get('model_type')}; the {name} must be a {MODEL_TYPES[name][0]}"
        )
    for key, most in MOST.items():
        values = config.get(key)
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, int) and value > most:
                raise InputError(f"{path}: {key} {value}, at most {most} can be; copy it again")
    if name == "scheduler" and not isinstance(config.get("_class_name"), str):
        raise InputError(f"{path}: names no _class_name; give a diffusers scheduler")
    if name != "scheduler":
        for weights in weight_files(folder, name, variant):
            if weights.suffix == ".safetensors":
                safetensors_header(weights)


def has_variant(folder: Path, variant: str) -> bool:
    """Return whether a component's folder holds weight files of a variant, such as `fp16`."""
    return any(f".{variant}" in path.suffixes[:-1] for path in folder.iterdir())


def weight_files(folder: Path, name: str, variant: str | None = None) -> list[Path]:
    """Return the weight files of a component: one safetensors file, those of its index, or one .bin file.

    With `variant` they are those of that variant, where the folder holds any.

    Raises:
        InputError: there are none, or the index names one that is missing.
    """
    stem = WEIGHTS.get(name, DIFFUSERS_WEIGHTS)
    mark = f".{variant}" if variant and has_variant(folder, variant) else ""
    whole, index = folder / f"{stem}{mark}.safetensors", folder / f"{stem}.safetensors.index{mark}.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        parts = read_json(index).get("weight_map")
        if not isinstance(parts, dict) or not parts or not all(isinstance(part, str) for part in parts.values()):
            raise InputError(f"{index}: has no weight_map; copy it again")
        paths = [folder / Path(part).name for part in dict.fromkeys(parts.values())]
        for path in paths:
            if not path.is_file():
                raise InputError(f"{path}: missing; give a whole model folder")
        return paths
    for other in ("pytorch_model", DIFFUSERS_WEIGHTS, "diffusion_model"):
        if (folder / f"{other}{mark}.bin").is_file():
            return [folder / f"{other}{mark}.bin"]
    raise InputError(f"{whole}: missing; give a whole model folder")


def check_model_folder(
    folder: str | Path, required: Iterable[str] = (), skip: Iterable[str] = (), variant: str | None = None
) -> None:
    """Check a model or base folder whole: what `check_model_files` does, then shapes and values of all weights.

    Takes about as long as reading the weights once; they are mapped, not loaded.

    Args:
        folder: local diffusers folder.
        required: components that must be there.
        skip: components that are not looked at, because the caller has others in their place.
        variant: the word in the names of the weight files, as diffusers takes it; a component without such files is
            looked at by its plain ones.

    Raises:
        InputError: one line that names the file and, for weights, the tensor.
    """
    folder = Path(folder)
    for name in check_model_files(folder, required, skip, variant):
        check_component(folder / name, name, variant)


def check_component(folder: Path, name: str, variant: str | None = None) -> None:
    """Check one component's files, the names and shapes of its weights against its configuration, and their values.

    Raises:
        InputError: one line that names the file and, for weights, the tensor.
    """
    check_component_files(folder, name, variant)
    if name == "tokenizer":
        _check_tokenizer(folder)
    elif name == "scheduler":
        _check_scheduler(folder / CONFIGS[name])
    else:
        _check_weights(folder, name, variant)


def require_finite(module, weights: Path) -> None:
    """Check the values of a torch module.

    Args:
        module: the module.
        weights: the file of its weights, for the error.

    Raises:
        InputError: a value is not finite.
    """
    for name, tensor in module.state_dict().items():
        if not is_finite(tensor):
            raise InputError(f"{weights}: {name} holds values that are not finite numbers; copy it again")


def is_finite(tensor) -> bool:
    """Return whether all values of a torch tensor, of any shape and type, are finite."""
    import torch

    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()  # torch finds no least value of 8-bit floats
    # A NaN is the least and the largest value of any that hold it: one pass, many times as fast as to look at each.
    return tensor.numel() == 0 or all(bool(value.isfinite()) for value in torch.aminmax(tensor))


def canonical_name(name: str) -> str:
    """Return a parameter's name in the spelling that old and new versions of the libraries share."""
    name = name.removeprefix("text_model.")
    return re.sub(
        r"(attentions\.\d+)\.(query|key|value|proj_attn)\.", lambda m: f"{m[1]}.{_OLD_ATTENTION[m[2]]}.", name
    )


# --- files ------------------------------------------------------------------------------------------------------------


def _check_tokenizer_files(folder: Path) -> None:
    """Raise InputError unless tokenizer.json, or vocab.json and merges.txt, are there and hold what they should."""
    if (folder / CONFIGS["tokenizer"]).exists():
        read_json(folder / CONFIGS["tokenizer"])
    if (folder / "tokenizer.json").is_file():
        if not isinstance(read_json(folder / "tokenizer.json").get("model"), dict):
            raise InputError(f"{folder}/tokenizer.json: describes no model; give a CLIP tokenizer")
        if not (folder / "vocab.json").exists():
            return
    vocabulary = read_json(folder / "vocab.json")
    if not vocabulary or not all(isinstance(number, int) for number in vocabulary.values()):
        raise InputError(f"{folder}/vocab.json: no table of tokens and ids; give a CLIP tokenizer")
    merges = folder / "merges.txt"
    try:
        lines = LocalStore(folder).get(merges.name).decode().splitlines()
    except FileNotFoundError:
        raise InputError(f"{merges}: missing; give a whole model folder") from None
    except InputError:
        raise
    except (OSError, ValueError):
        raise InputError(f"{merges}: cannot be read as text; copy it again") from None
    pairs = [line for line in lines if line.strip() and not line.startswith("#version")]
    if not pairs or any(len(line.split()) != 2 for line in pairs):
        raise InputError(f"{merges}: not a list of token pairs; copy it again")


def _check_fit(folder: Path, present: list[str]) -> None:
    """Raise InputError when the widths and channels that the configurations state do not fit each other."""
    configs = {name: read_json(folder / name / "config.json") for name in present if name in MODULES}
    width = configs.get("text_encoder", {}).get("hidden_size")
    for name, key in (
        ("unet", "cross_attention_dim"), ("unet_text", "cross_attention_dim"),
        ("image_encoder", "projection_dim"), ("subject_fuser", "embed_dim"),
    ):  # fmt: skip
        value = configs.get(name, {}).get(key, width)
        if width is not None and value != width:
            raise InputError(
                f"{folder}/{name}/config.json: {key} {value}, the text_encoder's hidden_size is {width}; give parts of "
                "one model"
            )
    scale = configs.get("vae", {}).get("scaling_factor", 1.0)
    if not (isinstance(scale, int | float) and math.isfinite(scale) and scale > 0):
        raise InputError(
            f"{folder}/vae/config.json: scaling_factor {scale!r}; latents are divided by it: copy it again"
        )
    channels = configs.get("vae", {}).get("latent_channels")
    for name in ("unet", "unet_text"):
        for key in ("in_channels", "out_channels"):
            value = configs.get(name, {}).get(key, channels)
            if channels is not None and value != channels:
                raise InputError(
                    f"{folder}/{name}/config.json: {key} {value}, the vae's latent_channels are {channels} (models for "
                    "inpainting differ so); give a text-to-image model"
                )


# --- what needs torch -------------------------------------------------------------------------------------------------


def _check_tokenizer(folder: Path) -> None:
    from transformers import CLIPTokenizer

    try:
        ids = CLIPTokenizer.from_pretrained(folder)("a person").input_ids
    except Exception as error:  # tokenizers raises plain Exception for files it cannot use
        raise InputError(f"{folder}: does not load as a CLIP tokenizer ({first_line(error)}); copy it again") from error
    width = folder.parent / "text_encoder" / "config.json"
    if width.is_file() and max(ids) >= read_json(width).get("vocab_size", max(ids) + 1):
        raise InputError(f"{folder}: has more tokens than the text_encoder knows; give the tokenizer of this model")


def _check_scheduler(path: Path) -> None:
    import diffusers
    from diffusers.schedulers import SchedulerMixin

    config = read_json(path)
    kind = getattr(diffusers, config["_class_name"], None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise InputError(f"{path}: unknown scheduler class {config['_class_name']!r}; give a diffusers scheduler")
    try:
        scheduler: Any = kind  # diffusers counts as Any: to mypy this is any class
        made = scheduler.from_config(config)
        made.set_timesteps(2)
        levels = getattr(made, "alphas_cumprod", None)
        usable = levels is None or bool(((levels >= 0) & (levels <= 1)).all())
    except Exception as error:
        raise InputError(f"{path}: cannot be used as a {kind.__name__} ({first_line(error)}); copy it again") from error
    if not usable:
        raise InputError(f"{path}: its noise levels are not between 0 and 1; check the betas")


def _check_weights(folder: Path, name: str, variant: str | None) -> None:
    """Compare a model's weights with its configuration, then look for values that are not finite."""
    path = folder / "config.json"
    config = read_json(path)
    try:
        wanted = _shapes_of_configuration(CLASSES.get(name, name), json.dumps(config))
    except Exception as error:  # a configuration may hold any value, and the libraries raise as it comes
        raise InputError(f"{path}: makes no {name} ({first_line(error)}); copy it again") from error
    ignored = {key for key, needed in wanted.items() if not needed[1]}
    # A whole CLIP model has more than its vision tower.
    optional = config.get("model_type") == "clip"
    missing = {key for key in wanted if key not in ignored}
    for path in weight_files(folder, name, variant):
        for key, tensor in _tensors(path):
            plain = canonical_name(key)
            missing.discard(plain)
            if plain in ignored or plain.endswith("position_ids"):
                continue
            if plain not in wanted:
                if optional:
                    continue
                raise InputError(f"{path}: {key} has no place in the {name}; give weights of this configuration")
            if tuple(tensor.shape) != wanted[plain][0]:
                raise InputError(
                    f"{path}: {key} has shape {tuple(tensor.shape)}, the configuration needs {wanted[plain][0]}; give "
                    "weights of this configuration"
                )
            if not tensor.is_floating_point() or not is_finite(tensor):
                raise InputError(f"{path}: {key} holds values that are not finite numbers; copy it again")
    if missing:
        raise InputError(f"{path}: {sorted(missing)[0]} is missing; give weights of this configuration")


# Both UNets have one configuration, and a module of the full size takes a second to build, on the meta device too.
@functools.lru_cache(maxsize=16)
def _shapes_of_configuration(kind: str, config: str) -> Mapping[str, tuple[tuple[int, ...], bool]]:
    """Return shape of each tensor by canonical name, and whether it is needed in a file (not a computed buffer)."""
    import torch

    with torch.device("meta"):
        module = _module(kind, parse_json(config))
    saved = module.state_dict()
    buffers = {key: value for key, value in module.named_buffers() if key not in saved}
    return {canonical_name(key): (tuple(value.shape), key in saved) for key, value in {**buffers, **saved}.items()}


def _module(kind: str, config: dict[str, Any]):
    import diffusers
    import transformers

    if kind == "SubjectFuser":
        from facediffuser.subject import SubjectFuser

        return SubjectFuser.from_config(config)
    if kind in CLASSES.values():
        return getattr(diffusers, kind).from_config(config)
    if kind == "text_encoder":
        return transformers.CLIPTextModel(transformers.CLIPTextConfig.from_dict(config))
    if config["model_type"] == "clip":
        whole = transformers.CLIPConfig.from_dict(config)
        whole.vision_config.projection_dim = whole.projection_dim
        return transformers.CLIPVisionModelWithProjection(whole.vision_config)
    return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig.from_dict(config))


def _tensors(path: Path):
    """Yield names and tensors of a weight file, mapped from it where its format allows."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # not a dict
                yield key, file.get_tensor(key)
        return
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        tensors = list(state.items())
    except Exception as error:  # torch.load raises many kinds for a broken or unsafe file
        raise InputError(
            f"{path}: cannot be read as a checkpoint of tensors ({first_line(error)}); copy it again"
        ) from error
    if not all(isinstance(tensor, torch.Tensor) for _, tensor in tensors):
        raise InputError(f"{path}: is no state_dict of tensors; copy it again")
    yield from tensors
