"""Where the shipped parts of the miniature lie."""

from pathlib import Path

from facediffuser.errors import InputError

WEIGHTS = Path(__file__).parent / "miniature" / "weights"


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
