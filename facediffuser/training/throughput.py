"""Throughput of a training run: images per second, and the share of time spent waiting for batches."""

from contextlib import AbstractContextManager

from facediffuser.stage_timer import StageTimer


class Throughput:
    """Counts training steps and the time they take.

    Args:
        images_per_step: images of one optimiser step, all workers together.
    """

    def __init__(self, images_per_step: int):
        self.images_per_step = images_per_step
        self._steps, self._timer = 0, StageTimer()

    def waiting(self) -> AbstractContextManager[None]:
        """Count the time of the block as waiting for a batch."""
        return self._timer("waiting")

    def paused(self) -> AbstractContextManager[None]:
        """Leave the time of the block out: it is spent on something else than training."""
        return self._timer("paused")

    def step(self) -> None:
        """Count one finished step."""
        self._steps += 1

    def rates(self) -> dict[str, float]:
        """Return `images_per_second` and `waiting` (share of the time, 0..1) since the last call, and start over."""
        seconds = max(self._timer.elapsed() - self._timer.seconds["paused"], 1e-9)
        rates = {
            "images_per_second": self._steps * self.images_per_step / seconds,
            "waiting": self._timer.seconds["waiting"] / seconds,
        }
        self._steps, self._timer = 0, StageTimer()
        return rates
