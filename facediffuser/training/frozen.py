"""What the frozen parts make of the data, computed once and kept as Parquet: pictures' latents and captions' embeddings."""

import hashlib
import logging
import math
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL
from torchvision.transforms.v2 import functional as TF
from transformers import CLIPTextModel, CLIPTokenizer

from facediffuser.errors import InputError
from facediffuser.prompt_tokens import tokenize_with_markers
from facediffuser.storage import Store, open_store
from facediffuser.training.records import Records, square

logger = logging.getLogger(__name__)

PART_ROWS = 1024
"""Rows of a part: what a run that is killed while it fills the cache has to compute again at most."""
AT_ONCE = 32


class CaptionEmbeddings:
    """The text encoder's embeddings of all captions of a split and of the empty one, by caption: (n, d) float16."""

    def __init__(self, captions: Sequence[str], embeddings: np.ndarray):
        self._embeddings = embeddings
        self._places = {caption: place for place, caption in enumerate(captions)}

    def __getitem__(self, caption: str) -> np.ndarray:
        return self._embeddings[self._places[caption]]


def open_cache(settings) -> Store:
    """Return where the settings keep what frozen parts make: as told, else beside the data, else in the output."""
    if settings.cache:
        return open_store(settings.cache)
    beside = open_store(f"{settings.data.rstrip('/')}-latents")
    try:
        beside.require_writable()
        return beside
    except InputError:
        return open_store(settings.output).child("cache")


def moments_name(records: Records, vae_digest: str, resolution: int) -> str:
    """Return the name of the latents of these pictures by this autoencoder at this size."""
    return f"moments-{records.digest()[:16]}-{vae_digest[:16]}-{resolution}"


def embeddings_name(captions: Sequence[str], text_encoder_digest: str, tokenizer_digest: str) -> str:
    """Return the name of the embeddings of these captions by this text encoder and tokenizer."""
    digest = hashlib.sha256("\0".join(captions).encode()).hexdigest()
    return f"captions-{digest[:16]}-{text_encoder_digest[:16]}-{tokenizer_digest[:16]}"


def fill(
    store: Store, name: str, rows: int, make: Callable[[range], np.ndarray], share: tuple[int, int] = (0, 1)
) -> None:
    """Compute the parts of a table of `rows` arrays that are not in the store yet, each written whole or not at all.

    `make` returns the arrays of a range of rows, stacked, float16. `share` (k, n): of n that do this together, this is the k-th.
    """
    parts = math.ceil(rows / PART_ROWS)
    for part in range(share[0], parts, share[1]):
        if store.exists(_key(name, part)):
            continue
        arrays = make(range(part * PART_ROWS, min((part + 1) * PART_ROWS, rows)))
        shape = ",".join(str(side) for side in arrays.shape[1:])
        schema = pa.schema([("array", pa.binary())], metadata={b"shape": shape.encode()})
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table([[one.tobytes() for one in arrays]], schema=schema), sink, compression="none")
        store.put(_key(name, part), sink.getvalue().to_pybytes())
        logger.info("%s: part %d of %d kept", store.url_of(name), part + 1, parts)


def read(store: Store, name: str, rows: int) -> np.ndarray:
    """Return what `fill` kept, (rows, ...) float16."""
    whole, start = None, 0
    for part in range(math.ceil(rows / PART_ROWS)):
        table = pq.read_table(pa.BufferReader(store.get(_key(name, part))))
        if whole is None:
            shape = tuple(int(side) for side in table.schema.metadata[b"shape"].split(b","))
            whole = np.empty((rows, *shape), np.float16)
        for value in table["array"]:
            whole[start] = np.frombuffer(value.as_buffer(), np.float16).reshape(whole.shape[1:])
            start += 1
    return whole


def _key(name: str, part: int) -> str:
    return f"{name}/part-{part:05d}.parquet"


@torch.no_grad()
def encode_pictures(records: Records, rows: range, vae: AutoencoderKL, resolution: int) -> np.ndarray:
    """Return the latents' mean and log variance of pictures and their mirror images: (n, 2, 2c, h, w) float16."""
    parts = []
    for some in _some(rows):
        pixels = torch.stack([pixels_of(records, row, resolution) for row in some]).to(vae.device)
        both = [encode_moments(vae, seen) for seen in (pixels, pixels.flip(-1))]
        parts.append(torch.stack(both, 1).half().cpu().numpy())
    return np.concatenate(parts)


def pixels_of(records: Records, row: int, resolution: int) -> torch.Tensor:
    """Return a picture as the autoencoder takes it, (3, resolution, resolution) in [-1, 1]."""
    return square(TF.to_image(records.image(row)), resolution).float() / 127.5 - 1


def encode_moments(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Return mean and log variance of the latents, (b, 2c, h, w)."""
    distribution = vae.encode(pixels).latent_dist
    return torch.cat([distribution.mean, distribution.logvar], 1)


@torch.no_grad()
def encode_captions(
    captions: Sequence[str], rows: range, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel
) -> np.ndarray:
    """Return the embeddings of captions, (m, n, d) float16."""
    parts = []
    for some in _some(rows):
        ids = tokenize_with_markers(tokenizer, [captions[row] for row in some], lost="drop").input_ids
        parts.append(text_encoder(ids.to(text_encoder.device)).last_hidden_state.half().cpu().numpy())
    return np.concatenate(parts)


def _some(rows: range) -> list[range]:
    return [rows[start : start + AT_ONCE] for start in range(0, len(rows), AT_ONCE)]
