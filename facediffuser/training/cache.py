"""Latents and text embeddings of the frozen parts, computed once and kept as Parquet.

    <cache>/latents-<key>/<split>/part-00000.parquet      a file for each prepared one, rows in the same order

The key is a digest of the frozen parts and the resolution; a file's name is that of the prepared one, and its metadata
tells which rows it was made of.
"""

import hashlib
import io
import logging
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTokenizer

from facediffuser.errors import InputError
from facediffuser.storage import Store, open_store
from facediffuser.subject import tokenize_with_markers
from facediffuser.training.frame import Frame
from facediffuser.training.prepared import Prepared, PreparedPart, decode_image, read_part

logger = logging.getLogger(__name__)

FORMAT = "1"
SOURCE_KEY = b"facediffuser_prepared_part"
FROZEN = ("vae", "text_encoder", "tokenizer")


def cache_key(digests: dict[str, str], resolution: int) -> str:
    """Return the name of the cache of one base model's frozen parts at a resolution."""
    text = repr([FORMAT, resolution, [digests.get(name) for name in FROZEN]])
    return f"latents-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def choose_cache(prepared: Prepared, given: str | None, output: str) -> str:
    """Return the URL where caches are kept: the given one, beside the data, or in the output if that is read-only."""
    if given:
        open_store(given).require_writable()
        return given
    beside = f"{prepared.store.url.rstrip('/')}/cache"
    try:
        open_store(beside).require_writable()
    except InputError:
        logger.info("%s cannot be written; latents go to the output", prepared.store.url)
        return f"{output.rstrip('/')}/cache"
    return beside


class FrozenParts:
    """The frozen VAE and text encoder, and what they make of photographs and captions."""

    def __init__(self, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, device: torch.device):
        self.vae = vae.to(device).eval().requires_grad_(False)
        self.text_encoder = text_encoder.to(device).eval().requires_grad_(False)
        self.tokenizer, self.device = tokenizer, device

    @torch.no_grad()
    def moments(self, images: torch.Tensor) -> torch.Tensor:
        """Return the latents' means and log variances of images in [-1, 1]: (b, 2c, h, w) float16."""
        moments = self.vae.encode(images.to(self.device, self.vae.dtype)).latent_dist.parameters
        # float16 ends at 65504; log variances are clamped to [-30, 20] by the VAE's own distribution anyway.
        return moments.float().cpu().half()

    @torch.no_grad()
    def embeddings(self, captions: list[str]) -> torch.Tensor:
        """Return the captions' embeddings, (b, n, d) float16."""
        tokens = tokenize_with_markers(self.tokenizer, captions, lost="drop").input_ids.to(self.device)
        return self.text_encoder(tokens).last_hidden_state.float().cpu().half()


def fill_cache(
    prepared: Prepared,
    cache: Store,
    parts: list[PreparedPart],
    resolution: int,
    batch_size: int,
    load: Callable[[], FrozenParts],
    report: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Make the cache files that are missing of `parts`; return how many. `load` is called only if there are any.

    `report(done, total)` counts files.
    """
    there = {info.key for info in cache.list()}
    missing = [part for part in parts if part.key not in there or not _is_of(cache, part)]
    frozen = load() if missing else None
    for number, part in enumerate(missing):
        table = _encode_part(prepared.store, part, frozen, resolution, batch_size)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="NONE", use_dictionary=False, write_statistics=False)
        cache.put(part.key, buffer.getvalue())
        report(number + 1, len(missing))
    return len(missing)


def _is_of(cache: Store, part: PreparedPart) -> bool:
    system, root = cache.arrow()
    with system.open_input_file(f"{root}/{part.key}") as file:
        return (pq.read_schema(file).metadata or {}).get(SOURCE_KEY) == part.version.encode()


def _encode_part(store: Store, part: PreparedPart, frozen: FrozenParts, resolution: int, batch_size: int) -> pa.Table:
    moments, embeddings, ids = [], [], []
    for batch in _batches(read_part(store, part.key, ["image_id", "image", "caption"]), batch_size):
        images = []
        for row in batch:
            picture = decode_image(row["image"]["bytes"])
            images.append(Frame(*picture.size, resolution).image(picture))
        pixels = torch.stack(images)
        moments.append(torch.stack([frozen.moments(pixels), frozen.moments(pixels.flip(-1))], dim=1))
        embeddings.append(frozen.embeddings([row["caption"] for row in batch]))
        ids += [row["image_id"] for row in batch]
    columns = {"image_id": pa.array(ids)}
    shapes = {}
    for name, values in (("moments", torch.cat(moments)), ("text", torch.cat(embeddings))):
        shapes[f"shape_{name}"] = repr(tuple(values.shape[1:]))
        flat = pa.array(values.numpy().reshape(-1).astype(np.float16))
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, values[0].numel())
    return pa.table(columns).replace_schema_metadata({SOURCE_KEY: part.version, **shapes})


def _batches(stream: Iterator[pa.RecordBatch], size: int) -> Iterator[list[dict]]:
    waiting: list[dict] = []
    for batch in stream:
        waiting += batch.to_pylist()
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
    if waiting:
        yield waiting
