"""What a flow run's state says when its process was stopped or killed: hooks for `@flow`, and the watcher they start.

A process worker that is sent SIGTERM kills its runs' processes at once (SIGKILL), and the machine may kill one for its
memory. Prefect then leaves the run in the state Running, and its deployment's concurrency slot taken. So every process
that runs a flow has a watcher beside it, a process that outlives it and reports its end.
"""

import os
import signal
import subprocess
import sys
import time
from typing import Any
from uuid import UUID

import httpx
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from prefect.states import Crashed

from facediffuser.errors import Stopped

STOPPED = "Stopped"
KILLED = "the run's process was killed, or its worker stopped; the next run with the same settings resumes it"
REPORT_TRIES, LONGEST_WAIT_S = 12, 30.0

_watcher: subprocess.Popen[bytes] | None = None


def watch_process(flow: Flow[..., Any], run: FlowRun, state: State) -> None:
    """Hook for `on_running`: report the run as stopped when this process ends while the run is Running.

    Without a server of its own (no PREFECT_API_URL) nothing is left to report to, and nothing is watched.
    """
    global _watcher
    settings = get_current_settings()
    if settings.api.url is None:
        return
    if _watcher is None or _watcher.poll() is not None:
        _watcher = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,  # a worker's pipes end with the worker
            stderr=subprocess.DEVNULL,
            env={**os.environ, **settings.to_environment_variables(exclude_unset=True)},
            start_new_session=True,  # a signal to the process's group is not for the watcher
        )
    assert _watcher.stdin is not None  # it was started with a pipe
    _watcher.stdin.write(f"{run.id} {state.id}\n".encode())
    _watcher.stdin.flush()


def report_stop(flow: Flow[..., Any], run: FlowRun, state: State) -> None:
    """Hook for `on_failure`: a run that ended with Stopped is not a failed one; its state is called `Stopped`."""
    error = state.result(raise_on_failure=False)
    if isinstance(error, Stopped):
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(run.id, Crashed(name=STOPPED, message=str(error)), force=True)


def watch() -> None:
    """Read runs from standard input, one a line, until the process that writes them has ended; report the unfinished.

    A line has the ids of a run and of its state: a run that has left that state, or runs elsewhere by now, is left alone.
    """
    # A service manager signals all processes of a service; this one ends after the process it watches.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with get_client(sync_client=True) as client:
        for line in sys.stdin.readlines():
            run_id, state_id = map(UUID, line.split())
            for attempt in range(REPORT_TRIES):
                try:
                    _report_killed(client, run_id, state_id)
                    break
                except httpx.HTTPError:
                    time.sleep(min(2.0**attempt, LONGEST_WAIT_S))  # a server that is busy or away for a moment
            else:
                return  # away for good: no other run can be reported to it, either


def _report_killed(client: SyncPrefectClient, run_id: UUID, state_id: UUID) -> None:
    try:
        run = client.read_flow_run(run_id)
    except ObjectNotFound:
        return
    if run.state is not None and run.state.id == state_id:
        client.set_flow_run_state(run.id, Crashed(name=STOPPED, message=KILLED))


if __name__ == "__main__":
    watch()
