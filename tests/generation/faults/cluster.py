"""A Ray cluster of machines of their own, which share nothing but a bucket: head, driver's machine, nodes of one CPU."""

import os
import secrets
import shlex
from pathlib import Path

from faults.ground import Driver, generate_words, wait_until
from faults.machines import Machine, Network
from faults.proxy import FaultyProxy

from facediffuser.generation.generate_settings import GenerateSettings
from facediffuser.miniature.render import render_set
from facediffuser.shipped import models_folder, scorers_folder
from facediffuser.storage import open_store
from facediffuser.storage.output import put_folder

GCS_PORT = 6379
OBJECT_STORE_BYTES = 80 * 1024 * 1024


class MiniatureOnS3:
    """The miniature as a bucket's content: `settings(output)` is a run of one person and twelve prompts, 72 images."""

    def __init__(self, bucket: str, folder: Path):
        self.bucket = bucket
        put_folder(open_store(f"{bucket}/models"), models_folder(), "model_index.json")
        for name in ("identity", "prompt"):
            put_folder(open_store(f"{bucket}/scorers/{name}"), scorers_folder() / name, "config.json")
        render_set(8, 0, folder)
        person = min(path for path in (folder / "subjects").iterdir() if path.is_dir())
        for picture in person.iterdir():
            open_store(f"{bucket}/people").put(f"{person.name}/{picture.name}", picture.read_bytes())
        lines = "".join(f'{{"prompt": "a photo of {{subject}} in park {number}"}}\n' for number in range(12))
        open_store(bucket).put("prompts.jsonl", lines.encode())

    def settings(self, output: Path | str, **others) -> GenerateSettings:
        inputs = {name: f"{self.bucket}/{name}" for name in ("models", "scorers")}
        inputs |= {"subjects": f"{self.bucket}/people", "prompts": f"{self.bucket}/prompts.jsonl"}
        given = {"images_per_prompt": 6, "steps": 12, "shard_size": 6, "batch_size": 3}
        return GenerateSettings(**(inputs | given | others | {"output": str(output)}))


class Cluster:
    """The head and the machine of the driver are there from the beginning; `join` adds a node that works.

    What runs a node starts it anew when it ends, as Kubernetes and systemd do.
    """

    def __init__(self, network: Network, store: FaultyProxy, folder: Path):
        self.network, self.store, self.folder = network, store, folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if name.startswith("AWS_")},
            "AWS_ENDPOINT_URL": store.endpoint,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.head = network.machine("head")
        self.address = f"{self.head.address}:{GCS_PORT}"
        self._start_head()
        self.desk = network.machine("desk")
        self._start_node(self.desk, cpus=0)
        self.wait_until_started(self.desk)

    def _start_head(self) -> None:
        words = ("--head", f"--port={GCS_PORT}", "--num-cpus=0", "--include-dashboard=false")
        self._ray(self.head, *words)
        self.wait_until_started(self.head)

    def _start_node(self, machine: Machine, cpus: int) -> None:
        self._ray(machine, f"--address={self.address}", f"--num-cpus={cpus}")

    def join(self, name: str) -> Machine:
        """Return a new machine whose one CPU works for the cluster."""
        machine = self.network.machine(name)
        self._start_node(machine, cpus=1)
        self.wait_until_started(machine)
        return machine

    def wait_until_started(self, machine: Machine) -> None:
        """Wait until Ray has started on a machine."""
        log = self.folder / f"{machine.name}.log"
        wait_until(lambda: "Ray runtime started" in log.read_text(errors="replace"))

    def generate(self, settings: GenerateSettings) -> Driver:
        """Start `facediffuser generate` on the driver's machine."""
        log = self.folder / f"generate-{len(list(self.folder.glob('generate-*.log')))}.log"
        words = generate_words(settings)
        return Driver(self.desk.begin(words, log, self.environment | {"RAY_ADDRESS": self.address}), log)

    def shards_by(self, machine: Machine) -> int:
        """How many shards a machine put into the bucket."""
        return sum(
            one.method == "PUT" and "/data/shard-" in one.path
            for one in self.store.requests
            if one.client == machine.address
        )

    def _ray(self, machine: Machine, *words: str) -> None:
        given = ["ray", "start", *words, f"--node-ip-address={machine.address}", "--block",
                 f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats"]  # fmt: skip
        forever = f"while true; do {shlex.join(given)}; sleep 1; done"
        machine.begin(["bash", "-c", forever], self.folder / f"{machine.name}.log", self.environment)
