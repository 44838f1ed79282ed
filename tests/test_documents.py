"""The documents: links lead somewhere, commands and options exist, every column is explained."""

import contextlib
import io
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import yaml

from facediffuser.dataset.schema import DATASET_SCHEMA, SUBJECTS_SCHEMA
from facediffuser.flows.cli import main

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    path.relative_to(ROOT) for folder in ("", "docs", "docs/results", "infra") for path in (ROOT / folder).glob("*.md")
)
by_document = pytest.mark.parametrize("document", DOCUMENTS, ids=str)


def shell_lines(document: Path) -> list[str]:
    """The commands of a document's blocks of shell, each on one line."""
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)
    text = "\n".join(block for language, block in blocks if not language)
    return [line.strip() for line in re.sub(r"\\\n\s*", " ", text).splitlines() if line.strip()]


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@by_document
def test_relative_links_lead_somewhere(document):
    text = re.sub(r"```.*?```", "", (ROOT / document).read_text(), flags=re.DOTALL)
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / document).parent / name if name else ROOT / document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert wrong == []


@cache
def help_of(command: tuple[str, ...]) -> str:
    """What `facediffuser COMMAND --help` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        assert main([*command, "--help"]) == 0
    return out.getvalue()


@by_document
def test_commands_exist_with_their_options(document, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # no option is broken over two lines
    for line in shell_lines(document):
        if not line.startswith("facediffuser "):
            continue
        words = shlex.split(line, comments=True)
        command = tuple(words[1:3] if words[1] == "miniature" else words[1:2])
        text = help_of(command)
        assert f"facediffuser {command[0]}" in text, line
        options = [word.partition("=")[0] for word in words if word.startswith("--")]
        assert [option for option in options if not re.search(rf"{option}\b(?!-)", text)] == [], line


@by_document
def test_make_targets_exist(document):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"`make ([a-z-]+)", (ROOT / document).read_text())
    named += [line.split()[1] for line in shell_lines(document) if line.startswith("make ")]
    assert set(named) - targets == set()


def test_the_reference_explains_every_column():
    text = (ROOT / "docs" / "reference.md").read_text()
    explained = {
        name for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert {*DATASET_SCHEMA.names, *SUBJECTS_SCHEMA.names} - explained == set()


def test_the_reference_lists_every_command():
    text = (ROOT / "docs" / "reference.md").read_text()
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main(["--help"])
    for command in ("demo", "retry-failed", "explain"):  # the help is read, not empty
        assert command in out.getvalue()
    table = text[text.index("## Commands") : text.index("| exit code")]
    listed = set(re.findall(r"^\| `([a-z -]+)`", table, re.MULTILINE))
    assert {"demo", "generate", "verify", "miniature render"} <= listed
    for command in listed:
        assert command.split()[0] in out.getvalue(), command


def test_the_citation_names_the_paper_and_this_version():
    from facediffuser import __version__

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["references"][0]["url"] == "https://arxiv.org/abs/2311.10329"


def test_the_workflow_runs_make_test():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    assert workflow["jobs"]["test"]["steps"][-1] == {"run": "make test"}
