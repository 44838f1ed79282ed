"""How fast a run is."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Speed:
    """Counts steps and tells images a second, and the share of the time that is spent waiting for batches.

    `images`: of one step, all workers' together.
    """

    def __init__(self, images: int):
        self.images = images
        self._restart()

    def _restart(self) -> None:
        self._steps, self._waited, self._since = 0, 0.0, time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A batch is waited for."""
        started = time.monotonic()
        yield
        self._waited += time.monotonic() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Something else than training is done, which does not count."""
        started = time.monotonic()
        yield
        self._since += time.monotonic() - started

    def step(self) -> None:
        """A step is done."""
        self._steps += 1

    def since_last(self) -> dict[str, float]:
        """Return `images_per_second` and `waiting` in [0, 1] since this was last asked for."""
        seconds = max(time.monotonic() - self._since, 1e-9)
        numbers = {"images_per_second": self._steps * self.images / seconds, "waiting": self._waited / seconds}
        self._restart()
        return numbers
