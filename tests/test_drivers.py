"""The drivers: every unit once, stopped by SIGTERM with the units in hand finished, errors as they were raised."""

import ipaddress
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial

import psutil
import pytest
from pydantic import ValidationError

from facediffuser.batch_stage import Limits, Results, Spending, Stage, Unit, WorkerPool
from facediffuser.errors import InputError, LimitReached, Stopped
from facediffuser.generation.generate_settings import GenerateSettings
from facediffuser.generation.generate_stage import describe_totals
from facediffuser.json_log import FORMAT_VARIABLE
from facediffuser.storage import StorageError
from facediffuser.tasks.driver import sigterm_calls
from facediffuser.tasks.local_driver import LocalDriver
from facediffuser.tasks.ray_driver import RayDriver
from tests.counting_worker import Counting, LogFormat

ONE = WorkerPool(1)


def stage(count=12, pool=ONE, worker=Counting, **others) -> Stage:
    units = [Unit(f"unit-{number}", 2) for number in range(count)]
    return Stage("Test", "images", {}, units, worker, pool=pool, **others)


@pytest.fixture(params=["ray", "local"])
def driver(request):
    if request.param == "local":
        return LocalDriver()
    request.getfixturevalue("ray_session")
    return RayDriver()


def test_every_unit_is_done_once_and_counts_are_summed(driver, caplog):
    given = stage(pool=WorkerPool(fewest=1, most=2), finished=4, describe=describe_totals)
    with caplog.at_level("INFO"):
        results: Results = driver.run(given)
    assert sorted(results.counts) == sorted(unit.key for unit in given.units)
    assert (results.totals["rows"], results.totals["failed"], results.totals["bytes"]) == (24, 12, 120)
    assert results.totals["retries"] == {"denoise": 12} and results.totals["seconds"]["total"] == 48
    assert "Test: 28/28 images" in caplog.text


def test_the_progress_line_says_what_operators_look_for(ray_session, monkeypatch):
    from facediffuser.tasks import driver as following

    notes = []

    class Progress(following.Progress):
        def advance(self, n=1, note=""):
            notes.append(note)
            super().advance(n, note)

    monkeypatch.setattr(following, "Progress", Progress)
    RayDriver().run(stage(pool=WorkerPool(fewest=1, most=2), describe=describe_totals))
    assert notes[1] == "denoising 75%, 1 retry, 1 failed, 9 queued, 0 restarted"
    assert notes[-1] == "denoising 75%, 12 retries, 12 failed, 0 queued, 0 restarted"


def test_a_finished_stage_makes_no_worker_and_is_finished_again(driver):
    worker = partial(Counting, cannot_start=InputError("must not be made"))
    assert driver.run(stage(0, worker=worker, finish=lambda results: "finished")) == "finished"


def test_sigterm_finishes_what_is_in_hand_and_begins_nothing_more(driver):
    before, done = signal.getsignal(signal.SIGTERM), []

    def once(totals):
        done.append(totals["rows"])
        if len(done) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return ""

    def finish(results):
        raise AssertionError("a stopped stage is not finished")

    with pytest.raises(Stopped, match="run the same command again"):
        driver.run(stage(describe=once, finish=finish))
    assert 1 <= len(done) < 12
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("limits", "named"), [
    (Limits(hours=1e-9), "--max-hours 1e-09"), (Limits(cost=1e-9, hour_price=2.0), "--max-cost 1e-09"),
])  # fmt: skip
def test_a_limit_finishes_what_is_in_hand_and_begins_nothing_more(driver, limits, named):
    reached = threading.Event()

    class Logged(logging.Handler):
        def emit(self, record):
            reached.set()

    def wait(totals):
        assert reached.wait(60)
        return ""

    handler = Logged(logging.WARNING)
    logging.getLogger("facediffuser.tasks.driver").addHandler(handler)
    try:
        with pytest.raises(LimitReached, match=f"stopped at {named}, .* left; run the same command again"):
            driver.run(stage(describe=wait, limits=limits))
    finally:
        logging.getLogger("facediffuser.tasks.driver").removeHandler(handler)


PRICED = Limits(cost=10, hour_price=2.5)


@pytest.mark.parametrize(("limits", "workers", "first"), [
    (Limits(), 1, None), (Limits(hours=2), 3, (7200, "--max-hours 2")), (PRICED, 1, (14400, "--max-cost 10")),
    (PRICED, 4, (3600, "--max-cost 10")), (replace(PRICED, hours=2), 4, (3600, "--max-cost 10")),
    (replace(PRICED, hours=2), 1, (7200, "--max-hours 2")),
    (Limits(cost=10), 1, None), (Limits(cost=10, hour_price=0), 1, None),
    (replace(PRICED, spending=Spending(cost=7.5)), 1, (3600, "--max-cost 10")),
    (replace(PRICED, spending=Spending(cost=15)), 2, (-3600, "--max-cost 10")),
])  # fmt: skip
def test_when_a_limit_is_reached(limits, workers, first):
    assert limits.first(workers) == first


def test_hours_count_from_the_first_workers_of_a_run_and_cost_adds_up_over_its_stages(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    limits = Limits(hours=2, cost=10, hour_price=2.5).of_one_run()
    for attempt in range(2):
        with pytest.raises(ConnectionError), limits.counted(workers=2):
            clock[0] += 1800.0
            raise ConnectionError(f"attempt {attempt}")
        clock[0] += 60.0  # until the task is tried once more
    assert limits.first(1) == (2 * 3600 - 3720, "--max-hours 2")
    assert limits.first(4) == ((10 - 2 * 2 * 0.5 * 2.5) / 2.5 / 4 * 3600, "--max-cost 10")
    # Another run begins anew.
    assert limits.of_one_run().first(1) == (7200, "--max-hours 2")


@pytest.mark.parametrize(("given", "spent", "named"), [
    ({"hours": 1}, Spending(started=-7200.0), "--max-hours 1"),
    ({"cost": 5, "hour_price": 2.0}, Spending(cost=5.0), "--max-cost 5"),
])  # fmt: skip
def test_a_stage_of_a_run_that_has_reached_its_limit_begins_nothing(given, spent, named):
    class Never:
        def __init__(self):
            raise AssertionError("a worker was started")

    with pytest.raises(LimitReached, match=f"stopped at {named}, .* 12 left"):
        LocalDriver().run(stage(worker=Never, limits=Limits(**given, spending=spent)))
    # What has nothing left to do is finished nevertheless.
    assert LocalDriver().run(stage(count=0, worker=Never, limits=Limits(**given, spending=spent))).counts == {}


def test_what_a_stage_took_counts_for_the_next_also_when_it_failed():
    limits = Limits(hours=9, cost=1e9, hour_price=3600.0).of_one_run()
    with pytest.raises(StorageError):
        wrong = {"unit-3": StorageError("S3 answered 503")}
        LocalDriver().run(stage(worker=partial(Counting, wrong), limits=limits))
    started, cost = limits.spending.started, limits.spending.cost
    assert started is not None and cost > 0
    LocalDriver().run(stage(limits=limits))
    assert limits.spending.started == started and limits.spending.cost > cost


def test_what_does_not_end_in_time_after_sigterm_is_abandoned():
    with pytest.raises(Stopped, match="within 0.01 s and is abandoned; run the same command again"):
        with sigterm_calls(lambda: None, grace_s=0.01):
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(60)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


OUTAGE = StorageError("s3://bucket/data: S3 answered 503 (SlowDown)")
DAMAGED = InputError("a.png: damaged; replace it")


@pytest.mark.parametrize(("where", "error"), [
    ("in a unit", OUTAGE), ("at the start", DAMAGED), ("in the reader", OUTAGE),
])  # fmt: skip
def test_what_a_worker_raises_arrives_as_it_is(driver, where, error):
    def broken():
        yield Unit("unit-0", 2)
        raise error

    given = {
        "in a unit": {"worker": partial(Counting, wrong={"unit-3": error})},
        "at the start": {"worker": partial(Counting, cannot_start=error)},
        "in the reader": {"read": broken},
    }[where]
    with pytest.raises(type(error)) as caught:
        driver.run(stage(6, **given))
    assert str(caught.value) == str(error)


def test_workers_write_json_when_the_driver_is_asked_to_whatever_their_node_was_told(ray_session, monkeypatch):
    monkeypatch.setenv(FORMAT_VARIABLE, "json")
    assert RayDriver().run(stage(1, worker=LogFormat)).totals["json"] == 1


def test_a_source_that_is_read_from_beginning_to_end_hands_its_contents_to_workers(driver):
    def read():
        for number in range(5):
            yield Unit(f"unit-{number}", 2, bytes([number]) * 100_000)

    results = driver.run(stage(5, pool=WorkerPool(2), read=read))
    assert [results.counts[f"unit-{number}"]["data"][0] for number in range(5)] == list(range(5))


@pytest.mark.parametrize(("pool", "gpus", "units", "size"), [
    (WorkerPool(), 0, 9, (1, 1)), (WorkerPool(gpu=True), 4, 9, (4, 4)), (WorkerPool(gpu=True), 4, 2, (2, 2)),
    (WorkerPool(3), 8, 9, (3, 3)), (WorkerPool(), 4, 9, (1, 1)), (WorkerPool(most=5), 0, 9, (1, 5)),
    (WorkerPool(fewest=2, most=5), 0, 3, (2, 3)), (WorkerPool(3), 0, 0, (1, 1)),
])  # fmt: skip
def test_how_many_workers_there_are(pool, gpus, units, size):
    assert pool.size(gpus, units) == size


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
        # Our own tests serve on loopback, too; Ray's processes are known by their path or title.
        try:
            words = " ".join(process.cmdline())
            if process is mine or "/ray/" in words or words.startswith("ray::"):
                found = process.net_connections()
                addresses |= {one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN}
        except psutil.NoSuchProcess:
            continue  # ended meanwhile, or a zombie: it listens nowhere
    outside = [one for one in addresses if not ipaddress.ip_address(one.removeprefix("::ffff:")).is_loopback]
    assert addresses and not outside


@pytest.mark.parametrize(("address", "loopback", "mode"), [
    (None, "0", "token"), ("local", "0", "token"), ("127.0.0.1:6379", "0", "None"),
    ("ray://localhost:10001", "0", "None"), ("10.0.0.7:6379", "None", "None"), ("auto", "None", "None"),
    ("ray://head:10001", "None", "None"),
])  # fmt: skip
def test_the_switches_of_ray_are_set_for_a_ray_of_one_machine_only(address, loopback, mode):
    switches = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_MODE")
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", *switches)}
    environment |= {"RAY_ADDRESS": address} if address else {}
    code = f"import os, facediffuser.tasks; print(*map(os.environ.get, {switches}))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [loopback, mode]


@pytest.mark.slow
def test_a_ray_started_from_python_says_nothing():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    code = "from facediffuser.tasks.ray_session import connect_ray; connect_ray(); import ray; ray.shutdown()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
