"""A timer that sums the seconds spent in each named stage of some work."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class StageTimer:
    """Sums seconds by stage: `with timer("read"): ...`. Stages on two threads may overlap.

    Attributes:
        seconds: of each stage so far.
    """

    def __init__(self):
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._started = time.monotonic()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] += time.monotonic() - started

    def elapsed(self) -> float:
        """Return the seconds since the timer was created."""
        return time.monotonic() - self._started
