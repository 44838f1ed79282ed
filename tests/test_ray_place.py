"""A cluster that does not answer, and a folder too long for Ray's sockets, are one line at once."""

import socket
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from facediffuser.errors import InputError
from facediffuser.tasks.ray_place import LONGEST_FOLDER, HeadWatch, require_reachable, session_folder
from facediffuser.tasks.ray_session import connect_ray


@pytest.fixture
def dead_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "localhost:{}", "[::1]:{}"])
def test_a_dead_cluster_is_named(form, dead_port):
    with pytest.raises(InputError, match="RAY_ADDRESS .*no cluster answers there"):
        require_reachable(form.format(dead_port))


@pytest.mark.parametrize(
    "address", ["nonsense", "http://host:8265", "host:", "host:99999999", ":6379", "ray://", "a b:1"]
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(InputError, match="not an address of Ray"):
        require_reachable(address)


def test_a_credential_in_the_address_is_not_shown():
    with pytest.raises(InputError) as error:
        require_reachable("ray://user:MARKED@host:10001")
    assert "MARKED" not in str(error.value)


def test_what_speaks_as_ray_does_and_auto_are_left_to_ray():
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    for form in ("127.0.0.1:{}", "ray://localhost:{}"):
        require_reachable(form.format(port))
    server.stop(0)
    require_reachable("auto")


def test_a_head_that_is_lost_and_comes_back_is_said_once_each(dead_port, caplog):
    watch = HeadWatch(f"127.0.0.1:{dead_port}")
    for _ in range(2):
        watch.look()
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_insecure_port(watch.address)
    server.start()
    with caplog.at_level("WARNING"):
        for _ in range(2):
            watch.look()
    server.stop(0)
    lost, back = caplog.messages
    assert f"head at {watch.address} does not answer" in lost and "run the same command again" in lost
    assert "answers again" in back


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"-ERR unknown command\r\n", b"\0\0"])
def test_what_speaks_otherwise_is_no_cluster(answer):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with server.accept()[0] as connection:
                connection.recv(100)
                connection.sendall(answer)

        with ThreadPoolExecutor(1) as pool:
            pool.submit(serve)
            with pytest.raises(InputError, match="something else than Ray answers there"):
                require_reachable(f"127.0.0.1:{server.getsockname()[1]}")


def test_ray_is_not_started_for_a_dead_cluster(dead_port, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("ray.init was called"))
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{dead_port}")
    with pytest.raises(InputError, match="no cluster answers there"):
        connect_ray()


def test_a_folder_that_cannot_be_written_is_left_for_another_or_named():
    for folder in ("/proc/x", "/dev/null", "/dev/null/x"):
        assert session_folder({"TMPDIR": folder}) == "/tmp"
    with pytest.raises(InputError, match="RAY_TMPDIR /proc/x: folder /proc cannot be written"):
        session_folder({"RAY_TMPDIR": "/proc/x"})


def test_a_folder_too_long_for_sockets_is_left_for_a_short_one_or_named():
    long = "/" + "x" * LONGEST_FOLDER
    assert session_folder({}) is None and session_folder({"TMPDIR": long[:-1]}) is None
    assert session_folder({"TMPDIR": long}) == "/tmp"
    assert session_folder({"TMPDIR": long, "RAY_TMPDIR": "/short"}) is None
    with pytest.raises(InputError, match="RAY_TMPDIR /xxx.*shorter folder"):
        session_folder({"RAY_TMPDIR": long})
