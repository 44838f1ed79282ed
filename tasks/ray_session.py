"""The connection to Ray: a given cluster, or one started here for as long as this process lives."""

import logging
import os
import threading

import ray

logger = logging.getLogger(__name__)

# Tasks of one flow may run side by side, and a process has one connection.
_connecting = threading.Lock()


def connect_ray() -> None:
    """Connect this process to Ray; doing so again changes nothing.

    The cluster is the one named by the standard `RAY_ADDRESS` (`auto`, `host:6379`, `ray://host:10001`). Without it a
    local Ray is started on the loopback address, without a dashboard, and ends with this process.
    """
    with _connecting:
        if ray.is_initialized():
            return
        address = os.environ.get("RAY_ADDRESS")
        quiet = {"log_to_driver": False, "logging_level": logging.WARNING, "ignore_reinit_error": True}
        if address and address != "local":
            ray.init(address=address, **quiet)
        else:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
        resources = ray.cluster_resources()
        logger.info(
            "Ray: %d CPUs, %d GPUs at %s", resources.get("CPU", 0), resources.get("GPU", 0), address or "this machine"
        )


def cluster_gpus() -> int:
    """Return how many GPUs the connected cluster has now (an autoscaled cluster may grow more)."""
    return int(ray.cluster_resources().get("GPU", 0))


def cluster_cpus() -> int:
    """Return how many CPUs the connected cluster has now."""
    return int(ray.cluster_resources().get("CPU", 1))
