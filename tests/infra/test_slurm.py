"""infra/slurm/generate.sbatch, with programs of Slurm and Ray that only write down how they are called."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import ray.scripts.scripts as ray_command_line

SCRIPT = Path(__file__).resolve().parents[2] / "infra" / "slurm" / "generate.sbatch"
# Each lives as long as the script, where a variable does not say how it ends.
LIVES = "while read -r state < /proc/$SCRIPT_PID/stat && [[ $state != *') Z '* ]]; do sleep 0.05; done 2> /dev/null"
PROGRAMS = {
    "scontrol": 'case "$2" in hostnames) printf "n1\\nn2\\n";; *) echo "NodeName=$4 NodeAddr=127.0.0.1 Port=1";; esac',
    "srun": f'case "$*" in *--head*) ends=${{HEAD_ENDS:-}};; *) ends=${{OTHERS_END:-}};; esac; [ "$ends" ] && exit $ends; {LIVES}',
    "ray": 'exit "${UNHEALTHY:-0}"',
    "python": f'echo "waits for ${{@: -1}} nodes" >> "$LOG"; [ "${{NODES_MISSING:-}}" ] || exit 0; {LIVES}',
    "facediffuser": 'echo "at $RAY_ADDRESS" >> "$LOG"; exit "${ENDS:-0}"',
}


@pytest.fixture
def run(tmp_path):
    """Runs the script for a job of two nodes; returns its exit code and the calls."""
    for name, body in PROGRAMS.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(
            f'#!/bin/bash\n[ {name} = scontrol ] || [ {name} = python ] || echo {name} "$@" >> "$LOG"\n{body}\n'
        )
        program.chmod(0o755)

    def start(**environment: str) -> tuple[int, list[str], str]:
        job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}
        path = {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "LOG": str(tmp_path / "log")}
        # The pipes are at their end when the programs in the background have ended, too: what they were called with is written.
        done = subprocess.run(
            ["bash", "-c", 'export SCRIPT_PID=$$; exec bash "$0"', SCRIPT],
            env=os.environ | path | job | environment, timeout=60, capture_output=True, text=True,
        )  # fmt: skip
        log = tmp_path / "log"
        return done.returncode, log.read_text().splitlines() if log.exists() else [], done.stderr

    return start


def test_the_head_is_on_the_first_node_others_join_it_and_the_driver_runs_beside_it(run):
    code, calls, said = run(FACEDIFFUSER_CONFIG="run.yaml")
    assert code == 0 and not said
    (head,) = [call for call in calls if "--head" in call]
    (other,) = [call for call in calls if call.startswith("srun") and "--head" not in call]
    assert "--nodelist=n1 ray start --head --node-ip-address=127.0.0.1 --port=20017" in head
    assert "--nodes=1 --ntasks=1 --exclude=n1 ray start --address=127.0.0.1:20017" in other
    assert calls.index("waits for 2 nodes") < calls.index("facediffuser generate --config run.yaml")
    assert "at 127.0.0.1:20017" in calls


def test_jobs_on_one_node_have_ports_of_their_own_and_a_port_can_be_given(run):
    ports = set()
    for given in ({"SLURM_JOB_ID": "4999"}, {"SLURM_JOB_ID": "5000"}, {"RAY_PORT": "6379", "RAY_CLIENT_PORT": "10001"}):
        (head,) = [call for call in run(FACEDIFFUSER_CONFIG="run.yaml", **given)[1] if "--head" in call][-1:]
        words = dict(word.split("=", 1) for word in head.split() if "port=" in word)
        ports |= {words["--port"], words["--ray-client-server-port"]}
    assert ports == {"24999", "29999", "20000", "25000", "6379", "10001"}


@pytest.mark.parametrize("code", ["0", "1"])
def test_a_head_that_does_not_start_ends_the_job(run, code):
    ended, calls, said = run(FACEDIFFUSER_CONFIG="run.yaml", HEAD_ENDS=code, UNHEALTHY="1")
    assert ended == 1 and f"Ray's head did not start at 127.0.0.1:20017 (exit code {code})" in said
    assert not [call for call in calls if call.startswith("facediffuser")]


@pytest.mark.parametrize(("missing", "line"), [
    ({"RAY_NODES_WAIT_S": "0.1"}, "not all 2 nodes are in Ray after 0.1 s"),
    ({"OTHERS_END": "1"}, "the other nodes' part of Ray has ended"),
])  # fmt: skip
def test_the_run_starts_without_nodes_that_do_not_come_and_says_so(run, missing, line):
    code, calls, said = run(FACEDIFFUSER_CONFIG="run.yaml", NODES_MISSING="1", **missing)
    assert code == 0 and line in said and "facediffuser generate --config run.yaml" in calls


def test_the_job_ends_as_the_run_did(run):
    assert run(FACEDIFFUSER_CONFIG="run.yaml", ENDS="3")[0] == 3


def test_without_options_nothing_is_started(run):
    code, calls, _ = run(FACEDIFFUSER_CONFIG="")
    assert code != 0 and calls == []


def test_ray_takes_the_options_of_its_nodes_and_python_what_counts_them():
    script = SCRIPT.read_text().replace("\\\n", " ")
    for words in re.findall(r"\bray start (--[^&\n]*)&", script):
        given = [re.sub(r"\$\{?\w+[^}\"]*\}?", "20017", word) for word in shlex.split(words)]
        assert ray_command_line.cli.commands["start"].make_context("start", given).params["block"]
    (counting,) = re.findall(r"python -c '([^']*)'", script)
    compile(counting, str(SCRIPT), "exec")
