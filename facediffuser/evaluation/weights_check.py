"""A user's own weights, looked at once: their digests beside the published ones, and what they say of known inputs."""

import hashlib
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from facediffuser.evaluation.weights_settings import CheckSettings
from facediffuser.miniature.render import person, render
from facediffuser.model_check import MODULES, check_model_files, check_model_folder, weight_files
from facediffuser.modelfolder import resolve_model
from facediffuser.number_words import counted
from facediffuser.scoring.folder import PAPER, require_scorers, scorers_folder

logger = logging.getLogger(__name__)

# SHA-256 of files as their publishers have them.
PUBLISHED = {
    "19da7aaa4b880e59d56843f1fcb4dd9b599c28a1d9d9af7c1143057c8ffae9f1": "Stable Diffusion v1-5, unet",
    "a2b5134f4dbc140d9c11f11cba3233099e00af40f262f136c691fb7d38d2194c": "Stable Diffusion v1-5, vae",
    "d008943c017f0092921106440254dbbe00b6a285f7883ec8ba160c3faad88334": "Stable Diffusion v1-5, text_encoder",
    "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb": "CLIP ViT-L/14, model.safetensors",
    "f1a17cdbe0f36fec524f5cafb1c261ea3bbbc13e346e0f74fc9eb0460dedd0d3": "CLIP ViT-L/14, pytorch_model.bin",
}
FIRST_PERSON, PEOPLE, SIDE = 80_000_000, 4, 320
PROMPT = "a man <|image|> on the beach"


@dataclass(frozen=True)
class Finding:
    """One line of the check: what was looked at, what was found, whether it is as it must be."""

    what: str
    found: str
    good: bool = True

    def __str__(self) -> str:
        return f"{'ok' if self.good else 'WRONG'}: {self.what}: {self.found}"


def check_places(settings: CheckSettings) -> None:
    """Check that the models and scorers named are there; nothing is loaded.

    Raises:
        InputError: one is not there.
    """
    if settings.models:
        check_model_files(resolve_model(settings.models))
    if settings.scorers:
        require_scorers(settings.scorers)


def check_weights(settings: CheckSettings, device: str = "cpu") -> Iterator[Finding]:
    """Yield what is found of the weights that the settings name.

    Args:
        settings: models and scorers.
        device: where they run.

    Raises:
        InputError: a file is missing or damaged; the error names it.
    """
    if settings.models:
        yield from _check_models(settings.models, device)
    if settings.scorers:
        yield from _check_scorers(settings.scorers, device)


def published_name(path: Path) -> str:
    """Return what a file of weights is, by its SHA-256, or that no published file has that."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    name = PUBLISHED.get(digest)
    return f"{digest[:12]}, " + (f"as published: {name}" if name else "no published file that is known here")


def _check_models(name: str, device: str) -> Iterator[Finding]:
    from facediffuser.pipeline import FaceDiffuserPipeline

    folder = resolve_model(name)
    check_model_folder(folder)
    yield Finding(name, "configurations, shapes and values of all weights are whole")
    for part in check_model_files(folder):
        if part in MODULES:
            for path in weight_files(folder / part, part):
                yield Finding(f"{part}/{path.name}", published_name(path))
    pipeline = FaceDiffuserPipeline.from_pretrained(folder).to(device)
    pipeline.set_progress_bar_config(disable=True)
    import torch

    drawn = _people()[0][0]
    out = pipeline(
        prompt=PROMPT, reference_images=[drawn], num_inference_steps=2, output_type="np",
        generator=torch.Generator("cpu").manual_seed(0),
    )  # fmt: skip
    pixels = np.asarray(out.images[0], np.float32)
    spread = float(pixels.std())
    good = bool(np.isfinite(pixels).all()) and spread > 1e-3
    yield Finding("an image of two steps", f"{pixels.shape[1]} x {pixels.shape[0]}, spread {spread:.3f}", good)


def _check_scorers(name: str, device: str) -> Iterator[Finding]:
    from facediffuser.scoring.scorers import load_scorers

    scorers = load_scorers(name, device)
    if name != PAPER:
        folder = scorers_folder(name)
        for path in sorted(path for part in ("identity", "prompt") for path in (folder / part).iterdir()):
            if path.suffix in (".pt", ".bin", ".safetensors"):
                yield Finding(f"{path.parent.name}/{path.name}", published_name(path))
    for part, digest in scorers.digests.items():
        yield Finding(f"{part}, as datasets record it", digest[:12])
    people = _people()
    pictures = [picture for picture, _ in people]
    found = scorers.identity.embed_faces([*pictures, *map(_recompressed, pictures)])
    seen = sum(bool(one.faces) for one in found)
    yield Finding("faces of drawn people", f"found in {seen} of {counted(len(found), 'picture')}", seen == len(found))
    if seen == len(found):
        vectors = np.stack([one.vectors[0] for one in found])
        cosines = vectors[:PEOPLE] @ vectors[PEOPLE:].T
        same, other = float(np.diag(cosines).min()), float((cosines - 2 * np.eye(PEOPLE)).max())
        words = f"cosine of a picture with its JPEG at least {same:.3f}, with another person at most {other:.3f}"
        yield Finding("identity", words, bool(np.isfinite(cosines).all()) and same > other)
    captions = [caption for _, caption in people]
    table = np.array([scorers.prompt.score(pictures, [caption] * PEOPLE) for caption in captions])
    own, others = float(np.diag(table).mean()), float(table[~np.eye(PEOPLE, dtype=bool)].mean())
    words = f"cosine with a picture's own caption {own:.3f}, with another's {others:.3f}, means"
    yield Finding("prompt", words, bool(np.isfinite(table).all()) and own > others)


def _people() -> list[tuple[Image.Image, str]]:
    """Drawn people, every one in another scene, with their captions: inputs that are the same everywhere."""
    drawn = [render([person(FIRST_PERSON + number)], number, 64) for number in range(PEOPLE)]
    pictures = [Image.fromarray(one.image).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for one in drawn]
    return [(picture, one.caption.text) for picture, one in zip(pictures, drawn, strict=True)]


def _recompressed(picture: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "jpeg", quality=85)
    return Image.open(buffer).convert("RGB")  # noqa: TID251, what this process has just written
