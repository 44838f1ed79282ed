"""The driver of the tasks that are given none: Ray's, unless `driven_by` names another for what runs inside it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from facediffuser.tasks.driver import Driver
from facediffuser.tasks.ray_driver import RayDriver

_chosen: ContextVar[Driver | None] = ContextVar("driver", default=None)


def chosen_driver() -> Driver:
    """Return the driver that `driven_by` names, else one that connects to Ray."""
    return _chosen.get() or RayDriver()


@contextmanager
def driven_by(driver: Driver) -> Iterator[None]:
    """Let flows and tasks that are called inside do their stages with this driver.

    ```
    with driven_by(LocalDriver()):
        generate_dataset(settings)
    ```

    Training runs on Ray Train, whatever the driver.
    """
    before = _chosen.set(driver)
    try:
        yield
    finally:
        _chosen.reset(before)
