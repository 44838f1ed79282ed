"""Training of the miniature's scorers and CLIP towers: telling people apart, and matching pictures with texts.

The scorers see other people than the models do and share no weights with them.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from facediffuser.pictures import CLIP_MEAN, CLIP_STD
from facediffuser.scoring.miniature_embedder import IdentityEmbedder
from tools.miniature_weights.base import WIDTH, new_text_encoder
from tools.miniature_weights.fitting import Average, fit, with_plain_attention
from tools.miniature_weights.photo_stream import PhotoSet
from tools.miniature_weights.tokenizer import MAX_LENGTH, token_ids

MARGIN, SCALE = 0.2, 24.0


class MarginSoftmax(nn.Module):
    """Cosine softmax over known people with an additive margin (CosFace, arXiv 1801.09414)."""

    def __init__(self, dim: int, people: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(people, dim) / math.sqrt(dim))

    def forward(self, embeddings: torch.Tensor, people: torch.Tensor) -> torch.Tensor:
        cosine = F.normalize(embeddings, dim=-1) @ F.normalize(self.weight, dim=-1).T
        target = F.one_hot(people, len(self.weight)).to(cosine.dtype) * MARGIN
        return F.cross_entropy(SCALE * (cosine - target), people)


def train_identity_embedder(photos: PhotoSet, steps: int, batch_size: int = 128, seed: int = 0) -> IdentityEmbedder:
    """Train on jittered tight face crops of people pictured several times; return the averaged network."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = IdentityEmbedder().train()
    head = MarginSoftmax(model.config["dim"], photos.people)
    average = Average(model, 0.998)

    def loss(step: int) -> torch.Tensor:
        crops, people = photos.face_crops(batch_size, margin=0.0, side=64, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = model(degrade(crops, generator))
        return head(embeddings.float(), people)

    fit(
        "identity",
        loss,
        [*model.parameters(), *head.parameters()],
        steps,
        2e-3,
        1e-3,
        after_step=lambda step: average.update(model),
    )
    return average.module


def train_clip(
    photos: PhotoSet, tokenizer: CLIPTokenizer, steps: int, batch_size: int = 80, seed: int = 0
) -> tuple[CLIPTextModel, CLIPVisionModelWithProjection]:
    """Train the base's text encoder and the SDM's image encoder on each other, as CLIP's towers serve Stable Diffusion.

    Half of a step are pictures and their captions, half face crops with hair and the words for the person; crops also tell
    people apart. Return the averages of both towers.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        projection_dim=WIDTH,
    )
    vision = with_plain_attention(CLIPVisionModelWithProjection(config)).train()
    text = with_plain_attention(new_text_encoder(tokenizer)).train()
    head = MarginSoftmax(WIDTH, photos.people)
    scales = nn.Parameter(torch.tensor([2.5, 2.5]))
    averages = Average(text, 0.998), Average(vision, 0.998)
    captions = torch.stack([token_ids(tokenizer, texts) for texts in (photos.captions, photos.full_captions)], 1)
    words = token_ids(tokenizer, photos.identity_texts)

    def loss(step: int) -> torch.Tensor:
        index = torch.randint(len(photos), (batch_size,), generator=generator)
        full = int(torch.rand(1, generator=generator) < 0.7)
        crops, people = photos.face_crops(batch_size, margin=0.5, side=64, generator=generator)
        pixels = degrade(torch.cat([photos.pixels(index), crops]), generator)
        ids = torch.cat([captions[index, full], words[people]])
        with torch.autocast("cpu", torch.bfloat16):
            pictures = vision(clip_normalised(pixels)).image_embeds
            texts = text(ids).pooler_output
        matched = sum(
            contrast(picture.float(), caption.float(), (mine[:, None] == mine[None]).all(-1), scale)
            for picture, caption, mine, scale in zip(
                pictures.split(batch_size), texts.split(batch_size), ids.split(batch_size), scales, strict=True
            )
        )
        return matched + head(pictures[batch_size:].float(), people)

    def after_step(step: int) -> None:
        averages[0].update(text)
        averages[1].update(vision)

    parameters = [*vision.parameters(), *text.parameters(), *head.parameters(), scales]
    fit("clip", loss, parameters, steps, 1e-3, 1e-2, after_step=after_step)
    return averages[0].module, averages[1].module


def train_prompt_scorer(
    photos: PhotoSet, tokenizer: CLIPTokenizer, steps: int, batch_size: int = 192, seed: int = 0
) -> CLIPModel:
    """Train a small CLIP on whole pictures and captions, half of them without the words for the person's looks."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = CLIPModel(
        CLIPConfig(
            text_config=dict(
                vocab_size=len(tokenizer),
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=MAX_LENGTH,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            ),
            vision_config=dict(
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=4,
                num_attention_heads=4,
                image_size=64,
                patch_size=8,
            ),
            projection_dim=128,
        )
    )
    model = with_plain_attention(model).train()
    average = Average(model, 0.998)
    ids = torch.stack([token_ids(tokenizer, texts) for texts in (photos.captions, photos.full_captions)], 1)

    def loss(step: int) -> torch.Tensor:
        index = torch.randint(len(photos), (batch_size,), generator=generator)
        full = int(torch.rand(1, generator=generator) < 0.3)
        pixels = degrade(photos.pixels(index), generator)
        mine = ids[index, full]
        with torch.autocast("cpu", torch.bfloat16):
            pictures = model.visual_projection(model.vision_model(clip_normalised(pixels)).pooler_output)
            texts = model.text_projection(model.text_model(mine).pooler_output)
        same = (mine[:, None] == mine[None]).all(-1)
        return contrast(pictures.float(), texts.float(), same, model.logit_scale)

    fit("prompt", loss, model.parameters(), steps, 1e-3, 1e-2, after_step=lambda step: average.update(model))
    return average.module


def contrast(pictures: torch.Tensor, texts: torch.Tensor, same: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric loss for (n, d) pairs; equal texts (n, n) bool in a batch share the target evenly."""
    logits = F.normalize(pictures, dim=-1) @ F.normalize(texts, dim=-1).T * log_scale.exp().clamp(max=100)
    target = same.float() / same.float().sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def degrade(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blur, dim, tint and add noise to pictures (n, 3, h, w) a little, a different amount each, as sampling and decoding do."""
    count = len(pixels)
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.rand(count, 1, 1, 1, generator=generator) * (torch.rand(count, 1, 1, 1, generator=generator) < 0.6)
    light = 1 + 0.15 * torch.randn(count, 1, 1, 1, generator=generator)
    tint = 0.06 * torch.randn(count, 3, 1, 1, generator=generator)
    grain = 0.04 * torch.randn(pixels.shape, generator=generator)
    return ((pixels + share * (blurred - pixels)) * light + tint + grain).clamp(-1, 1)


def clip_normalised(pixels: torch.Tensor) -> torch.Tensor:
    """Pictures in [-1, 1] with CLIP's mean and deviation per channel."""
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return ((pixels + 1) / 2 - mean) / deviation
