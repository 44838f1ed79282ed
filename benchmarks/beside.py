"""Work beside a benchmark on the same machine: it runs while models load and compile, and stands still while something is timed.

    with Beside("python -m tools.miniature_weights.gpu ...", log):
        ...
        with quiet():
            ...  # timed

A borrowed GPU is used for two things at once so, and neither takes part in the other's times.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

_SETTLE = 0.2
"""Seconds until kernels that were queued have run."""

_running: "Beside | None" = None
_depth = 0


class Beside:
    """A command in a process group of its own, with low priority, that `quiet` stops and continues.

    Args:
        command: as for a shell, without a shell's syntax.
        log: file of what it prints.
    """

    def __init__(self, command: str, log: Path):
        self.process = subprocess.Popen(
            ["nice", "-n", "19", *shlex.split(command)],
            stdout=log.open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> "Beside":
        global _running
        _running = self
        return self

    def __exit__(self, *error: object) -> None:
        global _running
        _running = None
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self.signal(signal.SIGKILL)

    def signal(self, number: int) -> None:
        """Send a signal to all its processes; none where they have ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Stop what runs beside, if anything does, until the end of the block."""
    global _depth
    _depth += 1
    if _running and _depth == 1:
        _running.signal(signal.SIGSTOP)
        time.sleep(_SETTLE)
    try:
        yield
    finally:
        _depth -= 1
        if _running and _depth == 0:
            _running.signal(signal.SIGCONT)
