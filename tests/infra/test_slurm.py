"""infra/slurm/generate.sbatch, with programs of Slurm and Ray that only write down how they are called."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "infra" / "slurm" / "generate.sbatch"
PROGRAMS = {
    "scontrol": 'case "$2" in hostnames) printf "n1\\nn2\\n";; *) echo "NodeName=$4 NodeAddr=127.0.0.1 Port=1";; esac',
    "srun": "",
    "ray": "",
    "facediffuser": 'echo "at $RAY_ADDRESS" >> "$LOG"; exit "${ENDS:-0}"',
}


@pytest.fixture
def run(tmp_path):
    """Runs the script for a job of two nodes; returns its exit code and the calls."""
    for name, body in PROGRAMS.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/bash\n[ {name} = scontrol ] || echo {name} "$@" >> "$LOG"\n{body}\n')
        program.chmod(0o755)

    def start(**environment: str) -> tuple[int, list[str]]:
        job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}
        path = {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "LOG": str(tmp_path / "log")}
        # The pipe is at its end when the programs in the background have ended, too: what they were called with is written.
        done = subprocess.run(
            ["bash", SCRIPT], env=os.environ | path | job | environment, timeout=60, stdout=subprocess.PIPE
        )
        log = tmp_path / "log"
        return done.returncode, log.read_text().splitlines() if log.exists() else []

    return start


def test_the_head_is_on_the_first_node_others_join_it_and_the_driver_runs_beside_it(run):
    code, calls = run(FACEDIFFUSER_CONFIG="run.yaml")
    assert code == 0
    (head,) = [call for call in calls if "--head" in call]
    (other,) = [call for call in calls if call.startswith("srun") and "--head" not in call]
    assert "--nodelist=n1 ray start --head --node-ip-address=127.0.0.1 --port=6379" in head
    assert "--nodes=1 --ntasks=1 --exclude=n1 ray start --address=127.0.0.1:6379" in other
    assert "facediffuser generate --config run.yaml" in calls and "at 127.0.0.1:6379" in calls


def test_the_job_ends_as_the_run_did(run):
    assert run(FACEDIFFUSER_CONFIG="run.yaml", ENDS="3")[0] == 3


def test_without_options_nothing_is_started(run):
    code, calls = run(FACEDIFFUSER_CONFIG="")
    assert code != 0 and calls == []
