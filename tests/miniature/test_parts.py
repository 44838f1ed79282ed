"""The shipped parts: complete, small, and good enough to judge by."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection

from facediffuser import shipped as parts
from facediffuser.errors import InputError
from facediffuser.miniature.render import Rendering
from facediffuser.scoring.face_detector import FaceDetector
from facediffuser.scoring.miniature_embedder import load_identity_embedder
from facediffuser.shipped import base_folder, models_folder, scorers_folder
from tools.miniature_weights.tokenizer import token_ids
from tools.miniature_weights.train_scorers import clip_normalised

BASE = {"unet", "vae", "text_encoder", "tokenizer", "scheduler", "image_encoder"}
MEGABYTE = 2**20


def _pixels(drawn: list[Rendering]) -> torch.Tensor:
    images = np.stack([one.image for one in drawn])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def _face_crops(drawn: list[Rendering], margin: float) -> torch.Tensor:
    crops = []
    for one in drawn:
        x1, y1, x2, y2 = one.face_boxes[0]
        half = max(x2 - x1, y2 - y1) * (1 + margin) / 2
        centre_x, centre_y = (x1 + x2) / 2, (y1 + y2) / 2
        box = (centre_x - half, centre_y - half, centre_x + half, centre_y + half)
        crop = Image.fromarray(one.image).transform((64, 64), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)
        crops.append(np.asarray(crop))
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _auc(embeddings: torch.Tensor, who: torch.Tensor) -> float:
    """The share of (same person, other people) pairs of pairs that the cosine puts in the right order."""
    cosine = (F.normalize(embeddings, dim=-1) @ F.normalize(embeddings, dim=-1).T)[*np.triu_indices(len(who), 1)]
    same = (who[:, None] == who[None])[*np.triu_indices(len(who), 1)]
    return float((cosine[same][:, None] > cosine[~same][None]).float().mean())


def test_all_parts_are_there_and_under_forty_megabytes():
    assert {path.name for path in base_folder().iterdir()} >= BASE
    assert {path.name for path in models_folder().iterdir()} >= BASE | {"unet_text", "subject_fuser"}
    files = [path for path in parts.WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 40 * MEGABYTE
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]


def test_a_missing_part_is_named_with_the_command_that_makes_it(monkeypatch, tmp_path):
    monkeypatch.setattr(parts, "WEIGHTS", tmp_path)
    with pytest.raises(InputError, match="tools.miniature_weights.make"):
        parts.base_folder()


def test_the_autoencoder_keeps_pictures_and_faces(photos: list[Rendering]):
    vae = AutoencoderKL.from_pretrained(base_folder() / "vae").float().eval()
    pixels = _pixels(photos)
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean
        decoded = vae.decode(latents).sample.clamp(-1, 1)
    psnr = -10 * torch.log10(F.mse_loss(decoded / 2, pixels / 2))
    assert psnr > 30
    assert latents.shape[1:] == (8, 16, 16) and vae.config.scaling_factor == 1.0
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.25 and (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.25
    images = ((decoded.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
    found = FaceDetector().detect([Image.fromarray(image) for image in images])
    right = [len(faces) == len(one.people) for faces, one in zip(found, photos, strict=True)]
    assert np.mean(right) >= 0.9


def test_the_base_predicts_noise_better_with_the_right_caption(photos: list[Rendering]):
    from diffusers import DDPMScheduler
    from transformers import CLIPTextModel

    base = base_folder()
    vae = AutoencoderKL.from_pretrained(base / "vae").float().eval()
    unet = UNet2DConditionModel.from_pretrained(base / "unet").float().eval()
    encoder = CLIPTextModel.from_pretrained(base / "text_encoder").float().eval()
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    schedule = DDPMScheduler.from_pretrained(base / "scheduler")
    single = [one for one in photos if len(one.people) == 1][:24]
    texts = [one.full_caption.text for one in single]
    torch.manual_seed(0)
    with torch.no_grad():
        latents = vae.encode(_pixels(single)).latent_dist.mean
        noise, times = torch.randn_like(latents), torch.full((len(single),), 700)
        noisy = schedule.add_noise(latents, noise, times)
        errors = []
        for said in (texts, texts[1:] + texts[:1]):
            states = encoder(token_ids(tokenizer, said)).last_hidden_state
            errors.append((unet(noisy, times, states).sample - noise).pow(2).mean(dim=(1, 2, 3)))
    assert errors[0].mean() < 0.2
    assert (errors[0] < errors[1]).float().mean() > 0.8


def test_the_identity_scorer_distinguishes_unseen_people(portraits: list[list[Rendering]]):
    embedder = load_identity_embedder(scorers_folder() / "identity")
    who = torch.arange(len(portraits)).repeat_interleave(3)
    with torch.no_grad():
        embeddings = embedder(_face_crops([one for takes in portraits for one in takes], margin=0.0))
    assert torch.allclose(embeddings.norm(dim=-1), torch.ones(len(who)), atol=1e-4)
    assert _auc(embeddings, who) > 0.98


def test_the_image_encoder_distinguishes_unseen_people(portraits: list[list[Rendering]]):
    encoder = CLIPVisionModelWithProjection.from_pretrained(base_folder() / "image_encoder").float().eval()
    assert encoder.config.projection_dim == 96
    who = torch.arange(len(portraits)).repeat_interleave(3)
    with torch.no_grad():
        crops = clip_normalised(_face_crops([one for takes in portraits for one in takes], margin=0.5))
        embeddings = encoder(crops).image_embeds
    assert _auc(embeddings, who) > 0.95


def test_the_prompt_scorer_finds_the_caption_of_a_picture(photos: list[Rendering]):
    folder = scorers_folder() / "prompt"
    model = CLIPModel.from_pretrained(folder).float().eval()
    ids = token_ids(CLIPTokenizer.from_pretrained(folder), [one.full_caption.text for one in photos])
    with torch.no_grad():
        pictures = model.visual_projection(model.vision_model(clip_normalised(_pixels(photos))).pooler_output)
        texts = model.text_projection(model.text_model(ids).pooler_output)
    cosine = F.normalize(pictures, dim=-1) @ F.normalize(texts, dim=-1).T
    best = cosine.argmax(1)
    assert (best == torch.arange(len(photos))).float().mean() > 0.9


def test_scorers_share_no_people_and_no_weights_with_the_models():
    from safetensors.torch import load_file

    from facediffuser.miniature.render import SET_PEOPLE, SUBJECT_PEOPLE
    from tools.miniature_weights.make import MODEL_PEOPLE, MODEL_PICTURES, SCORER_PEOPLE, SCORER_PICTURES

    assert MODEL_PEOPLE + MODEL_PICTURES <= SCORER_PEOPLE
    assert SCORER_PEOPLE + SCORER_PICTURES <= SET_PEOPLE < SUBJECT_PEOPLE
    towers = load_file(base_folder() / "image_encoder" / "model.safetensors")
    scorer = load_file(scorers_folder() / "prompt" / "model.safetensors")
    for name, value in towers.items():
        twin = scorer.get(name)
        if twin is not None and twin.shape == value.shape and value.std() > 0:
            assert not torch.equal(twin, value), name
