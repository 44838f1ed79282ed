"""Every command and all Python of the documents, run as written on what a small `facediffuser demo` left behind.

The words that stand for a reader's own things (MODELS, people, s3://bucket, ...) are links, folders and buckets of those
names. A command is made small by options behind it, of which the last one counts, or by a smaller number in its place.
What cannot run here stands in NOT_HERE with where it is tested; what needs a network is run, and must say so in a line.
"""

import csv
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3
import pyarrow.parquet as pq
import pytest
from PIL import Image

from facediffuser.dataset.suites import suite_prompts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parent.parent
DEMO = (
    "facediffuser demo --output out/demo --photos 24 --train-steps 1 --batch-size 2 --subjects 6 --prompts 2 --steps 3"
)
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
LISTING = re.compile(r"^(out/demo/dataset|people/ada|run\.json)")  # a folder's content, not a command
PRODUCT_LINE = re.compile(r"\d\d:\d\d:\d\d ")

NOT_HERE = {
    r"make |source ": "tests/test_makefile.py",
    r"python -m tools\.miniature_weights\.make all": "hours",
    r"python -m tools\.miniature_weights\.forgetting": "tests/miniature/test_measuring.py",
    r"prefect deployment run retract": "tests/infra/test_deployments.py",
    r"promtool ": "tests/test_metrics.py",
}
# These need a network, or weights and photographs that cannot be had here.
REFUSED = re.compile(r"s3://mine/ffhq|^facediffuser (publish|convert)")
SMALLER = {
    r"--count \d+": "--count 24",
    r"--steps \d{3,}": "--steps 2",
    r"--batch-size 128": "--batch-size 2",
    r"single-30,pairs-20": "single-30",
    r"\bPROMPTS\b": "prompts.jsonl",  # the kind of file is known by its name
}
SMALL = {
    r"generate (?!.*--speed)": "--scorers miniature --steps 3",
    r"generate .*--(benchmark|speed)": "--scorers miniature --subject-sets 1",
    r"evaluate .*--benchmark": "--scorers miniature --steps 3 --subject-sets 1",
    r"evaluate .*--images": "--scorers miniature",
    r"train [ts]dm": "--preset miniature --steps 2 --batch-size 2 --validate-every 1 --sample-every 2",
    r"rehearse": "--size miniature --steps 3 --try-pictures 2 --try-steps 1 --try-images 2",
    r"preprocess": "--size 64",
}
FIRST = ["README.md", "docs/generate.md"]  # generate.md's dataset in S3 is what the others read
DOCUMENTS = FIRST + sorted(
    name
    for path in [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "results").glob("*.md")]
    if (name := str(path.relative_to(ROOT))) not in FIRST and FENCE.search(path.read_text())
)


@dataclass
class Reader:
    """One who types what a document says, in a folder of their own."""

    folder: Path
    environment: dict[str, str]

    def run(self, text: str) -> subprocess.CompletedProcess[str]:
        """Run `text` in bash."""
        started = time.monotonic()
        done = subprocess.run(
            ["bash", "-e", "-c", text], cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        print(f"{time.monotonic() - started:6.1f} s, exit code {done.returncode}: {text.strip()}")
        return done

    def succeeds(self, text: str) -> None:
        """Run `text`; assert that it ends well and shows nothing of its libraries."""
        done = self.run(text)
        said = done.stdout + done.stderr
        assert done.returncode == 0, f"{text}\n{said}"
        of_libraries = "\n".join(line for line in said.splitlines() if not PRODUCT_LINE.match(line))
        assert not re.search(r"raylet|WARNING|Traceback", of_libraries), f"{text}\n{said}"

    def is_refused(self, text: str) -> None:
        """Run `text`; assert that it ends with exit code 2 and one line that says what is wrong."""
        done = self.run(text)
        assert done.returncode == 2, f"{text}\n{done.stdout}{done.stderr}"
        assert sum(line.startswith("facediffuser ") for line in done.stderr.splitlines()) == 1, done.stderr
        assert "Traceback" not in done.stderr, done.stderr


@pytest.fixture(scope="module")
def demo(tmp_path_factory, s3_server) -> Reader:
    """One who has run the demonstration and has the buckets of the documents, `theirs` in one of them."""
    folder = tmp_path_factory.mktemp("demo")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_", "AWS_"))}
    own = {
        **s3_server.environment(),
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PREFECT_HOME": str(folder / "prefect"),
        "PYTHONPATH": str(ROOT),
    }
    reader = Reader(folder, inherited | own)
    reader.succeeds(DEMO)
    dataset = folder / "out/demo/dataset"
    client = boto3.session.Session(own["AWS_ACCESS_KEY_ID"], own["AWS_SECRET_ACCESS_KEY"]).client(
        "s3", endpoint_url=s3_server.endpoint, region_name="us-east-1"
    )
    for bucket in ("bucket", "mine"):
        client.create_bucket(Bucket=bucket)
    for path in dataset.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "bucket", f"theirs/{path.relative_to(dataset)}")
    return reader


@pytest.fixture
def reader(demo, tmp_path) -> Reader:
    """A reader in a clone with the demo's output, people with pictures, and what the documents' words stand for."""
    made = demo.folder / "out/demo"
    (tmp_path / "out").mkdir()
    _people(made / "photos/subjects", tmp_path / "people")
    for name, target in {
        ".venv": Path(sys.prefix),
        **{name: ROOT / name for name in ("facediffuser", "flows", "tasks", "tools", "prefect.yaml", "prefect.toml")},
        "out/demo": made,
        "MODELS": made / "models",
        "MODEL": ROOT / "facediffuser/miniature/weights/base",
        "SUBJECTS": tmp_path / "people",
        "PHOTOGRAPHS": made / "photos",
        "PREPARED": made / "prepared",
        "URL": made / "dataset",
        "Pictures": tmp_path / "people/ada",
    }.items():
        (tmp_path / name).symlink_to(target)
    shutil.copy(made / "photos/prompts.jsonl", tmp_path)  # the README writes its own in its place
    return Reader(tmp_path, demo.environment | {"HOME": str(tmp_path)})


def _people(subjects: Path, people: Path) -> None:
    """Make the README's folder of people, Ada and Bob with what they agreed to, of pictures of the demonstration."""
    pictures = sorted(path for path in subjects.iterdir() if path.is_dir())
    for name, own in zip(("ada", "bob"), pictures, strict=False):
        shutil.copytree(own, people / name)
    (people / "subjects.csv").write_text(
        "subject_id,class_word,consent,expires\nada,woman,research,2099-12-31\nbob,man,research,2099-12-31\n"
    )


def _prompts(suite: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in suite_prompts(suite).read_text().splitlines()]


def _datasets_of_others(folder: Path) -> None:
    """Make the folders of images of other systems that docs/evaluate.md compares with."""
    table = pq.read_table(next((folder / "out/demo/dataset/data").glob("*.parquet")), columns=["image"])
    image = Image.open(io.BytesIO(table["image"][0].as_py()["bytes"])).convert("RGB")
    for name in ("ti", "cd", "sd"):
        (folder / "out" / name).mkdir()
    for system in ("ti", "cd"):
        for subject in range(2):
            for prompt in range(len(_prompts("single-30"))):
                image.save(folder / f"out/{system}/subject_{subject:04d}_prompt_{prompt:04d}_instance_0000.jpg")
    with open(folder / "out/sd.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "subject_ids", "prompt_id"])
        for number, prompt in enumerate(_prompts("pairs-20")):
            image.save(folder / f"out/sd/{number}.jpg")
            rows.writerow([f"{number}.jpg", "ada+bob", prompt["prompt_id"]])


def _prepare(document: str, folder: Path) -> None:
    """Put into `folder` what a document takes as made before it."""
    if document == "docs/scoring.md":
        shutil.copytree(folder / "out/demo/dataset", folder / "out/mine")
    elif document == "docs/evaluate.md":
        _datasets_of_others(folder)
    elif document == "docs/miniature.md":
        parts = ROOT / "facediffuser/miniature/weights"
        shutil.copytree(parts, folder / "out/parts", ignore=shutil.ignore_patterns("models"))
    elif document == "docs/preprocess.md":
        with tarfile.open(folder / "ffhq_fastcomposer.tgz", "w:gz") as archive:
            archive.add(folder / "out/demo/photos", "ffhq")
    elif document == "docs/train.md":
        (folder / "MODELS").unlink()  # `assemble` makes it


def blocks(document: str) -> list[tuple[str, str]]:
    """Return language and text of a document's blocks."""
    return [(language, text) for _, language, text in FENCE.findall((ROOT / document).read_text())]


def commands(text: str) -> list[str]:
    """Return the commands of a block, each whole: continued lines and here-documents belong to their first line."""
    found: list[str] = []
    end = ""
    for line in text.splitlines():
        if end or (found and found[-1].endswith("\\")):
            found[-1] += "\n" + line
            end = "" if line.strip() == end else end
        elif line.strip() and not line.lstrip().startswith("#"):
            found.append(re.sub(r"\s+# .*$", "", line.strip()))
            end = next(iter(re.findall(r"<<'(\w+)'", line)), "")
    return found


def made_small(command: str) -> str:
    """Return the command with smaller numbers, and with options behind it that make it small."""
    for number, smaller in SMALLER.items():
        command = re.sub(number, smaller, command)
    options = [more for pattern, more in SMALL.items() if re.search(f"facediffuser {pattern}", command, re.DOTALL)]
    return " ".join([command, *options])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_a_document_says_runs_as_written(document, reader):
    _prepare(document, reader.folder)
    for language, text in blocks(document):
        if language == "python":
            (reader.folder / "example.py").write_text(text)
            reader.succeeds("python example.py")
        if language or LISTING.match(text) or "export PREFECT_API_URL" in text:
            continue
        for command in commands(text):
            if REFUSED.search(command):
                reader.is_refused(command)
            elif not any(re.match(pattern, command) for pattern in NOT_HERE):
                reader.succeeds(made_small(command))


def test_a_wrong_path_in_a_command_of_the_readme_is_refused(reader):
    (reader.folder / "out/demo").rename(reader.folder / "out/elsewhere")
    tried = [one for language, text in blocks("README.md") if not language for one in commands(text)]
    tried = [one for one in tried if one.startswith("facediffuser ") and "out/demo" in one]
    assert len(tried) == 3
    for command in tried:
        reader.is_refused(command)
    assert [path.name for path in (reader.folder / "out").iterdir()] == ["elsewhere"]


@contextmanager
def _stays(reader: Reader, command: str) -> Iterator[None]:
    """Run a command that does not end by itself beside the others, and stop it at the end."""
    with open(reader.folder / "stays.log", "wb") as log:
        process = subprocess.Popen(
            command.split(), cwd=reader.folder, env=reader.environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)


def test_the_scheduled_runs_of_the_readme(reader):
    of_readme, of_schedule = (
        [text for _, text in blocks(name) if "export PREFECT_API_URL" in text]
        for name in ("README.md", "docs/schedule.md")
    )
    assert of_readme == of_schedule and len(of_readme) == 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reader.environment |= {
        "PREFECT_HOME": str(reader.folder / "prefect"),
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
    }
    first, second = (text.replace(":4200", f":{port}") for text in of_readme)
    setting_up, worker = first.strip().rsplit("\n", 1)
    assert worker == "prefect worker start --pool face-diffuser"
    try:
        # The server is the one command of it that stays.
        assert reader.run(f"{setting_up}\necho $! > server.pid").returncode == 0
        reader.environment["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
        with _stays(reader, worker):
            done = reader.run(second)
            assert done.returncode == 0, done.stdout + done.stderr + (reader.folder / "stays.log").read_text()[-4000:]
    finally:
        os.kill(int((reader.folder / "server.pid").read_text()), signal.SIGTERM)
    assert json.loads((reader.folder / "out/mine-scheduled/manifest.json").read_text())["counts"]["ok"] > 0
