"""The latents cache as a stage: the units are the parts of its arrays, computed before a training that lacks them.

A base model that is on the workers' machines only is not looked at here: then the workers of the training fill the cache.
"""

import functools
import math
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from facediffuser.batch_stage import Counts, Stage, Unit, WorkerPool
from facediffuser.modelfolder import model_digests, resolve_base
from facediffuser.storage import Store, open_store
from facediffuser.training import latent_cache
from facediffuser.training.records import Records, distinct_captions, split_digest, split_keys
from facediffuser.training.train_settings import TrainSettings

PICTURES, CAPTIONS = "pictures", "captions"


def latent_stage(settings: TrainSettings, pool: WorkerPool) -> Stage:
    """Return the stage that computes what the cache of a training lacks.

    Args:
        settings: settings of a single role; the base is on this machine.
        pool: the workers.
    """
    cache, digests = latent_cache.open_cache(settings), model_digests(resolve_base(settings.base))
    resolution = settings.recipe().resolution
    every: list[Unit] = []
    identity: dict[str, Any] = {}
    for split in _splits(settings):
        data = open_store(settings.data)
        table = _captions(data, split)
        captions = distinct_captions(table)
        moments = latent_cache.moments_name(split_digest(data, split), digests["vae"], resolution)
        texts = latent_cache.embeddings_name(captions, digests["text_encoder"], digests["tokenizer"])
        for kind, name, rows in ((PICTURES, moments, len(table)), (CAPTIONS, texts, len(captions))):
            identity[f"{split} {kind}"] = name
            for part in range(math.ceil(rows / latent_cache.PART_ROWS)):
                span = latent_cache.part_rows(part, rows)
                every.append(Unit(latent_cache.part_key(name, part), len(span), (split, kind, name, rows, part)))
    units = [unit for unit in every if not cache.exists(unit.key)]
    return Stage(
        f"Latents {settings.role}", "rows", identity, units, functools.partial(LatentWorker, settings, pool.cpus),
        finished=sum(unit.rows for unit in every) - sum(unit.rows for unit in units), pool=pool,
    )  # fmt: skip


def _splits(settings: TrainSettings) -> tuple[str, ...]:
    """The splits that a training reads: test only where it validates on it."""
    test = settings.validate_every and open_store(settings.data).list("test/")
    return ("train", "test") if test else ("train",)


def _captions(store: Store, split: str) -> pa.Table:
    """The captions of a split's rows, read without the pictures."""
    tables = []
    for key in split_keys(store, split):
        with store.open(key) as source:
            tables.append(pq.read_table(source, columns=["caption"]))
    return pa.concat_tables(tables)


class LatentWorker:
    """Computes parts of the cache; loads the frozen encoders and the rows of a split when they are first needed."""

    def __init__(self, settings: TrainSettings, threads: int):
        torch.set_num_threads(threads)
        self.settings, self.base = settings, resolve_base(settings.base)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.records = functools.cache(functools.partial(Records, settings.data))

    def __call__(self, unit: Unit) -> Counts:
        split, kind, name, rows, part = unit.data
        records = self.records(split)
        if kind == PICTURES:
            resolution = self.settings.recipe().resolution
            compute = functools.partial(latent_cache.encode_pictures, records, vae=self.vae, resolution=resolution)
        else:
            compute = functools.partial(
                latent_cache.encode_captions,
                records.captions(),
                tokenizer=self.tokenizer,
                text_encoder=self.text_encoder,
            )
        latent_cache.write_part(latent_cache.open_cache(self.settings), name, rows, part, compute)
        return {"rows": unit.rows}

    @functools.cached_property
    def vae(self):
        """The frozen autoencoder."""
        return latent_cache.load_vae(self.base).to(self.device)

    @functools.cached_property
    def text_encoder(self):
        """The frozen text encoder."""
        return latent_cache.load_text_encoder(self.base).to(self.device)

    @functools.cached_property
    def tokenizer(self):
        """The base's tokenizer."""
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(self.base / "tokenizer")
