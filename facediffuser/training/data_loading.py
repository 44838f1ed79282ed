"""The batches of one split of the prepared data, and the cache of latents and caption embeddings they read."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from facediffuser.training import latent_cache
from facediffuser.training.batches import Batches
from facediffuser.training.denoisers import Parts, latent_shape
from facediffuser.training.records import Records
from facediffuser.training.train_settings import TrainSettings
from facediffuser.training.worker_context import Worker


def split_batches(settings: TrainSettings, parts: Parts, split: str, worker: Worker | None = None) -> Batches:
    """Return the batches of one split, after computing what the cache lacks.

    With several workers each of them has to call this: each computes its share of the cache, then waits for the others.

    Args:
        settings: data, recipe and cache location of a single role.
        parts: the loaded base model; its VAE and text encoder visit the device only while the cache is filled.
        split: `train` or `test`.
        worker: this process among the workers; alone on the denoiser's device by default.

    Raises:
        InputError: the data has no such split, no rows, or another schema version.
    """
    worker, recipe = worker or Worker(device=str(parts.device)), settings.recipe()
    records = Records(settings.data, split)
    cached: dict[str, Any] = {}
    if settings.precompute:
        cached = _cached_inputs(settings, parts, records, worker)
    else:
        parts.vae.to(worker.device)
        parts.text_encoder.to(worker.device)
    size = parts.denoiser.image_encoder.config.image_size if settings.role == "sdm" else 0
    shape = latent_shape(parts.vae, recipe.resolution)
    return Batches(recipe, settings.seed, records, shape, parts.tokenizer, size, **cached)


def _cached_inputs(settings: TrainSettings, parts: Parts, records: Records, worker: Worker) -> dict[str, Any]:
    """Return the `moments` and `texts` arguments of Batches, read from the cache once it is complete."""
    cache, captions = latent_cache.open_cache(settings), records.captions()
    digests, share, resolution = parts.digests, (worker.rank, worker.count), settings.recipe().resolution
    moments = latent_cache.moments_name(records.digest(), digests["vae"], resolution)
    texts = latent_cache.embeddings_name(captions, digests["text_encoder"], digests["tokenizer"])
    with _on_device(parts.vae, worker.device) as vae:
        encode = partial(latent_cache.encode_pictures, records, vae=vae, resolution=resolution)
        latent_cache.write_missing_parts(cache, moments, len(records), encode, share)
    with _on_device(parts.text_encoder, worker.device) as encoder:
        encode = partial(latent_cache.encode_captions, captions, tokenizer=parts.tokenizer, text_encoder=encoder)
        latent_cache.write_missing_parts(cache, texts, len(captions), encode, share)
    worker.wait_for_all()
    embeddings = latent_cache.CaptionEmbeddings(captions, latent_cache.read_array(cache, texts, len(captions)))
    return {"moments": latent_cache.read_array(cache, moments, len(records)), "texts": embeddings}


@contextmanager
def _on_device(module: nn.Module, device: str) -> Iterator[nn.Module]:
    """Keep a frozen module on the device only during the block: its memory is needed for training."""
    yield module.to(device)
    module.cpu()
