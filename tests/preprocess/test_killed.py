"""`facediffuser preprocess` killed outright, as a machine that goes down does it, and run again."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import ray
from preprocess.conftest import contents, prepare

from facediffuser.miniature.render import render_set

OPTIONS = {"part_size": 8, "captioner": "none", "segmenter": "none", "matcher": "none"}


def start(source: Path, output: Path, log: Path) -> subprocess.Popen:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    command = [
        sys.executable,
        "-m",
        "facediffuser.flows.cli",
        "preprocess",
        f"--source={source}",
        f"--output={output}",
        *options,
    ]
    with open(log, "ab") as file:
        # On the tests' own Ray: a cluster outlives the process that drives it.
        address = ray.get_runtime_context().gcs_address
        environment = {**os.environ, "PREFECT_HOME": str(log.parent / "prefect"), "RAY_ADDRESS": address}
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


def kill_in_the_middle(process: subprocess.Popen, output: Path, log: Path) -> None:
    """Kill -9 once two parts are finished, and then the Prefect server that is left without its parent."""
    while len(list(output.glob("parts/*.json"))) < 2:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            process.wait(timeout=0.1)
        except subprocess.TimeoutExpired:
            continue
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    for child in family:
        if child.is_running():
            child.kill()
    psutil.wait_procs(family)


# Slow: two processes that each start a Prefect server of their own.
@pytest.mark.slow
def test_killed_in_the_middle_and_run_again_it_gives_the_bytes_of_an_undisturbed_run(tmp_path, ray_session, here):
    photos, output, log = tmp_path / "photos", tmp_path / "out", tmp_path / "log"
    render_set(160, 5, photos, subjects=0)
    kill_in_the_middle(start(photos, output, log), output, log)
    finished = {path.name for path in output.glob("parts/*.json")}
    assert 2 <= len(finished) < 20 and not (output / "manifest.json").exists()
    before = {name: os.stat(output / "parts" / name).st_mtime_ns for name in finished}
    assert start(photos, output, log).wait() == 0, log.read_text()[-3000:]
    assert {name: os.stat(output / "parts" / name).st_mtime_ns for name in finished} == before, (
        "finished parts are kept"
    )
    prepare(photos, tmp_path / "undisturbed", **OPTIONS)
    assert contents(output) == contents(tmp_path / "undisturbed")
