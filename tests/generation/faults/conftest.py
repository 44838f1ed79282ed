"""The ground the faults are tried on, and the table of what became of the rows, printed at the end of the tests."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from faults.cluster import MiniatureOnS3
from faults.ground import Ground, Outcome

HEAD = f"{'fault':<47}{'times':>6}{'rows lost':>11}{'duplicated':>12}{'corrupted':>11}{'partial seen':>14}  note"


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
def table(summary_line):
    """Take an outcome into the table at the end of the run; fail when a row was harmed."""

    def take(outcome: Outcome) -> None:
        summary_line("faults", HEAD)
        summary_line(
            "faults",
            f"{outcome.fault:<47}{outcome.times:>6}{outcome.lost:>11}{outcome.duplicated:>12}{outcome.corrupted:>11}"
            f"{outcome.partial:>14}  {outcome.note}",
        )
        assert outcome.harm == 0, outcome

    return take
