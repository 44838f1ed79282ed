"""Batches made by processes ahead of their use, so that training does not wait for pictures to be decoded and varied."""

import threading
from collections.abc import Iterable, Iterator

from torch.utils.data import DataLoader

from facediffuser.training.batches import Batch, Batches

AHEAD = 4
"""Batches that each process has ready or in work."""


def ahead(batches: Batches, places: Iterable[int], loaders: int, pin: bool = False) -> Iterator[Batch]:
    """Return the batches at some places, in order, made by `loaders` processes; 0: when they are asked for, by this one.

    What is in a batch does not depend on how many processes make them. `pin`: they are wanted on a GPU.
    """
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=places,
        num_workers=loaders,
        collate_fn=_as_it_is,
        pin_memory=pin,
        # Forked, so that all of them share the records in memory.
        multiprocessing_context="fork" if loaders else None,
        prefetch_factor=AHEAD if loaders else None,
        worker_init_fn=_forget_threads,
    )
    return iter(loader)


def _forget_threads(number: int) -> None:
    """Drop what libraries of the parent, Prefect among them, want done at the end: their threads are not in this process.

    Left as they are they fail there, and the loader takes that for a process that died.
    """
    getattr(threading, "_threading_atexits", []).clear()


def _as_it_is(batch: Batch) -> Batch:
    return batch
