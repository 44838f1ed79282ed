"""Cache of the frozen encoders' outputs as Parquet: VAE latents of the pictures, text embeddings of the captions."""

import fcntl
import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torchvision.transforms.v2 import functional as TF

from facediffuser.errors import InputError
from facediffuser.number_words import counted
from facediffuser.prompt_tokens import tokenize_with_markers
from facediffuser.storage import Store, open_store
from facediffuser.storage.opening import default_cache
from facediffuser.storage.reading import DamagedError, reading
from facediffuser.training.records import Records, square

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

logger = logging.getLogger(__name__)

PART_ROWS = 1024
"""Rows of a cache file: at most so many are lost when a run is killed while it fills the cache."""
ENCODE_BATCH = 32
HELD_BYTES = 256 * 2**20
"""Arrays up to this size are held in memory; larger ones are mapped from a local file."""
REMOVE = "remove it, so that it is computed again"
"""What can be done about a damaged file of the cache."""


class CaptionEmbeddings:
    """Text embeddings of a split's captions and of the empty caption: `embeddings[caption]` is (n, d) float16.

    Args:
        captions: distinct captions, in the order of the rows of `embeddings`.
        embeddings: (captions, n, d) float16.
    """

    def __init__(self, captions: Sequence[str], embeddings: np.ndarray):
        self._embeddings = embeddings
        self._places = {caption: place for place, caption in enumerate(captions)}

    def __getitem__(self, caption: str) -> np.ndarray:
        return self._embeddings[self._places[caption]]


def open_cache(settings) -> Store:
    """Return the store of the cache: the one in the settings, else beside the data, else in the run's output.

    Raises:
        InputError: the location in the settings is not a URL or folder that can be opened.
    """
    if settings.cache:
        return open_store(settings.cache)
    beside_data = open_store(f"{settings.data.rstrip('/')}-latents")
    try:
        beside_data.require_writable()
        return beside_data
    except InputError:
        return open_store(settings.output).child("cache")


def moments_name(digest: str, vae_digest: str, resolution: int) -> str:
    """Return the cache key of the latents of pictures.

    Args:
        digest: that of the pictures' files, see `split_digest`.
        vae_digest: the VAE's SHA-256.
        resolution: the side of the pictures in px.
    """
    return f"moments-{digest[:16]}-{vae_digest[:16]}-{resolution}"


def embeddings_name(captions: Sequence[str], text_encoder_digest: str, tokenizer_digest: str) -> str:
    """Return the cache key of the embeddings: it covers the captions and the SHA-256 of text encoder and tokenizer."""
    digest = hashlib.sha256("\0".join(captions).encode()).hexdigest()
    return f"captions-{digest[:16]}-{text_encoder_digest[:16]}-{tokenizer_digest[:16]}"


def write_missing_parts(
    store: Store, name: str, rows: int, compute: Callable[[range], np.ndarray], share: tuple[int, int] = (0, 1)
) -> None:
    """Compute the parts of an array that the store lacks; each is one object, written whole or not at all.

    Args:
        store: the cache.
        name: cache key of the array.
        rows: length of the array.
        compute: returns the rows of a range, stacked along the first axis, float16.
        share: (rank, workers): this worker computes every `workers`-th part, from part `rank` on.
    """
    for part in range(share[0], math.ceil(rows / PART_ROWS), share[1]):
        if not store.exists(part_key(name, part)):
            write_part(store, name, rows, part, compute)


def write_part(store: Store, name: str, rows: int, part: int, compute: Callable[[range], np.ndarray]) -> None:
    """Compute and write one part of an array.

    Args:
        store: the cache.
        name: the array's key.
        rows: how many rows the array has.
        part: the part's number, from 0.
        compute: returns an array (m, ...) for a range of m rows.
    """
    arrays = compute(part_rows(part, rows))
    shape = ",".join(str(side) for side in arrays.shape[1:])
    schema = pa.schema([("array", pa.binary())], metadata={b"shape": shape.encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table([[row.tobytes() for row in arrays]], schema=schema), sink, compression="none")
    store.put(part_key(name, part), sink.getvalue().to_pybytes())
    logger.info("%s: part %d of %d written", store.url_of(name), part + 1, math.ceil(rows / PART_ROWS))


def read_array(store: Store, name: str, rows: int, folder: Path | None = None) -> np.ndarray:
    """Return an array that `write_missing_parts` completed, (rows, ...) float16, not to be written to.

    A large one is copied once to a local file and mapped: a row is read when it is asked for, what is read may be dropped
    again, and all workers of a machine share it. So memory does not grow with the number of pictures.

    Args:
        store: the cache.
        name: cache key of the array.
        rows: its length.
        folder: where local copies lie (default: `latents` in this machine's cache).

    Raises:
        InputError: a part or the local copy is damaged.
    """
    shape = _row_shape(store, name)
    size = rows * math.prod(shape) * np.dtype(np.float16).itemsize
    if size <= HELD_BYTES:
        whole = np.empty((rows, *shape), np.float16)
        _fill(whole, store, name)
        return whole
    folder = folder or default_cache() / "latents"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{rows}.npy"
    # One process copies while its neighbours wait; the lock ends with the process that holds it.
    with open(folder / f"{path.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            logger.info("%s: copying %.1f GB of %s to this machine", path, size / 1e9, store.url_of(name))
            temporary = path.with_suffix(".unfinished")
            whole = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=(rows, *shape))
            _fill(whole, store, name)
            whole.flush()
            del whole
            temporary.replace(path)
    try:
        return np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise DamagedError(f"{path}: not readable as an array ({type(error).__name__}); {REMOVE}") from error


def _row_shape(store: Store, name: str) -> tuple[int, ...]:
    key = part_key(name, 0)
    with reading(store.url_of(key), "Parquet", REMOVE), store.open(key) as file:
        metadata = pq.read_schema(file).metadata or {}
    try:
        return tuple(int(side) for side in metadata[b"shape"].split(b","))
    except (KeyError, ValueError) as error:
        raise DamagedError(f"{store.url_of(key)}: says no shape of its rows; {REMOVE}") from error


def _fill(whole: np.ndarray, store: Store, name: str) -> None:
    for part in range(math.ceil(len(whole) / PART_ROWS)):
        key, rows = part_key(name, part), part_rows(part, len(whole))
        with reading(store.url_of(key), "Parquet", REMOVE):
            table = pq.read_table(pa.BufferReader(store.get(key)))
        size = whole[:1].nbytes
        values = [value.as_buffer() for value in table["array"]] if "array" in table.column_names else []
        if len(values) != len(rows) or any(value is None or value.size != size for value in values):
            wanted = f"{counted(len(rows), 'row')} of {counted(size, 'byte')}"
            raise DamagedError(f"{store.url_of(key)}: not {wanted}; {REMOVE}")
        for row, value in zip(rows, values, strict=True):
            whole[row] = np.frombuffer(value, np.float16).reshape(whole.shape[1:])


def part_rows(part: int, rows: int) -> range:
    """Return which of an array's `rows` rows are in a part, counted from 0."""
    return range(part * PART_ROWS, min((part + 1) * PART_ROWS, rows))


def part_key(name: str, part: int) -> str:
    """Return the key of a part of an array."""
    return f"{name}/part-{part:05d}.parquet"


def load_vae(base: Path) -> "AutoencoderKL":
    """Return the frozen autoencoder of a base model, float32."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(base / "vae").float().eval().requires_grad_(False)


def load_text_encoder(base: Path) -> "CLIPTextModel":
    """Return the frozen text encoder of a base model, float32."""
    from transformers import CLIPTextModel

    return CLIPTextModel.from_pretrained(base / "text_encoder").float().eval().requires_grad_(False)


@torch.no_grad()
def encode_pictures(records: Records, rows: range, vae: "AutoencoderKL", resolution: int) -> np.ndarray:
    """Return mean and log variance of the latents of pictures and of their mirror images.

    Args:
        records: the split's rows.
        rows: the n rows to encode.
        vae: frozen autoencoder, on the device to compute on.
        resolution: side of the square pictures, px.

    Returns:
        (n, 2, 2c, h, w) float16; the second axis is the picture and its mirror image.
    """
    parts = []
    for chunk in _chunks(rows):
        pixels = torch.stack([pixels_of(records, row, resolution) for row in chunk]).to(vae.device)
        both = [encode_moments(vae, view) for view in (pixels, pixels.flip(-1))]
        parts.append(torch.stack(both, 1).half().cpu().numpy())
    return np.concatenate(parts)


def pixels_of(records: Records, row: int, resolution: int) -> torch.Tensor:
    """Return the centre square of a row's picture as VAE input, (3, resolution, resolution) float32 in [-1, 1]."""
    return square(TF.to_image(records.image(row)), resolution).float() / 127.5 - 1


def encode_moments(vae: "AutoencoderKL", pixels: torch.Tensor) -> torch.Tensor:
    """Return mean and log variance of the latents of pixels (b, 3, H, W) in [-1, 1]: (b, 2c, h, w), mean first."""
    distribution = vae.encode(pixels).latent_dist
    return torch.cat([distribution.mean, distribution.logvar], 1)


@torch.no_grad()
def encode_captions(
    captions: Sequence[str], rows: range, tokenizer: "CLIPTokenizer", text_encoder: "CLIPTextModel"
) -> np.ndarray:
    """Return the text embeddings of `captions[row]` for m rows.

    Args:
        captions: all captions, without markers.
        rows: those to embed.
        tokenizer: of the text encoder.
        text_encoder: CLIP's.

    Returns:
        (m, n, d) float16.
    """
    parts = []
    for chunk in _chunks(rows):
        ids = tokenize_with_markers(tokenizer, [captions[row] for row in chunk], lost="drop").input_ids
        parts.append(text_encoder(ids.to(text_encoder.device)).last_hidden_state.half().cpu().numpy())
    return np.concatenate(parts)


def _chunks(rows: range) -> list[range]:
    return [rows[start : start + ENCODE_BATCH] for start in range(0, len(rows), ENCODE_BATCH)]
