"""What every fault is tried on: one small dataset made undisturbed, drivers as processes, a reader that polls."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from facediffuser.dataset.manifest import MANIFEST_KEY
from facediffuser.dataset.verify import verify
from facediffuser.generation.generate_settings import GenerateSettings
from facediffuser.generation.job import prepare
from facediffuser.generation.shard_generator import ShardGenerator
from facediffuser.storage import Store, open_store
from facediffuser.tasks.generate import finish_dataset

DRIVER = Path(__file__).with_name("driver.py")
TAKEN = ("stats/", "README.md", "card/")  # they say what a run took, which differs from run to run
WAIT_S = 1200.0
POLL_S = 0.1


@dataclass
class Outcome:
    """What became of the rows; all zeros but `times` when the promises hold."""

    fault: str
    times: int
    lost: int
    duplicated: int
    corrupted: int
    partial: int
    note: str = ""

    @property
    def harm(self) -> int:
        return self.lost + self.duplicated + self.corrupted + self.partial


class Poller(threading.Thread):
    """A reader of data/*.parquet that looks again and again: each object it meets must be whole and the final one."""

    def __init__(self, store: Store):
        super().__init__(daemon=True)
        self.store, self.met, self.broken = store, set(), []
        self._over = threading.Event()

    def run(self) -> None:
        seen = {}
        while not self._over.wait(POLL_S):
            try:
                for info in self.store.list("data/"):
                    if seen.get(info.key) != info.version and info.key.endswith(".parquet"):
                        data = self.store.get(info.key)
                        seen[info.key] = info.version
                        self._look(info.key, data)
            except (OSError, ValueError):
                continue  # not there yet, or no more; the store itself is not what is looked at

    def _look(self, key: str, data: bytes) -> None:
        try:
            pq.read_table(io.BytesIO(data))
        except (pa.ArrowException, OSError):
            self.broken.append(key)
        self.met.add((key, hashlib.sha256(data).hexdigest()))

    def stop(self) -> None:
        self._over.set()
        self.join(60)


@dataclass
class Driver:
    """A running driver and where its words go."""

    process: subprocess.Popen
    log: Path

    def wait(self) -> int:
        return self.process.wait(WAIT_S)

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def workers(self) -> list[psutil.Process]:
        """The processes of the pool's actors, of this driver's own Ray."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if "MapWorker" in " ".join(child.cmdline()):
                    found.append(child)
            except psutil.Error:
                continue
        return found


@dataclass
class Ground:
    """`settings(output)` is always the same run; `undisturbed` holds the bytes of all its objects but the stats."""

    world: object
    folder: Path
    settings_given: dict = field(default_factory=dict)
    undisturbed: dict[str, bytes] = field(default_factory=dict)

    def settings(self, output: str | Path, **others) -> GenerateSettings:
        given = {"images_per_prompt": 12, "steps": 12, "shard_size": 6, "batch_size": 3, "workers": 1,
                 "cpus_per_worker": 1, "max_failed": 1.0}  # fmt: skip
        return self.world.settings(output, **(given | self.settings_given | others))

    def make_undisturbed(self) -> None:
        """Make the dataset in this process, with as many threads as a worker has."""
        prepared = prepare(self.settings(self.folder / "undisturbed" / "dataset"))
        prepared.write()
        generator = ShardGenerator(prepared.job)
        for shard in range(prepared.job.layout.shards):
            generator(shard)
        finish_dataset.fn(prepared.job)
        self.job = prepared.job
        self.undisturbed = contents(prepared.job.store())

    def start(self, settings: GenerateSettings, actor: str = "", **environment: str) -> Driver:
        """Start a driver."""
        number = len(list(self.folder.glob("driver-*.json")))
        given, log = self.folder / f"driver-{number}.json", self.folder / f"driver-{number}.log"
        given.write_text(json.dumps(settings.model_dump()))
        words = [sys.executable, str(DRIVER), str(given), *([actor] if actor else [])]
        return Driver(self._process(words, log, environment), log)

    def start_command(self, settings: GenerateSettings) -> Driver:
        """Start `facediffuser generate`, the command itself with its Prefect."""
        number = len(list(self.folder.glob("command-*.log")))
        log = self.folder / f"command-{number}.log"
        home = {"PREFECT_HOME": str(self.folder / "prefect")}
        return Driver(self._process(generate_words(settings), log, home), log)

    def _process(self, words: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen:
        clean = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PREFECT_API_URL")}
        with open(log, "wb") as out:
            return subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=clean | environment
            )

    def finish(self, settings: GenerateSettings, actor: str = "", **environment: str) -> Driver:
        """Run a driver to its end, which must be good."""
        driver = self.start(settings, actor, **environment)
        code = driver.wait()
        assert code == 0, f"exit code {code}:\n{driver.said()[-3000:]}"
        return driver

    def outcome(self, fault: str, times: int, url: str, poller: Poller | None = None, note: str = "") -> Outcome:
        """Compare a finished dataset with the undisturbed one, row by row and byte by byte, and with what was polled."""
        store = open_store(url)
        there = contents(store)
        problems = verify(url)
        assert problems == [], problems
        planned = [name for table in self._tables(self.undisturbed) for name in table]
        found = Counter(name for table in self._tables(there) for name in table)
        wrong = {key for key in there.keys() | self.undisturbed.keys() if there.get(key) != self.undisturbed.get(key)}
        corrupted = sum(6 for key in wrong if key.startswith("data/")) + sum(
            not key.startswith("data/") for key in wrong
        )
        if wrong:
            note = f"{note}; other than in the undisturbed run: {', '.join(sorted(wrong))}"
        partial = 0
        if poller:
            poller.stop()
            final = {(key, hashlib.sha256(data).hexdigest()) for key, data in self.undisturbed.items()}
            partial = len(poller.broken) + len(poller.met - final)
        return Outcome(
            fault, times, sum(name not in found for name in planned),
            sum(count - 1 for count in found.values()), corrupted, partial, note,
        )  # fmt: skip

    @staticmethod
    def _tables(objects: dict[str, bytes]) -> list[list[str]]:
        data = [objects[key] for key in sorted(objects) if key.startswith("data/")]
        return [pq.read_table(io.BytesIO(one), columns=["sample_id"])["sample_id"].to_pylist() for one in data]


def generate_words(settings: GenerateSettings) -> list[str]:
    """The command line of `facediffuser generate` with these settings."""
    given = settings.model_dump(exclude_unset=True, exclude_none=True).items()
    options = [[f"--{name.replace('_', '-')}", str(value)] for name, value in given]
    return [str(Path(sys.executable).with_name("facediffuser")), "generate", *sum(options, [])]


def contents(store: Store) -> dict[str, bytes]:
    """The bytes of all objects that do not say what a run took: stats and pages are left out, the manifest without it."""
    found = {info.key: store.get(info.key) for info in store.list() if not info.key.startswith(TAKEN)}
    if MANIFEST_KEY in found:
        found[MANIFEST_KEY] = _lasting(found[MANIFEST_KEY])
    return found


def _lasting(manifest: bytes) -> bytes:
    document = json.loads(manifest)
    lasting = {name: value for name, value in document.items() if name not in ("spent", "digest")}
    lasting["objects"] = [one for one in document["objects"] if not one["key"].startswith(TAKEN)]
    return json.dumps(lasting, sort_keys=True).encode()


def shards_there(url: str) -> int:
    """How many shards a reader would find now."""
    try:
        return len(open_store(url).list("data/"))
    except (OSError, ValueError):
        return 0


def wait_until(what: Callable[[], object], driver: Driver | None = None) -> object:
    """Wait for something to be true and return it; fail when the driver ends before, or after minutes."""
    end = time.monotonic() + WAIT_S
    while not (found := what()):
        if driver is not None and driver.process.poll() is not None and not (found := what()):
            raise AssertionError(f"the driver ended with {driver.process.returncode}:\n{driver.said()[-3000:]}")
        if time.monotonic() > end:
            raise AssertionError("nothing happened in minutes" + (f":\n{driver.said()[-3000:]}" if driver else ""))
        time.sleep(POLL_S)
    return found
