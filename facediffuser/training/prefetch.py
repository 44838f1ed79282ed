"""Batches decoded and augmented by background processes and copied to the device ahead of the step that uses them."""

import threading
from collections.abc import Iterable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from facediffuser.errors import InputError
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
        An iterator over `Batch` on the CPU; it raises InputError at a batch with a row that cannot be used.
    """
    loader = DataLoader(
        _BatchesOrErrors(batches),
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
    # The processes start now, not when the first batch is asked for.
    return _raising(iter(loader))


class _BatchesOrErrors(Dataset):
    """Returns an InputError as a value: one that a loader process raises comes out with a traceback for its text."""

    def __init__(self, batches: Batches):
        self._batches = batches

    def __getitem__(self, position: int) -> Batch | InputError:
        try:
            return self._batches[position]
        except InputError as error:
            return error


def _raising(made: Iterator[Batch | InputError]) -> Iterator[Batch]:
    for one in made:
        if isinstance(one, InputError):
            raise one
        yield one


class DeviceBatches(Iterator[Batch]):
    """Batches on the training device; on a GPU the next one is copied while the current one is computed.

    Args:
        batches: batches on the CPU, in page-locked memory for copies that run beside computation.
        device: the training device.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device):
        self._batches, self._device = batches, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: Batch | None = None

    def __next__(self) -> Batch:
        if self._stream is None:
            return next(self._batches).to(self._device)
        if self._copied is None:
            self._copied = self._copy()
        batch, self._copied = self._copied, None
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        # The allocator must not give the batch's memory to the copies before the computation that reads it is done.
        batch.record_stream(current)
        return batch

    def start_next(self) -> None:
        """Start the copy of the next batch, if there is one; called when the current batch's computation is queued."""
        if self._stream is not None and self._copied is None:
            try:
                self._copied = self._copy()
            except StopIteration:
                return

    def _copy(self) -> Batch:
        batch = next(self._batches)
        with torch.cuda.stream(self._stream):
            return batch.to(self._device)


def _drop_inherited_exit_hooks(number: int) -> None:
    """Clear exit hooks that the parent's libraries (Prefect among them) registered: their threads do not exist here.

    They would raise at exit, which the DataLoader reports as a worker that died.
    """
    getattr(threading, "_threading_atexits", []).clear()


def _identity(one: Batch | InputError) -> Batch | InputError:
    return one
