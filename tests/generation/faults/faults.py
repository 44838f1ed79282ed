"""The faults themselves: each makes the same dataset while something goes wrong, and returns what became of the rows."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import pyarrow.parquet as pq
from faults.ground import Ground, Outcome, Poller, contents, shards_there, wait_until
from faults.proxy import FaultyProxy

from facediffuser.storage import open_store

SHARDS = 12


def actors_killed(ground: Ground, url: str, kills: int = 4) -> Outcome:
    """A worker is killed with SIGKILL each time another shard appeared."""
    poller = polled(url)
    driver = ground.start(ground.settings(url, workers=2))
    killed = 0
    while killed < kills and driver.process.poll() is None:
        there = shards_there(url)
        wait_until(lambda there=there: shards_there(url) > there or driver.process.poll() is not None, driver)
        for worker in driver.workers()[:1]:
            worker.kill()
            killed += 1
    assert driver.wait() == 0, driver.said()[-3000:]
    assert killed >= 2, f"{killed} workers could be killed before the run was over"
    return ground.outcome("worker killed (SIGKILL)", killed, url, poller)


def driver_killed(ground: Ground, url: str, kills: int = 3) -> Outcome:
    """The driver is killed with SIGKILL as soon as it made another shard, and started again."""
    poller = polled(url)
    for _ in range(kills):
        driver, there = ground.start(ground.settings(url)), shards_there(url)
        wait_until(lambda there=there: shards_there(url) > there, driver)
        driver.process.kill()
        driver.process.wait()
        if shards_there(url) == SHARDS:
            break
    ground.finish(ground.settings(url))
    return ground.outcome("driver killed (SIGKILL), started again", kills, url, poller)


def node_killed(ground: Ground, url: str) -> Outcome:
    """The Ray node with the worker on it dies; a node that has just joined goes on."""
    from ray.cluster_utils import Cluster

    own = {"node_ip_address": "127.0.0.1", "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **own})
    try:
        first = cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1")
        poller = polled(url)
        driver = ground.start(ground.settings(url), RAY_ADDRESS=cluster.address)
        wait_until(lambda: shards_there(url) >= 2, driver)  # so the worker is on the one node there is
        cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1")
        cluster.remove_node(first, allow_graceful=False)
        assert driver.wait() == 0, driver.said()[-3000:]
    finally:
        cluster.shutdown()
    return ground.outcome("Ray node killed", 1, url, poller)


def faulty_store(ground: Ground, url: str, server, monkeypatch, kinds: tuple[str, ...], share: float) -> Outcome:
    """Requests to S3 fail; the run goes on."""
    direct = server.endpoint
    poller = polled(url)  # its client was made for the server itself
    with FaultyProxy(direct, kinds, share) as proxy:
        driver = ground.start(ground.settings(url), AWS_ENDPOINT_URL=proxy.endpoint)
        assert driver.wait() == 0, driver.said()[-3000:]
    failed = sum(proxy.counts[kind] for kind in kinds)
    assert failed >= 5, proxy.counts
    note = f"{failed} of {proxy.counts.total()} requests failed"
    names = {"500": "answers 500", "503": "answers 503", "cut": "cuts connections", "slow": "is slow"}
    return ground.outcome(f"S3 {' and '.join(names[kind] for kind in kinds)}", failed, url, poller, note)


def bucket_gone(ground: Ground, url: str) -> Outcome:
    """The bucket disappears with all that is in it; made again, the run is begun again."""
    client, name = boto3.session.Session().client("s3"), url.removeprefix("s3://").split("/")[0]
    driver = ground.start(ground.settings(url))
    wait_until(lambda: shards_there(url) >= 2, driver)

    def removed() -> bool:
        # Workers go on writing: the bucket cannot go before it is empty, and it is empty for moments only.
        bucket = boto3.resource("s3").Bucket(name)
        bucket.objects.all().delete()
        try:
            client.delete_bucket(Bucket=name)
        except client.exceptions.ClientError as error:
            if error.response["Error"]["Code"] != "BucketNotEmpty":
                raise
            return False
        return True

    wait_until(removed)
    code = driver.wait()
    assert code != 0, "the run ended well without its bucket"
    # Whichever a worker asked for last: its objects go first.
    assert any(f"told: {words}" in driver.said() for words in ("s3://", "[Errno 2] no such object")), driver.said()[
        -3000:
    ]
    assert "no such" in driver.said()
    client.create_bucket(Bucket=name)
    poller = polled(url)
    ground.finish(ground.settings(url))
    return ground.outcome("bucket disappears", 1, url, poller, f"exit code {code}, then run again")


def disk_full(ground: Ground, folder: Path) -> Outcome:
    """The disk is full before the run is over; with more room the same command goes on."""
    plan = sum(len(data) for key, data in ground.undisturbed.items() if key.startswith(("plan/", "subjects")))
    data = sum(len(data) for key, data in ground.undisturbed.items() if key.startswith("data/"))
    with _small_disk(folder, plan + data // 2 + 64 * 1024) as grow:
        url, actor = str(folder / "dataset"), "" if grow else "Cramped"
        poller = polled(url)
        driver = ground.start(ground.settings(url), actor)
        code = driver.wait()
        assert code == 1, f"exit code {code}:\n{driver.said()[-3000:]}"
        told = [line for line in driver.said().splitlines() if line.startswith("told: ")]
        assert len(told) == 1 and ("No space left" in told[0] or "File too large" in told[0]), told
        assert not list(folder.rglob("*.partial")), "unfinished files were left"
        if grow:
            grow()
        ground.finish(ground.settings(url))
        note = "a small tmpfs" if grow else "no mount allowed here: a limit on file sizes instead"
        return ground.outcome("disk full", 1, url, poller, note)


def two_drivers(ground: Ground, url: str) -> Outcome:
    """Two drivers with the same settings start at once on one output: both end well, the bytes are the same."""
    poller = polled(url)
    drivers = [ground.start(ground.settings(url)) for _ in range(2)]
    codes = [driver.wait() for driver in drivers]
    assert codes == [0, 0], drivers[0].said()[-2000:] + drivers[1].said()[-2000:]
    where = "S3" if url.startswith("s3://") else "local"
    return ground.outcome(f"two drivers at once, {where}", 2, url, poller, f"exit codes {codes[0]}, {codes[1]}")


def two_runs(ground: Ground, url: str) -> Outcome:
    """Two drivers with different settings start at once on one output: one loses and says so, no bytes are mixed."""
    settings = [ground.settings(url), ground.settings(url, seed=1)]
    drivers = [ground.start(each) for each in settings]
    codes = [driver.wait() for driver in drivers]
    assert sorted(codes) == [0, 2], (codes, [driver.said()[-2000:] for driver in drivers])
    loser = drivers[codes.index(2)]
    assert "another run" in loser.said()
    where = "S3" if url.startswith("s3://") else "local"
    if codes[0] == 2:  # the other run won: its bytes are right when it can be made again with nothing to do
        there = contents(open_store(url))
        ground.finish(settings[1])
        wrong = contents(open_store(url)) != there
        return Outcome(f"two different runs at once, {where}", 2, 0, 0, int(wrong), 0, "the second won")
    return ground.outcome(f"two different runs at once, {where}", 2, url, None, "the first won")


def poisoned_row(ground: Ground, url: str) -> Outcome:
    """A row fails each time: it ends as a failed row, and no other row is harmed."""
    from faults.driver import POISON

    victim = pq.read_table(ground.job.output + "/plan").to_pylist()[8]
    driver = ground.finish(ground.settings(url), "Poisoned", **{POISON: str(victim["seed"])})
    there = pq.read_table(url + "/data").to_pylist()
    failed = [row for row in there if row["status"] == "failed"]
    assert [row["sample_id"] for row in failed] == [victim["sample_id"]]
    assert failed[0]["error"] == "ValueError: this row cannot be made"
    names = [row["sample_id"] for row in there]
    planned = pq.read_table(ground.job.output + "/data")["sample_id"].to_pylist()
    # The shard of the failed row is another one, as it should be; retry-failed makes it the undisturbed one.
    shard = ground.job.layout.shard_key(8 // ground.job.layout.shard_size)
    wrong = [
        key for key, data in contents(open_store(url)).items()
        if key.startswith("data/") and key != shard and data != ground.undisturbed[key]
    ]  # fmt: skip
    assert driver.process.returncode == 0
    return Outcome(
        "a row that always fails", 1, len(set(planned) - set(names)), len(names) - len(set(names)), 6 * len(wrong), 0,
        "1 failed row, with its error",
    )  # fmt: skip


def terminated(ground: Ground, url: str) -> Outcome:
    """SIGTERM: the shards in hand are finished, the command says so and ends with 143; run again, it goes on."""
    poller = polled(url)
    driver = ground.start_command(ground.settings(url))
    wait_until(lambda: shards_there(url) >= 1, driver)
    driver.process.send_signal(signal.SIGTERM)
    code = driver.wait()
    there = shards_there(url)
    assert code == 143, f"exit code {code}:\n{driver.said()[-3000:]}"
    assert "stopped by SIGTERM" in driver.said() and "run the same command again" in driver.said()
    assert 1 <= there < SHARDS
    ground.finish(ground.settings(url))
    return ground.outcome("SIGTERM", 1, url, poller, f"{there} of {SHARDS} shards finished, exit code 143")


def polled(url: str) -> Poller:
    """Start a reader that looks at a dataset again and again."""
    poller = Poller(open_store(url))
    poller.start()
    return poller


@contextmanager
def _small_disk(folder: Path, size: int) -> Iterator[object]:
    """A tmpfs of so many bytes at the folder; yields what makes it larger, or None where mounting is not allowed."""
    folder.mkdir(parents=True)
    kib = -(-size // 1024)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        yield None
        return
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
