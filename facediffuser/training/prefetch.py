"""Batches decoded and augmented by background processes, ahead of the training step that uses them."""

import threading
from collections.abc import Iterable, Iterator

from torch.utils.data import DataLoader

from facediffuser.training.batches import Batch, Batches

PREFETCH_FACTOR = 4
"""Batches that each loader process holds ready or is working on."""


def prefetch_batches(
    batches: Batches, positions: Iterable[int], loaders: int, pin_memory: bool = False
) -> Iterator[Batch]:
    """Yield the batches at the given positions, in order.

    The content of a batch does not depend on the number of processes.

    Args:
        batches: the sequence of batches of one split.
        positions: index of each batch's first image in the endless sequence of images.
        loaders: processes that prepare batches, >= 0; with 0 this process prepares each batch when it is asked for.
        pin_memory: allocate page-locked memory, for copies to a GPU that run beside its computation.

    Returns:
        An iterator over `Batch` on the CPU.
    """
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=positions,
        num_workers=loaders,
        collate_fn=_identity,
        pin_memory=pin_memory,
        # Forked, so that all of them share the records in memory.
        multiprocessing_context="fork" if loaders else None,
        prefetch_factor=PREFETCH_FACTOR if loaders else None,
        worker_init_fn=_drop_inherited_exit_hooks,
    )
    return iter(loader)


def _drop_inherited_exit_hooks(number: int) -> None:
    """Clear exit hooks that the parent's libraries (Prefect among them) registered: their threads do not exist here.

    They would raise at exit, which the DataLoader reports as a worker that died.
    """
    getattr(threading, "_threading_atexits", []).clear()


def _identity(batch: Batch) -> Batch:
    return batch
