"""The ground the faults are tried on, and the table of what became of the rows, printed at the end of the tests."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from faults.cluster import MiniatureOnS3
from faults.ground import Ground, Outcome

OUTCOMES: list[Outcome] = []


@pytest.fixture(scope="session")
def made_ground(world, tmp_path_factory) -> Ground:
    import torch

    ground = Ground(world, tmp_path_factory.mktemp("faults"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ground.make_undisturbed()
    torch.set_num_threads(threads)
    return ground


@pytest.fixture
def ground(made_ground, tmp_path) -> Ground:
    """The ground, with this test's own folder for logs."""
    made_ground.folder = tmp_path
    return made_ground


@pytest.fixture
def ground_on_s3(s3_bucket, tmp_path) -> Ground:
    """The miniature with all of its inputs in the bucket, and what an undisturbed run of it in this process makes."""
    ground = Ground(MiniatureOnS3(s3_bucket.url, tmp_path / "photos"), tmp_path, {"images_per_prompt": 6})
    ground.make_undisturbed()
    return ground


@pytest.fixture
def table():
    """Take an outcome into the table; fail when a row was harmed."""

    def take(outcome: Outcome) -> None:
        OUTCOMES.append(outcome)
        assert outcome.harm == 0, outcome

    return take


def pytest_terminal_summary(terminalreporter) -> None:
    if not OUTCOMES:
        return
    terminalreporter.section("faults")
    head = f"{'fault':<47}{'times':>6}{'rows lost':>11}{'duplicated':>12}{'corrupted':>11}{'partial seen':>14}  note"
    terminalreporter.write_line(head)
    for one in OUTCOMES:
        terminalreporter.write_line(
            f"{one.fault:<47}{one.times:>6}{one.lost:>11}{one.duplicated:>12}{one.corrupted:>11}{one.partial:>14}  {one.note}"
        )
