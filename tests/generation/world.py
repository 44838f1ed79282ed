"""A made world for generation: a small random model folder, untrained scorers, two people, a few prompts."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from PIL import Image, ImageOps
from scoring.small_world import save_scorers
from skimage import data
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from facediffuser.generation.generate_settings import GenerateSettings
from facediffuser.pipeline import FaceDiffuserPipeline
from facediffuser.subject import SubjectFuser
from tools.miniature_weights.tokenizer import make_tokenizer

PROMPTS = [
    {"prompt": "{subject} reading a book", "prompt_id": "book", "category": "action"},
    {"prompt": "{subject} in the park", "category": "context"},
    {"prompt": "a photo of a person <|image|>, smiling"},
]


def save_models(folder: Path, width: int = 16) -> Path:
    """Write a model folder of random weights that makes images of 32 x 32 px; return it."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer([row["prompt"] for row in PROMPTS], merges=40)
    end = tokenizer.eos_token_id
    size = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4}

    def unet() -> UNet2DConditionModel:
        return UNet2DConditionModel(
            sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, cross_attention_dim=width,
            attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **blocks,
        )  # fmt: skip

    FaceDiffuserPipeline(
        unet=unet(),
        unet_text=unet(),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            sample_size=32,
            **blocks,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**size, **tokens, max_position_embeddings=77)),
        tokenizer=tokenizer,
        image_encoder=CLIPVisionModelWithProjection(
            CLIPVisionConfig(**size, image_size=28, patch_size=14, projection_dim=width)
        ),
        subject_fuser=SubjectFuser(embed_dim=width),
        scheduler=PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1),
    ).save_pretrained(folder)
    return folder


def save_people(folder: Path) -> Path:
    """Write `subjects/`: ada (two pictures, a woman) and bob, who has no class word; return it."""
    person = Image.fromarray(data.astronaut()).crop((120, 0, 320, 200))
    (folder / "ada").mkdir(parents=True)
    (folder / "bob").mkdir()
    person.save(folder / "ada" / "1.png")
    ImageOps.mirror(person).save(folder / "ada" / "2.jpg")
    ImageOps.autocontrast(person.convert("L")).save(folder / "bob" / "1.webp")
    (folder / "subjects.csv").write_text("subject_id,class_word\nada,woman\n")
    return folder


def save_prompts(path: Path, rows: list[dict] = PROMPTS) -> Path:
    """Write prompts as JSONL; return the file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class World:
    """Where the parts of a made world lie; `settings(output)` is a run of 12 rows in 4 shards, 3 steps an image."""

    def __init__(self, root: Path):
        self.models = save_models(root / "models")
        self.scorers = save_scorers(root / "scorers")
        self.subjects = save_people(root / "subjects")
        self.prompts = save_prompts(root / "prompts.jsonl")

    def settings(self, output: Path | str, **others) -> GenerateSettings:
        given = {
            "models": str(self.models), "scorers": str(self.scorers), "subjects": str(self.subjects),
            "prompts": str(self.prompts), "output": str(output), "images_per_prompt": 2, "steps": 3, "shard_size": 3,
            "batch_size": 2, "workers": 1,
        }  # fmt: skip
        return GenerateSettings(**(given | others))
