"""Prompt consistency (PC): CLIP's cosine of a picture and the text it was asked to show."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from facediffuser.digests import files_digest
from facediffuser.errors import InputError, first_line
from facediffuser.model_check import require_finite
from facediffuser.pictures import CLIP_MEAN, CLIP_STD

logger = logging.getLogger(__name__)

PAPER_CLIP = "openai/clip-vit-large-patch14"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
TEXT_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
BATCH = 64


class PromptScorer:
    """A CLIP model (transformers' CLIPModel) with its tokenizer, in float32."""

    def __init__(self, model: torch.nn.Module, tokenizer, device: str | torch.device = "cpu"):
        self.device = torch.device(device)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.image_size = model.config.vision_config.image_size
        self.text_length = model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Return the embeddings of pictures.

        Args:
            images: n pictures of any sizes.

        Returns:
            The unit vectors (n, d), float32; (0, 0) without pictures.
        """
        batches = []
        for start in range(0, len(images), BATCH):
            crops = [clip_crop(image, self.image_size) for image in images[start : start + BATCH]]
            pixels = torch.from_numpy(np.stack(crops)).to(self.device)
            batches.append(_unit(self.model.get_image_features(pixel_values=pixels).pooler_output))
        return np.concatenate(batches) if batches else np.zeros((0, 0), np.float32)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return the embeddings of texts.

        Args:
            texts: n texts, cut at the model's length (77 tokens for CLIP).

        Returns:
            The unit vectors (n, d), float32; (0, 0) without texts.
        """
        batches = []
        for start in range(0, len(texts), BATCH):
            tokens = self.tokenizer(
                list(texts[start : start + BATCH]),
                padding="max_length",
                truncation=True,
                max_length=self.text_length,
                return_tensors="pt",
            )
            features = self.model.get_text_features(
                input_ids=tokens.input_ids.to(self.device), attention_mask=tokens.attention_mask.to(self.device)
            )
            batches.append(_unit(features.pooler_output))
        return np.concatenate(batches) if batches else np.zeros((0, 0), np.float32)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Return the PC of each picture with its prompt.

        Args:
            images: n pictures.
            prompts: n prompts, without markers.

        Returns:
            n cosines, -1..1.
        """
        if not images:
            return []
        distinct = list(dict.fromkeys(prompts))
        row = {text: index for index, text in enumerate(distinct)}
        texts = self.embed_texts(distinct)[[row[text] for text in prompts]]
        products = self.embed_images(images).astype(np.float64) * texts.astype(np.float64)
        return products.sum(axis=1).tolist()


def clip_crop(image: Image.Image, size: int) -> np.ndarray:
    """Return a picture preprocessed as CLIP's own code does, with Pillow: resized, cropped to the centre, normalised.

    Args:
        image: a picture of any size.
        size: px; the shorter side becomes this long (bicubic), and the centre square of this side is kept.

    Returns:
        An array (3, size, size), float32, with CLIP's mean and standard deviation.
    """
    image = image.convert("RGB")
    width, height = image.size
    if min(width, height) != size:
        scale = size / min(width, height)
        width, height = max(size, int(width * scale)), max(size, int(height * scale))
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255.0
    return ((pixels - np.asarray(CLIP_MEAN, np.float32)) / np.asarray(CLIP_STD, np.float32)).transpose(2, 0, 1)


def load_prompt(folder: Path, device: str | torch.device) -> tuple[PromptScorer, str]:
    """Return the prompt scorer of a CLIP model.

    Args:
        folder: a transformers CLIPModel folder with tokenizer.
        device: where it runs, such as `cpu` or `cuda`.

    Returns:
        The scorer and the sha256 of its files.

    Raises:
        InputError: a file is missing, or the folder holds another model.
    """
    weights = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not (folder / "config.json").is_file() or not weights:
        missing = "config.json" if weights else "model.safetensors"
        raise InputError(f"{folder}/{missing}: missing; give a transformers CLIP folder (such as {PAPER_CLIP})")
    from transformers import AutoTokenizer, CLIPModel

    try:
        model, info = CLIPModel.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a damaged file makes the libraries raise as it comes
        raise InputError(
            f"{folder}: not a CLIP model with tokenizer ({first_line(error)}); give the whole folder"
        ) from error
    if info["missing_keys"]:
        # transformers draws what a file lacks at random, with a warning.
        raise InputError(f"{weights[0]}: {sorted(info['missing_keys'])[0]} is missing; copy it again")
    require_finite(model, weights[0])
    text = [folder / name for name in TEXT_FILES if (folder / name).is_file()]
    return PromptScorer(model, tokenizer, device), files_digest([*text, weights[0]])


def published_clip() -> Path:
    """Return the local folder of PAPER_CLIP of the Hugging Face Hub, downloaded when it is missing.

    Raises:
        InputError: it is not in the cache and cannot be downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    # Only what is read: such a repository holds the same weights for several frameworks.
    patterns = [*TEXT_FILES, "special_tokens_map.json", "model.safetensors"]
    try:
        return Path(snapshot_download(PAPER_CLIP, allow_patterns=patterns))
    except (OSError, ValueError, HTTPError) as error:
        raise InputError(
            f"{PAPER_CLIP}: not in the cache of huggingface_hub and cannot be downloaded; fetch it once with "
            "`hf download`, or give --scorers a folder with identity/ and prompt/"
        ) from error


def _unit(features: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(features.float(), dim=1).cpu().numpy()
