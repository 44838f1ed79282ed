"""Released checkpoints and the folders they need, of small random modules in the very format of the originals."""

import json
from pathlib import Path

import torch
from sampler.conftest import scheduler
from transformers import CLIPConfig, CLIPVisionModelWithProjection

from facediffuser.subject import SubjectFuser

OLD_ATTENTION = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def released_state(parts: dict, unet: str, with_subject: bool) -> dict[str, torch.Tensor]:
    """The state dict of one released file: old names, `position_ids`, and no `text_model.`."""
    state = {}
    for key, value in parts["text_encoder"].state_dict().items():
        state[f"text_encoder.{key.removeprefix('text_model.')}"] = value
    state["text_encoder.embeddings.position_ids"] = torch.arange(77)[None]
    for key, value in parts["vae"].state_dict().items():
        if ".attentions." in key:
            for new, old in OLD_ATTENTION.items():
                key = key.replace(new, old)
        state[f"vae.{key}"] = value
    state |= {f"unet.{key}": value for key, value in parts[unet].state_dict().items()}
    if with_subject:
        state |= {f"image_encoder.{key}": value for key, value in parts["image_encoder"].state_dict().items()}
        positions = parts["image_encoder"].vision_model.embeddings.num_positions
        state["image_encoder.vision_model.embeddings.position_ids"] = torch.arange(positions)[None]
        state |= {f"postfuse_module.{key}": value for key, value in parts["subject_fuser"].state_dict().items()}
    return {key: value.clone() for key, value in state.items()}


def write_base(folder: Path, parts: dict) -> Path:
    """A base folder in diffusers layout, with the parts' own configurations and weights."""
    for name in ("vae", "text_encoder", "tokenizer"):
        parts[name].save_pretrained(folder / name)
    parts["unet_text"].save_pretrained(folder / "unet")
    scheduler().save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.10.2",
        "scheduler": ["diffusers", "PNDMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_clip(folder: Path, tower: CLIPVisionModelWithProjection) -> Path:
    """A folder with the configuration of a whole CLIP model around the vision tower."""
    vision = tower.config.to_dict()
    vision["projection_dim"] = 512  # as published configurations may have it: only the outer value counts
    CLIPConfig(vision_config=vision, projection_dim=tower.config.projection_dim).save_pretrained(folder)
    return folder


def write_run(folder: Path, role: str, parts: dict, unet: str, digests: dict[str, str]) -> Path:
    """What a training leaves behind."""
    parts[unet].save_pretrained(folder / "final" / "unet")
    if role == "sdm":
        parts["image_encoder"].save_pretrained(folder / "final" / "image_encoder")
        fuser: SubjectFuser = parts["subject_fuser"]
        fuser.save_pretrained(folder / "final" / "subject_fuser")
    record = {"role": role, "step": 3, "settings": {}, "base_digests": digests}
    (folder / "final" / "training.json").write_text(json.dumps(record))
    return folder
