"""A cluster that does not answer, and a folder too long for Ray's sockets, are one line at once."""

import socket

import pytest

from facediffuser.errors import InputError
from facediffuser.tasks.ray_place import LONGEST_FOLDER, require_reachable, session_folder
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


def test_what_answers_and_auto_are_left_to_ray():
    with socket.create_server(("127.0.0.1", 0)) as server:
        require_reachable(f"127.0.0.1:{server.getsockname()[1]}")
    require_reachable("auto")


def test_ray_is_not_started_for_a_dead_cluster(dead_port, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("ray.init was called"))
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{dead_port}")
    with pytest.raises(InputError, match="no cluster answers there"):
        connect_ray()


def test_a_folder_too_long_for_sockets_is_left_for_a_short_one_or_named():
    long = "/" + "x" * LONGEST_FOLDER
    assert session_folder({}) is None and session_folder({"TMPDIR": long[:-1]}) is None
    assert session_folder({"TMPDIR": long}) == "/tmp"
    assert session_folder({"TMPDIR": long, "RAY_TMPDIR": "/short"}) is None
    with pytest.raises(InputError, match="RAY_TMPDIR /xxx.*shorter folder"):
        session_folder({"RAY_TMPDIR": long})
