"""Small random models in the shapes of Stable Diffusion v1-5 and CLIP, made once per session."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from facediffuser.pipeline import FaceDiffuserPipeline
from facediffuser.subject import SubjectFuser
from tools.miniature_weights.tokenizer import make_tokenizer

WIDTH = 32
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
WORDS = ["a man and a woman reading a book in the park", "a person riding a red horse, smiling", "it's the man's hat"]


def unet(seed: int) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    model = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    # At random start the condition hardly changes the output; louder cross-attention makes responses a test can see.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn2.to_v" in name or "attn2.to_out.0.weight" in name:
                parameter.mul_(4)
    return model


def vae(seed: int = 3) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    ).eval()


def text_encoder(vocabulary: int, end: int, seed: int = 4) -> CLIPTextModel:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    return CLIPTextModel(config).eval()


def image_encoder(seed: int = 5) -> CLIPVisionModelWithProjection:
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
        projection_dim=WIDTH,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config).eval()


def fuser(seed: int = 6) -> SubjectFuser:
    torch.manual_seed(seed)
    return SubjectFuser(embed_dim=WIDTH).eval()


def scheduler(name: str = "pndm"):
    """Stable Diffusion v1-5's own scheduler, or DDIM with the same betas."""
    if name == "pndm":
        return PNDMScheduler(**SCHEDULE, skip_prk_steps=True)
    return DDIMScheduler(**SCHEDULE, clip_sample=False)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer(WORDS, merges=60)


@pytest.fixture(scope="session")
def parts(tokenizer):
    """The components of a pipeline, shared by all tests; nobody changes them."""
    end = tokenizer.eos_token_id
    return {
        "unet": unet(1),
        "unet_text": unet(2),
        "vae": vae(),
        "text_encoder": text_encoder(len(tokenizer), end),
        "tokenizer": tokenizer,
        "image_encoder": image_encoder(),
        "subject_fuser": fuser(),
    }


@pytest.fixture
def pipeline(parts):
    pipe = FaceDiffuserPipeline(**parts, scheduler=scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def picture():
    """A function (seed, (width, height), mode) -> a random picture."""
    return random_picture


def random_picture(seed: int, size: tuple[int, int] = (40, 40), mode: str = "RGB") -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8))
