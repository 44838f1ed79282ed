"""A clock of how long a process has been running: the time in which it was stopped (SIGSTOP) does not count."""

import threading
import time

TICK_SECONDS = 0.2
LONGEST_TICK = 1.0
"""What a tick counts at most: one that took longer was a stop."""


class RunningClock:
    """Counts down a running time and, beside it, a wall time; the earlier of the two ends it.

    Args:
        running: seconds of running time.
        wall_end: time of day (`time.time()`) at which it ends in any case.
    """

    def __init__(self, running: float, wall_end: float = float("inf")):
        self.running, self.wall_end = running, wall_end
        self.ran = 0.0
        self._wall_start = time.time()
        threading.Thread(target=self._tick, daemon=True).start()

    def _tick(self) -> None:
        last = time.monotonic()
        while True:
            time.sleep(TICK_SECONDS)
            now = time.monotonic()
            self.ran += min(now - last, LONGEST_TICK)
            last = now

    def left(self) -> float:
        """Seconds until the earlier of the two ends; negative after it."""
        return min(self.running - self.ran, self.wall_end - time.time())

    def has(self, seconds: float) -> bool:
        """Whether there is time for something that takes so long."""
        return self.left() > seconds

    def progress(self) -> float:
        """How much of the time is over, 0 to 1, by whichever of the two ends first."""
        wall = (time.time() - self._wall_start) / max(1e-9, self.wall_end - self._wall_start)
        return min(1.0, max(self.ran / self.running, wall))
