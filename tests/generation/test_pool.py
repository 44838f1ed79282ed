"""The pool: every shard once, between its bounds; stopped by SIGTERM with the shards in hand finished; on loopback only."""

import dataclasses
import ipaddress
import os
import signal

import psutil
import pytest
from pydantic import ValidationError

from facediffuser.errors import Stopped
from facediffuser.generation.generate_settings import GenerateSettings, Pool
from facediffuser.storage import StorageError
from facediffuser.tasks.pool import Foreman, ShardActor, Work, stopped_by_sigterm
from facediffuser.tasks.progress import Progress
from facediffuser.tasks.spending import follow

SECONDS = {"denoise": 3.0, "score": 1.0, "total": 4.0}


class Counting(ShardActor):
    """A worker that makes nothing of shards; the one numbered 13 cannot be stored."""

    def load(self, job):
        return None

    def make(self, shard):
        if shard == 13:
            raise StorageError("s3://bucket/data: S3 answered 503 (SlowDown)")
        return {"shard": shard, "rows": 2, "ok": 1, "failed": 1, "bytes": 10, "retries": {"denoise": 1},
                "seconds": SECONDS}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """What the pool wants to know of a GenerationJob."""

    pool: Pool
    device: str = "cpu"
    made: dict = dataclasses.field(default_factory=lambda: {"threads": 1})


def test_a_pool_between_bounds_makes_every_shard_once_and_tells_what_operators_want(ray_session, caplog):
    work = Work(Job(Pool(min_workers=1, max_workers=2)), list(range(12)), Counting)
    assert (work.fewest, work.most, work.queued) == (1, 2, 10)
    told = []
    with caplog.at_level("INFO"), Progress(24, "images", "Test") as progress:
        advance, kept = progress.advance, {}
        progress.advance = lambda n, note: (told.append(note), advance(n, note))
        spent = follow(work, progress, kept)
    assert sorted(kept) == list(range(12)) and progress.done == 24
    assert (spent.images, spent.failed, spent.bytes, spent.retries, spent.busy) == (24, 12, 120, 12, 0.75)
    assert told[0].startswith("workers busy 75%, 9 shards queued, 1 retries") and told[0].endswith("1 failed")
    assert all(" 0 shards begun again" in note for note in told), "no worker died"
    assert "Test: 24/24 images" in caplog.text


def test_sigterm_finishes_what_is_in_hand_and_begins_nothing_more(ray_session):
    work = Work(Job(Pool(workers=1)), list(range(12)), Counting)
    before, done = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(Stopped, match="run the same command again"), stopped_by_sigterm(work):
        for stats in work:
            if not done:
                os.kill(os.getpid(), signal.SIGTERM)
            done.append(stats["shard"])
    assert 1 <= len(done) < 12 and len(set(done)) == len(done)
    assert work.done | work.skipped == set(range(12))
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_a_worker_cannot_store_is_raised_as_it_is(ray_session):
    work, done = Work(Job(Pool(workers=1)), [0, 13, 1, 2], Counting), []
    with pytest.raises(StorageError) as caught:
        done += [stats["shard"] for stats in work]
    assert type(caught.value) is StorageError and str(caught.value) == "s3://bucket/data: S3 answered 503 (SlowDown)"
    assert 13 not in work.done and work.done | work.skipped == {0, 1, 2}


def test_the_foreman_lets_nothing_begin_after_a_stop():
    foreman = Foreman()
    assert foreman.begin(0) and foreman.begin(1) and foreman.count_again() == 0
    assert foreman.begin(1)
    foreman.stop()
    assert not foreman.begin(0) and foreman.count_again() == 1


@pytest.mark.parametrize(("pool", "gpus", "shards", "size"), [
    (Pool(), 0, 9, (1, 1)), (Pool(), 4, 9, (4, 4)), (Pool(), 4, 2, (2, 2)), (Pool(workers=3), 8, 9, (3, 3)),
    (Pool(max_workers=5), 0, 9, (1, 5)), (Pool(min_workers=2, max_workers=5), 0, 3, (2, 3)),
])  # fmt: skip
def test_how_many_workers_there_are(pool, gpus, shards, size):
    assert pool.size(gpus, shards) == size


@pytest.mark.parametrize("wrong", [
    {"workers": 2, "max_workers": 3}, {"min_workers": 2}, {"min_workers": 3, "max_workers": 2},
])  # fmt: skip
def test_bounds_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValidationError, match="workers"):
        GenerateSettings(models="m", subjects="s", prompts="p", output="o", **wrong)


def test_a_ray_started_here_listens_on_the_loopback_address_only(ray_session):
    mine = psutil.Process()
    addresses = set()
    for process in [mine, *mine.children(recursive=True)]:
        # Our own tests serve on loopback, too; Ray's processes are told by their path or title.
        try:
            words = " ".join(process.cmdline())
            if process is mine or "/ray/" in words or words.startswith("ray::"):
                found = process.net_connections()
                addresses |= {one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN}
        except psutil.NoSuchProcess:
            continue  # ended meanwhile, or a zombie: it listens nowhere
    outside = [one for one in addresses if not ipaddress.ip_address(one.removeprefix("::ffff:")).is_loopback]
    assert addresses and not outside
