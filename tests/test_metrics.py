"""Metrics of a driver as Prometheus reads them, the files of infra/monitoring that use them, and logs as JSON."""

import json
import logging
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from facediffuser.batch_stage import Limits, Stage, Unit, WorkerPool
from facediffuser.errors import InputError, Stopped
from facediffuser.json_log import FORMAT_VARIABLE, JsonFormatter, about
from facediffuser.tasks.local_driver import LocalDriver
from facediffuser.tasks.metrics import metrics_served
from tests.counting_worker import Counting
from tools.dashboard import draw

MONITORING = Path(__file__).parents[1] / "infra" / "monitoring"
RAYS = {"ray_node_gpus_utilization", "ray_node_gram_used"}


def scrape(url: str) -> dict[tuple[str, ...], float]:
    """Return the samples at a URL: (name, values of the labels) -> value."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


def run_and_scrape(caplog) -> list[dict[tuple[str, ...], float]]:
    """Run a stage of three units of two rows; return what was served after each of them and after the end."""
    seen = []

    def look(totals):
        seen.append(scrape(url))
        return ""

    units = [Unit(f"unit-{number}", 2) for number in range(3)]
    stage = Stage("Generate", "images", {}, units, Counting, finished=4, pool=WorkerPool(1), describe=look,
                  limits=Limits(hour_price=3600.0))  # fmt: skip
    with caplog.at_level("INFO"), metrics_served(0, "127.0.0.1", last_scrape_s=0.0):
        url = re.search(r"http://\S+", caplog.text)[0]
        LocalDriver().run(stage)
        seen.append(scrape(url))
    return seen


def test_a_scrape_shows_rows_failures_retries_seconds_cost_and_time_left(caplog):
    first, *_, last = run_and_scrape(caplog)
    assert (first["facediffuser_running", "generate"], last["facediffuser_running", "generate"]) == (1, 0)
    assert first["facediffuser_rows_planned", "generate"] == 10
    assert last["facediffuser_rows_finished", "generate"] == 10
    assert last["facediffuser_rows_total", "generate"] == 6
    assert last["facediffuser_failed_rows_total", "generate"] == 3
    assert last["facediffuser_retries_total", "denoise", "generate"] == 3
    assert last["facediffuser_worker_seconds_total", "total", "generate"] == 12
    assert last["facediffuser_seconds_left", "generate"] == 0
    assert first["facediffuser_units_queued", "generate"] == 1
    assert last["facediffuser_cost", "generate"] > 0


def test_a_run_that_ends_by_itself_is_seen_to_have_ended_whoever_scrapes_it(caplog):
    seen = []

    def scrape_until_it_has_ended():
        while not seen or seen[-1]:
            seen.append(scrape(url)[("facediffuser_run_active",)])

    scraper = threading.Thread(target=scrape_until_it_has_ended)
    with pytest.raises(Stopped), caplog.at_level("INFO"), metrics_served(0, "127.0.0.1", last_scrape_s=60.0):
        url = re.search(r"http://\S+", caplog.text)[0]
        assert scrape(url)[("facediffuser_run_active",)] == 1
        scraper.start()
        raise Stopped("stopped by SIGTERM")
    scraper.join(60)
    assert seen[-1] == 0 and set(seen[:-1]) <= {1}


def test_a_run_that_nobody_scrapes_does_not_wait_at_its_end():
    with metrics_served(0, "127.0.0.1", last_scrape_s=threading.TIMEOUT_MAX):
        pass


def test_dashboard_and_alerts_ask_for_metrics_there_are(caplog):
    served = {name for name, *_ in run_and_scrape(caplog)[-1]} | RAYS | {"up"}
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    rules = [
        rule for group in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"] for rule in group["rules"]
    ]
    names = {name for text in [*asked, *(rule["expr"] for rule in rules)]
             for name in re.findall(r"\b(?:facediffuser|ray)_\w+", text)}  # fmt: skip
    assert names <= served and len(names) > 10
    runbook = (MONITORING.parents[1] / "docs" / "operations.md").read_text()
    assert [rule["alert"] for rule in rules if f"`{rule['alert']}`" not in runbook] == []


def test_a_port_that_is_taken_is_one_line(caplog):
    with caplog.at_level("INFO"), metrics_served(0, "127.0.0.1"):
        port = int(re.search(r":(\d+)/metrics", caplog.text)[1])
        with pytest.raises(InputError, match=f"--metrics-port {port}: cannot be served .* give another port"):
            with metrics_served(port, "127.0.0.1"):
                pass


@pytest.mark.slow
def test_a_real_prometheus_scrapes_a_driver(caplog, tmp_path):
    if not (prometheus := shutil.which("prometheus")):
        pytest.skip("prometheus is not installed (Debian: prometheus)")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{one.getsockname()[1]}"

    def value(metric: str) -> float | None:
        try:
            with urllib.request.urlopen(f"http://{address}/api/v1/query?query={metric}", timeout=10) as answer:
                result = json.load(answer)["data"]["result"]
        except OSError:
            return None
        return float(result[0]["value"][1]) if result else None

    with caplog.at_level("INFO"), metrics_served(0, "127.0.0.1"):
        target = re.search(r"http://([^/]+)/metrics", caplog.text)[1]
        scrape = {"job_name": "face-diffuser", "static_configs": [{"targets": [target]}]}
        configuration = {"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]}
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(configuration))
        options = ["--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address={address}"]
        with open(tmp_path / "log", "wb") as log:
            process = subprocess.Popen([prometheus, *options], cwd=tmp_path, stdout=log, stderr=log)
        try:
            LocalDriver().run(Stage("Generate", "images", {}, [Unit("unit", 2)], Counting))
            end = time.monotonic() + 60
            while value("facediffuser_rows_total") != 2 and time.monotonic() < end:
                time.sleep(0.2)
            assert value("facediffuser_rows_total") == 2, (tmp_path / "log").read_text()
            assert (value("facediffuser_running"), value("up")) == (0, 1)
            picture = tmp_path / "dashboard.png"
            drawn = draw(f"http://{address}", picture, minutes=1, window="10s")
            # Rates take two scrapes with something between them, and GPUs are Ray's to tell.
            assert drawn >= 3 and Image.open(picture).size[0] > 1000
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.slow
def test_promtool_accepts_configuration_and_rules_and_the_rules_fire_when_they_should():
    if not (promtool := shutil.which("promtool")):
        pytest.skip("promtool is not installed (Debian: prometheus)")
    for command in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"],
                    ["check", "config", "prometheus.yml"]):  # fmt: skip
        done = subprocess.run([promtool, *command], cwd=MONITORING, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_json_line_says_run_shard_and_worker_and_no_secret(monkeypatch):
    record = logging.LogRecord("facediffuser.x", logging.WARNING, __file__, 1, "read %s", ("s3://k:secret@b/x",), None)
    with about(run="r", worker="w"), about(shard="data/shard-1"):
        line = json.loads(JsonFormatter().format(record))
    assert {"run": "r", "worker": "w", "shard": "data/shard-1", "level": "WARNING"}.items() <= line.items()
    assert "secret" not in line["message"]
    assert "run" not in json.loads(JsonFormatter().format(record))
    assert FORMAT_VARIABLE == "FACEDIFFUSER_LOG_FORMAT"
