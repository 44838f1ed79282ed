"""Where the shipped parts of the miniature lie."""

from pathlib import Path

from facediffuser.errors import InputError

WEIGHTS = Path(__file__).parent / "miniature" / "weights"

EARLIER_PARTS = {
    # Before words for people were added; texts without those words have the same ids and embeddings.
    "5ba4058329ac234cc42294be7bef274e8e718b22664b3cfcb2cad388d18b52dd": "2ad0101b40ea570ec2733d3d1fe97769961cb69c367646948827364379bda910",
    "afe8657758240a013b541d12cb6c8ec6f57fe564d14057470b5b7e9e330a67f0": "b32d3fa2e41e624d663b50355be0e66817f9eff6527d334066091233d897c30e",
}
"""Digests of shipped text encoders and tokenizers, each with that of the one that took its place and fits what was trained."""


def base_folder() -> Path:
    """The base model in diffusers layout: unet, vae, text_encoder, tokenizer, image_encoder, scheduler."""
    return _shipped("base")


def models_folder() -> Path:
    """The model folder with the fine-tuned SDM (`unet`) and TDM (`unet_text`), ready for FaceDiffuserPipeline."""
    return _shipped("models")


def scorers_folder() -> Path:
    """The miniature's two scorers: `identity/` and `prompt/`."""
    return _shipped("scorers")


def _shipped(name: str) -> Path:
    folder = WEIGHTS / name
    if not folder.is_dir():
        raise InputError(
            f"{folder}: the miniature's {name} is missing; make it with `python -m tools.miniature_weights.make`"
        )
    return folder
