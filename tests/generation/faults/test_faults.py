"""After every fault: each planned row exactly once, all bytes as in the undisturbed run, nothing partial ever seen."""

import pytest
from faults import faults
from faults.ground import Poller
from faults.proxy import FaultyProxy

from facediffuser.generation.job import prepare
from facediffuser.generation.shard_generator import ShardGenerator
from facediffuser.storage import open_store

# Several drivers in one test; on a machine that does other things, too, each takes minutes.
pytestmark = pytest.mark.timeout(3600)


@pytest.fixture
def local(tmp_path) -> str:
    return str(tmp_path / "out" / "dataset")


@pytest.fixture
def remote(s3_bucket) -> str:
    return f"{s3_bucket.url}/out/dataset"


def test_a_worker_gets_through_a_store_that_fails(world, made, remote, s3_server, monkeypatch):
    poller = Poller(open_store(remote))
    poller.start()  # its client was made for the server itself
    poller.store.list()
    with FaultyProxy(s3_server.endpoint, ("500", "503", "cut"), 0.15) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        prepared = prepare(world.settings(remote))
        prepared.write()
        generator = ShardGenerator(prepared.job, made[1].pipeline, made[1].scorers)
        for shard in range(prepared.job.layout.shards):
            generator(shard)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    poller.stop()
    store, failed = open_store(remote), sum(proxy.counts[kind] for kind in ("500", "503", "cut"))
    assert failed >= 3, proxy.counts
    undisturbed = {info.key: made[0].store().get(info.key) for info in made[0].store().list("data/")}
    assert {info.key: store.get(info.key) for info in store.list("data/")} == undisturbed
    assert poller.broken == [] and {key for key, _ in poller.met} <= undisturbed.keys()
    assert len(poller.met) == len({key for key, _ in poller.met})


# What follows starts several drivers each, with a Ray and workers of their own: a minute and more on two quiet cores.


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
