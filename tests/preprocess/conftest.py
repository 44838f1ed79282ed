"""A rendered photo set, and the stage driven without Ray for the tests that are not about Ray."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from facediffuser.miniature.render import render_set
from facediffuser.preprocess.preprocess_settings import PreprocessSettings
from facediffuser.preprocess.preprocess_stage import PartWorker
from facediffuser.tasks.chosen_driver import driven_by
from facediffuser.tasks.local_driver import LocalDriver
from facediffuser.tasks.preprocess import prepare_photographs

COUNT = 20


@pytest.fixture(scope="session")
def rendered(tmp_path_factory) -> Path:
    """20 pictures in the ffhq-fastcomposer layout, the last 4 in test; not to be changed."""
    root = tmp_path_factory.mktemp("rendered") / "photos"
    render_set(COUNT, 3, root, subjects=0)
    ids = (root / "image_ids.txt").read_text().split()
    for name, part in (("train", ids[:-4]), ("test", ids[-4:])):
        (root / f"image_ids_{name}.txt").write_text("\n".join(part))
    return root


@pytest.fixture
def photos(rendered: Path, tmp_path: Path) -> Path:
    """A copy of the rendered set that a test may damage."""
    return Path(shutil.copytree(rendered, tmp_path / "photos"))


@pytest.fixture
def here() -> Iterator[LocalDriver]:
    """Parts are prepared in this process, whose number of threads is put back afterwards."""
    threads = torch.get_num_threads()
    yield LocalDriver()
    torch.set_num_threads(threads)


def prepare(source: Path | str, output: Path | str, driver=None, worker=PartWorker, **settings) -> dict:
    """Run the task with parts of 8 pictures and, unless given otherwise, without models and without Ray."""
    chosen = {"part_size": 8, "captioner": "none", "segmenter": "none", "matcher": "none", **settings}
    given = PreprocessSettings(source=str(source), output=str(output), **chosen)
    with driven_by(driver or LocalDriver()):
        return prepare_photographs.fn(given, worker)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
