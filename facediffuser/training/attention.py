"""Recording of cross-attention maps: a processor that keeps the probabilities while a context is open."""

from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention


class AttentionMaps:
    """Context that records the attention maps of one forward pass: `maps`, per layer (b, heads, cells, n text tokens)."""

    def __init__(self):
        self.maps: list[torch.Tensor] = []
        self.recording = self.recorded = False

    def __enter__(self) -> "AttentionMaps":
        self.maps, self.recording, self.recorded = [], True, True
        return self

    def __exit__(self, *error) -> None:
        self.recording = False

    @property
    def explicit(self) -> bool:
        """Whether attention is computed through explicit probabilities.

        Gradient checkpointing runs the layers a second time in the backward pass: they must compute as in the first
        pass, but are not recorded.
        """
        return self.recording or (self.recorded and torch.is_grad_enabled())


class RecordingProcessor:
    """Cross-attention as diffusers computes it, which adds its probabilities to an AttentionMaps while that records.

    Args:
        store: receives the probabilities, (b, heads, cells, n) float32.
        plain: the processor it replaces, which computes while nothing is recorded.
    """

    def __init__(self, store: AttentionMaps, plain: Callable[..., torch.Tensor]):
        self.store, self.plain = store, plain

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not self.store.explicit or encoder_hidden_states is None or attention_mask is not None:
            return self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        residual = hidden_states
        query = _split(attn.to_q(hidden_states), attn.heads)
        key = _split(attn.to_k(encoder_hidden_states), attn.heads)
        value = _split(attn.to_v(encoder_hidden_states), attn.heads)
        # Probabilities in float32, as the small differences between them are what is learnt from.
        probabilities = ((query @ key.transpose(-1, -2)).float() * attn.scale).softmax(dim=-1)
        if self.store.recording:
            self.store.maps.append(probabilities)
        joined = (probabilities.to(value.dtype) @ value).transpose(1, 2).flatten(2)
        out = attn.to_out[1](attn.to_out[0](joined))
        out = out + residual if attn.residual_connection else out
        return out / attn.rescale_output_factor


def _split(states: torch.Tensor, heads: int) -> torch.Tensor:
    """Return (b, cells, heads * d) as (b, heads, cells, d)."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def record_cross_attention(unet: UNet2DConditionModel, store: AttentionMaps) -> list[str]:
    """Install the recording processor in the cross-attention below the full latent resolution.

    These are all blocks but the first down and the last up: for Stable Diffusion v1-5 `down_blocks.1`, `down_blocks.2`,
    `mid_block`, `up_blocks.1` and `up_blocks.2`, the five of the method's localization loss.

    Args:
        unet: the UNet; its other processors stay.
        store: what keeps the maps while it is open.

    Returns:
        The names of those layers.
    """
    full = ("down_blocks.0.", f"up_blocks.{len(unet.up_blocks) - 1}.")
    processors = dict(unet.attn_processors)
    chosen = [name for name in processors if ".attn2." in name and not name.startswith(full)]
    processors.update({name: RecordingProcessor(store, processors[name]) for name in chosen})
    unet.set_attn_processor(processors)
    return [name.removesuffix(".processor") for name in chosen]
