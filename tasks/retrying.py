"""Retries of a scheduled run's tasks: growing delays for what passes by itself (S3, Ray), none for bad input."""

from typing import Any

import ray
from prefect import Task, runtime
from prefect.client.schemas.objects import State, TaskRun

from facediffuser.errors import InputError, UnreachableError
from facediffuser.storage import StorageError

DELAYS_S = [10.0, 30.0, 90.0, 270.0]
JITTER = 0.2
"""Share of the delay by which it varies: many runs that lost one server do not all come back at once."""


def is_transient(error: BaseException) -> bool:
    """Return whether an error may pass by itself: a store or a cluster that did not answer, a node that was lost."""
    if isinstance(error, UnreachableError):
        return True
    if isinstance(error, InputError):
        return False
    return isinstance(error, StorageError | ConnectionError | TimeoutError | ray.exceptions.RayError)


def should_retry(task: Task[..., Any], run: TaskRun, state: State) -> bool:
    """Return whether a failed task is retried: a deployment's run is, a command at a terminal says the error at once."""
    if runtime.deployment.id is None:
        return False
    error = state.result(raise_on_failure=False)
    return isinstance(error, BaseException) and is_transient(error)


RETRIES: dict[str, Any] = {
    "retries": len(DELAYS_S),
    "retry_delay_seconds": DELAYS_S,
    "retry_jitter_factor": JITTER,
    "retry_condition_fn": should_retry,
}
"""Options of `prefect.task` for every task that reaches a store or a cluster."""
