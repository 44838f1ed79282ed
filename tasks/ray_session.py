"""The connection to Ray: a given cluster, or one started here for as long as this process lives."""

import ipaddress
import logging
import os
import threading
import time
from typing import Any

import ray
import ray.util

from facediffuser.tasks.ray_place import HeadWatch, require_reachable, session_folder

logger = logging.getLogger(__name__)

START_TRIES = 3
# Processes that start at once. Ray takes the number of CPUs and warns of four times as many processes; on two CPUs two
# trainings side by side have more, most of them Ray's own coordinators, which wait.
MIN_STARTING_PROCESSES = 4
# Shorter than a head takes to start anew.
WATCH_S = 2.0

# Tasks of one flow may run side by side, and a process has one connection.
_connecting = threading.Lock()


def connect_ray() -> None:
    """Connect this process to Ray; a second call changes nothing.

    The cluster is the one named by the standard `RAY_ADDRESS` (`auto`, `host:6379`, `ray://host:10001`). Without it a
    local Ray is started, without a dashboard and with all its ports on the loopback address; it ends with this process.

    Raises:
        RuntimeError: a local Ray would listen on an outer address, because Ray was imported before
            `facediffuser.tasks`.
    """
    with _connecting:
        if ray.is_initialized():
            return
        address = os.environ.get("RAY_ADDRESS")
        # What Ray and its workers say is shown where Ray's own variables ask for it, as --verbose does.
        options = {
            "log_to_driver": os.environ.get("RAY_LOG_TO_DRIVER", "0") == "1",
            "logging_level": os.environ.get("RAY_LOGGER_LEVEL", "warning"),
            "ignore_reinit_error": True,
        }
        if address and address != "local":
            require_reachable(address)  # Ray itself would try for minutes
            ray.init(address=address, **options)
            head = ray.get_runtime_context().gcs_address if address == "auto" else address
            threading.Thread(target=_watch, args=(HeadWatch(head),), daemon=True).start()
        else:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            os.environ.setdefault(
                "RAY_worker_maximum_startup_concurrency", str(max(MIN_STARTING_PROCESSES, os.cpu_count() or 1))
            )
            if folder := session_folder():
                os.environ["RAY_TMPDIR"] = folder
            logger.info("Ray: starting it on this machine")
            _start_local(options)
            _require_loopback()
        resources = ray.cluster_resources()
        logger.info(
            "Ray: %d CPUs, %d GPUs at %s", resources.get("CPU", 0), resources.get("GPU", 0), address or "this machine"
        )


def _watch(head: HeadWatch) -> None:
    while ray.is_initialized():
        head.look()
        time.sleep(WATCH_S)


def _start_local(options: dict[str, Any]) -> None:
    # Ray gives its own processes thirty seconds to start, which a busy machine may not keep.
    for attempt in range(1, START_TRIES + 1):
        try:
            ray.init(address="local", include_dashboard=False, **options)
            return
        except Exception as error:
            ray.shutdown()
            if attempt == START_TRIES:
                raise
            logger.warning("Ray did not start (%s); trying once more", error)


def _require_loopback() -> None:
    address = ray.util.get_node_ip_address()
    if not ipaddress.ip_address(address).is_loopback:
        ray.shutdown()
        raise RuntimeError(
            f"Ray listens on {address}: it was imported before facediffuser.tasks; import facediffuser.tasks first, or "
            "set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0"
        )


def cluster_gpus() -> int:
    """Return how many GPUs the connected cluster has now (an autoscaled cluster may grow more)."""
    return int(ray.cluster_resources().get("GPU", 0))


def cluster_cpus() -> int:
    """Return how many CPUs the connected cluster has now."""
    return int(ray.cluster_resources().get("CPU", 1))
