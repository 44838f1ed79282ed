"""Exits with 0 when the programs of this container answer, with 1 and a line for each that does not.

    python infra/healthy.py [server] [worker] [ray]

server: the Prefect server on port 4200. worker: the Prefect worker's own page on $PREFECT_WORKER_WEBSERVER_PORT (8080);
it says no when the worker polls no more. ray: the Ray node of this container: its raylet lives and the head answers it. A
worker whose Ray node has died would still accept runs and fail them, so its check asks for both. Without arguments the
programs are taken from HEALTHY ("worker ray", say); where that is not set, nothing is asked.
"""

import os
import subprocess
import sys
import urllib.request

TIMEOUT_S = 10


def _page(url: str) -> str | None:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S):
            return None
    except OSError as error:
        return f"{url}: {error}"


def server() -> str | None:
    """Return what is wrong with the Prefect server, None when it answers."""
    return _page(f"http://127.0.0.1:{os.environ.get('PREFECT_SERVER_API_PORT', '4200')}/api/health")


def worker() -> str | None:
    """Return what is wrong with the Prefect worker, None when it answers."""
    return _page(f"http://127.0.0.1:{os.environ.get('PREFECT_WORKER_WEBSERVER_PORT', '8080')}/health")


def ray() -> str | None:
    """Return what is wrong with Ray in this container, None when it answers."""
    if not _runs("raylet"):
        return "ray: no raylet in this container"
    # FQ_RAY_IP is KubeRay's name for the head.
    address = os.environ.get("RAY_HEAD") or f"{os.environ.get('FQ_RAY_IP', '127.0.0.1')}:6379"
    done = subprocess.run(["ray", "health-check", "--address", address], capture_output=True, timeout=2 * TIMEOUT_S)
    return None if done.returncode == 0 else f"ray: {address} does not answer"


def _runs(name: str) -> bool:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/comm") as file:
                if file.read().strip() == name:
                    return True
        except OSError:
            continue  # it ended meanwhile
    return False


CHECKS = {"server": server, "worker": worker, "ray": ray}


def main(names: list[str]) -> int:
    """Run the checks of these names, print what is wrong and return the exit code."""
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        print(f"{unknown[0]}: no such check; give any of {', '.join(CHECKS)}", file=sys.stderr)
        return 2
    problems = [problem for name in names if (problem := CHECKS[name]())]
    print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or os.environ.get("HEALTHY", "").split()))
