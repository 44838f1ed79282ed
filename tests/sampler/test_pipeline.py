"""What FaceDiffuserPipeline promises besides its numbers: passes, batches, seeds, callbacks, folders, refusals."""

import copy
import logging
import math
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from PIL import Image
from sampler.conftest import SCHEDULE, scheduler

import facediffuser
from facediffuser.errors import InputError
from facediffuser.pipeline import FaceDiffuserPipeline
from facediffuser.stages import Stage, plan_stages
from facediffuser.window import default_fusion_window

ONE = "a man <|image|> reading a book"
TWO = "a man <|image|> and a woman <|image|> in the park"
SHORT = {"num_inference_steps": 4, "fusion_start": 1, "fusion_end": 3}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def rows(parts):
    """Rows each UNet is called with, one entry per call, as (name, rows)."""
    calls = []
    hooks = [
        parts[name].register_forward_pre_hook(
            lambda module, args, kwargs, name=name: calls.append((name, len(args[0]))), with_kwargs=True
        )
        for name in ("unet", "unet_text")
    ]
    yield calls
    for hook in hooks:
        hook.remove()


# --- stages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "start", "end", "expected"),
    [
        ("face-diffuser", 2, 4, "text text fusion fusion subject subject"),
        ("face-diffuser", 0, 3, "fusion fusion fusion subject subject subject"),
        ("face-diffuser", 3, 3, "text text text subject subject subject"),
        ("face-diffuser", 3, 1, "text text text subject subject subject"),
        ("face-diffuser", 6, 6, "text text text text text text"),
        ("tdm", 2, 4, "text text text text text text"),
        ("sdm", 2, 4, "subject subject subject subject subject subject"),
        ("fastcomposer", 2, 4, "delay delay delayed delayed delayed delayed"),
    ],
)
def test_stages_by_step(method, start, end, expected):
    assert [str(stage) for stage in plan_stages(method, 6, 5, start, end, alpha=0.6)] == expected.split()


def test_fastcomposers_delay_does_not_hang_on_rounding():
    assert plan_stages("fastcomposer", 50, 50, 0, 0, alpha=0.7).count(Stage.DELAY) == 15


def test_the_default_window_is_the_released_one():
    assert default_fusion_window(50) == (16, 31)
    assert default_fusion_window(10) == (3, 6)


def test_each_stage_runs_only_the_passes_it_needs(pipeline, picture, rows):
    pipeline(ONE, [picture(0)], **SHORT, output_type="latent")
    # PNDM: 5 timesteps for 4 steps: one of the TDM's, two fused, two of the SDM's.
    assert rows == [
        ("unet_text", 2),
        ("unet_text", 2),
        ("unet", 2),
        ("unet_text", 2),
        ("unet", 2),
        ("unet", 2),
        ("unet", 2),
    ]


@pytest.mark.parametrize(
    ("method", "reads"), [("face-diffuser", True), ("tdm", True), ("fastcomposer", True), ("sdm", False)]
)
def test_a_negative_prompt_guides_what_is_guided_from_the_null_text(pipeline, picture, method, reads):
    how = {**SHORT, "method": method, "output_type": "latent"}
    plain, negative, embedded = (
        pipeline(ONE, [picture(0)], generator=seeded(1), **how, **null).images
        for null in ({}, {"negative_prompt": "a hat"}, {"negative_prompt_embeds": pipeline.encode_prompt("a hat")})
    )
    assert torch.equal(negative, embedded)
    assert torch.equal(plain, negative) != reads


@pytest.mark.parametrize(
    ("method", "expected"),
    [("tdm", {"unet_text": 5}), ("sdm", {"unet": 5}), ("fastcomposer", {"unet": 5})],
)
def test_each_method_runs_only_its_own_model(pipeline, picture, rows, method, expected):
    pipeline([ONE, ONE], [[picture(0)], [picture(1)]], num_inference_steps=4, method=method, output_type="latent")
    assert Counter(name for name, _ in rows) == expected
    assert {count for _, count in rows} == {4}


def test_a_method_needs_only_its_own_components(parts, picture):
    text_only = FaceDiffuserPipeline(
        **{name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "unet_text")}, scheduler=scheduler()
    )
    assert text_only(ONE, num_inference_steps=2, method="tdm", output_type="latent").images.shape == (1, 4, 16, 16)
    with pytest.raises(InputError, match="unet: this pipeline has none"):
        text_only(ONE, [picture(0)], num_inference_steps=2, method="sdm")
    subject_only = FaceDiffuserPipeline(**{k: v for k, v in parts.items() if k != "unet_text"}, scheduler=scheduler())
    subject_only(ONE, [picture(0)], num_inference_steps=2, method="fastcomposer", output_type="latent")
    with pytest.raises(InputError, match="unet_text: this pipeline has none"):
        subject_only(ONE, [picture(0)], num_inference_steps=2)


# --- batches and seeds ------------------------------------------------------------------------------------------------


def test_a_batch_of_prompts_gives_what_each_gives_alone(pipeline, picture):
    prompts, references = [ONE, TWO, "a red horse"], [[picture(0)], [picture(1), picture(2)], []]
    together = pipeline(prompts, references, **SHORT, generator=[seeded(i) for i in range(3)], output_type="latent")
    for i, (prompt, images) in enumerate(zip(prompts, references, strict=True)):
        alone = pipeline(prompt, images, **SHORT, generator=[seeded(i)], output_type="latent")
        assert torch.allclose(together.images[i], alone.images[0], atol=1e-3)
        assert math.isclose(together.subject_fraction[i], alone.subject_fraction[0], abs_tol=1e-6)


def test_images_of_one_prompt_repeat_its_conditions(pipeline, picture):
    arguments = {**SHORT, "output_type": "latent"}
    twice = pipeline(
        [ONE, TWO], [[picture(0)], [picture(1), picture(2)]], num_images_per_prompt=2,
        generator=[seeded(i) for i in range(4)], **arguments,
    ).images  # fmt: skip
    last = pipeline(TWO, [picture(1), picture(2)], generator=seeded(3), **arguments).images
    assert torch.allclose(twice[3], last[0], atol=1e-3)


def test_the_same_seed_gives_the_same_image_and_another_seed_another(pipeline, picture):
    def image(seed):
        return pipeline(ONE, [picture(0)], **SHORT, generator=seeded(seed), output_type="latent").images

    assert torch.equal(image(1), image(1))
    assert not torch.allclose(image(1), image(2))


def test_given_latents_are_the_noise_the_generator_would_have_drawn(pipeline, picture):
    noise = torch.randn(1, 4, 16, 16, generator=seeded(5))
    drawn = pipeline(ONE, [picture(0)], **SHORT, generator=seeded(5), output_type="latent").images
    given = pipeline(ONE, [picture(0)], **SHORT, latents=noise, output_type="latent").images
    assert torch.equal(drawn, given)


def test_embeddings_made_once_give_the_same_image(pipeline, picture):
    arguments = {**SHORT, "output_type": "latent"}
    text = pipeline.encode_prompt(ONE)
    fused = pipeline.fuse(ONE, [pipeline.encode_references([picture(0)])], prompt_embeds=text)
    made = pipeline(
        prompt_embeds=text, subject_prompt_embeds=fused, negative_prompt_embeds=pipeline.encode_prompt(""),
        generator=seeded(0), **arguments,
    ).images  # fmt: skip
    assert torch.equal(made, pipeline(ONE, [picture(0)], generator=seeded(0), **arguments).images)


def test_two_equal_models_without_a_subject_are_one_model(parts):
    """Fusing a model with itself changes nothing, here over whole runs: with no subject the SDM has no response."""
    pipe = FaceDiffuserPipeline(**{**parts, "unet": parts["unet_text"]}, scheduler=scheduler("ddim"))
    arguments = {"generator": seeded(0), "num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent"}
    fused = pipe("a red horse", fusion_start=0, fusion_end=4, **arguments).images
    alone = pipe("a red horse", method="tdm", **arguments | {"generator": seeded(0)}).images
    assert torch.allclose(fused, alone, atol=1e-4)


# --- schedulers, sizes, types -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, HeunDiscreteScheduler, DDPMScheduler])
def test_any_scheduler_that_takes_noise_works(parts, picture, kind):
    betas = {name: SCHEDULE[name] for name in ("beta_start", "beta_end", "beta_schedule")}
    pipe = FaceDiffuserPipeline(**parts, scheduler=kind(**betas))
    pipe.set_progress_bar_config(disable=True)
    images = pipe(ONE, [picture(0)], **SHORT, generator=[seeded(0)], output_type="latent").images
    assert images.isfinite().all()


@pytest.mark.parametrize(
    ("output_type", "check"),
    [
        ("pil", lambda images: isinstance(images[0], Image.Image) and images[0].size == (48, 32)),
        ("np", lambda images: images.shape == (1, 32, 48, 3) and images.min() >= 0 and images.max() <= 1),
        ("pt", lambda images: images.shape == (1, 3, 32, 48) and images.min() >= 0 and images.max() <= 1),
        ("latent", lambda images: images.shape == (1, 4, 16, 24)),
    ],
)
def test_output_types_and_sizes(pipeline, picture, output_type, check):
    out = pipeline(ONE, [picture(0)], **SHORT, height=32, width=48, output_type=output_type)
    assert check(out.images)


def test_pixels_are_the_decoders_of_the_latents_over_the_scaling_factor(pipeline, picture):
    arguments = {**SHORT, "generator": seeded(0)}
    latents = pipeline(ONE, [picture(0)], **arguments, output_type="latent").images
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    pixels = pipeline(ONE, [picture(0)], **arguments | {"generator": seeded(0)}, output_type="np").images
    assert np.allclose(pixels, (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), atol=1e-5)


def test_bfloat16_models_run_and_keep_float32_saliency(parts, picture):
    halves = {k: v if k == "tokenizer" else type(v).from_config(v.config).to(torch.bfloat16).eval()
              if hasattr(type(v), "from_config") else type(v)(v.config).to(torch.bfloat16).eval()
              for k, v in parts.items()}  # fmt: skip
    pipe = FaceDiffuserPipeline(**halves, scheduler=scheduler("ddim"))
    kinds = []
    out = pipe(
        ONE, [picture(0)], **SHORT, output_type="latent", callback_on_step_end_tensor_inputs=["text_saliency"],
        callback_on_step_end=lambda p, i, t, tensors: kinds.append(tensors["text_saliency"]),
    )  # fmt: skip
    assert out.images.dtype == torch.bfloat16
    assert kinds[1].dtype == torch.float32


# --- what a caller may watch ------------------------------------------------------------------------------------------


def test_the_callback_sees_masks_and_saliency_and_the_fraction_is_their_mean(pipeline, picture):
    seen = []
    names = ["latents", "noise_pred", "mask", "text_saliency", "subject_saliency"]
    out = pipeline(
        [ONE, TWO], [[picture(0)], [picture(1), picture(2)]], **SHORT, output_type="latent", generator=seeded(0),
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append(tensors),
        callback_on_step_end_tensor_inputs=names,
    )  # fmt: skip
    assert len(seen) == 5
    assert [list(tensors) for tensors in seen] == [names] * 5
    assert all(tensors["mask"].shape == (2, 1, 16, 16) for tensors in seen)
    assert seen[0]["mask"].eq(0).all() and seen[-1]["mask"].eq(1).all()
    assert seen[0]["subject_saliency"] is None and seen[-1]["text_saliency"] is None
    fused = torch.stack([tensors["mask"] for tensors in seen[1:3]])
    compared = torch.stack([tensors["subject_saliency"] > tensors["text_saliency"] for tensors in seen[1:3]])
    assert torch.equal(fused, compared.float())
    assert torch.allclose(fused.mean(dim=(0, 2, 3, 4)), torch.tensor(out.subject_fraction))
    assert torch.equal(seen[-1]["latents"], out.images)


def test_the_callback_may_replace_the_latents(pipeline, picture):
    out = pipeline(
        ONE, [picture(0)], **SHORT, output_type="latent",
        callback_on_step_end=lambda pipe, i, t, tensors: {"latents": torch.zeros_like(tensors["latents"])},
    )  # fmt: skip
    assert out.images.eq(0).all()


def test_without_a_fused_step_there_is_no_fraction(pipeline, picture):
    out = pipeline(ONE, [picture(0)], num_inference_steps=2, method="sdm", output_type="latent")
    assert math.isnan(out.subject_fraction[0])
    images, fraction = pipeline(ONE, num_inference_steps=2, method="tdm", output_type="latent", return_dict=False)
    assert images.shape == (1, 4, 16, 16) and math.isnan(fraction[0])


def test_a_window_that_leaves_the_subject_out_is_warned_of(pipeline, picture, caplog):
    with caplog.at_level(logging.WARNING, logger="facediffuser.pipeline"):
        pipeline(ONE, [picture(0)], num_inference_steps=4, fusion_start=16, fusion_end=31, output_type="latent")
    assert "the subjects are not used at all" in caplog.text


@pytest.mark.parametrize(("steps", "expected"), [(4, (1, 2)), (20, (6, 12)), (50, (16, 31))])
def test_without_a_window_the_released_one_is_scaled_to_the_steps(parts, picture, steps, expected):
    pipe = FaceDiffuserPipeline(**parts, scheduler=scheduler("ddim"))
    ran: list[tuple[bool, bool]] = []
    pipe(
        ONE, [picture(0)], num_inference_steps=steps, output_type="latent",
        callback_on_step_end=lambda p, i, t, seen: ran.append(
            (seen["text_saliency"] is not None, seen["subject_saliency"] is not None)
        ),
        callback_on_step_end_tensor_inputs=["text_saliency", "subject_saliency"],
    )  # fmt: skip
    start, end = expected
    assert ran == [(True, False)] * start + [(True, True)] * (end - start) + [(False, True)] * (steps - end)


def test_a_callback_may_interrupt_and_properties_describe_the_call(pipeline, picture, rows):
    seen = []

    def stop(pipe, i, t, tensors):
        seen.append((i, pipe.num_timesteps, pipe.guidance_scale, pipe.interrupt))
        pipe._interrupt = i == 1

    how = {**SHORT, "guidance_scale": 2.0, "output_type": "latent"}
    pipeline(ONE, [picture(0)], **how, callback_on_step_end=stop)
    assert seen == [(0, 5, 2.0, False), (1, 5, 2.0, False)] and len(rows) == 3
    pipeline(ONE, [picture(0)], **how)
    assert not pipeline.interrupt and len(rows) == 3 + 7


# --- values that are not finite ---------------------------------------------------------------------------------------


def replaced(module, **changes):
    """A copy of a model with some elements of parameters set, as {"conv_out.bias": value of its first element}."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        for name, value in changes.items():
            module.get_parameter(name.replace("__", ".")).flatten()[0] = value
    return module


@pytest.mark.parametrize(("name", "step"), [("unet_text", 0), ("unet", 1)])
def test_a_model_with_one_nan_is_named_by_the_first_step_it_spoils(parts, picture, name, step):
    broken = replaced(parts[name], conv_out__bias=math.nan)
    pipe = FaceDiffuserPipeline(**{**parts, name: broken}, scheduler=scheduler())
    for output_type in ("latent", "pil"):
        out = pipe(ONE, [picture(0)], **SHORT, output_type=output_type)
        assert out.errors == [f"latents are not finite at step {step} of 5"]


def test_only_the_rows_that_are_not_finite_have_an_error(parts, picture):
    encoder = copy.deepcopy(parts["text_encoder"])
    hat = parts["tokenizer"]("hat", add_special_tokens=False).input_ids[0]
    with torch.no_grad():
        encoder.get_input_embeddings().weight[hat] = math.inf
    pipe = FaceDiffuserPipeline(**{**parts, "text_encoder": encoder}, scheduler=scheduler())
    how = {**SHORT, "output_type": "np"}
    both = pipe([ONE, "a red hat"], [[picture(0)], []], generator=[seeded(0), seeded(1)], **how)
    assert both.errors == [None, "latents are not finite at step 0 of 5"]
    alone = pipe(ONE, [picture(0)], generator=[seeded(0)], **how)
    assert alone.errors == [None] and np.allclose(alone.images[0], both.images[0], atol=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_decoder_that_is_not_finite_is_an_error_of_the_image(parts, picture, value):
    broken = replaced(parts["vae"], decoder__conv_out__bias=value)
    pipe = FaceDiffuserPipeline(**{**parts, "vae": broken}, scheduler=scheduler())
    out = pipe(ONE, [picture(0)], **SHORT)
    assert out.errors == ["the decoded image is not finite"] and isinstance(out.images[0], Image.Image)


def test_an_image_that_overflows_in_half_precision_is_decoded_in_float32(parts):
    """The decoder's first activations exceed float16's range, and its group norms bring them back."""
    vae = copy.deepcopy(parts["vae"])
    with torch.no_grad():
        vae.post_quant_conv.weight.copy_(vae.post_quant_conv.weight.sign() * 6e4)
    vae = vae.half()
    latents = torch.randn(2, 4, 16, 16, generator=seeded(3))
    with torch.no_grad():
        assert not vae.decode(latents.half() / vae.config.scaling_factor).sample.isfinite().all()
    pipe = FaceDiffuserPipeline(**{**parts, "vae": vae}, scheduler=scheduler())
    images = pipe.decode_latents(latents, "np")
    assert np.isfinite(images).all() and all(image.std() > 0 for image in images)
    assert {parameter.dtype for parameter in pipe.vae.parameters()} == {torch.float16}


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_saved_pipeline_loads_and_gives_the_same_image(pipeline, picture, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    loaded = facediffuser.FaceDiffuserPipeline.from_pretrained(tmp_path / "model")
    assert set(loaded.components) == set(pipeline.components)
    assert type(loaded.subject_fuser).__module__ == "facediffuser.subject"
    arguments = {**SHORT, "output_type": "latent"}
    ours = pipeline(ONE, [picture(0)], generator=seeded(0), **arguments).images
    theirs = loaded(ONE, [picture(0)], generator=seeded(0), **arguments).images
    assert (ours - theirs).abs().max() < 1e-3
    assert not list((tmp_path / "model").rglob("*.bin"))


def test_half_precision_folders_are_loaded_as_float32_unless_asked(pipeline, tmp_path, parts):
    components = ("text_encoder", "image_encoder", "subject_fuser", "unet", "unet_text", "vae")
    try:
        for name in components:
            parts[name].half()
        pipeline.save_pretrained(tmp_path / "half")
    finally:
        for name in components:
            parts[name].float()
    full = FaceDiffuserPipeline.from_pretrained(tmp_path / "half")
    assert {getattr(full, name).dtype for name in components} == {torch.float32}
    half = FaceDiffuserPipeline.from_pretrained(tmp_path / "half", dtype=torch.float16)
    assert {getattr(half, name).dtype for name in components} == {torch.float16}


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ONE}, "0 reference images for 1"),
        ({"prompt": TWO, "reference_images": 1}, "1 reference image for 2"),
        ({"prompt": "a man", "reference_images": 1}, "1 reference image for 0"),
        ({"prompt": [ONE, ONE], "reference_images": 1}, "1 list of references for 2 prompts"),
        ({"prompt": "a man <|image|>" * 5, "reference_images": 5}, "takes up to 4"),
        ({"prompt": "a man, <|image|>", "reference_images": 1}, "number 1 stands after 'a man,'"),
        ({"prompt": "<|image|> a man", "reference_images": 1}, "at the start"),
        ({"prompt": None}, "give one of the two"),
        ({"prompt": []}, "no prompts"),
        ({"prompt": [3]}, "not a string"),
        ({"prompt": ONE, "reference_images": 1, "method": "sdxl"}, "choose one of face-diffuser, tdm"),
        ({"prompt": ONE, "reference_images": 1, "fusion_start": -1}, "counted from 0"),
        ({"prompt": ONE, "reference_images": 1, "alpha": 1.5}, "alpha 1.5"),
        ({"prompt": ONE, "reference_images": 1, "guidance_scale": math.nan}, "guidance_scale"),
        ({"prompt": ONE, "reference_images": 1, "num_inference_steps": 0}, "num_inference_steps 0"),
        ({"prompt": ONE, "reference_images": 1, "output_type": "jpg"}, "output_type 'jpg'"),
        ({"prompt": ONE, "reference_images": 1, "height": 33}, "multiples of 2"),
        ({"prompt": ONE, "reference_images": 1, "latents": torch.zeros(2, 4, 16, 16)}, "latents of shape"),
        ({"prompt": ONE, "reference_images": 1, "generator": [torch.Generator()] * 2}, "2 generators for 1"),
        ({"prompt": ONE, "reference_images": 1, "callback_on_step_end_tensor_inputs": ["eps"]}, "'eps'"),
        ({"prompt_embeds": torch.zeros(1, 77, 32), "prompt": None}, "subject_prompt_embeds"),
        (
            {"prompt": ONE, "reference_images": 1, "negative_prompt_embeds": torch.zeros(3, 77, 32)},
            "negative prompt embeddings of shape",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused_in_one_line(pipeline, picture, rows, arguments, message):
    count = arguments.get("reference_images")
    if count:
        arguments = {**arguments, "reference_images": [picture(i) for i in range(count)]}
    with pytest.raises(InputError, match=message) as caught:
        pipeline(**arguments)
    assert "\n" not in str(caught.value)
    assert rows == []
