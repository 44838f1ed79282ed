"""A real S3 server for the tests: a one-node OpenStack Swift with its S3 API on the loopback address.

Swift lives in an environment of its own, `.swift/`, which `make test` makes. One server process each stands for
accounts, containers and objects, and a proxy in front of them speaks S3.
"""

import ctypes
import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

ENVIRONMENT = Path(__file__).resolve().parent.parent / ".swift"
MEND = "`make test` makes it (or `make .swift/ready`)"

REGION = "us-east-1"
ACCESS_KEY, SECRET_KEY = "test:tester", "testing"
# Known to the server, but without a right to anything: every request of this one is answered 403.
POWERLESS_ACCESS_KEY, POWERLESS_SECRET_KEY = "test:reader", "reading"
# A secret that stands out wherever it should not be.
MARKED_ACCESS_KEY, MARKED_SECRET_KEY = "test:marked", "wJalrMarkedSecretEXAMPLEKEYw7Qz"

STORAGE_KINDS = ("account", "container", "object")
START_TRIES = 3
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0

# Order matters: what stands left sees a request first. `versioned_writes` has to stand left of `symlink`, and the
# token-less `s3api` left of `tempauth`, which then checks the signature that s3api took apart.
PROXY_FILTERS: dict[str, dict[str, object]] = {
    "catch_errors": {},
    "proxy-logging": {"use": "egg:swift#proxy_logging"},
    "listing_formats": {},
    "s3api": {"location": REGION, "max_upload_part_num": 10_000, "multi_delete_concurrency": 8},
    "tempauth": {
        "user_test_tester": f"{SECRET_KEY} .admin",
        "user_test_reader": POWERLESS_SECRET_KEY,
        "user_test_marked": f"{MARKED_SECRET_KEY} .admin",
    },
    "bulk": {},
    "slo": {"max_manifest_segments": 10_000},
    "versioned_writes": {"allow_versioned_writes": "true", "allow_object_versioning": "true"},
    "symlink": {},
}


class SwiftError(RuntimeError):
    """The server is not installed or did not start."""


class SwiftS3:
    """The server as a context manager: started on entry, stopped and its data removed on exit.

    While it runs, `endpoint` is its URL, `environment()` what an S3 client needs, and `folder` holds data and logs.
    """

    def __init__(self, parent: Path | None = None, environment: Path = ENVIRONMENT):
        self._programs = environment / "bin"
        self._parent = parent or _fast_folder()
        self._servers: list[subprocess.Popen[bytes]] = []
        self.folder = Path()
        self.endpoint = ""

    def __enter__(self) -> "SwiftS3":
        if not (self._programs / "swift-proxy-server").exists():
            raise SwiftError(f"{self._programs.parent}: the tests' S3 server is not installed; {MEND}")
        for attempt in range(1, START_TRIES + 1):
            try:
                self._start()
                return self
            except SwiftError:
                # A port found free may have been taken before the server bound it; other ports, another try.
                self._stop()
                if attempt == START_TRIES:
                    raise
        raise AssertionError("unreachable")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def environment(self) -> dict[str, str]:
        """Return the standard AWS variables that point a client to this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
        }

    @contextmanager
    def away(self) -> Iterator[None]:
        """Nobody answers at the endpoint until the block ends; what is stored stays."""
        proxy = self._servers.pop()
        proxy.terminate()
        proxy.wait(STOP_TIMEOUT_S)
        try:
            yield
        finally:
            self._servers.append(self._launch("proxy"))
            self._wait_until_open({"proxy": int(self.endpoint.rsplit(":", 1)[1])})

    def _start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="facediffuser-swift-", dir=self._parent))
        for name in ("etc", "disks/d1", "cache", "log"):
            (self.folder / name).mkdir(parents=True)
        *storage, proxy = _free_ports(len(STORAGE_KINDS) + 1)
        ports = {**dict(zip(STORAGE_KINDS, storage, strict=True)), "proxy": proxy}
        _write_configuration(self.folder, ports)
        for kind in STORAGE_KINDS:
            self._build_ring(kind, ports[kind])
        for kind in ports:
            self._servers.append(self._launch(kind))
        self._wait_until_open(ports)
        self.endpoint = f"http://127.0.0.1:{proxy}"

    def _build_ring(self, kind: str, port: int) -> None:
        """Write the ring file, which tells the proxy that all partitions of `kind` are on the one device."""
        builder = [self._programs / "swift-ring-builder", self.folder / "etc" / f"{kind}.builder"]
        partition_power, replicas, hours_between_moves = "2", "1", "0"
        for arguments in (
            ["create", partition_power, replicas, hours_between_moves],
            ["add", f"r1z1-127.0.0.1:{port}/d1", "1"],
            ["rebalance"],
        ):
            done = subprocess.run([*builder, *arguments], capture_output=True, text=True)
            if done.returncode != 0:
                raise SwiftError(f"swift-ring-builder {arguments[0]} for {kind}: {done.stdout}{done.stderr}")

    def _launch(self, kind: str) -> subprocess.Popen[bytes]:
        with open(self.folder / "log" / f"{kind}.log", "ab") as log:
            return subprocess.Popen(
                [self._programs / f"swift-{kind}-server", self.folder / "etc" / f"{kind}.conf", "-v"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self.folder)},
                preexec_fn=_end_with_parent,
            )

    def _wait_until_open(self, ports: dict[str, int]) -> None:
        end = time.monotonic() + START_TIMEOUT_S
        for kind, port in ports.items():
            while not _accepts(port):
                ended = [server.args for server in self._servers if server.poll() is not None]
                if ended or time.monotonic() > end:
                    raise SwiftError(f"the S3 server's {kind} part did not start:\n{self._last_words()}")
                time.sleep(0.05)
        # An open port may be somebody else's, when ours ended for want of it.
        if any(server.poll() is not None for server in self._servers):
            raise SwiftError(f"a part of the S3 server ended at once:\n{self._last_words()}")

    def _last_words(self) -> str:
        logs = sorted((self.folder / "log").glob("*.log"))
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-1000:]}" for log in logs)

    def _stop(self) -> None:
        for server in self._servers:
            server.terminate()
        for server in self._servers:
            try:
                server.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
        self._servers = []
        if self.folder != Path():
            shutil.rmtree(self.folder)
        self.folder, self.endpoint = Path(), ""


def _write_configuration(folder: Path, ports: dict[str, int]) -> None:
    largest_object = 5 * 1024**3 + 2  # S3's largest single upload is 5 GiB
    sections = {
        "swift": {
            "swift-hash": {"swift_hash_path_suffix": "test"},
            "swift-constraints": {"max_file_size": largest_object},
        },
        "proxy": _proxy_sections(folder, ports["proxy"]),
        **{kind: _storage_sections(folder, kind, ports[kind]) for kind in STORAGE_KINDS},
    }
    for name, content in sections.items():
        (folder / "etc" / f"{name}.conf").write_text(_ini(content))


def _default_section(folder: Path, port: int) -> dict[str, object]:
    return {
        "bind_ip": "127.0.0.1",
        "bind_port": port,
        "user": getpass.getuser(),
        "swift_dir": folder / "etc",
        "devices": folder / "disks",
        "mount_check": "false",  # a plain folder stands for the disk
        "workers": 0,  # answer in the process itself: a test stops four processes, not their children
        "disable_fallocate": "true",
        "fallocate_reserve": 0,
    }


# Longer than Swift's own half a second for a connection and three for an answer, for a busy machine: an object server that
# gives up on the container's server leaves the listing to a process that does not run here.
PATIENCE = {"conn_timeout": 30, "node_timeout": 60}


def _storage_sections(folder: Path, kind: str, port: int) -> dict[str, dict[str, object]]:
    return {
        "DEFAULT": {**_default_section(folder, port), **PATIENCE, "container_update_timeout": 60},
        "pipeline:main": {"pipeline": f"{kind}-server"},
        f"app:{kind}-server": {
            "use": f"egg:swift#{kind}",
            "auto_create_account_prefix": ".",
            "replication_server": "true",
            "recon_cache_path": folder / "cache",
        },
        f"{kind}-replicator": {},  # the ring's reader wants the section, though nothing is replicated
    }


def _proxy_sections(folder: Path, port: int) -> dict[str, dict[str, object]]:
    filters = {f"filter:{name}": {"use": f"egg:swift#{name}", **options} for name, options in PROXY_FILTERS.items()}
    return {
        "DEFAULT": _default_section(folder, port),
        "pipeline:main": {"pipeline": " ".join([*PROXY_FILTERS, "proxy-logging", "proxy-server"])},
        "app:proxy-server": {
            "use": "egg:swift#proxy",
            **PATIENCE,
            "account_autocreate": "true",
            "allow_account_management": "true",
        },
        **filters,
    }


def _ini(sections: dict[str, dict[str, object]]) -> str:
    lines = []
    for name, options in sections.items():
        lines += [f"[{name}]", *(f"{option} = {value}" for option, value in options.items()), ""]
    return "\n".join(lines)


def _free_ports(count: int) -> list[int]:
    """Return ports that were free a moment ago, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1.0).close()
    except OSError:
        return False
    return True


def _fast_folder() -> Path:
    """Return where the data go: memory where there is some (Swift syncs every object), else the temporary folder.

    Swift keeps an object's metadata in extended attributes, so a file system without them will not do.
    """
    for folder in (Path("/dev/shm"), Path(tempfile.gettempdir())):
        if folder.is_dir() and os.access(folder, os.W_OK) and _keeps_attributes(folder):
            return folder
    raise SwiftError(f"{tempfile.gettempdir()}: no extended attributes here; set TMPDIR to an ext4 or xfs folder")


def _keeps_attributes(folder: Path) -> bool:
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        try:
            os.setxattr(file.name, "user.swift.metadata", b"1")
        except OSError:
            return False
    return True


def _end_with_parent() -> None:
    """Ask Linux to end this process when its parent does, so that a killed test run leaves no server behind."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
