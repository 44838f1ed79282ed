"""The watcher of a run's process: it reports what the process left behind, and does not outlive a server that is gone."""

import io
import socket
from types import SimpleNamespace
from uuid import uuid4

from prefect.settings import PREFECT_API_URL, temporary_settings

from facediffuser.flows import stopping


def test_a_server_that_is_gone_is_waited_for_once_not_once_a_run(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/api"
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # of the client's own tries
    monkeypatch.setattr(stopping, "time", SimpleNamespace(sleep=waits.append))
    monkeypatch.setattr("signal.signal", lambda number, action: None)  # this process must stay one that can be ended
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{uuid4()} {uuid4()}\n" for _ in range(3))))
    with temporary_settings({PREFECT_API_URL: url}):
        stopping.watch()
    assert len(waits) == stopping.REPORT_TRIES and max(waits) == stopping.LONGEST_WAIT_S
