"""Stable Diffusion's UNet in parts: with its inner features, the decoder or the last layers alone, two texts of a latent.

What is inside a UNet changes little from one step to the next (arXiv 2312.00858 of its deep features, 2312.09608 of its
encoder's); these functions evaluate the rest on features that were kept. They are plain functions of a
UNet2DConditionModel and tensors, so a compiler takes them as it takes the UNet.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch

from facediffuser.errors import InputError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

_PLAIN = {
    "center_input_sample": False, "class_embed_type": None, "addition_embed_type": None, "encoder_hid_dim_type": None,
    "time_cond_proj_dim": None, "num_class_embeds": None, "time_embedding_act_fn": None,
}  # fmt: skip


class Encoded(NamedTuple):
    """What a UNet's encoder and middle make of (b, c, h, w): the features that its decoder reads."""

    middle: torch.Tensor
    skips: tuple[torch.Tensor, ...]


def require_parts(unet, layers: int = 1) -> None:
    """Check that a UNet can be evaluated in parts.

    Args:
        unet: the UNet.
        layers: how many layers its last block must have.

    Raises:
        InputError: it cannot, or has fewer.
    """
    from diffusers import UNet2DConditionModel

    if not isinstance(unet, UNet2DConditionModel):
        raise InputError(f"{type(unet).__name__}: cannot be evaluated in parts; leave deep_every and encoder_every out")
    for name, plain in _PLAIN.items():
        if unet.config.get(name) != plain:
            raise InputError(f"UNet with {name} {unet.config[name]!r}: cannot be evaluated in parts; leave deep_every and "
                             "encoder_every out")  # fmt: skip
    most = len(unet.up_blocks[-1].resnets)
    if layers > most:
        raise InputError(f"deep_layers {layers}: this UNet's last block has {most}; give at most that many")


def has_common_start(unet) -> bool:
    """Return whether `common_start` can evaluate a UNet: its first layer that reads the text is as Stable Diffusion's."""
    try:
        require_parts(unet)
    except InputError:
        return False
    reading = next((block for block in unet.down_blocks if getattr(block, "has_cross_attention", False)), None)
    if reading is None or unet.mid_block is None:
        return False
    first = reading.attentions[0].transformer_blocks[0]
    return first.norm_type == "layer_norm" and first.pos_embed is None and not first.only_cross_attention


def common_start(
    unet: "UNet2DConditionModel", latents: torch.Tensor, t: torch.Tensor, embeds: torch.Tensor
) -> torch.Tensor:
    """Return the noise of latents for two texts each; what lies before the first layer that reads the text is computed once.

    Args:
        unet: the UNet.
        latents: (b, c, h, w).
        t: the time, without dimensions.
        embeds: (2b, n, d): b texts, then b others.

    Returns:
        (2b, c, h, w), in the order of the texts.
    """
    time = _time(unet, latents, t)
    hidden = unet.conv_in(latents)
    skips: tuple[torch.Tensor, ...] = (hidden,)
    start = next(n for n, block in enumerate(unet.down_blocks) if getattr(block, "has_cross_attention", False))
    for block in unet.down_blocks[:start]:
        hidden, made = block(hidden_states=hidden, temb=time)
        skips += made
    skips, both = tuple(_twice(skip) for skip in skips), _twice(time)
    first = unet.down_blocks[start]
    for number, resnet in enumerate(first.resnets):
        if number == 0:
            hidden = _attend_twice(first.attentions[0], resnet(hidden, time), embeds)
        else:
            hidden = _attend(first, number, resnet(hidden, both), embeds)
        skips += (hidden,)
    for downsampler in first.downsamplers or ():
        hidden = downsampler(hidden)
        skips += (hidden,)
    return decode(unet, _rest(unet, start + 1, hidden, skips, both, embeds), t, embeds)[0]


def encode(unet: "UNet2DConditionModel", rows: torch.Tensor, t: torch.Tensor, embeds: torch.Tensor) -> Encoded:
    """Return the features of the encoder and the middle block.

    Args:
        unet: the UNet.
        rows: latents, (b, c, h, w).
        t: the time, without dimensions or (b,).
        embeds: (b, n, d).
    """
    time = _time(unet, rows, t)
    hidden = unet.conv_in(rows)
    return _rest(unet, 0, hidden, (hidden,), time, embeds)


def _rest(unet, start: int, hidden: torch.Tensor, skips: tuple[torch.Tensor, ...], time, embeds) -> Encoded:
    for block in unet.down_blocks[start:]:
        hidden, made = block(hidden_states=hidden, temb=time, **_text(block, embeds))
        skips += made
    return Encoded(unet.mid_block(hidden, time, **_text(unet.mid_block, embeds)), skips)


def decode(
    unet: "UNet2DConditionModel", encoded: Encoded, t: torch.Tensor, embeds: torch.Tensor, layers: int = 0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the noise of an encoder's features, and what enters the last layers.

    Args:
        unet: the UNet.
        encoded: what `encode` returned.
        t: the time, without dimensions or (b,).
        embeds: (b, n, d).
        layers: how many layers of the last block.

    Returns:
        Noise, (b, c, h, w), and features; None for 0 layers.
    """
    time, hidden, skips = _time(unet, encoded.middle, t), encoded.middle, encoded.skips
    *blocks, last = unet.up_blocks
    for block in blocks:
        count = len(block.resnets)
        own, skips = skips[-count:], skips[:-count]
        # The next skip has the side that this block's upsampling must reach; sides that are odd need it said.
        hidden = block(
            hidden_states=hidden, temb=time, res_hidden_states_tuple=own, upsample_size=skips[-1].shape[2:],
            **_text(block, embeds),
        )  # fmt: skip
    count = len(last.resnets)
    deep = None
    for number in range(count):
        if count - number == layers:
            deep = hidden
        hidden = _layer(last, number, hidden, skips[count - 1 - number], time, embeds)
    return _noise(unet, hidden), deep


def last_layers(
    unet: "UNet2DConditionModel",
    rows: torch.Tensor,
    t: torch.Tensor,
    embeds: torch.Tensor,
    deep: torch.Tensor,
    layers: int,
) -> torch.Tensor:
    """Return the noise of latents by the layers nearest to them, on deep features that `decode` returned earlier.

    Args:
        unet: the UNet.
        rows: (b, c, h, w).
        t: time, without dimensions or (b,).
        embeds: (b, n, d).
        deep: what entered the last `layers` layers, (b, channels, h, w).
        layers: how many layers of the decoder's last block are evaluated, with those of the encoder that lead to them.
    """
    time, first = _time(unet, rows, t), unet.down_blocks[0]
    skips = [unet.conv_in(rows)]
    for number in range(layers - 1):
        hidden = first.resnets[number](skips[-1], time)
        skips.append(_attend(first, number, hidden, embeds))
    hidden, count = deep, len(unet.up_blocks[-1].resnets)
    for number in range(count - layers, count):
        hidden = _layer(unet.up_blocks[-1], number, hidden, skips[count - 1 - number], time, embeds)
    return _noise(unet, hidden)


def _time(unet: "UNet2DConditionModel", rows: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    each = t.reshape(-1).expand(len(rows))
    return unet.time_embedding(unet.time_proj(each).to(rows.dtype))


def _text(block, embeds: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": embeds} if getattr(block, "has_cross_attention", False) else {}


def _layer(block, number: int, hidden: torch.Tensor, skip: torch.Tensor, time: torch.Tensor, embeds: torch.Tensor):
    return _attend(block, number, block.resnets[number](torch.cat([hidden, skip], dim=1), time), embeds)


def _attend(block, number: int, hidden: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    if not getattr(block, "has_cross_attention", False):
        return hidden
    return block.attentions[number](hidden, encoder_hidden_states=embeds, return_dict=False)[0]


def _attend_twice(transformer, hidden: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    """Return what a transformer makes of hidden (b, c, h, w) for the texts of embeds (2b, n, d): (2b, c, h, w)."""
    height, width = hidden.shape[2:]
    linear, (first, *others) = transformer.use_linear_projection, transformer.transformer_blocks
    normed = transformer.norm(hidden)
    cells = (normed if linear else transformer.proj_in(normed)).permute(0, 2, 3, 1).flatten(1, 2)
    cells = transformer.proj_in(cells) if linear else cells
    cells = _twice(cells + first.attn1(first.norm1(cells)))
    cells = cells + first.attn2(first.norm2(cells), encoder_hidden_states=embeds)
    cells = cells + first.ff(first.norm3(cells))
    for block in others:
        cells = block(cells, encoder_hidden_states=embeds)
    cells = transformer.proj_out(cells) if linear else cells
    made = cells.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    return (made if linear else transformer.proj_out(made)) + _twice(hidden)


def _twice(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor])


def _noise(unet: "UNet2DConditionModel", hidden: torch.Tensor) -> torch.Tensor:
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))
