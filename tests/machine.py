"""The loss of a machine: a process and all that came of it end at once, without a word to anybody."""

import subprocess
from contextlib import suppress

import psutil


def lose_machine(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all its descendants, those in sessions of their own too.

    All are stopped before the first is killed, so that none sees the end of another and reports it.
    """
    stopped: list[psutil.Process] = []
    while new := [one for one in _tree(process.pid) if one not in stopped]:
        for one in new:
            with suppress(psutil.NoSuchProcess):  # it ended by itself meanwhile
                one.suspend()
        stopped += new
    for one in stopped:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(stopped, timeout=20)
    process.wait()


def _tree(pid: int) -> list[psutil.Process]:
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]
