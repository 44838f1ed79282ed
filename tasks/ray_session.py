"""The connection to Ray: a given cluster, or one started here for as long as this process lives."""

import logging
import os
import re
import threading
from typing import Any

import ray
from ray._private import ray_constants

from facediffuser.tasks.ray_place import require_reachable, session_folder

logger = logging.getLogger(__name__)

START_TRIES = 3
LOOPBACK = re.compile(r"localhost|127\.[\d.]+|\[?::1\]?")

# Tasks of one flow may run side by side, and a process has one connection.
_connecting = threading.Lock()


def connect_ray() -> None:
    """Connect this process to Ray; doing so again changes nothing.

    The cluster is the one named by the standard `RAY_ADDRESS` (`auto`, `host:6379`, `ray://host:10001`). Without it a
    local Ray is started, without a dashboard and with all its ports on the loopback address; it ends with this process.
    """
    with _connecting:
        if ray.is_initialized():
            return
        address = os.environ.get("RAY_ADDRESS")
        # What Ray and its workers say is shown where Ray's own variables ask for it, as --verbose does.
        quiet = {
            "log_to_driver": os.environ.get("RAY_LOG_TO_DRIVER", "0") == "1",
            "logging_level": os.environ.get("RAY_LOGGER_LEVEL", "warning"),
            "ignore_reinit_error": True,
        }
        if address and address != "local":
            require_reachable(address)  # Ray itself would try for minutes
            if LOOPBACK.fullmatch(address.split("://")[-1].rsplit(":", 1)[0]):
                _stay_on_loopback()  # else Ray looks for that cluster at the machine's outer address
            ray.init(address=address, **quiet)
        else:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            _stay_on_loopback()
            folder = session_folder()
            _start_local(quiet | ({"_temp_dir": folder} if folder else {}))
        resources = ray.cluster_resources()
        logger.info(
            "Ray: %d CPUs, %d GPUs at %s", resources.get("CPU", 0), resources.get("GPU", 0), address or "this machine"
        )


def _start_local(options: dict[str, Any]) -> None:
    # Ray gives its own processes thirty seconds to start, which a busy machine may not keep.
    for attempt in range(1, START_TRIES + 1):
        try:
            ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **options)
            return
        except Exception as error:
            ray.shutdown()
            if attempt == START_TRIES:
                raise
            logger.warning("Ray did not start (%s); once more", error)


def _stay_on_loopback() -> None:
    # On Linux Ray takes 127.0.0.1 for a mistake, puts the machine's outer address in its place and listens to all the
    # world. This is its own switch for a Ray of one machine, made for the systems where that is the default.
    os.environ.setdefault(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "0")
    ray_constants.ENABLE_RAY_CLUSTER = os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] not in ("0", "false")


def cluster_gpus() -> int:
    """Return how many GPUs the connected cluster has now (an autoscaled cluster may grow more)."""
    return int(ray.cluster_resources().get("GPU", 0))


def cluster_cpus() -> int:
    """Return how many CPUs the connected cluster has now."""
    return int(ray.cluster_resources().get("CPU", 1))
