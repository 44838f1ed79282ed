"""Embeddings of prompts and subjects, which the models are conditioned on: each is computed once per worker."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from cachetools import LRUCache

from facediffuser.dataset.reading import read_columns
from facediffuser.dataset.references import References, load_references, references_marks, references_of
from facediffuser.dataset.schema import SUBJECTS_KEY
from facediffuser.errors import InputError
from facediffuser.scoring.face_labels import Gallery, gallery_of
from facediffuser.scoring.identity import subject_embedding
from facediffuser.storage import Store

MAX_ENTRIES = 512


class ConditionCache:
    """Embeddings by prompt and by subject; of each kind the `MAX_ENTRIES` used last are kept.

    Everything is encoded alone, never in a batch: what a row is conditioned on must not depend on the rows a worker
    happened to see before.
    """

    def __init__(
        self,
        pipeline,
        store: Store,
        fingerprint: str,
        with_subjects: bool,
        references: pa.Table | None = None,
        negative_prompt: str = "",
        references_key: str = SUBJECTS_KEY,
        plan_keys: Sequence[str] = (),
    ):
        self.pipeline, self.store, self.fingerprint, self.with_subjects = pipeline, store, fingerprint, with_subjects
        self.given, self.references_key, self.plan_keys = references, references_key, plan_keys
        self.null = pipeline.encode_prompt(negative_prompt)
        self._texts: LRUCache[str, torch.Tensor] = LRUCache(MAX_ENTRIES)
        self._fused: LRUCache[tuple, torch.Tensor] = LRUCache(MAX_ENTRIES)
        self._references: dict[str, References] = {}
        self._checked = False
        self._subjects: LRUCache[str, tuple[torch.Tensor | None, np.ndarray]] = LRUCache(MAX_ENTRIES)

    def open(self, rows: list[dict[str, Any]]) -> None:
        """Fetch the references that the rows of a shard need; a store that fails fails here, not in a row."""
        names = {name for row in rows for name in row["subject_ids"]}
        kept = {name: self._references[name] for name in names if name in self._references}
        self._references = kept | self._load(names - kept.keys())

    def _load(self, names: set[str]) -> dict[str, References]:
        if self.given is not None:
            return references_of(self.given, names)
        if not self._checked:
            marks = references_marks(self.store, self.references_key)
            if self.fingerprint not in marks:
                raise InputError(
                    f"{self.store.url_of(self.references_key)}: of another run ({(marks or ['none'])[0][:12]}), begun at the "
                    "same time; give another output"
                )
            self._checked = True
        return load_references(self.store, names, self.references_key)

    def embeddings(self, rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Return the embeddings that b rows are conditioned on.

        Returns:
            The plain text, (b, n, d); the subject-augmented text, (b, n, d), None where the method has no subjects; the
            empty or negative text, (1, n, d).
        """
        text = torch.cat([self._text(row["prompt"]) for row in rows])
        fused = torch.cat([self._augmented(row) for row in rows]) if self.with_subjects else None
        return text, fused, self.null

    def identities(self, subject_ids: list[str]) -> list[np.ndarray]:
        """Return the unit vector (d,) that each subject's identity is measured against."""
        return [self._subject(name)[1] for name in subject_ids]

    @functools.cached_property
    def gallery(self) -> Gallery:
        """Everyone whom the run shows, for the faces' labels."""
        columns = ["subject_id", "identity"]
        if self.given is not None:
            return gallery_of(self.given.select(columns).to_pylist())
        # Whoever was added to the dataset since is not among them: a shard generated again must be the same bytes.
        shown = set()
        for key in self.plan_keys:
            shown |= set(
                read_columns(self.store, key, ["subject_ids"])["subject_ids"]
                .combine_chunks()
                .flatten()
                .unique()
                .to_pylist()
            )
        rows = read_columns(self.store, self.references_key, columns).to_pylist()
        return gallery_of([row for row in rows if row["subject_id"] in shown])

    def _text(self, prompt: str) -> torch.Tensor:
        return _get_or_compute(self._texts, prompt, lambda: self.pipeline.encode_prompt([prompt]))

    def _augmented(self, row: dict[str, Any]) -> torch.Tensor:
        names, prompt = tuple(row["subject_ids"]), row["prompt"]

        def fuse() -> torch.Tensor:
            embeds = torch.stack([self._subject(name)[0] for name in names])
            return self.pipeline.fuse([prompt], [embeds], self._text(prompt))

        return _get_or_compute(self._fused, (names, prompt), fuse)

    def _subject(self, name: str) -> tuple[torch.Tensor | None, np.ndarray]:
        def load() -> tuple[torch.Tensor | None, np.ndarray]:
            found = self._references[name]
            # The model takes one embedding per subject; of several references it is their mean.
            shown = self.pipeline.encode_references(found.images).mean(dim=0) if self.with_subjects else None
            return shown, subject_embedding(found.identities)

        return _get_or_compute(self._subjects, name, load)


def _get_or_compute(cache: LRUCache, key: Any, compute: Callable[[], Any]) -> Any:
    if key in cache:
        return cache[key]
    cache[key] = value = compute()
    return value
