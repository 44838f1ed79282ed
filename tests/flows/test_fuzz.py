"""Hostile options and damaged files: every command refuses them in one line with exit code 2, and writes nothing."""

from pathlib import Path

import pytest
from fuzzing import (
    COMMANDS,
    DAMAGES,
    READS,
    VARIANTS,
    WORK,
    Tried,
    make_hostile,
    make_templates,
    no_work,
    options,
    require_promise,
    words,
    world_of,
)
from hypothesis import HealthCheck, given, settings

pytestmark = pytest.mark.usefixtures("plain_plots")


@pytest.fixture(scope="module")
def templates(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("templates")
    make_templates(root)
    make_hostile(root)
    return root


@pytest.fixture(autouse=True)
def no_work_is_done(monkeypatch):
    """An input that is accepted ends there: neither Prefect, Ray nor a model starts."""
    for work in filter(None, WORK.values()):
        monkeypatch.setattr(work, no_work)
    for name in ("RAY_ADDRESS", "AWS_ENDPOINT_URL", "AZURE_STORAGE_ACCOUNT_NAME"):
        monkeypatch.delenv(name, raising=False)
    # gs:// is refused for its credentials: without them the client would ask the network.
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere/key.json")


def try_inputs(command: str, templates: Path, count: int) -> dict[str, Tried]:
    """Try `count` hostile command lines and `count` damaged files on a command; return what came of each kind."""
    reads = list(VARIANTS[command].reads) if command in VARIANTS else READS[command]
    tried = {"options": Tried(), "files": Tried()}
    quiet = settings(
        max_examples=count, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip

    @quiet
    @given(options(command))
    def with_options(given: dict[str, str]) -> None:
        with world_of(templates, []) as root:
            require_promise(command, words(command, root, given), root, tried["options"])

    @quiet
    @given(DAMAGES)
    def with_files(damage) -> None:
        with world_of(templates, reads) as root:
            damage.do(root, reads)
            changed = {"models": "models"} if "models" in reads else {}
            require_promise(command, [*words(command, root, changed)], root, tried["files"])

    with_options()
    if reads:
        with_files()
    return tried


@pytest.mark.parametrize("command", [*COMMANDS, *VARIANTS])
def test_hostile_input_is_one_line_and_nothing_is_written(command, templates):
    tried = try_inputs(command, templates, 5)
    assert tried["options"].refused


@pytest.mark.slow
@pytest.mark.parametrize("command", [*COMMANDS, *VARIANTS])
def test_much_hostile_input_is_one_line_and_nothing_is_written(command, templates, summary_line):
    tried = try_inputs(command, templates, 300)
    assert tried["options"].refused
    counts = ", ".join(f"{kind} {one.refused} refused, {one.accepted} accepted" for kind, one in tried.items())
    summary_line("hostile input", f"{command}: {counts}")
