"""What ends a training on Ray Train at an error that is for the user. Imported by the process that watches the workers."""

from typing import Any

import ray
from ray.train import UserCallback


class EndTraining(UserCallback):
    """Ends a training, instead of starting its workers anew, when one of them failed with an error for the user.

    The other workers may wait for that one in a collective operation, which they would do for half an hour.

    Args:
        metrics: the actor that keeps the error, `TrainNumbers`.
    """

    def __init__(self, metrics: Any):
        self.metrics = metrics

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise the error for the user, if there is one: what a callback raises is never retried. Others are Ray's."""
        failure = ray.get(self.metrics.failure.remote())
        if failure is not None:
            raise failure
