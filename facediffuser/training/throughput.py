"""Throughput of a training run: images per second, and the share of time spent waiting for batches."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Throughput:
    """Counts training steps and the time they take.

    Args:
        images_per_step: images of one optimiser step, all workers together.
    """

    def __init__(self, images_per_step: int):
        self.images_per_step = images_per_step
        self._reset()

    def _reset(self) -> None:
        self._steps, self._waited, self._since = 0, 0.0, time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting for a batch."""
        started = time.monotonic()
        yield
        self._waited += time.monotonic() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out: it is spent on something else than training."""
        started = time.monotonic()
        yield
        self._since += time.monotonic() - started

    def step(self) -> None:
        """Count one finished step."""
        self._steps += 1

    def rates(self) -> dict[str, float]:
        """Return `images_per_second` and `waiting` (share of the time, 0..1) since the last call, and start over."""
        seconds = max(time.monotonic() - self._since, 1e-9)
        rates = {
            "images_per_second": self._steps * self.images_per_step / seconds,
            "waiting": self._waited / seconds,
        }
        self._reset()
        return rates
