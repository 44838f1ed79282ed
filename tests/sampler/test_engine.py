"""The engine: the same mathematics as without it, whatever its options; padding that nobody sees; bytes of pixels."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from sampler.conftest import random_picture, scheduler, unet, vae

from facediffuser import engine as engine_module
from facediffuser.engine import pad_rows
from facediffuser.engine_options import COMPILED, EAGER, EngineOptions, choose_engine, parse_attention
from facediffuser.errors import InputError
from facediffuser.means import Means
from facediffuser.pipeline import FaceDiffuserPipeline
from facediffuser.schedulers import SCHEDULER_CLASSES, set_scheduler
from facediffuser.settings import Method
from facediffuser.stages import METHODS
from facediffuser.unet_parts import common_start, has_common_start

ONE = "a man <|image|> reading a book"
NEAR = {"rtol": 0, "atol": 1e-4}


def pipeline_with(parts, options: EngineOptions = EAGER) -> FaceDiffuserPipeline:
    """A pipeline with UNets and a VAE of its own, since an engine changes them."""
    pipe = FaceDiffuserPipeline(**parts | {"unet": unet(1), "unet_text": unet(2), "vae": vae()}, scheduler=scheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe.set_engine(options)
    return pipe


def sample(pipe, method: Method, kind: str = "PNDMScheduler", images: int = 2, output_type: str = "np"):
    set_scheduler(pipe, kind)
    return pipe(
        [ONE] * images, [random_picture(seed) for seed in range(images)], num_inference_steps=4, fusion_start=1,
        fusion_end=3, method=method, generator=[torch.Generator().manual_seed(seed) for seed in range(images)],
        output_type=output_type,
    )  # fmt: skip


@pytest.fixture(scope="module")
def eager(parts):
    """The images of a method and a scheduler without an engine."""
    pipe = pipeline_with(parts)
    return functools.cache(functools.partial(sample, pipe))


@pytest.fixture(scope="module")
def compiled(parts):
    """One compiled pipeline for the tests of this file: compiling takes seconds."""
    return pipeline_with(parts, COMPILED)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", SCHEDULER_CLASSES.values())
def test_compiled_images_are_the_eager_ones(compiled, eager, method, kind):
    found, expected = sample(compiled, method, kind), eager(method, kind)
    np.testing.assert_allclose(found.images, expected.images, **NEAR)
    np.testing.assert_allclose(found.subject_fraction, expected.subject_fraction, rtol=0, atol=1 / 256)


@pytest.mark.parametrize(
    "options",
    [
        EngineOptions(channels_last=True),
        EngineOptions(fused_projections=True),
        EngineOptions(text_once=True),
        EngineOptions(common_start=True),
        EngineOptions(attention="math"),
        EngineOptions(attention="8=math"),
        pytest.param(EngineOptions(compile="blocks", text_once=True), marks=pytest.mark.slow),
        pytest.param(EngineOptions(compile="blocks", common_start=True), marks=pytest.mark.slow),
        pytest.param(EngineOptions(compile="full"), marks=pytest.mark.slow),
        pytest.param(EngineOptions(compiled_decoder=True), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_each_option_alone_changes_nothing_but_the_last_bits(parts, eager, options):
    found = sample(pipeline_with(parts, options), "face-diffuser")
    np.testing.assert_allclose(found.images, eager("face-diffuser", "PNDMScheduler").images, **NEAR)


def test_keys_of_the_text_follow_the_prompt(parts, eager):
    pipe = pipeline_with(parts, EngineOptions(text_once=True))
    first = sample(pipe, "face-diffuser").images
    pipe("a red horse", method="tdm", num_inference_steps=2, output_type="latent")
    assert (sample(pipe, "face-diffuser").images == first).all()


def test_what_reads_no_text_is_computed_once_for_baseline_and_condition(parts):
    pipe, rows = pipeline_with(parts, EngineOptions(common_start=True)), []
    first = pipe.unet_text.down_blocks[0]
    for module in (pipe.unet_text.conv_in, first.resnets[0], first.attentions[0].transformer_blocks[0].attn2,
                   pipe.unet_text.mid_block):  # fmt: skip
        module.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    pipe("a red horse", method="tdm", num_inference_steps=1, output_type="latent")
    assert rows == [1, 1, 2, 2]


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(
    "down", [("CrossAttnDownBlock2D", "DownBlock2D"), ("DownBlock2D", "CrossAttnDownBlock2D")], ids=str
)
def test_a_common_start_gives_the_noise_of_the_whole_unet(down, linear):
    torch.manual_seed(0)
    net = UNet2DConditionModel(
        sample_size=9, block_out_channels=(8, 16), layers_per_block=2, transformer_layers_per_block=2, down_block_types=down,
        up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(down)), cross_attention_dim=8,
        attention_head_dim=4, norm_num_groups=4, use_linear_projection=linear,
    ).eval()  # fmt: skip
    latents, embeds, t = torch.randn(3, 4, 9, 9), torch.randn(6, 5, 8), torch.tensor(7.0)
    with torch.no_grad():
        expected = net(torch.cat([latents, latents]), t, embeds).sample
        assert has_common_start(net)
        torch.testing.assert_close(common_start(net, latents, t, embeds), expected, rtol=0, atol=1e-5)


def test_a_unet_of_another_kind_has_no_common_start():
    assert not has_common_start(torch.nn.Linear(2, 2))
    assert not has_common_start(
        UNet2DConditionModel(
            block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4,
            cross_attention_dim=8, attention_head_dim=4,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        EngineOptions(text_once=True, fused_projections=True, common_start=True),
        pytest.param(COMPILED, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("means", [Means(deep_every=2), Means(encoder_every=2, merged=True, in_fusion=True)], ids=str)
def test_means_that_leave_steps_out_give_the_same_with_an_engine(parts, options, means):
    found, expected = (
        pipe([ONE], [random_picture(0)], num_inference_steps=5, fusion_start=1, fusion_end=3, means=means,
             generator=torch.Generator().manual_seed(0), output_type="np").images
        for pipe in (pipeline_with(parts, options), pipeline_with(parts))
    )  # fmt: skip
    np.testing.assert_allclose(found, expected, **NEAR)


@pytest.mark.slow
def test_padding_does_not_change_the_other_images(compiled):
    def latents(seeds: list[int]):
        given = [random_picture(seed) for seed in seeds]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return compiled(
            [ONE] * len(seeds), given, num_inference_steps=4, generator=generators, output_type="latent"
        ).images

    whole, padded = latents([0, 1]), latents([0, 0])
    assert torch.equal(whole[0], padded[0])
    assert torch.equal(pad_rows(whole, 5)[2:], whole[1:].expand(3, -1, -1, -1)) and pad_rows(whole, 2) is whole


@pytest.mark.slow
def test_more_images_than_the_decoder_takes_at_once_are_decoded_in_parts(compiled, parts):
    latents = torch.randn(engine_module.DECODED_TOGETHER + 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = pipeline_with(parts).decode_latents(latents, "pt")
    torch.testing.assert_close(compiled.decode_latents(latents, "pt"), expected, **NEAR)


def test_without_a_compiler_it_runs_eager_and_says_so(parts, eager, monkeypatch, caplog):
    def nothing_compiles(*_, **__):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", nothing_compiles)
    pipe = pipeline_with(parts)
    holds = pipe.set_engine(COMPILED)
    assert not holds.compiles and holds.text_once and holds.common_start and "install g++" in caplog.text
    np.testing.assert_allclose(
        sample(pipe, "face-diffuser").images, eager("face-diffuser", "PNDMScheduler").images, **NEAR
    )


def test_pixels_become_the_bytes_that_diffusers_makes_of_them(pipeline):
    images = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(0)) * 2
    images[0, 0, :, 0], images[1, 1, 0, :] = torch.inf, -torch.inf
    expected = pipeline.image_processor.postprocess(images, "pil")
    pipeline.vae.decode, decode = lambda *_, **__: (images,), pipeline.vae.decode
    try:
        found = pipeline.decode_latents(torch.zeros(2, 4, 9, 7))
    finally:
        pipeline.vae.decode = decode
    assert [one.tobytes() for one in found] == [one.tobytes() for one in expected]


# --- options ----------------------------------------------------------------------------------------------------------


def test_options_survive_a_run_document():
    assert EngineOptions.from_document(COMPILED.as_document()) == COMPILED
    newer = {"common_start", "pointwise_products"}
    older = {name: value for name, value in COMPILED.as_document().items() if name not in newer}
    read = EngineOptions.from_document(older)
    assert read == replace(COMPILED, **dict.fromkeys(newer, False)), (
        "a run begun before there were these keeps its engine"
    )
    with pytest.raises(InputError, match="engine option 'fp8': unknown"):
        EngineOptions.from_document({**COMPILED.as_document(), "fp8": True})


@pytest.mark.parametrize("attention", ["fast", "40=fast", "40=flash,cudnn", "x=flash"])
def test_an_unknown_kernel_is_refused(attention):
    with pytest.raises(InputError, match="attention"):
        EngineOptions(attention=attention)


def test_kernels_by_head_size():
    assert parse_attention("40=flash, 80=cudnn") == {40: "flash", 80: "cudnn"}


@pytest.mark.parametrize("option", ["cuda_graphs", "autotune", "pointwise_products"])
def test_what_belongs_to_compiled_code_wants_it(option):
    with pytest.raises(
        InputError, match="cuda_graphs, autotune and pointwise_products: .* set compile to full or blocks"
    ):
        EngineOptions(**{option: True})
    assert EngineOptions(compile="full", **{option: True}).without_compiling() == EAGER


def test_a_second_engine_is_refused(parts):
    pipe = pipeline_with(parts, EngineOptions(text_once=True))
    with pytest.raises(InputError, match="has an engine already"):
        pipe.set_engine(COMPILED)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("compiled", 1, 64, 64, False), "compiled"),
        (("eager", 10**6, 512, 512, True), "eager"),
        (("auto", 10**6, 512, 512, False), "eager"),
        (("auto", 10**6, 512, 512, True), "compiled"),
        (("auto", 100, 512, 512, True), "eager"),
        (("auto", 10**5, 64, 64, True), "eager"),
        (("auto", 10**6, 512, 512, True, "eager"), "eager"),
        (("auto", 100, 512, 512, True, "compiled"), "compiled"),
        (("eager", 100, 512, 512, True, "compiled"), "eager"),
    ],
)
def test_which_engine_a_run_takes(arguments, expected):
    chosen, why = choose_engine(*arguments)
    assert chosen == expected and why
