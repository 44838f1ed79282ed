"""The gates the miniature has to pass, measured: `python -m tools.miniature_weights.measure`.

Every picture here is of people that no part was trained on.
"""

import argparse
import logging
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection

from facediffuser.faces import crop_square, face_crop_box
from facediffuser.miniature.captions import looks_phrase
from facediffuser.miniature.looks import SCENES, STYLES, Setting, sample_setting
from facediffuser.miniature.render import Rendering, person, render
from facediffuser.scoring.face_detector import FaceDetector
from facediffuser.scoring.miniature_embedder import load_identity_embedder
from facediffuser.scoring.scorers import load_scorers
from facediffuser.shipped import base_folder, scorers_folder
from tools.miniature_weights.tokenizer import token_ids
from tools.miniature_weights.train_scorers import clip_normalised

logger = logging.getLogger(__name__)

FIRST_PERSON = 60_000_000
REFERENCE_MARGIN = 0.3


def unseen(count: int, people: int = 1, style: str = "photo", size: int = 64, first: int = 0) -> list[Rendering]:
    """Pictures of people who appear once."""
    result = []
    for number in range(first, first + count):
        rng = np.random.default_rng((number, 23))
        setting = Setting(str(rng.choice(list(SCENES))), style)
        who = [person(FIRST_PERSON + 2 * number + place) for place in range(people)]
        result.append(render(who, number, size, setting))
    return result


def pixels(images: Sequence[np.ndarray]) -> torch.Tensor:
    """Pictures (h, w, 3) uint8 as (n, 3, h, w) float32 in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def detection_rate(images: Sequence[np.ndarray], people: int) -> float:
    """The share of pictures in which MTCNN finds exactly `people` faces."""
    found = FaceDetector().detect([Image.fromarray(image) for image in images])
    return float(np.mean([len(faces) == people for faces in found]))


def area_under_curve(embeddings: torch.Tensor, who: torch.Tensor) -> float:
    """How often two pictures of one person are more alike (cosine) than two of different people: 0.5 is chance."""
    unit = F.normalize(embeddings, dim=-1)
    rows, columns = np.triu_indices(len(who), 1)
    cosine, same = (unit @ unit.T)[rows, columns], (who[:, None] == who[None])[rows, columns]
    # The rank-sum form of the area; equal values are too rare among floats to matter.
    ranks = torch.empty(len(cosine), dtype=torch.float64)
    ranks[cosine.argsort()] = torch.arange(1, len(cosine) + 1, dtype=torch.float64)
    positives, negatives = int(same.sum()), int((~same).sum())
    return float((ranks[same].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def measure_renderer(count: int = 400) -> dict[str, float]:
    """Shares of renderings in which MTCNN finds exactly the people in them."""
    rates = {f"renderer, {style}": detection_rate([r.image for r in unseen(count, style=style)], 1) for style in STYLES}
    rates["renderer, photo of two"] = detection_rate([r.image for r in unseen(count, 2, first=10**6)], 2)
    return rates


@torch.no_grad()
def measure_vae(count: int = 200) -> dict[str, float]:
    """PSNR in dB and MTCNN's rate of pictures encoded and decoded."""
    vae = AutoencoderKL.from_pretrained(base_folder() / "vae").float().eval()
    images = pixels([drawn.image for drawn in unseen(count)])
    latents = [vae.encode(some).latent_dist.mean for some in images.split(50)]
    decoded = torch.cat([vae.decode(some).sample.clamp(-1, 1) for some in latents])
    psnr = float(-10 * torch.log10(F.mse_loss(decoded / 2, images / 2)))
    arrays = ((decoded.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
    return {"VAE, PSNR dB": psnr, "VAE, photo": detection_rate(arrays, 1)}


def measure_base(count: int = 64, steps: int = 25, guidance: float = 2.5) -> dict[str, float]:
    """Of pictures sampled from captions that tell the looks: MTCNN's rate, the image-text scorer's recall, likeness."""
    pipe = StableDiffusionPipeline.from_pretrained(
        base_folder(), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe = pipe.to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    drawn = unseen(count, first=2 * 10**6)
    captions = [
        f"a photo of a {who.class_word}{looks_phrase(who)} on the beach" for (who,) in (d.people for d in drawn)
    ]
    images: list[np.ndarray] = []
    for start in range(0, count, 16):
        made = pipe(
            captions[start : start + 16],
            height=64,
            width=64,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(start),
        ).images
        images += [np.asarray(image) for image in made]
    rate = detection_rate(images, 1)
    likeness = caption_similarity([one.image for one in drawn], images)
    return {"base, photo": rate, f"base, caption first of {count}": caption_recall(images, captions)} | likeness


def caption_similarity(photographs: Sequence[np.ndarray], images: Sequence[np.ndarray]) -> dict[str, float]:
    """The identity scorer's cosine of each image to the person whose looks its prompt describes, and to the next one; 0 for no face."""
    scorer = load_scorers("miniature", "cpu").identity

    def vectors(pictures: Sequence[np.ndarray]) -> torch.Tensor:
        found = scorer.embed_faces([Image.fromarray(picture) for picture in pictures])
        width = next(len(one.vectors[0]) for one in found if len(one.vectors))
        return torch.stack(
            [torch.as_tensor(one.vectors[0]) if len(one.vectors) else torch.zeros(width) for one in found]
        )

    ours, theirs = F.normalize(vectors(images), dim=-1), F.normalize(vectors(photographs), dim=-1)
    own, other = (ours * theirs).sum(-1).mean(), (ours * theirs.roll(1, 0)).sum(-1).mean()
    return {"base, IP to the person told": float(own), "base, IP to another person": float(other)}


@torch.no_grad()
def caption_recall(images: Sequence[np.ndarray], captions: list[str]) -> float:
    """The share of pictures whose own caption the image-text scorer puts first among all."""
    folder = scorers_folder() / "prompt"
    model = CLIPModel.from_pretrained(folder).float().eval()
    pictures = model.visual_projection(model.vision_model(clip_normalised(pixels(images))).pooler_output)
    ids = token_ids(CLIPTokenizer.from_pretrained(folder), captions)
    texts = model.text_projection(model.text_model(ids).pooler_output)
    best = (F.normalize(pictures, dim=-1) @ F.normalize(texts, dim=-1).T).argmax(1)
    return float(np.mean([captions[place] == caption for place, caption in zip(best.tolist(), captions, strict=True)]))


def face_crops(drawn: Sequence[Rendering], margin: float) -> tuple[torch.Tensor, list[int]]:
    """Square crops (k, 3, 64, 64) around MTCNN's first face, as scoring and generation take them, and whose they are.

    Pictures without a found face are left out; the list holds the places of the others.
    """
    images = [Image.fromarray(one.image) for one in drawn]
    crops, kept = [], []
    for place, (image, faces) in enumerate(zip(images, FaceDetector().detect(images), strict=True)):
        if faces:
            square = crop_square(image, face_crop_box(faces[0].box, margin))
            crops.append(np.asarray(square.resize((64, 64), Image.Resampling.BILINEAR)))
            kept.append(place)
    return pixels(crops), kept


@torch.no_grad()
def measure_recognition(people: int = 150, takes: int = 4) -> dict[str, float]:
    """AUC of the identity scorer (tight crops) and of the image encoder (crops as for the SDM), and caption recall."""
    drawn, who = [], []
    for number in range(people):
        for take in range(takes):
            setting = sample_setting(np.random.default_rng((number, take, 29)), photo_share=1.0)
            drawn.append(render([person(FIRST_PERSON + 5 * 10**6 + number)], takes * number + take, setting=setting))
            who.append(number)
    scorer = load_identity_embedder(scorers_folder() / "identity")
    encoder = CLIPVisionModelWithProjection.from_pretrained(base_folder() / "image_encoder").float().eval()
    numbers, result = torch.tensor(who), {}
    crops, kept = face_crops(drawn, 0.0)
    result["identity scorer, AUC"] = area_under_curve(scorer(crops), numbers[kept])
    crops, kept = face_crops(drawn, REFERENCE_MARGIN)
    result["image encoder, AUC"] = area_under_curve(encoder(clip_normalised(crops)).image_embeds, numbers[kept])
    first = drawn[::takes][:100]
    recall = caption_recall([one.image for one in first], [one.full_caption.text for one in first])
    return result | {"prompt scorer, caption first of 100": recall}


MEASURES = {
    "renderer": measure_renderer,
    "vae": measure_vae,
    "recognition": measure_recognition,
    "base": measure_base,
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.miniature_weights.measure", description=__doc__)
    parser.add_argument("what", nargs="*", metavar="PART", help=f"any of {', '.join(MEASURES)} (default: all)")
    asked = parser.parse_args().what or list(MEASURES)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in asked:
        if name not in MEASURES:
            parser.error(f"{name}: no such part; choose from {', '.join(MEASURES)}")
        for title, value in MEASURES[name]().items():
            logger.info("%-40s %.3f", title, value)


if __name__ == "__main__":
    main()
