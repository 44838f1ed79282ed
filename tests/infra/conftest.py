"""What the infra tests share: a Prefect server and worker as processes of their own, and what Prefect can be told."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import httpx
import prefect.settings
import pytest
from postgres import running_postgres
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[2]
PREFECT = Path(sys.executable).with_name("prefect")
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0
WAIT_TIMEOUT_S = 240.0
LOG_ENTRY = re.compile(r"^(?=\d\d:\d\d:\d\d\.\d+ \|)", re.MULTILINE)
SERVICE_ERROR = re.compile(r"\S+ \| (ERROR|CRITICAL) +\| (docket|prefect\.server\.(services|events))\b")

T = TypeVar("T")


class PrefectHouse:
    """A running server with a home of its own below `folder`; `command` runs the `prefect` command line against it."""

    def __init__(self, folder: Path, port: int, database_url: str | None = None):
        self.folder = folder
        self.port = port
        self.api_url = f"http://127.0.0.1:{port}/api"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_"))}
        self.environment = {
            **inherited,
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_API_URL": self.api_url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "1",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_WORKER_PREFETCH_SECONDS": "1",
            "PREFECT_LOGGING_COLORS": "false",
            "NO_COLOR": "1",
            "COLUMNS": "200",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        if database_url is not None:
            self.environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database_url

    def command(self, *arguments: str, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
        """Run `prefect ARGUMENTS` in the repository's root and return what it said."""
        return subprocess.run(
            [PREFECT, *arguments],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def log(self, name: str) -> str:
        """Return the end of a process's log."""
        return (self.folder / f"{name}.log").read_text(errors="replace")[-4000:]

    def service_errors(self) -> list[str]:
        """Return what the server's services logged as errors, from its start until now.

        SQLite refuses a write while another process writes; a service tries it again in its next round, so that is none.
        """
        entries = LOG_ENTRY.split((self.folder / "server.log").read_text(errors="replace"))
        return [entry for entry in entries if SERVICE_ERROR.match(entry) and "database is locked" not in entry]

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send a request to the server's API and return its answer, None for an empty one.

        On SQLite the server answers 503 while another writes to the database: the request is sent again, as Prefect's
        own clients do. It has all of the time for an answer: on a busy machine one may take minutes.
        """
        end = time.monotonic() + WAIT_TIMEOUT_S
        url = f"{self.api_url}/{path}"
        while (answer := httpx.request(method, url, json=body, timeout=WAIT_TIMEOUT_S)).status_code == 503:
            if time.monotonic() > end:
                break
            time.sleep(0.2)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def wait_for(self, what: str, found: Callable[[], T | None], timeout: float = WAIT_TIMEOUT_S) -> T:
        """Return what `found` returns once that is true; raise with the logs when it is not within the timeout."""
        end = time.monotonic() + timeout
        while not (value := found()):
            if time.monotonic() > end:
                raise TimeoutError(f"no {what}; server:\n{self.log('server')}\nworker:\n{self.log('worker')}")
            time.sleep(0.2)
        return value

    @contextmanager
    def process(self, name: str, *arguments: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run `prefect ARGUMENTS` beside the test, with its output in a log, and stop it on exit.

        `variables` are of the process's environment, beside those of the house.
        """
        with open(self.folder / f"{name}.log", "wb") as log:
            process = self._launch(log, arguments, variables)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _launch(self, log: IO[bytes], arguments: tuple[str, ...], variables: dict[str, str]) -> subprocess.Popen[bytes]:
        # What a script runs in the background ignores SIGINT, and hands that down; Prefect's worker ends by it.
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return subprocess.Popen(
            [PREFECT, *arguments],
            cwd=ROOT,
            env=self.environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )

    def wait_until_healthy(self, server: subprocess.Popen[bytes]) -> None:
        """Return when the server answers; raise with its log when it ended or takes too long."""
        end = time.monotonic() + START_TIMEOUT_S
        while not self._healthy():
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the Prefect server did not start:\n{self.log('server')}")
            time.sleep(0.2)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.api_url}/health", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False


@contextmanager
def running_house(folder: Path, database_url: str | None = None) -> Iterator[PrefectHouse]:
    """A server with the work pool of prefect.yaml and a worker on it; all of it ends on exit.

    The server's database is SQLite in the house's folder unless a URL is given.
    """
    house = PrefectHouse(folder, _free_port(), database_url)
    with house.process("server", "server", "start", "--host", "127.0.0.1", "--port", str(house.port)) as server:
        house.wait_until_healthy(server)
        made = house.command("work-pool", "create", "face-diffuser", "--type", "process")
        if made.returncode != 0:
            raise RuntimeError(f"prefect work-pool create: {made.stdout}{made.stderr}")
        with house.process("worker", "worker", "start", "--pool", "face-diffuser", "--type", "process"):
            yield house


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def prefect_house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectHouse]:
    """A real Prefect server and a real worker on the work pool of prefect.yaml; idle they cost a tenth of a core."""
    with running_house(tmp_path_factory.mktemp("prefect")) as house:
        yield house


@pytest.fixture
def prefect_house_on_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectHouse]:
    """The same with its database in a real PostgreSQL."""
    with running_postgres() as url, running_house(tmp_path_factory.mktemp("prefect"), url) as house:
        yield house


@pytest.fixture(scope="session")
def prefect_variables() -> set[str]:
    """The names of the environment variables that the installed Prefect reads."""
    return _variables(prefect.settings.Settings)


def _variables(settings: type[BaseModel]) -> set[str]:
    names = set()
    for name, field in settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names |= _variables(field.annotation)
        else:
            names.add(f"{settings.model_config.get('env_prefix', '')}{name}".upper())
    return names
