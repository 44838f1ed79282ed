"""Machines of their own on this computer: each with its own network, processes and root folder, joined by a switch.

Linux's namespaces make them, which takes root. Nothing of this computer's own network is changed: the switch stands in a
namespace of its own, and a machine reaches only what is joined to it.
"""

import ctypes
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = Path(__file__).with_name("machine.sh")
NETWORK = "10.77.0"
CLONE_NEWNET = 0x40000000
START_S = 60.0


class Network:
    """A switch with an address of its own, `address`, and the machines joined to it; all ends with the context."""

    def __init__(self, folder: Path):
        self.folder, self.address = folder, f"{NETWORK}.1"
        self._name = f"fd-{uuid.uuid4().hex[:6]}"
        self._machines: list[Machine] = []

    def __enter__(self) -> "Network":
        _run("ip", "netns", "add", self._name)
        self._ip("link", "set", "lo", "up")
        self._ip("link", "add", "switch", "type", "bridge")
        self._ip("address", "add", f"{self.address}/24", "dev", "switch")
        self._ip("link", "set", "switch", "up")
        return self

    def __exit__(self, *_) -> None:
        for machine in self._machines:
            machine.lose()
            subprocess.run(["ip", "netns", "delete", machine.namespace], capture_output=True)
        subprocess.run(["ip", "netns", "delete", self._name], capture_output=True)

    def machine(self, name: str) -> "Machine":
        """Return a new machine, running, with its cable in the switch."""
        number = len(self._machines) + 2
        machine = Machine(self, name, f"{self._name}-{number}", f"{NETWORK}.{number}")
        _run("ip", "netns", "add", machine.namespace)
        self._machines.append(machine)
        ours, theirs = f"port-{number}", "eth0"
        self._ip("link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", machine.namespace)
        self._ip("link", "set", ours, "master", "switch")
        self._ip("link", "set", ours, "up")
        inside = ("ip", "-netns", machine.namespace)
        for words in (
            ("link", "set", "lo", "up"),
            ("address", "add", f"{machine.address}/24", "dev", theirs),
            ("link", "set", theirs, "up"),
            # Ray learns a machine's address from the route to any other.
            ("route", "add", "default", "via", self.address),
        ):
            _run(*inside, *words)
        machine.start()
        return machine

    def plug(self, machine: "Machine", there: bool) -> None:
        """Pull a machine's cable out of the switch, or put it in again; the machine itself goes on."""
        self._ip("link", "set", f"port-{machine.namespace.rsplit('-', 1)[1]}", "up" if there else "down")

    def listen(self) -> socket.socket:
        """Return a socket of this process that listens at the switch's address."""
        found: list[socket.socket] = []

        def bind() -> None:
            # A thread may stand in another network than its process, and a socket stays where it was made.
            with open(f"/run/netns/{self._name}") as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            found.append(socket.create_server((self.address, 0)))

        thread = threading.Thread(target=bind)
        thread.start()
        thread.join()
        return found[0]

    def _ip(self, *words: str) -> None:
        _run("ip", "-netns", self._name, *words)


class Machine:
    """A machine of a network. `begin` starts a program on it; `lose` ends all of it at once."""

    def __init__(self, network: Network, name: str, namespace: str, address: str):
        self.network, self.name, self.namespace, self.address = network, name, namespace, address
        self._unshare: subprocess.Popen[bytes] | None = None
        self._first = 0

    def start(self) -> None:
        """Switch the machine on, with an empty disk."""
        folder = self.network.folder / self.namespace
        folder.mkdir(exist_ok=True)
        # Outer folders first: a machine takes no folder that another one has brought.
        shown = sorted({os.path.realpath(path) for path in (sys.base_prefix, sys.prefix, ROOT)}, key=len)
        self._unshare = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{self.namespace}", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--uts", "--ipc",
             "bash", SCRIPT, folder, self.name, self.address, *shown],
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        end = time.monotonic() + START_S
        while not (self._first and (self.disk() / "run" / "ready").exists()):
            if self._unshare.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"machine {self.name} did not start")
            children = psutil.Process(self._unshare.pid).children()
            self._first = children[0].pid if children and children[0].name() == "sleep" else 0
            time.sleep(0.05)

    def lose(self) -> None:
        """End all of the machine's programs at once; its disk is lost with it."""
        if self._unshare is not None:
            self._unshare.kill()
            self._unshare.wait()
            self._unshare, self._first = None, 0

    @property
    def programs(self) -> str:
        """The folder of the environment's programs, on this machine and on every other."""
        return f"{os.path.realpath(sys.prefix)}/bin"

    def disk(self) -> Path:
        """The machine's root folder, as it is seen from here."""
        return Path(f"/proc/{self._first}/root")

    def begin(self, words: list[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a program in the machine's home; what it says goes to the log."""
        own = {
            "PATH": f"{self.programs}:/usr/local/bin:/usr/bin:/bin",
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        variables = [f"{name}={value}" for name, value in (own | dict(environment)).items()]
        with open(log, "ab") as out:
            return subprocess.Popen(
                ["nsenter", f"--target={self._first}", "--mount", "--pid", "--net", "--uts", "--ipc", "--root",
                 "--wd", "env", "--ignore-environment", "--chdir=/root", *variables, *words],
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
