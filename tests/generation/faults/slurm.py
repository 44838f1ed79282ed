"""A Slurm cluster of machines of their own: a controller and nodes of one CPU, with Debian's munge, slurmctld and slurmd."""

import json
import os
import secrets
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from faults.machines import ROOT, Machine, Network
from faults.proxy import FaultyProxy

from facediffuser.generation.generate_settings import GenerateSettings

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
SCRIPT = ROOT / "infra" / "slurm" / "generate.sbatch"
HOME = "/root"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CONFIGURATION = """
ClusterName=test
SlurmctldHost=controller({controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=20
KillWait=10
"""


class Slurm:
    """A controller and two nodes; what a job writes to its home stays on its node."""

    def __init__(self, network: Network, store: FaultyProxy, folder: Path):
        self.folder = folder
        amazon = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        self.environment = amazon | {"AWS_ENDPOINT_URL": store.endpoint, "SLURM_CONF": f"{HOME}/slurm.conf"}
        self.controller = network.machine("controller")
        self.nodes = [network.machine(name) for name in ("n1", "n2")]
        self._key, self._options = secrets.token_bytes(128), ""
        for machine in (self.controller, *self.nodes):
            self._configure(machine)
        self._begin(self.controller, ["slurmctld", "-D", "-i"], "slurmctld")
        for node in self.nodes:
            self.start_node(node)

    def start_node(self, node: Machine) -> None:
        """Start Slurm on a node."""
        self._begin(node, ["slurmd", "-D", "-N", node.name], "slurmd")

    def restore(self, node: Machine) -> None:
        """Switch a lost node on, with an empty disk, and start Slurm on it."""
        node.start()
        self._configure(node)
        self._put_options(node)
        self.start_node(node)

    def submit(self, settings: GenerateSettings) -> str:
        """Hand in infra/slurm/generate.sbatch on both nodes with these settings; return the job's number."""
        given = settings.model_dump(exclude_unset=True, exclude_none=True)
        self._options = json.dumps({name.replace("_", "-"): value for name, value in given.items()})
        for node in self.nodes:
            self._put_options(node)
        words = ["sbatch", "--parsable", "--nodes=2", f"--chdir={HOME}", "--output=job.log",
                 f"--export=ALL,FACEDIFFUSER_CONFIG={HOME}/generate.yaml", str(SCRIPT)]  # fmt: skip
        return self.ask(*words).strip()

    def ask(self, *words: str) -> str:
        """Run a program on the controller and return what it says."""
        log = self.folder / f"asked-{time.monotonic_ns()}.log"
        done = self._begin(self.controller, list(words), log.stem).wait(60)
        said = log.read_text(errors="replace")
        log.unlink()
        if done:
            raise RuntimeError(f"{' '.join(words)}: {said}")
        return said

    def job(self, number: str) -> dict[str, str]:
        """Return what Slurm says of a job."""
        said = self.ask("scontrol", "show", "job", "--oneliner", number)
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def said(self) -> str:
        """Return what the job said, of all its starts."""
        logs = [node.disk() / "root" / "job.log" for node in self.nodes]
        return "".join(log.read_text(errors="replace") for log in logs if log.exists())

    def wait_until(self, what: Callable[[], object], seconds: float = 900) -> object:
        """Wait for something to be true and return it; raise with what the job said when it takes too long."""
        end = time.monotonic() + seconds
        while not (found := what()):
            if time.monotonic() > end:
                raise TimeoutError(f"{self.ask('squeue')}\n{self.ask('sinfo')}\n{self.said()[-3000:]}")
            time.sleep(1)
        return found

    def _put_options(self, node: Machine) -> None:
        (node.disk() / "root" / "generate.yaml").write_text(self._options)

    def _configure(self, machine: Machine) -> None:
        nodes = [f"NodeName={one.name} NodeAddr={one.address} NodeHostname={one.name} CPUs=1 CoresPerSocket=1 RealMemory=4000 State=UNKNOWN"
                 for one in self.nodes]  # fmt: skip
        text = CONFIGURATION.format(home=HOME, controller=self.controller.address)
        partition = "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP"
        home = machine.disk() / "root"
        (home / "slurm.conf").write_text("\n".join([text, *nodes, partition, ""]))
        (home / "munge.key").write_bytes(self._key)
        (home / "munge.key").chmod(0o400)
        home.chmod(0o755)
        for name in ("state", "spool"):
            (home / name).mkdir()
        own = [f"--{name}-file={HOME}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        started = self._begin(machine, ["munged", "--force", f"--socket={HOME}/munge.socket", *own], "munged").wait(60)
        if started:
            raise RuntimeError(f"munged ended with {started}")

    def _begin(self, machine: Machine, words: list[str], log: str) -> subprocess.Popen[bytes]:
        path = {"PATH": f"{machine.programs}:{SYSTEM_PATH}"}
        name = log if log.startswith("asked") else f"{machine.name}-{log}"
        return machine.begin(words, self.folder / f"{name}.log", self.environment | path)
