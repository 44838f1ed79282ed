"""Cross-attention that is looked at gives the same output as cross-attention that is not."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from facediffuser.training.attention import AttentionMaps, RecordingProcessor, record_cross_attention


def _unet(levels: int = 3) -> UNet2DConditionModel:
    torch.manual_seed(0)
    cross = ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * (levels - 1)
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(8, 16, 16)[:levels], layers_per_block=1,
        norm_num_groups=4, attention_head_dim=2, cross_attention_dim=12, down_block_types=tuple(cross),
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(cross)),
    )  # fmt: skip


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return torch.randn(2, 4, 16, 16), torch.tensor([10, 500]), torch.randn(2, 7, 12)


def test_recording_changes_nothing_of_the_output_and_its_gradient(inputs):
    plain, watched, store = _unet(), _unet(), AttentionMaps()
    record_cross_attention(watched, store)
    expected = plain(*inputs).sample
    with store:
        made = watched(*inputs).sample
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)
    made.square().mean().backward()
    expected.square().mean().backward()
    for mine, theirs in zip(watched.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-4)


def test_maps_are_probabilities_over_the_text_of_every_recorded_layer(inputs):
    unet, store = _unet(), AttentionMaps()
    names = record_cross_attention(unet, store)
    with store:
        unet(*inputs)
    assert len(store.maps) == len(names) > 0
    for maps in store.maps:
        assert maps.shape[0] == 2 and maps.shape[-1] == 7
        torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))


def test_nothing_is_recorded_unless_asked_for_and_self_attention_never(inputs):
    unet, store = _unet(), AttentionMaps()
    names = record_cross_attention(unet, store)
    unet(*inputs)
    assert store.maps == []
    assert all(".attn2" in name for name in names)
    others = [p for name, p in unet.attn_processors.items() if name.removesuffix(".processor") not in names]
    assert not any(isinstance(processor, RecordingProcessor) for processor in others)


def test_the_layers_of_stable_diffusion_are_the_five_blocks_of_the_method():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
        )
    names = record_cross_attention(unet, AttentionMaps())
    blocks = {".".join(name.split(".")[: 2 if "blocks" in name.split(".")[0] else 1]) for name in names}
    assert blocks == {"down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.1", "up_blocks.2"}


def test_gradient_checkpointing_records_each_layer_once_and_trains_through_the_maps(inputs):
    unet, store = _unet().train(), AttentionMaps()
    names = record_cross_attention(unet, store)
    unet.enable_gradient_checkpointing()
    with store:
        unet(*inputs)
    sum(maps[..., 0].sum() for maps in store.maps).backward()
    assert len(store.maps) == len(names)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in unet.parameters())
