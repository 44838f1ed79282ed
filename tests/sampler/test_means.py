"""The means of fast mode: what each leaves out, what stays exact, and what an image costs."""

import pytest
import torch
from sampler.conftest import scheduler

from facediffuser.errors import InputError
from facediffuser.fast_sampling import part_shares, plan_steps, row_equivalents
from facediffuser.means import NONE, Means
from facediffuser.pipeline import FaceDiffuserPipeline
from facediffuser.schedulers import SCHEDULER_CLASSES, set_scheduler
from facediffuser.stages import Stage, plan_stages
from facediffuser.unet_parts import decode, encode, last_layers, require_parts

PROMPTS = ["a man <|image|> reading a book", "a woman <|image|> in the park"]
T, F, S = Stage.TEXT, Stage.FUSION, Stage.SUBJECT


def sample(pipeline, picture, means=NONE, prompts=PROMPTS, steps=8, first=0, **others):
    """Return the latents of some prompts from fixed noise, each image with its own."""
    noise = [torch.Generator().manual_seed(first + number) for number in range(len(prompts))]
    return pipeline(
        prompts, [[picture(0)]] * len(prompts), num_inference_steps=steps, fusion_start=3, fusion_end=5, generator=noise,
        output_type="latent", means=means, **others,
    ).images  # fmt: skip


EACH = {
    "kept guidance": Means(guidance_every=2),
    "no guidance at the end": Means(unguided_text=0.5, unguided_subject=0.5),
    "deep features": Means(deep_every=2),
    "more layers": Means(deep_every=2, deep_layers=2),
    "encoder": Means(encoder_every=3),
    "merged": Means(encoder_every=3, merged=True),
    "deep features and guidance, fused steps too": Means(guidance_every=2, deep_every=2, in_fusion=True),
    "merged, guidance, fused steps too": Means(
        guidance_every=2, encoder_every=2, merged=True, unguided_text=0.3, unguided_subject=0.3, in_fusion=True
    ),
}


@pytest.fixture(scope="module")
def exact() -> dict[str, torch.Tensor]:
    """Latents of exact mode, once they are made: the models are the same for all tests."""
    return {}


@pytest.mark.parametrize("means", EACH.values(), ids=EACH)
@torch.no_grad()
def test_an_image_does_not_depend_on_those_beside_it(pipeline, picture, means, exact):
    set_scheduler(pipeline, "DPMSolverMultistepScheduler")
    together = sample(pipeline, picture, means)
    alone = sample(pipeline, picture, means, PROMPTS[1:], first=1)
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-4)
    if not exact:
        exact["latents"] = sample(pipeline, picture)
    assert (together - exact["latents"]).abs().max() > 1e-3  # it does leave something out


@pytest.mark.parametrize("kind", SCHEDULER_CLASSES.values())
def test_any_scheduler_takes_all_means(parts, picture, kind):
    pipeline = FaceDiffuserPipeline(**parts, scheduler=scheduler())
    set_scheduler(pipeline, kind)
    pipeline.set_progress_bar_config(disable=True)
    for means in (
        Means(guidance_every=2, deep_every=2, unguided_text=0.3, unguided_subject=0.3),
        Means(encoder_every=2, merged=True),
    ):
        assert sample(pipeline, picture, means, steps=6).isfinite().all()


@torch.no_grad()
def test_a_unet_in_parts_is_the_unet(parts):
    unet, generator = parts["unet"], torch.Generator().manual_seed(0)
    rows, embeds = torch.randn(3, 4, 16, 16, generator=generator), torch.randn(3, 77, 32, generator=generator)
    t = torch.tensor(501)
    whole = unet(rows, t, encoder_hidden_states=embeds).sample
    encoded = encode(unet, rows, t, embeds)
    for layers in (1, 2):
        noise, deep = decode(unet, encoded, t, embeds, layers)
        torch.testing.assert_close(noise, whole, rtol=0, atol=1e-6)
        torch.testing.assert_close(last_layers(unet, rows, t, embeds, deep, layers), whole, rtol=0, atol=1e-6)
    # Each row at its own time, as one call.
    times = torch.tensor([501, 301, 101])
    each = [decode(unet, encoded, one, embeds)[0][n] for n, one in enumerate(times)]
    torch.testing.assert_close(decode(unet, encoded, times, embeds)[0], torch.stack(each), rtol=0, atol=1e-6)


@torch.no_grad()
def test_merged_evaluations_are_those_one_by_one(pipeline, picture):
    one_by_one, merged = (
        sample(pipeline, picture, Means(guidance_every=2, encoder_every=3, merged=value, in_fusion=True))
        for value in (False, True)
    )
    torch.testing.assert_close(one_by_one, merged, rtol=0, atol=1e-4)


def test_what_each_step_evaluates():
    stages = [T] * 4 + [F] * 2 + [S] * 4
    steps = plan_steps(stages, Means(guidance_every=2, unguided_text=0.5, unguided_subject=0.5))
    assert [step.guidance for step in steps] == [
        "full",
        "kept",
        "none",
        "none",
        "full",
        "full",
        "full",
        "kept",
        "none",
        "none",
    ]
    steps = plan_steps(stages, Means(deep_every=3))
    assert [step.part for step in steps] == ["whole", "layers", "layers", "whole"] + ["whole"] * 2 + [
        "whole",
        "layers",
        "layers",
        "whole",
    ]
    assert [step.group for step in steps] == [0, 0, 0, 3, 4, 5, 6, 6, 6, 9]
    # Between, no row is asked for that was not evaluated with its features.
    steps = plan_steps([T] * 6, Means(guidance_every=3, encoder_every=2))
    assert [(step.guidance, step.part) for step in steps] == [
        ("full", "whole"), ("kept", "decoder"), ("kept", "whole"), ("full", "whole"), ("kept", "decoder"), ("kept", "whole"),
    ]  # fmt: skip


def test_the_cost_of_an_image():
    exact = plan_steps(plan_stages("face-diffuser", 51, 50, 16, 31), NONE)
    shares = {"whole": 1.0, "decoder": 0.6, "layers": 0.1}
    assert row_equivalents(exact, shares) == 16 * 2 + 15 * 4 + 20 * 2
    fast = plan_steps([T] * 2 + [F] + [S] * 2, Means(deep_every=2))
    assert row_equivalents(fast, shares) == pytest.approx(2 + 0.2 + 4 + 2 + 0.2)


def test_the_share_of_a_part_is_that_of_its_operations(parts):
    one, two = (part_shares(parts["unet"], layers) for layers in (1, 2))
    assert 0 < one["layers"] < two["layers"] < 1
    assert 0 < one["decoder"] < 1
    assert one["whole"] == 1


@pytest.mark.parametrize(
    "given,message",
    [
        ({"deep_every": 0}, "deep_every 0: give 1 or more"),
        ({"unguided_subject": 1.5}, "unguided_subject 1.5: give a share of the steps, from 0 to 1"),
        ({"deep_every": 2, "encoder_every": 2}, "deep_every and encoder_every: both keep features"),
        ({"merged": True}, "merged: joins evaluations of the decoder"),
    ],
)
def test_means_that_do_not_fit_together_are_refused(given, message):
    with pytest.raises(InputError) as raised:
        Means(**given)
    assert str(raised.value).startswith(message)


def test_a_unet_that_has_no_parts_is_refused_before_the_first_step(pipeline, picture, parts):
    with pytest.raises(InputError, match="deep_layers 9: this UNet's last block has 2; give at most that many"):
        sample(pipeline, picture, Means(deep_every=2, deep_layers=9))
    with pytest.raises(InputError, match="Linear: cannot be evaluated in parts; leave deep_every"):
        require_parts(torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match="cross_attention_kwargs: not with deep_every"):
        sample(pipeline, picture, Means(deep_every=2), cross_attention_kwargs={"scale": 1.0})


def test_a_run_document_names_the_means_that_are_on():
    means = Means(guidance_every=2, unguided_text=0.25)
    assert means.as_document() == {"guidance_every": 2, "unguided_text": 0.25}
    assert Means.from_document(means.as_document()) == means
    assert NONE.as_document() == {}
    with pytest.raises(InputError, match="means 'later': unknown here"):
        Means.from_document({"later": 1})
