"""What all tests share: one Prefect server, one local Ray and one S3 server per session, and threads that fit two cores."""

import os

# `make test` runs two workers on two cores; they inherit what the first process has set.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pytest

pytest_plugins = ["fixtures_s3"]


# Files of twenty seconds and more, those of `make test-slow` before the others; they come first, so that no worker is
# idle at the end.
LONG_FILES = (
    "test_document_commands.py",
    "generation/faults/test_clusters.py",
    "generation/faults/test_faults.py",
    "curation/test_story.py",
    "generation/faults/test_slurm.py",
    "infra/test_lost_runs.py",
    "infra/test_outages.py",
    "flows/test_fuzz_work.py",
    "flows/test_demo.py",
    "infra/test_prefect_server.py",
    "training/test_ray_train.py",
    "generation/test_flow.py",
    "preprocess/test_preprocess.py",
    "miniature/test_measuring.py",
    "miniature/test_ordering.py",
    "training/test_loop.py",
    "training/test_s3.py",
    "generation/test_certificate.py",
    "flows/test_rehearse.py",
    "generation/test_repair.py",
    "flows/test_fuzz.py",
    "test_drivers.py",
    "generation/test_extend.py",
    "test_cloud_storage.py",
    "training/test_benchmark.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first; the others keep their order."""
    places = {f"tests/{name}": place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))


@pytest.fixture
def summary_line(record_property):
    """Take (heading, line): shown under the heading at the end of the run, whichever process runs the test."""
    return lambda heading, line: record_property("summary", (heading, line))


def pytest_terminal_summary(terminalreporter) -> None:
    """Show what tests said by `summary_line`: a heading once, and under it each different line."""
    found: dict[str, dict[str, None]] = {}
    for report in (one for reports in terminalreporter.stats.values() for one in reports):
        if getattr(report, "when", "") == "call":
            for heading, line in (value for name, value in report.user_properties if name == "summary"):
                found.setdefault(heading, {})[line] = None
    for heading, lines in found.items():
        terminalreporter.section(heading)
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def prefect_harness():
    """One temporary Prefect server with its own database for the whole session."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="module")
def plain_plots():
    """Each plot of a card is a picture of 8 by 4 pixels, the same for the same numbers: plots take a second a card."""
    import dataclasses
    import hashlib

    import numpy as np
    from PIL import Image

    from facediffuser.cards import dataset_card
    from facediffuser.picture_grid import png_bytes

    def described(value):
        if dataclasses.is_dataclass(value):
            return {name: described(part) for name, part in vars(value).items()}
        if isinstance(value, dict):
            return {name: described(part) for name, part in value.items()}
        return value.tolist() if isinstance(value, np.ndarray) else value

    def plain(numbers) -> bytes:
        return png_bytes(Image.frombytes("L", (8, 4), hashlib.sha256(repr(described(numbers)).encode()).digest()))

    with pytest.MonkeyPatch.context() as patched:
        for name in ("score_histograms", "image_plane", "identity_plots", "pose_plots"):
            patched.setattr(dataset_card, name, plain)
        yield


@pytest.fixture(scope="session")
def without_ray():
    """Return a context in which flows do their stages in this process: for tests that are not about Ray.

    What makes a worker is pickled and read again, as on its way to Ray's processes.
    """
    import dataclasses

    from facediffuser.tasks.chosen_driver import driven_by
    from facediffuser.tasks.local_driver import LocalDriver

    class Travelled(LocalDriver):
        def run(self, stage):
            from ray import cloudpickle

            worker, units = cloudpickle.loads(cloudpickle.dumps((stage.worker, stage.units)))
            return super().run(dataclasses.replace(stage, worker=worker, units=units))

    return lambda: driven_by(Travelled())


@pytest.fixture(scope="module")
def local_driver():
    """Tasks do their stages in this process, one unit after another."""
    from facediffuser.tasks.chosen_driver import driven_by
    from facediffuser.tasks.local_driver import LocalDriver

    with driven_by(LocalDriver()):
        yield


@pytest.fixture(scope="session")
def ray_session():
    """One local Ray with two CPUs for the whole session."""
    os.environ.pop("RAY_ADDRESS", None)
    from facediffuser.tasks.ray_session import connect_ray

    connect_ray()
    yield
    import ray

    ray.shutdown()
