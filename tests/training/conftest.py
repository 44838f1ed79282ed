"""A small prepared set, made of rendered pictures without searching for faces, and settings for short runs on it."""

import json
from pathlib import Path

import pytest
import torch
from training.prepared_rows import prepared_row, write_prepared

from facediffuser.miniature.render import render_set
from facediffuser.training.train_settings import TrainSettings

TRAIN, TEST = 12, 4


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """12 + 4 prepared rows of the miniature world, in parts of 8; not to be changed."""
    root = tmp_path_factory.mktemp("prepared")
    render_set(TRAIN + TEST, 5, root / "photos", subjects=0)
    files = sorted(path for path in (root / "photos").glob("[0-9]*/*.json"))
    rows = [prepared_row(path, "train" if place < TRAIN else "test") for place, path in enumerate(files)]
    write_prepared(root / "data", rows)
    return root / "data"


@pytest.fixture
def settings(prepared, base, tmp_path):
    """A function that returns settings of a short run from the miniature base."""

    def make(role: str = "tdm", **given) -> TrainSettings:
        chosen = dict(
            data=str(prepared), base=str(base), output=str(tmp_path / "run"), preset="miniature", steps=3,
            batch_size=2, checkpoint_every=100, log_every=1, cache=str(prepared.parent / "cache"), ema=0.0,
            precision="fp32",
        )  # fmt: skip
        return TrainSettings(role=role, **chosen | given)

    return make


@pytest.fixture(autouse=True)
def one_thread():
    """Runs on one thread, whatever a test sets."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A random Stable Diffusion of three small resolutions, with an image encoder of four layers; 64 px make 16 x 16 latents."""
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    from tools.miniature_weights.tokenizer import make_tokenizer

    folder, width = tmp_path_factory.mktemp("base"), 24
    torch.manual_seed(7)
    tokenizer = make_tokenizer(["a photo of a man and a woman standing in the park, wearing a hat"], merges=60)
    end = tokenizer.eos_token_id
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, image_size=32, patch_size=16,
        projection_dim=width,
    )  # fmt: skip
    parts = {
        "unet": UNet2DConditionModel(
            sample_size=16, in_channels=4, out_channels=4, block_out_channels=(8, 16, 16), layers_per_block=1,
            norm_num_groups=4, attention_head_dim=2, cross_attention_dim=width,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        "vae": AutoencoderKL(
            block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3, latent_channels=4,
            up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=4, sample_size=64,
        ),
        "text_encoder": CLIPTextModel(text),
        "tokenizer": tokenizer,
        "image_encoder": CLIPVisionModelWithProjection(vision),
        "scheduler": PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, skip_prk_steps=True,
            set_alpha_to_one=False,
        ),
    }  # fmt: skip
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.38.0"}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        library = "diffusers" if name in ("unet", "vae", "scheduler") else "transformers"
        index[name] = [library, type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
