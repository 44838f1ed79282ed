"""The losses against the method's words, in numbers small enough to follow."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from facediffuser.training.losses import localization_loss, min_snr_weights, noise_loss


def test_the_noise_loss_is_the_mean_squared_error_of_each_image():
    torch.manual_seed(0)
    predicted, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    expected = torch.stack([torch.nn.functional.mse_loss(p, n) for p, n in zip(predicted, noise, strict=True)])
    torch.testing.assert_close(noise_loss(predicted, noise), expected)


def test_errors_outside_of_the_mask_do_not_count():
    noise = torch.zeros(1, 2, 4, 4)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    inside, outside = noise.clone(), noise.clone()
    inside[..., :2] = 3.0
    outside[..., 2:] = 3.0
    assert noise_loss(outside, noise, mask).item() == 0
    assert noise_loss(inside, noise, mask).item() == pytest.approx(9 / 2)
    assert noise_loss(inside, noise, mask, over="mask").item() == pytest.approx(9)


def test_an_image_without_subjects_counts_whole_under_the_masked_loss():
    torch.manual_seed(1)
    predicted, noise = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    empty = torch.zeros(2, 1, 4, 4)
    for over in ("image", "mask"):
        torch.testing.assert_close(noise_loss(predicted, noise, empty, over), noise_loss(predicted, noise))


def test_emphasis_moves_weight_without_changing_the_loss_of_an_even_error():
    even = torch.full((1, 2, 4, 4), 2.0)
    emphasis = torch.ones(1, 1, 4, 4)
    emphasis[..., 0, 0] = 5
    assert noise_loss(even, torch.zeros_like(even), emphasis=emphasis).item() == pytest.approx(4)
    spot = torch.zeros(1, 2, 4, 4)
    spot[..., 0, 0] = 1
    assert noise_loss(spot, torch.zeros_like(spot), emphasis=emphasis).item() == pytest.approx(5 / 20)


def _maps(attention: torch.Tensor) -> torch.Tensor:
    """(b, cells) attention to token 1 of 2, for two heads."""
    return torch.stack([1 - attention, attention], dim=-1)[:, None].expand(-1, 2, -1, -1)


def test_attention_inside_of_the_subject_lowers_the_localization_loss_and_outside_raises_it():
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2, :] = 1
    tokens, present = torch.tensor([[1]]), torch.tensor([[True]])
    inside = _maps(mask.flatten(2)[:, 0] * 0.8)
    outside = _maps((1 - mask.flatten(2)[:, 0]) * 0.8)
    even = _maps(torch.full((1, 16), 0.3))
    assert localization_loss([inside], mask, tokens, present).item() == pytest.approx(-0.8, abs=1e-4)
    assert localization_loss([outside], mask, tokens, present).item() == pytest.approx(0.8, abs=1e-4)
    assert localization_loss([even], mask, tokens, present).item() == pytest.approx(0, abs=1e-4)


def test_the_localization_loss_is_the_mean_over_present_subjects_and_layers_of_any_size():
    torch.manual_seed(2)
    masks = (torch.rand(2, 2, 16, 16) > 0.5).float()
    tokens, present = torch.tensor([[1, 2], [3, 0]]), torch.tensor([[True, True], [True, False]])
    layers = [torch.rand(2, 2, side * side, 5).softmax(-1) for side in (8, 4)]
    total = torch.zeros(2)
    for maps, side in zip(layers, (8, 4), strict=True):
        small = torch.nn.functional.interpolate(masks, size=(side, side), mode="bilinear", antialias=True).flatten(2)
        for image, subjects in enumerate(([0, 1], [0])):
            for subject in subjects:
                heads = maps[image, :, :, tokens[image, subject]]
                inside = small[image, subject]
                outer = (heads * (1 - inside)).sum(-1) / (1 - inside).sum()
                inner = (heads * inside).sum(-1) / inside.sum()
                total[image] += (outer - inner).mean() / len(subjects) / len(layers)
    torch.testing.assert_close(localization_loss(layers, masks, tokens, present), total, atol=1e-4, rtol=1e-3)


def test_an_image_without_subjects_has_no_localization_loss():
    loss = localization_loss(
        [torch.rand(1, 1, 16, 3)], torch.ones(1, 1, 4, 4), torch.tensor([[0]]), torch.tensor([[False]])
    )
    assert loss.item() == 0


@given(st.floats(0.5, 20))
def test_min_snr_weights_are_one_where_noise_is_strong_and_fall_with_the_signal(gamma):
    alphas = torch.linspace(0.999, 0.005, 100)
    weights = min_snr_weights(alphas, gamma)
    snr = alphas / (1 - alphas)
    assert (weights[snr <= gamma] == 1).all()
    torch.testing.assert_close(weights[snr > gamma], gamma / snr[snr > gamma])
