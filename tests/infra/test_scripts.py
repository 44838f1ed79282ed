"""The image's two scripts, and the commands that the files of infra/ give to Ray."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
import ray.scripts.scripts as ray_command_line
import yaml

INFRA = Path(__file__).resolve().parents[2] / "infra"


def _make_bucket(name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, INFRA / "make_bucket.py", name], capture_output=True, text=True)


def test_make_bucket_makes_it_and_leaves_it_as_it_is_the_second_time(s3_bucket):
    name = f"{s3_bucket.name}-made"
    assert _make_bucket(name).stdout == f"{name}: made\n"
    client = boto3.session.Session().client("s3")
    client.put_object(Bucket=name, Key="kept", Body=b"x")
    assert _make_bucket(name).stdout == f"{name}: there already\n"
    assert client.list_objects_v2(Bucket=name)["KeyCount"] == 1


def test_make_bucket_fails_where_it_may_not(s3_bucket, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    done = _make_bucket(f"{s3_bucket.name}-made")
    assert done.returncode != 0
    assert "SignatureDoesNotMatch" in done.stderr


@pytest.fixture
def recorded(tmp_path, monkeypatch) -> Path:
    """A log of how `ray` and `prefect` are called, which stand aside for programs that only write it."""
    log = tmp_path / "calls"
    for name in ("ray", "prefect"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> {log}\n[ {name} != "$FAILING" ]\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return log


def test_start_worker_joins_ray_first_and_then_becomes_the_prefect_worker(recorded, monkeypatch):
    monkeypatch.setenv("RAY_HEAD", "ray-head:6379")
    subprocess.run([INFRA / "start_worker.sh"], check=True)
    joined, worker = recorded.read_text().splitlines()
    assert _ray_options(joined)["address"] == "ray-head:6379"
    assert _ray_options(joined)["num_cpus"] == 0
    assert worker == "prefect worker start --pool face-diffuser --type process --with-healthcheck"


def test_start_worker_ends_when_ray_cannot_be_joined(recorded, monkeypatch):
    monkeypatch.setenv("RAY_HEAD", "ray-head:6379")
    monkeypatch.setenv("FAILING", "ray")
    assert subprocess.run([INFRA / "start_worker.sh"]).returncode != 0
    assert len(recorded.read_text().splitlines()) == 1


def test_start_worker_needs_to_know_where_the_head_is(recorded, monkeypatch):
    monkeypatch.delenv("RAY_HEAD", raising=False)
    done = subprocess.run([INFRA / "start_worker.sh"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "RAY_HEAD" in done.stderr
    assert not recorded.exists()


def _ray_commands() -> list[str]:
    """Return every `ray ...` command of the compose file and of the Ray cluster file."""
    services = yaml.safe_load((INFRA / "docker-compose.yaml").read_text())["services"].values()
    composed = [service["command"] for service in services if "command" in service] + [
        service["healthcheck"]["test"][1:] for service in services if "healthcheck" in service
    ]
    cluster = yaml.safe_load((INFRA / "aws" / "ray-cluster.yaml").read_text())
    launched = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    return [shlex.join(words) for words in composed if words[0] == "ray"] + launched


def _ray_options(command: str) -> dict:
    """Return what Ray's own command line reads; it raises for an option that is not there."""
    _, name, *arguments = shlex.split(re.sub(r"\$RAY_HEAD_IP", "10.0.0.1", command))
    return ray_command_line.cli.commands[name].make_context(name, list(arguments)).params


def test_ray_understands_every_command_given_to_it():
    commands = _ray_commands()
    assert len(commands) >= 7
    for command in commands:
        assert _ray_options(command) is not None
    heads = [_ray_options(command) for command in commands if "--head" in command]
    assert [head["port"] for head in heads] == [6379, 6379]
