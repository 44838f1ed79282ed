"""The package: what the distributions hold, what the base install can do, and what it says of the rest."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from base_install import in_base_install

from facediffuser.extras import EXTRAS, missing_extra

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# --- distributions ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[list[str], list[str]]:
    """The names in the wheel, which is built from the source distribution, and those in the source distribution."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    # A copy, because a build writes beside the sources; with what must stay out of the wheel.
    for name in ("facediffuser", "flows", "tasks", "tools", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", source / "tests")
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, source)
    subprocess.run(
        [
            *(sys.executable, "-m", "uv", "build", "--quiet", "--offline", "--no-build-isolation"),
            *("--python", sys.executable, "--out-dir", out, source),
        ],
        check=True,
    )
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive, tarfile.open(sdist) as sources:
        return archive.namelist(), [name.partition("/")[2] for name in sources.getnames()]


def test_a_wheel_puts_one_module_into_site_packages(distributions):
    wheel, _ = distributions
    top = {name.partition("/")[0] for name in wheel}
    assert top == {"facediffuser", f"facediffuser-{importlib.metadata.version('facediffuser')}.dist-info"}


def test_a_wheel_has_all_of_the_package_that_git_has(distributions):
    wheel, _ = distributions
    package = {
        str(path.relative_to(ROOT))
        for folder in (ROOT / "facediffuser", ROOT / "facediffuser/flows", ROOT / "facediffuser/tasks")
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert package - set(wheel) == set()
    assert {"facediffuser/py.typed", "facediffuser/flows/cli.py", "facediffuser/tasks/generate.py"} <= package
    assert any(name.endswith(".safetensors") for name in wheel)
    assert any(name.endswith(".jsonl") for name in wheel)


@pytest.mark.parametrize("folder", ["tests", "tools", "benchmarks", "flows", "tasks"])
def test_neither_distribution_has_a_top_level(folder, distributions):
    for names in distributions:
        assert not [name for name in names if name.startswith(f"{folder}/")]


# --- extras -----------------------------------------------------------------------------------------------------------


def test_reading_the_dataset_format_loads_neither_torch_nor_ray_nor_prefect():
    modules = [f"facediffuser.dataset.{path.stem}" for path in (ROOT / "facediffuser/dataset").glob("[a-z]*.py")]
    code = f"""
import importlib, sys
for name in ["facediffuser", "facediffuser.storage", "facediffuser.dataset", *{modules!r}]:
    importlib.import_module(name)
print({{"torch", "ray", "prefect", "diffusers", "transformers"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


COMMANDS_OF_EXTRAS = {
    "demo --output out": "all",
    "preprocess --source . --output out": "all",
    "train tdm --data data --base miniature --output out": "all",
    "generate --models miniature --subjects people --prompts single-30 --output out": "all",
    "evaluate --dataset data --output out": "all",
    "score data --add sharpness": "all",
    "copies data --training photos": "all",
    "repair data": "all",
    "retry-failed data": "all",
    "miniature claim --output out": "all",
    "assemble --base miniature --tdm tdm --sdm sdm --output out": "pipeline",
    "convert --base base --image-encoder clip --sdm sdm --tdm tdm --output out": "pipeline",
    "remake sample --dataset data": "pipeline",
    "check --models miniature": "pipeline",
    "explain --models miniature --prompt person --reference face.png --output out": "pipeline",
    "miniature render --count 2 --output out": "pipeline",
}


@pytest.fixture(scope="module")
def without_extras(tmp_path_factory) -> tuple[dict[str, tuple[int, str, str]], list[Path]]:
    """What each command returns and prints in a base install, and the files they leave behind."""
    folder = tmp_path_factory.mktemp("base-install")
    code = """
import contextlib, io, json
from facediffuser.flows.cli import main
results = {}
for command in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(command.split())
    results[command] = (code, out.getvalue(), err.getvalue())
print(json.dumps(results))
"""
    done = in_base_install(code, *COMMANDS_OF_EXTRAS, folder=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), list(folder.iterdir())


@pytest.mark.parametrize(("command", "extra"), COMMANDS_OF_EXTRAS.items())
def test_a_command_that_lacks_an_extra_names_it_in_one_line(command, extra, without_extras):
    code, stdout, stderr = without_extras[0][command]
    assert (code, stdout) == (2, "")
    *before, line = stderr.splitlines()
    assert len(before) <= 1  # what the command starts
    assert line.startswith("facediffuser ") and line.endswith(
        f"is not installed; run: pip install 'facediffuser[{extra}]'"
    )


def test_a_command_that_lacks_an_extra_writes_nothing(without_extras):
    assert without_extras[1] == []


def test_the_pipeline_names_its_extra():
    done = in_base_install("from facediffuser import FaceDiffuserPipeline", folder=ROOT)
    last = done.stderr.splitlines()[-1]
    assert last.endswith("FaceDiffuserPipeline: torch is not installed; run: pip install 'facediffuser[pipeline]'")


def test_every_requirement_of_an_extra_is_named_and_none_of_the_base_install():
    modules: dict[str, set[str]] = {}
    for module, names in importlib.metadata.packages_distributions().items():
        for name in names:
            modules.setdefault(name.lower().replace("_", "-"), set()).add(module)
    for extra, named in EXTRAS.items():
        required = [_name(line) for line in PROJECT["optional-dependencies"][extra]]
        for name in required:
            # The extras of further scorers are installed by `make test-real` alone.
            assert name == "facediffuser" or name not in modules or modules[name] & set(named), name
    base = {module for line in PROJECT["dependencies"] for module in modules[_name(line)]}
    assert base & {module for named in EXTRAS.values() for module in named} == set()


def test_another_error_is_not_taken_for_a_missing_extra():
    assert missing_extra(ModuleNotFoundError("No module named 'torch.x'", name="torch.x")) is not None
    assert missing_extra(ModuleNotFoundError("No module named 'mine'", name="mine")) is None
    assert missing_extra(ModuleNotFoundError("by hand")) is None
    assert missing_extra(ValueError("torch")) is None


def _name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower()
