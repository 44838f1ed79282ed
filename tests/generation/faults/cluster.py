"""A Ray cluster of machines of their own, which share nothing but a bucket: head, driver's machine, nodes of one CPU."""

import os
import secrets
import shlex
from collections import Counter
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

    What runs a node starts it anew when it ends, as Kubernetes and systemd do. `fault_tolerant`: the head keeps its books
    in a Redis on a machine of its own.
    """

    def __init__(self, network: Network, store: FaultyProxy, folder: Path, fault_tolerant: bool = False):
        self.network, self.store, self.folder = network, store, folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if name.startswith("AWS_")},
            "AWS_ENDPOINT_URL": store.endpoint,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._books = {}
        if fault_tolerant:
            books = network.machine("books")
            words = ["redis-server", "--bind", books.address, "--protected-mode", "no", "--save", ""]
            books.begin(words, folder / "books.log", {})
            self._books = {"RAY_REDIS_ADDRESS": f"{books.address}:6379"}
        self.head = network.machine("head")
        self.address = f"{self.head.address}:{GCS_PORT}"
        self.start_head()
        self.desk = network.machine("desk")
        self.start_node(self.desk, cpus=0)
        self.wait_until_started(self.desk)

    def start_head(self) -> None:
        """Start Ray's head on the head's machine, which does no work."""
        words = ("--head", f"--port={GCS_PORT}", "--num-cpus=0", "--include-dashboard=false")
        self._ray(self.head, *words, **self._books)
        self.wait_until_started(self.head)

    def lose_head(self) -> None:
        """Lose the head's machine, and start it anew with an empty disk."""
        self.head.lose()
        self.head.start()
        (self.folder / f"{self.head.name}.log").unlink()
        self.start_head()

    def start_node(self, machine: Machine, cpus: int) -> None:
        """Start a Ray node on a machine."""
        self._ray(machine, f"--address={self.address}", f"--num-cpus={cpus}")

    def join(self, name: str) -> Machine:
        """Return a new machine whose one CPU works for the cluster."""
        machine = self.network.machine(name)
        self.start_node(machine, cpus=1)
        self.wait_until_started(machine)
        return machine

    def starts(self, machine: Machine) -> int:
        """How often Ray has started on a machine."""
        return (self.folder / f"{machine.name}.log").read_text(errors="replace").count("Ray runtime started")

    def wait_until_started(self, machine: Machine, times: int = 1) -> None:
        """Wait until Ray has started on a machine, so many times since the beginning."""
        wait_until(lambda: self.starts(machine) >= times)

    def generate(self, settings: GenerateSettings) -> Driver:
        """Start `facediffuser generate` on the driver's machine."""
        log = self.folder / f"generate-{len(list(self.folder.glob('generate-*.log')))}.log"
        words = generate_words(settings)
        return Driver(self.desk.begin(words, log, self.environment | {"RAY_ADDRESS": self.address}), log)

    def shards_by(self, machine: Machine) -> int:
        """How many shards a machine put into the bucket."""
        return sum(one.method == "PUT" and "/data/shard-" in one.path for one in self._asked_by(machine))

    def models_fetched(self, machine: Machine) -> list[int]:
        """How often a machine fetched each piece of the models' weights; large files come in pieces."""
        weights = [one for one in self._asked_by(machine) if "/models/" in one.path and ".safetensors" in one.path]
        return sorted(Counter((one.path, one.bytes) for one in weights if one.method == "GET").values())

    def _asked_by(self, machine: Machine):
        return [one for one in self.store.requests if one.client == machine.address]

    def _ray(self, machine: Machine, *words: str, **variables: str) -> None:
        given = ["ray", "start", *words, f"--node-ip-address={machine.address}", "--block",
                 f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats"]  # fmt: skip
        forever = f"while true; do {shlex.join(given)}; sleep 1; done"
        machine.begin(["bash", "-c", forever], self.folder / f"{machine.name}.log", self.environment | variables)
