"""infra/healthy.py: each program of a container asked, those that do not answer named."""

import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "infra" / "healthy.py"


def healthy(*names: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *names], env=os.environ | environment, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def answering():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in ("/health", "/api/health") else 503)
            self.end_headers()

        def log_message(self, *words):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield str(server.server_port)
        server.shutdown()


def test_a_server_and_a_worker_that_answer_are_healthy(answering):
    ports = {"PREFECT_WORKER_WEBSERVER_PORT": answering, "PREFECT_SERVER_API_PORT": answering}
    assert healthy("worker", "server", **ports).returncode == 0
    assert healthy(HEALTHY="worker server", **ports).returncode == 0


def test_what_does_not_answer_is_named():
    done = healthy("worker", PREFECT_WORKER_WEBSERVER_PORT="1")
    assert done.returncode == 1 and "http://127.0.0.1:1/health" in done.stderr
    assert healthy(HEALTHY="").returncode == 0
    assert healthy("wroker").returncode == 2
