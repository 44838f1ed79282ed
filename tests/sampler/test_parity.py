"""The pipeline gives what the method's formulas give, written down on their own in `plain_sampler`."""

import pytest
import torch
from sampler import plain_sampler
from sampler.conftest import scheduler

from facediffuser.pipeline import FaceDiffuserPipeline

ONE = "a man <|image|> reading a book"
TWO = "a man <|image|> and a woman <|image|> in the park"


def noise(seed: int, images: int = 1, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.randn(images, 4, height, width, generator=torch.Generator().manual_seed(seed))


def latents_of(parts, schedule: str, **arguments) -> torch.Tensor:
    pipe = FaceDiffuserPipeline(**parts, scheduler=scheduler(schedule))
    pipe.set_progress_bar_config(disable=True)
    return pipe(**arguments, output_type="latent").images


@torch.no_grad()
@pytest.mark.parametrize("prompt", [ONE, TWO, "a red horse"])
def test_embeddings_agree_to_one_in_a_hundred_thousand(pipeline, parts, picture, prompt):
    images = [picture(seed, (40 + 9 * seed, 40)) for seed in range(prompt.count("<|image|>"))]
    ids, _ = plain_sampler.tokenize(parts["tokenizer"], prompt)
    assert (pipeline.encode_prompt(prompt)[0] - plain_sampler.embed_text(parts, ids)).abs().max() < 1e-5
    embeds = pipeline.encode_references(images) if images else torch.zeros(0, 32)
    for embed, image in zip(embeds, images, strict=True):
        assert (embed - plain_sampler.embed_image(parts, image)).abs().max() < 1e-5
    expected = plain_sampler.embed_subjects(parts, prompt, images)
    assert (pipeline.fuse(prompt, [embeds])[0] - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("schedule", "prompt", "steps", "scale", "start", "end"),
    [
        ("pndm", ONE, 50, 5.0, 16, 31),
        ("ddim", TWO, 20, 5.0, 6, 12),
        ("pndm", TWO, 12, 7.5, 0, 8),
        ("ddim", ONE, 12, 2.0, 0, 12),
        ("pndm", ONE, 12, 5.0, 6, 6),
        ("ddim", TWO, 12, 5.0, 5, 5),
        ("pndm", TWO, 12, 5.0, 13, 13),
        ("ddim", ONE, 12, 1.0, 3, 20),
        ("pndm", ONE, 12, 5.0, 0, 0),
    ],
)
def test_final_latents_agree_to_one_in_a_thousand(parts, picture, schedule, prompt, steps, scale, start, end):
    images = [picture(seed, (33, 47)) for seed in range(prompt.count("<|image|>"))]
    expected, masks = plain_sampler.sample(
        parts, scheduler(schedule), prompt, images, noise(7)[0], steps, scale, start, end
    )
    ours = latents_of(
        parts, schedule, prompt=prompt, reference_images=images, latents=noise(7), num_inference_steps=steps,
        guidance_scale=scale, fusion_start=start, fusion_end=end,
    )  # fmt: skip
    timesteps = steps + (schedule == "pndm")
    assert len(masks) == max(0, min(end, timesteps) - start)
    # A random model's masks must be no foregone conclusion, or the fusion would not be tested.
    assert all(0 < mask.mean() < 1 for mask in masks)
    assert (ours[0] - expected).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("method", "alpha", "plain_steps"),
    [("tdm", 0.5, 0), ("sdm", 0.5, 0), ("fastcomposer", 0.5, 5), ("fastcomposer", 0.7, 3), ("fastcomposer", 1.0, 0)],
)
def test_the_other_methods_agree(parts, picture, method, alpha, plain_steps):
    images = [picture(1), picture(2)]
    expected, _ = plain_sampler.sample(
        parts, scheduler("pndm"), TWO, images, noise(3)[0], 10, 5.0, 0, 0, method=method, plain_steps=plain_steps
    )
    ours = latents_of(
        parts, "pndm", prompt=TWO, reference_images=images, latents=noise(3), num_inference_steps=10, method=method,
        alpha=alpha,
    )  # fmt: skip
    assert (ours[0] - expected).abs().max() < 1e-3


def test_a_batch_with_one_two_and_no_subjects_on_oblong_latents_agrees_image_by_image(parts, picture):
    prompts = [ONE, TWO, "a red horse"]
    references = [[picture(1)], [picture(2), picture(3)], []]
    start = noise(5, 3, 12, 20)
    ours = latents_of(
        parts, "ddim", prompt=prompts, reference_images=references, latents=start, num_inference_steps=8,
        fusion_start=2, fusion_end=6,
    )  # fmt: skip
    for prompt, images, begin, end in zip(prompts, references, start, ours, strict=True):
        expected, _ = plain_sampler.sample(parts, scheduler("ddim"), prompt, images, begin, 8, 5.0, 2, 6)
        assert (end - expected).abs().max() < 1e-3


def test_ddim_itself_is_the_published_update(parts, picture):
    """One DDIM run against x_prev = sqrt(a') x0 + sqrt(1 - a') eps, so that the scheduler's use is checked as well."""
    ddim = scheduler("ddim")
    ddim.set_timesteps(10)
    latents = noise(9)
    text = plain_sampler.embed_text(parts, plain_sampler.tokenize(parts["tokenizer"], "a man")[0])
    null = plain_sampler.embed_text(parts, plain_sampler.tokenize(parts["tokenizer"], "")[0])
    with torch.no_grad():
        for t in ddim.timesteps:
            base = parts["unet_text"](latents, t, encoder_hidden_states=null[None]).sample
            eps = base + 5 * (parts["unet_text"](latents, t, encoder_hidden_states=text[None]).sample - base)
            now, before = ddim.alphas_cumprod[t], ddim.alphas_cumprod[max(int(t) - 100, 0)]
            clean = (latents - (1 - now).sqrt() * eps) / now.sqrt()
            latents = before.sqrt() * clean + (1 - before).sqrt() * eps
    ours = latents_of(parts, "ddim", prompt="a man", latents=noise(9), num_inference_steps=10, method="tdm")
    assert (ours - latents).abs().max() < 1e-3
