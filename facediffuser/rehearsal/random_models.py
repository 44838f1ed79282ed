"""Models of random weights in the published sizes, and in small ones: for rehearsals and benchmarks, never for images."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from facediffuser.shipped import base_folder


@dataclass(frozen=True)
class Size:
    """Sizes of a base model; the defaults are those of Stable Diffusion v1-5 and CLIP ViT-L/14."""

    unet: tuple[int, ...] = (320, 640, 1280, 1280)
    vae: tuple[int, ...] = (128, 256, 512, 512)
    text: tuple[int, int, int] = (768, 12, 12)
    """Width, layers, heads."""
    vision: tuple[int, int, int] = (1024, 24, 16)
    reference_px: int = 224
    patch_px: int = 14
    groups: int = 32
    blocks: int = 2
    heads: int = 8


def _configs(size: Size) -> tuple[CLIPTextConfig, CLIPVisionConfig]:
    width, layers, heads = size.text
    seen, seen_layers, seen_heads = size.vision
    end = 49407
    text = CLIPTextConfig(
        vocab_size=end + 1, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=77, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=seen, intermediate_size=4 * seen, num_hidden_layers=seen_layers, num_attention_heads=seen_heads,
        image_size=size.reference_px, patch_size=size.patch_px, projection_dim=width,
    )  # fmt: skip
    return text, vision


def modules(size: Size) -> dict[str, nn.Module]:
    """Return a base model of random weights, by part."""
    levels = len(size.unet)
    text, vision = _configs(size)
    width = size.text[0]
    return {
        "unet": UNet2DConditionModel(
            sample_size=64, in_channels=4, out_channels=4, block_out_channels=size.unet, layers_per_block=size.blocks,
            norm_num_groups=size.groups, attention_head_dim=size.heads, cross_attention_dim=width,
            down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        ),
        "vae": AutoencoderKL(
            block_out_channels=size.vae, layers_per_block=size.blocks, latent_channels=4, norm_num_groups=size.groups,
            down_block_types=("DownEncoderBlock2D",) * len(size.vae), up_block_types=("UpDecoderBlock2D",) * len(size.vae),
            sample_size=512,
        ),
        "text_encoder": CLIPTextModel(text),
        "image_encoder": CLIPVisionModelWithProjection(vision),
    }  # fmt: skip


def write_base(folder: Path, size: Size, device: str = "cpu") -> Path:
    """Write a base model of random weights with the miniature's tokenizer; return its folder.

    Args:
        folder: a new one.
        size: the widths and depths.
        device: where the weights are drawn.
    """
    torch.manual_seed(0)
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.38.0"}
    with torch.device(device):
        made = modules(size)
    for name, part in made.items():
        part.save_pretrained(folder / name)
        index[name] = ["diffusers" if name in ("unet", "vae") else "transformers", type(part).__name__]
    PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, skip_prk_steps=True,
        set_alpha_to_one=False,
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    (folder / "tokenizer").mkdir()
    for path in (base_folder() / "tokenizer").iterdir():
        (folder / "tokenizer" / path.name).write_bytes(path.read_bytes())
    index |= {"scheduler": ["diffusers", "PNDMScheduler"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_models(folder: Path, size: Size, device: str = "cpu") -> Path:
    """Write a model folder of random weights with the miniature's tokenizer, in half precision.

    Args:
        folder: where it goes.
        size: its sizes.
        device: where the weights are drawn; a GPU takes seconds, a CPU a minute.
    """
    from facediffuser.pipeline import FaceDiffuserPipeline
    from facediffuser.subject import SubjectFuser

    torch.manual_seed(1)
    with torch.device(device):
        parts, other = modules(size), modules(size)["unet"]
        fuser = SubjectFuser(size.text[0])
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, skip_prk_steps=True,
        set_alpha_to_one=False,
    )  # fmt: skip
    tokenizer = CLIPTokenizer.from_pretrained(base_folder() / "tokenizer")
    pipe = FaceDiffuserPipeline(**parts, unet_text=other, subject_fuser=fuser, tokenizer=tokenizer, scheduler=scheduler)
    pipe.to(torch.float16).save_pretrained(folder)
    return folder


def write_scorers(folder: Path, size: Size, device: str = "cpu") -> Path:
    """Write the paper's scorers with random weights: FaceNet's network, and a whole CLIP of these sizes.

    Args:
        folder: a new one.
        size: the widths and depths of CLIP.
        device: where the weights are drawn.
    """
    from facenet_pytorch import InceptionResnetV1

    torch.manual_seed(2)
    (folder / "identity").mkdir(parents=True)
    torch.save(InceptionResnetV1(pretrained=None).state_dict(), folder / "identity" / "random.pt")
    with torch.device(device):
        clip = CLIPModel(clip_config(size))
    clip.save_pretrained(folder / "prompt")
    CLIPTokenizer.from_pretrained(base_folder() / "tokenizer").save_pretrained(folder / "prompt")
    return folder


def clip_config(size: Size) -> CLIPConfig:
    """Return the configuration of a whole CLIP of these sizes."""
    parts = _configs(size)
    return CLIPConfig(text_config=parts[0].to_dict(), vision_config=parts[1].to_dict(), projection_dim=size.text[0])


def captioner(full: bool, device: str = "cpu") -> tuple[nn.Module, int]:
    """Return a BLIP-2 of random weights, and the side of its pictures in px.

    Args:
        full: as large as blip2-opt-2.7b.
        device: where the weights are drawn; a GPU takes seconds, a CPU a minute.
    """
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    torch.manual_seed(3)
    if full:
        # The vision tower's and Q-Former's defaults are the published ones; OPT's are not.
        config = Blip2Config(
            text_config={
                "model_type": "opt", "vocab_size": 50304, "hidden_size": 2560, "word_embed_proj_dim": 2560,
                "ffn_dim": 10240, "num_hidden_layers": 32, "num_attention_heads": 32,
            },
            num_query_tokens=32, image_token_index=50265,
        )  # fmt: skip
        with torch.device(device):
            return Blip2ForConditionalGeneration(config), 224
    small = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Blip2Config(
        vision_config={**small, "image_size": 32, "patch_size": 8},
        qformer_config={**small, "vocab_size": 16, "encoder_hidden_size": 32},
        text_config={
            "model_type": "opt", "vocab_size": 17, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 37,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
            "bos_token_id": 2, "eos_token_id": 3,
        },
        num_query_tokens=4, image_token_index=16,
    )  # fmt: skip
    return Blip2ForConditionalGeneration(config), 32


def write_segmenter(folder: Path, full: bool) -> Path:
    """Write a panoptic Mask2Former of random weights; `full` is the size of mask2former-swin-large, else tiny."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    torch.manual_seed(4)
    stages = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    if full:
        backbone = SwinConfig(image_size=384, embed_dim=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48],
                              window_size=12, **stages)  # fmt: skip
        config = Mask2FormerConfig(backbone_config=backbone, num_queries=200, num_labels=133)
        processor = Mask2FormerImageProcessor(size={"shortest_edge": 800, "longest_edge": 1333}, num_labels=133)
    else:
        backbone = SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[2, 2, 2, 2],
                              window_size=2, **stages)  # fmt: skip
        config = Mask2FormerConfig(
            backbone_config=backbone, hidden_dim=32, feature_size=32, mask_feature_size=32, num_queries=4,
            num_attention_heads=2, encoder_layers=1, decoder_layers=2, dim_feedforward=32, encoder_feedforward_dim=32,
            num_labels=2,
        )  # fmt: skip
        processor = Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}, num_labels=2)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
