"""Released Face-diffuser checkpoints to our model folder.

`SDM/pytorch_model.bin` and `TDM/pytorch_model.bin` are each the `state_dict()` of one module that holds text_encoder,
vae and unet, the SDM's also image_encoder and postfuse_module. Their names are older than the libraries that read them:
attention of the VAE as query/key/value/proj_attn, the text encoder with or without `text_model.`, and `position_ids`.
"""

import logging
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from facediffuser.errors import InputError, first_few, first_line
from facediffuser.model_check import canonical_name
from facediffuser.modelfolder import (
    copy_component,
    read_json,
    require_free,
    resolve_base,
    resolve_image_encoder,
    write_model_index,
    written_whole,
)
from facediffuser.number_words import counted
from facediffuser.subject import SubjectFuser

logger = logging.getLogger(__name__)

State = dict[str, torch.Tensor]
# The name a part has in a released file, and the component it becomes; frozen parts stand in both files.
FROZEN = {"vae": "vae", "text_encoder": "text_encoder"}
SDM_PARTS = {**FROZEN, "unet": "unet", "image_encoder": "image_encoder", "postfuse_module": "subject_fuser"}
TDM_PARTS = {**FROZEN, "unet": "unet_text"}


def convert(base: str | Path, image_encoder: str | Path, sdm: str | Path, tdm: str | Path, output: str | Path) -> Path:
    """Return `output`, now a model folder with the weights of two released checkpoints.

    All weights come from the two files; the base and the image encoder give configurations, tokenizer and scheduler.

    Args:
        base: Stable Diffusion v1-5, a folder, s3:// URL, hub id or `miniature`.
        image_encoder: CLIP ViT-L/14, likewise.
        sdm: the released SDM's file (.bin, read with weights_only, or .safetensors).
        tdm: the released TDM's file.
        output: a new or empty folder.

    Raises:
        InputError: a key is missing, left over or of another shape, or the frozen parts of the two files differ;
            nothing is written.
    """
    output = Path(output)
    require_free(output)
    base_folder = resolve_base(str(base))
    modules = released_modules(base_folder, resolve_image_encoder(str(image_encoder)))
    sdm_states = match_keys(read_state(Path(sdm)), SDM_PARTS, modules, sdm)
    tdm_states = match_keys(read_state(Path(tdm)), TDM_PARTS, modules, tdm)
    _require_same_frozen_parts(sdm_states, tdm_states, sdm, tdm)
    with written_whole(output) as temporary:
        for name, state in {**tdm_states, **sdm_states}.items():
            modules[name].load_state_dict(state, strict=True, assign=True)
            modules[name].save_pretrained(temporary / name)
        for name in ("tokenizer", "scheduler"):
            copy_component(base_folder / name, temporary / name)
        write_model_index(temporary, base_folder)
    logger.info(
        "%s: converted %s (%s) and %s (%s)",
        output,
        sdm,
        counted(_size(sdm_states), "tensor"),
        tdm,
        counted(_size(tdm_states), "tensor"),
    )
    return output


def released_modules(base: Path, image_encoder: Path) -> dict[str, nn.Module]:
    """Return the model folder's modules by component, built from configurations alone on the meta device.

    Args:
        base: the base model's folder.
        image_encoder: the CLIP model's folder.
    """
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        if not (base / name).is_dir():
            raise InputError(f"{base}: has no {name}; give a Stable Diffusion v1 folder")
    unet, text = read_json(base / "unet" / "config.json"), CLIPTextConfig.from_pretrained(base / "text_encoder")
    with torch.device("meta"):
        modules = {
            "unet": UNet2DConditionModel.from_config(unet),
            "unet_text": UNet2DConditionModel.from_config(unet),
            "vae": AutoencoderKL.from_config(read_json(base / "vae" / "config.json")),
            "text_encoder": CLIPTextModel(text),
            "image_encoder": CLIPVisionModelWithProjection(_vision_config(image_encoder)),
            "subject_fuser": SubjectFuser(embed_dim=text.hidden_size),
        }
    return {name: module.eval() for name, module in modules.items()}


def read_state(path: Path) -> State:
    """Return the tensors of a checkpoint by name, mapped from the file where its format allows.

    Args:
        path: `.safetensors`, or `.bin`, which is read with weights_only.

    Raises:
        InputError: it holds something else.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the released pytorch_model.bin")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch.load and safetensors raise many kinds for a broken or unsafe file
        raise InputError(f"{path}: cannot be read as a checkpoint of tensors ({first_line(error)}); give the released "
                         "pytorch_model.bin") from error  # fmt: skip
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path}: is no state_dict of tensors; give the released pytorch_model.bin")
    return state


def match_keys(
    state: State, parts: dict[str, str], modules: dict[str, nn.Module], source: str | Path
) -> dict[str, State]:
    """Return each component's state dict with its keys in the spelling of the current libraries.

    Args:
        state: all tensors of a released file, by key.
        parts: component by the prefix that its keys have in the file.
        modules: modules by component, on the meta device; they give names and shapes and are not changed.
        source: the file, for messages.

    Raises:
        InputError: names the first key, as the file spells it, that is left over, of another shape, or missing.
    """
    wanted = {part: _wanted(modules[component]) for part, component in parts.items()}
    states: dict[str, State] = {component: {} for component in parts.values()}
    for key, tensor in state.items():
        part, _, inner = key.partition(".")
        place = wanted.get(part, {}).pop(canonical_name(inner), None)
        if place is None:
            raise InputError(f"{source}: {key} has no place in the {_role(parts)}; give the one released")
        if tuple(tensor.shape) != place.shape:
            raise InputError(f"{source}: {key} has shape {_by(tensor.shape)}, the base models need {_by(place.shape)}")
        if place.saved:
            states[parts[part]][place.name] = tensor.contiguous()
    missing = [f"{part}.{place.name}" for part, places in wanted.items() for place in places.values() if place.saved]
    if missing:
        raise InputError(
            f"{source}: {first_few(missing, 1)} missing; give the whole released checkpoint of the {_role(parts)}"
        )
    return states


@dataclass(frozen=True)
class _Place:
    """Where a tensor goes: its name and shape in the module; `saved` is False for buffers that a module computes itself."""

    name: str
    shape: tuple[int, ...]
    saved: bool


def _wanted(module: nn.Module) -> dict[str, _Place]:
    saved = module.state_dict()
    buffers = {name: value for name, value in module.named_buffers() if name not in saved}
    return {
        canonical_name(name): _Place(name, tuple(value.shape), name in saved)
        for name, value in {**buffers, **saved}.items()
    }


def _require_same_frozen_parts(sdm_states: dict[str, State], tdm_states: dict[str, State], sdm, tdm) -> None:
    for component in FROZEN.values():
        for name, tensor in sdm_states[component].items():
            other = tdm_states[component][name]
            if not torch.equal(tensor, other.to(tensor.dtype)):
                raise InputError(
                    f"{component}.{name} differs between {sdm} and {tdm}; give the two files of one release"
                )


def _vision_config(folder: Path) -> CLIPVisionConfig:
    if read_json(folder / "config.json").get("model_type") == "clip":
        whole = CLIPConfig.from_pretrained(folder)
        config = whole.vision_config
        config.projection_dim = whole.projection_dim
        return config
    return CLIPVisionConfig.from_pretrained(folder)


def _role(parts: dict[str, str]) -> str:
    return "TDM" if parts is TDM_PARTS else "SDM"


def _by(shape) -> str:
    return "x".join(str(side) for side in shape) or "()"


def _size(states: dict[str, State]) -> int:
    return sum(len(state) for state in states.values())
