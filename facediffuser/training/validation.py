"""The batches of one split of the prepared data, with the cache of what frozen parts make of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from facediffuser.training import frozen
from facediffuser.training.batches import Batches
from facediffuser.training.denoisers import Parts, latent_shape
from facediffuser.training.records import Records
from facediffuser.training.train_settings import TrainSettings
from facediffuser.training.worker_context import Worker


def split_batches(settings: TrainSettings, parts: Parts, split: str, worker: Worker | None = None) -> Batches:
    """Return the batches of one split.

    What the cache lacks is computed and kept; of several workers, each of which has to call this, each does its share.
    """
    worker, recipe = worker or Worker(device=str(parts.device)), settings.recipe()
    records = Records(settings.data, split)
    made: dict[str, Any] = {}
    if settings.precompute:
        made = _precomputed(settings, parts, records, worker)
    else:
        parts.vae.to(worker.device)
        parts.text_encoder.to(worker.device)
    size = parts.denoiser.image_encoder.config.image_size if settings.role == "sdm" else 0
    shape = latent_shape(parts.vae, recipe.resolution)
    return Batches(recipe, settings.seed, records, shape, parts.tokenizer, size, **made)


def _precomputed(settings: TrainSettings, parts: Parts, records: Records, worker: Worker) -> dict[str, Any]:
    cache, captions = frozen.open_cache(settings), records.captions()
    digests, share, resolution = parts.digests, (worker.rank, worker.count), settings.recipe().resolution
    moments = frozen.moments_name(records, digests["vae"], resolution)
    texts = frozen.embeddings_name(captions, digests["text_encoder"], digests["tokenizer"])
    with _visiting(parts.vae, worker.device) as vae:
        encode = partial(frozen.encode_pictures, records, vae=vae, resolution=resolution)
        frozen.fill(cache, moments, len(records), encode, share)
    with _visiting(parts.text_encoder, worker.device) as encoder:
        encode = partial(frozen.encode_captions, captions, tokenizer=parts.tokenizer, text_encoder=encoder)
        frozen.fill(cache, texts, len(captions), encode, share)
    worker.wait_for_all()
    embeddings = frozen.CaptionEmbeddings(captions, frozen.read(cache, texts, len(captions)))
    return {"moments": frozen.read(cache, moments, len(records)), "texts": embeddings}


@contextmanager
def _visiting(module: nn.Module, device: str) -> Iterator[nn.Module]:
    """A frozen part on the device for as long as the block lasts: the memory is wanted for what trains."""
    yield module.to(device)
    module.cpu()
