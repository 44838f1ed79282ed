"""The Dockerfile parses, passes the linter, and copies only what exists and what the build context lets in."""

import json
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import dockerfile
import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "infra" / "Dockerfile"
IGNORE = ROOT / "infra" / "Dockerfile.dockerignore"
HADOLINT = Path(sys.executable).with_name("hadolint")


@pytest.fixture(scope="module")
def commands() -> tuple[dockerfile.Command, ...]:
    return dockerfile.parse_file(str(DOCKERFILE))


def _copied_from_context(commands) -> list[str]:
    copies = [command for command in commands if command.cmd.upper() in ("COPY", "ADD")]
    return [source for command in copies if not command.flags for source in command.value[:-1]]


def _values(commands, name: str) -> list[tuple[str, ...]]:
    return [command.value for command in commands if command.cmd.upper() == name]


def test_the_linter_has_nothing_to_say():
    done = subprocess.run([HADOLINT, "--format", "json", DOCKERFILE], capture_output=True, text=True)
    assert json.loads(done.stdout) == []
    assert done.returncode == 0


def test_the_linter_sees_a_stage_that_is_not_there(tmp_path):
    broken = tmp_path / "Dockerfile"
    broken.write_text(DOCKERFILE.read_text().replace("--from=package", "--from=pakcage"))
    done = subprocess.run([HADOLINT, "--format", "json", broken], capture_output=True, text=True)
    assert "DL3022" in {finding["code"] for finding in json.loads(done.stdout)}


def test_every_copied_path_exists(commands):
    sources = _copied_from_context(commands)
    assert len(sources) >= 8
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_every_copied_path_is_let_into_the_build_context(commands):
    let_in = [line[1:] for line in IGNORE.read_text().splitlines() if line.startswith("!")]
    kept_out = [
        source
        for source in map(Path, _copied_from_context(commands))
        if not any(fnmatch(str(path), pattern) for path in (source, *source.parents) for pattern in let_in)
    ]
    assert kept_out == []
    assert [name for name in let_in if not (ROOT / name).exists()] == []


def test_copied_stages_are_defined_before(commands):
    stages, used = [], []
    for command in commands:
        if command.cmd.upper() == "FROM" and "AS" in command.value:
            stages.append(command.value[-1])
        for flag in command.flags:
            if command.cmd.upper() == "COPY" and flag.startswith("--from="):
                used.append((flag.removeprefix("--from="), tuple(stages)))
    assert used
    assert all(stage in before for stage, before in used)


def test_the_image_runs_as_an_ordinary_user(commands):
    # A number, because Kubernetes cannot tell whether a name is root.
    (user,) = _values(commands, "USER")[-1]
    assert int(user) > 0
    assert any(f"--uid {user}" in " ".join(value) for value in _values(commands, "RUN"))


def test_prefect_s_pages_are_written_where_the_user_may_write(commands):
    """Prefect's server copies its pages into a folder before it serves them: by default into the environment."""
    variables = [word for words in _values(commands, "ENV") for word in words]
    folder = variables[variables.index("PREFECT_SERVER_UI_STATIC_DIRECTORY") + 1]
    assert folder.startswith("/home/factory/.prefect/")


def test_the_base_is_a_parameter_and_has_the_python_that_the_project_asks_for(commands):
    (base,) = [value[0].removeprefix("BASE_IMAGE=") for value in _values(commands, "ARG")]
    stages = [value[-1] for value in _values(commands, "FROM")]
    outer = [value[0] for value in _values(commands, "FROM") if value[0] not in stages]
    assert outer == ["${BASE_IMAGE}"], "the environment is copied from one stage to the next: both need the same Python"
    major, minor = base.removeprefix("python:").split("-")[0].split(".")[:2]
    assert (int(major), int(minor)) >= (3, 11)


def test_both_images_run_as_an_ordinary_user_and_say_whether_they_are_healthy(commands):
    kinds = [command.cmd.upper() for command in commands]
    ends = [place for place, kind in enumerate(kinds) if kind == "CMD"]
    for name, end in zip(("reader", "run"), ends, strict=True):
        (start,) = [place for place, one in enumerate(commands) if one.cmd.upper() == "FROM" and one.value[-1] == name]
        assert {"USER", "HEALTHCHECK"} <= set(kinds[start:end])


def test_what_is_copied_installs_with_everything_the_commands_need(commands, tmp_path):
    context, installed = tmp_path / "context", tmp_path / "installed"
    context.mkdir()
    for source in ("pyproject.toml", "README.md", "facediffuser", "tasks", "flows"):
        assert source in _copied_from_context(commands)
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, context / source)
    subprocess.run(
        [
            *(sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", sys.executable),
            *("--target", installed, "--no-deps", "--no-build-isolation", context),
        ],
        check=True,
    )
    shipped = {path.relative_to(ROOT) for path in (ROOT / "facediffuser").rglob("*") if _is_shipped(path)}
    assert {path for path in shipped if not (installed / path).exists()} == set()
    assert (installed / "bin" / "facediffuser").exists()


def _is_shipped(path: Path) -> bool:
    return path.is_file() and (path.suffix == ".py" or "weights" in path.parts) and "__pycache__" not in path.parts
