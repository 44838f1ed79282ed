"""Saliency, mask and fusion: cases worked out by hand, and what must hold for any response."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from facediffuser import snf
from facediffuser.errors import InputError

quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31 - 1)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(2, 12), st.integers(2, 12))


def noise(seed: int, shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def smooth_by_hand(rows: list[list[float]]) -> list[list[float]]:
    """4 x 4 means over a zero border of one cell, then linear interpolation back to the size, cell by cell."""
    height, width = len(rows), len(rows[0])

    def at(y, x):
        return rows[y][x] if 0 <= y < height and 0 <= x < width else 0.0

    pooled = [
        [sum(at(y + dy - 1, x + dx - 1) for dy in range(4) for dx in range(4)) / 16 for x in range(width - 1)]
        for y in range(height - 1)
    ]

    def weights(out: int, size: int, new: int) -> list[tuple[int, float]]:
        centre = (out + 0.5) * size / new
        raw = [(i, max(0.0, 1 - abs(i + 0.5 - centre))) for i in range(size)]
        total = sum(w for _, w in raw)
        return [(i, w / total) for i, w in raw if w]

    return [
        [
            sum(
                wy * wx * pooled[y][x]
                for y, wy in weights(row, height - 1, height)
                for x, wx in weights(column, width - 1, width)
            )
            for column in range(width)
        ]
        for row in range(height)
    ]


def test_guidance_is_the_baseline_plus_the_scaled_difference():
    response, estimate = snf.guide(torch.tensor([[[[1.0]]]]), torch.tensor([[[[1.5]]]]), 5.0)
    assert response.item() == 2.5
    assert estimate.item() == 3.5


def test_a_constant_map_is_smoothed_to_its_borders_zero_padding():
    # 3 x 3 ones with a zero border: every 4 x 4 window holds all nine ones, so every mean is 9/16.
    assert torch.allclose(snf.smooth(torch.ones(1, 1, 3, 3)), torch.full((1, 1, 3, 3), 9 / 16))


def test_saliency_of_a_single_peak_matches_the_hand_computation():
    rows = [[0.0] * 5 for _ in range(4)]
    rows[1][3] = -8.0
    smoothed = smooth_by_hand([[abs(value) for value in row] for row in rows])
    total = sum(math.exp(value) for row in smoothed for value in row)
    expected = torch.tensor([[math.exp(value) / total for value in row] for row in smoothed])
    assert torch.allclose(snf.saliency(torch.tensor([[rows]]))[0, 0], expected, atol=1e-7)


def test_channels_are_averaged_after_smoothing_each_ones_magnitude():
    response = torch.stack([torch.full((4, 4), 3.0), torch.full((4, 4), -1.0)]).unsqueeze(0)
    response[0, 0, 0, 0] = 9.0
    first = snf.smooth(response[:, :1].abs())
    second = snf.smooth(response[:, 1:].abs())
    expected = torch.softmax(((first + second) / 2).flatten(), 0).view(1, 1, 4, 4)
    assert torch.allclose(snf.saliency(response), expected, atol=1e-7)


def test_fusion_takes_every_channel_of_a_cell_from_the_same_model():
    mask = torch.tensor([[[[True, False]]]])
    fused = snf.fuse(torch.zeros(1, 4, 1, 2), torch.ones(1, 4, 1, 2), mask)
    assert fused[:, :, 0, 0].eq(1).all() and fused[:, :, 0, 1].eq(0).all()


@quick
@given(seeds, shapes)
def test_saliency_sums_to_one_and_is_positive(seed, shape):
    omega = snf.saliency(3 * noise(seed, shape))
    assert omega.shape == (shape[0], 1, *shape[2:])
    assert torch.allclose(omega.sum(dim=(1, 2, 3)), torch.ones(shape[0]), atol=1e-5)
    assert (omega > 0).all()


@quick
@given(seeds, shapes)
def test_ties_go_to_the_text_model(seed, shape):
    omega = snf.saliency(noise(seed, shape))
    assert not snf.subject_mask(omega, omega).any()


@quick
@given(seeds, shapes)
def test_fusing_a_model_with_itself_changes_nothing(seed, shape):
    mask = snf.subject_mask(snf.saliency(noise(seed, shape)), snf.saliency(noise(seed + 1, shape)))
    estimate = noise(seed + 2, shape)
    assert torch.equal(snf.fuse(estimate, estimate, mask), estimate)


@quick
@given(seeds, shapes)
def test_every_cell_comes_from_one_of_the_two_models(seed, shape):
    text, subject = noise(seed, shape), noise(seed + 1, shape)
    mask = snf.subject_mask(snf.saliency(text), snf.saliency(subject))
    fused = snf.fuse(text, subject, mask)
    assert torch.where(mask, fused == subject, fused == text).all()


@quick
@given(seeds, st.sampled_from([0.25, 0.5, 2.0, 4.0]))
def test_scaling_both_responses_alike_keeps_the_mask_where_the_maps_have_one_level(seed, factor):
    # Softmax is not linear, so the mask of two responses may move when both grow. It stays where both maps have one
    # normaliser, as for two arrangements of the same values: here one is the other, turned by 180 degrees.
    text = noise(seed, (1, 4, 9, 9)).double()
    subject = text.flip(-1, -2)

    def difference(k: float) -> torch.Tensor:
        return snf.saliency(k * subject) - snf.saliency(k * text)

    small, large = difference(1.0), difference(factor)
    clear = (small.abs() > 1e-9) & (large.abs() > 1e-9)
    assert torch.equal((small > 0)[clear], (large > 0)[clear])


@quick
@given(seeds, st.sampled_from([0.25, 0.5, 2.0, 3.0]))
def test_a_temperature_does_what_scaling_the_response_does(seed, factor):
    response = noise(seed, (2, 4, 7, 8))
    assert torch.allclose(snf.saliency(response, factor), snf.saliency(factor * response), atol=1e-7)


@quick
@given(seeds, shapes)
def test_a_batch_gives_what_its_items_give_alone(seed, shape):
    text, subject = noise(seed, shape), noise(seed + 1, shape)
    together = snf.subject_mask(snf.saliency(text), snf.saliency(subject))
    alone = [
        snf.subject_mask(snf.saliency(t), snf.saliency(s)) for t, s in zip(text.split(1), subject.split(1), strict=True)
    ]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_responses_are_compared_in_float32(dtype):
    response = noise(0, (1, 4, 64, 64)).to(dtype)
    omega = snf.saliency(response)
    assert omega.dtype == torch.float32
    assert torch.equal(omega, snf.saliency(response.float()))
    assert len(omega.unique()) > len(omega.to(dtype).unique())
    assert all(part.dtype == torch.float32 for part in snf.guide(response, response, 5.0))


def test_latents_too_small_to_smooth_are_refused():
    with pytest.raises(InputError, match="1 x 8"):
        snf.saliency(torch.zeros(1, 4, 1, 8))
