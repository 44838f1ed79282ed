"""The Makefile: what `make` says on machines that lack something, and that CI runs it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def fresh(tmp_path) -> Path:
    """A folder as a fresh clone has it: no environment yet."""
    (tmp_path / "tests").mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "tests/swift-constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def _make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def _python_that(folder: Path, fails_on: str) -> Path:
    """Return a Python that fails at code that holds `fails_on`, as one does that lacks what the code asks for."""
    program = folder / "python-lacking"
    program.write_text(f'#!/bin/sh\ncase "$*" in *{fails_on}*) exit 1;; esac\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    return program


def test_make_alone_lists_the_targets_and_does_nothing(fresh):
    done = _make(fresh)
    assert done.returncode == 0
    assert all(f"  {target} " in done.stdout for target in ("env", "demo", "test", "test-slow", "lint", "clean"))
    assert not (fresh / ".venv").exists()


@pytest.mark.parametrize(
    ("lacking", "mend"),
    [("version_info", "make demo PYTHON=python3.12"), ("ensurepip", "apt-get install python3-venv")],
    ids=["an old Python", "no venv module"],
)
def test_a_machine_that_lacks_something_is_told_how_to_fix_it(fresh, lacking, mend):
    done = _make(fresh, "demo", f"PYTHON={_python_that(fresh, lacking)}")
    assert done.returncode != 0
    assert mend in done.stderr
    assert "Traceback" not in done.stderr
    assert not (fresh / ".venv").exists()


def test_demo_sets_up_first_and_takes_an_output(fresh):
    lines = _make(fresh, "--dry-run", "demo", "OUTPUT=s3://bucket/demo").stdout
    assert lines.index("-m venv .venv") < lines.index("install --python") < lines.index("facediffuser demo")
    assert "facediffuser demo --output s3://bucket/demo" in lines


def test_test_sets_up_both_environments_and_lints_before_it_tests(fresh):
    lines = _make(fresh, "--dry-run", "test").stdout
    steps = [
        "-m venv .venv",
        "-e '.[dev]'",
        ".swift/bin/python",
        "ruff check",
        "ruff format --check",
        "lint-imports",
        "mypy",
        "-m pytest",
    ]
    places = [lines.index(step) for step in steps]
    assert places == sorted(places)


def test_ci_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "make test"
    assert "set -euo pipefail" in script.read_text()


def test_constraints_are_names_and_versions_only():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 100
    assert [line for line in lines if not _is_pin(line)] == []
    names = [line.partition("==")[0] for line in lines]
    assert names == sorted(names)


def _is_pin(line: str) -> bool:
    name, _, version = line.partition("==")
    return name.replace("-", "").replace(".", "").isalnum() and version[:1].isdigit() and "/" not in line
