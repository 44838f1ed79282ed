"""After every fault: each planned row exactly once, all bytes as in the undisturbed run, nothing partial ever seen."""

import pytest
from faults import faults


@pytest.fixture
def local(tmp_path) -> str:
    return str(tmp_path / "out" / "dataset")


@pytest.fixture
def remote(s3_bucket) -> str:
    return f"{s3_bucket.url}/out/dataset"


def test_a_driver_killed_and_started_again(ground, local, table):
    table(faults.driver_killed(ground, local, kills=1))


# What follows starts several drivers each, and a worker's start alone takes ten seconds and more.


@pytest.mark.slow
def test_a_driver_killed_again_and_again(ground, local, table):
    table(faults.driver_killed(ground, local, kills=3))


@pytest.mark.slow
def test_workers_killed_during_a_run(ground, local, table):
    table(faults.actors_killed(ground, local))


@pytest.mark.slow
def test_a_ray_node_killed(ground, local, table):
    table(faults.node_killed(ground, local))


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("500", "503"), ("cut",), ("slow",)], ids="-".join)
def test_a_store_that_fails(ground, remote, s3_server, monkeypatch, table, kinds):
    share = 0.9 if kinds == ("slow",) else 0.2
    table(faults.faulty_store(ground, remote, s3_server, monkeypatch, kinds, share))


@pytest.mark.slow
def test_a_bucket_that_disappears(ground, remote, table):
    table(faults.bucket_gone(ground, remote))


@pytest.mark.slow
def test_a_full_disk(ground, tmp_path, table):
    table(faults.disk_full(ground, tmp_path / "disk"))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["local", "remote"])
def test_two_drivers_at_once(ground, place, table, request):
    table(faults.two_drivers(ground, request.getfixturevalue(place)))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["local", "remote"])
def test_two_different_runs_at_once(ground, place, table, request):
    table(faults.two_runs(ground, request.getfixturevalue(place)))


@pytest.mark.slow
def test_a_row_that_always_fails(ground, local, table):
    table(faults.poisoned_row(ground, local))


@pytest.mark.slow
def test_sigterm(ground, local, table):
    table(faults.terminated(ground, local))
