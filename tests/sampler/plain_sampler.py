"""The whole sampler written down from the method's formulas: one image at a time, loops, nothing of the library's code.

Only the networks, the tokenizer with the marker as an added token, and the scheduler's own step are called.
"""

import copy

import numpy as np
import torch

MARKER = "<|image|>"
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


def tokenize(tokenizer, prompt: str) -> tuple[list[int], list[int]]:
    """77 ids without the marker's, and the place of the token before each marker."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([MARKER], special_tokens=True)
    marker = tokenizer.convert_tokens_to_ids(MARKER)
    ids, places = [], []
    for token in tokenizer.encode(prompt):
        if token == marker:
            places.append(len(ids) - 1)
        else:
            ids.append(token)
    return ids + [tokenizer.pad_token_id] * (77 - len(ids)), places


def embed_text(parts, ids: list[int]) -> torch.Tensor:
    return parts["text_encoder"](torch.tensor([ids])).last_hidden_state[0]


def interpolation(old: int, new: int) -> torch.Tensor:
    """The (new, old) matrix of linear interpolation with antialiasing: triangles as wide as the larger of two cells."""
    width = max(1.0, old / new)
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for out in range(new):
        centre = (out + 0.5) * old / new
        for i in range(old):
            matrix[out, i] = max(0.0, 1 - abs(i + 0.5 - centre) / width)
        matrix[out] /= matrix[out].sum()
    return matrix


def embed_image(parts, image) -> torch.Tensor:
    side = parts["image_encoder"].config.image_size
    pixels = torch.tensor(np.asarray(image), dtype=torch.float64).permute(2, 0, 1) / 255
    rows, columns = interpolation(pixels.shape[1], side), interpolation(pixels.shape[2], side)
    resized = torch.stack([rows @ channel @ columns.T for channel in pixels]).float()
    normal = torch.stack([(resized[c] - MEAN[c]) / STD[c] for c in range(3)])
    tower = parts["image_encoder"]
    return tower.visual_projection(tower.vision_model(normal[None]).pooler_output)[0]


def norm(x: torch.Tensor, layer) -> torch.Tensor:
    centred = x - x.mean()
    return centred / torch.sqrt((centred**2).mean() + 1e-5) * layer.weight + layer.bias


def mlp(x: torch.Tensor, block) -> torch.Tensor:
    hidden = block.fc1.weight @ norm(x, block.layernorm) + block.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return block.fc2.weight @ hidden + block.fc2.bias


def embed_subjects(parts, prompt: str, images) -> torch.Tensor:
    """The text embedding with each marked token fused with its image's embedding."""
    fuser = parts["subject_fuser"]
    ids, places = tokenize(parts["tokenizer"], prompt)
    embedding = embed_text(parts, ids).clone()
    for place, image in zip(places, images, strict=True):
        text = embedding[place].clone()
        x = mlp(torch.cat([text, embed_image(parts, image)]), fuser.mlp1) + text
        x = x + mlp(x, fuser.mlp2)
        embedding[place] = norm(x, fuser.layer_norm)
    return embedding


def omega(response: torch.Tensor) -> torch.Tensor:
    """Saliency (h, w) of a response (c, h, w)."""
    channels, height, width = response.shape
    padded = torch.zeros(channels, height + 2, width + 2)
    padded[:, 1:-1, 1:-1] = response.abs()
    pooled = sum(padded[:, y : y + height - 1, x : x + width - 1] for y in range(4) for x in range(4)) / 16
    rows, columns = interpolation(height - 1, height).float(), interpolation(width - 1, width).float()
    energy = torch.stack([rows @ channel @ columns.T for channel in pooled]).mean(dim=0)
    weight = torch.exp(energy - energy.max())
    return weight / weight.sum()


@torch.no_grad()
def sample(
    parts,
    scheduler,
    prompt,
    images,
    noise,
    steps,
    scale,
    start,
    end,
    method="face-diffuser",
    plain_steps=0,
    kwargs=None,
):
    """Final latents (c, h, w) of one image, and the mask of each fused step; `plain_steps` are FastComposer's first."""
    null = embed_text(parts, tokenize(parts["tokenizer"], "")[0])
    text = embed_text(parts, tokenize(parts["tokenizer"], prompt)[0])
    subject = embed_subjects(parts, prompt, images)
    scheduler.set_timesteps(steps)
    latents = noise * scheduler.init_noise_sigma
    masks = []
    for i, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(latents[None], t)

        def e(model, condition, scaled=scaled, t=t):
            return parts[model](scaled, t, encoder_hidden_states=condition[None]).sample[0]

        if method == "fastcomposer":
            condition = text if i < plain_steps else subject
            base = e("unet", null)
            eps = base + scale * (e("unet", condition) - base)
        elif method == "tdm" or (method == "face-diffuser" and i < start):
            base = e("unet_text", null)
            eps = base + scale * (e("unet_text", text) - base)
        elif method == "sdm" or i >= end:
            base = e("unet", text)
            eps = base + scale * (e("unet", subject) - base)
        else:
            base_t, base_s = e("unet_text", null), e("unet", text)
            r_t = scale * (e("unet_text", text) - base_t)
            r_s = scale * (e("unet", subject) - base_s)
            m = (omega(r_s) > omega(r_t)).float()
            masks.append(m)
            eps = m * (base_s + r_s) + (1 - m) * (base_t + r_t)
        latents = scheduler.step(eps[None], t, latents[None], **(kwargs or {})).prev_sample[0]
    return latents, masks
