"""What a run shows on its page in Prefect: a server that answers with an error, late or not at all ends no run."""

import logging
import threading
import uuid
from pathlib import Path

import httpx
import prefect.artifacts
import pytest
from counting_worker import Counting
from prefect.context import FlowRunContext

from facediffuser.batch_stage import Stage, Unit
from facediffuser.tasks import progress, run_page
from facediffuser.tasks.local_driver import LocalDriver
from facediffuser.tasks.run_page import ProgressBar, show_markdown

ROOT = Path(__file__).resolve().parents[1]
ARTIFACTS = ("create_progress_artifact", "update_progress_artifact", "create_markdown_artifact")
ERROR_500 = httpx.HTTPStatusError("Server error '500 Internal Server Error'", request=httpx.Request("POST", "http://x"),
                                  response=httpx.Response(500))  # fmt: skip


@pytest.fixture
def in_a_run():
    with FlowRunContext.model_construct():
        yield


@pytest.fixture
def server(in_a_run, monkeypatch, caplog):
    """Puts functions in the place of Prefect's; returns the warnings that the product logged since."""
    caplog.set_level(logging.INFO, logger="facediffuser")

    def answers(*calls) -> list[str]:
        for name, call in zip(ARTIFACTS, calls, strict=True):
            monkeypatch.setattr(prefect.artifacts, name, call)
        return caplog.records

    return answers


def raises(error):
    def call(*_, **__):
        raise error

    return call


def warnings(records) -> list[str]:
    return [record.getMessage() for record in records if record.levelno == logging.WARNING]


@pytest.mark.parametrize(
    "error", [ERROR_500, httpx.ConnectError("refused"), TimeoutError(), RuntimeError("cannot send")]
)
@pytest.mark.parametrize("begun", [False, True])
def test_a_stage_goes_on_when_the_server_takes_no_progress(server, monkeypatch, error, begun):
    monkeypatch.setattr(progress, "ARTIFACT_EVERY_S", 0.0)
    create = (lambda *_, **__: uuid.uuid4()) if begun else raises(error)
    said = server(create, raises(error), raises(error))
    units = [Unit(f"unit-{n}", 1) for n in range(5)]
    results = LocalDriver().run(Stage("Count", "images", {}, units, Counting))
    assert len(results.counts) == 5
    (line,) = warnings(said)
    assert "progress-count" in line and type(error).__name__ in line and "the run goes on" in line


def test_a_run_ends_well_when_the_server_takes_no_page(server):
    said = server(*[raises(ERROR_500)] * 3)
    show_markdown("# done", key="dataset-scores")
    (line,) = warnings(said)
    assert "dataset-scores" in line and "500" in line


def test_a_server_that_does_not_answer_holds_nothing_up(server):
    answers = threading.Event()
    try:
        said = server(*[lambda *_, **__: answers.wait(60)] * 3)
        bar = ProgressBar("progress-count", within_s=0.01)
        for percent in range(5):
            bar.show(percent, "on the way")
        bar.close(100.0, "done")
        show_markdown("# done", key="dataset-scores", within_s=0.01)
        assert [line.split("(")[1] for line in warnings(said)] == ["no answer within 0.01 s); the run goes on"] * 2
    finally:
        answers.set()


def test_the_bar_is_made_once_moved_and_shows_the_end_also_after_an_error(server):
    shown = []

    def create(percent, key, description):
        if not shown:
            shown.append("error")
            raise ERROR_500
        shown.append((key, percent, description))
        return uuid.uuid4()

    server(create, lambda _, percent, description: shown.append((percent, description)), raises(ERROR_500))
    bar = ProgressBar("progress-count")
    bar.close(0.0, "begun")
    bar.close(50.0, "half")
    bar.close(100.0, "done")
    assert shown == ["error", ("progress-count", 50.0, "half"), (100.0, "done")]


def test_outside_a_run_nothing_is_sent(monkeypatch):
    monkeypatch.setattr(prefect.artifacts, "create_markdown_artifact", raises(AssertionError("sent")))
    show_markdown("# done", key="dataset-scores")
    assert not run_page.in_prefect_run()


def test_every_artifact_of_the_product_goes_this_way():
    users = {
        path.name
        for folder in ("facediffuser", "flows", "tasks")
        for path in (ROOT / folder).rglob("*.py")
        if "prefect.artifacts" in path.read_text()
    }
    assert users == {"run_page.py"}
