"""The commands and the Python of README.md and docs/read.md, run as written after a small demonstration; each refuses a wrong path."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALL_DEMO = (
    "facediffuser demo --output out/demo --photos 24 --train-steps 1 --batch-size 2 --subjects 4 --prompts 2 --steps 3"
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Blocks that need a server that stays, an installation, or words of the reader's own.
LEFT_OUT = re.compile(r"^(make|source|people/|prefect|export|git|pip|<|facediffuser (verify|card) URL)")


def blocks(document: str, language: str) -> list[str]:
    found = [text for name, text in BLOCK.findall((ROOT / document).read_text()) if name == language]
    return [text for text in found if not LEFT_OUT.match(text)]


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    own = {"PREFECT_HOME": str(folder / "prefect"), **paths}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_"))}
    return subprocess.run(words, cwd=folder, env=inherited | own, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_the_documents_say_runs_as_written_and_refuses_a_wrong_path(tmp_path):
    shell, python = blocks("README.md", ""), blocks("README.md", "python") + blocks("docs/read.md", "python")
    assert len([text for text in shell if "facediffuser " in text]) >= 3 and len(python) >= 3
    for text in [SMALL_DEMO, *shell]:
        done = run(["bash", "-e", "-c", text], tmp_path)
        assert done.returncode == 0, f"{text}\n{done.stderr}"
        noise = [
            line for line in (done.stdout + done.stderr).splitlines() if re.search(r"raylet|WARNING|Traceback", line)
        ]
        assert noise == [], text
    for text in python:
        done = run([sys.executable, "-c", text], tmp_path)
        assert done.returncode == 0, f"{text}\n{done.stderr}"
    for text in shell:
        if "facediffuser " in text:
            done = run(["bash", "-c", text.replace("out/demo", "out/none").replace("out/mine", "out/other")], tmp_path)
            assert done.returncode == 2, f"{text}\n{done.stderr}"
            assert sum(line.startswith("facediffuser ") for line in done.stderr.splitlines()) == 1, done.stderr
            assert not (tmp_path / "out/none").exists() and not (tmp_path / "out/other").exists()
