"""A rendered photo set, and the stage driven without Ray for the tests that are not about Ray."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from facediffuser.miniature.render import render_set
from facediffuser.preprocess.photo_stages import Job
from facediffuser.preprocess.prepare import PartPreparer
from facediffuser.preprocess.preprocess_settings import PreprocessSettings
from facediffuser.preprocess.sources import Listing
from facediffuser.tasks import preprocess as stage

COUNT = 20


@pytest.fixture(scope="session")
def rendered(tmp_path_factory) -> Path:
    """20 pictures in the ffhq-fastcomposer layout, the last 4 in test; not to be changed."""
    root = tmp_path_factory.mktemp("rendered") / "photos"
    render_set(COUNT, 3, root)
    ids = (root / "image_ids.txt").read_text().split()
    for name, part in (("train", ids[:-4]), ("test", ids[-4:])):
        (root / f"image_ids_{name}.txt").write_text("\n".join(part))
    return root


@pytest.fixture
def photos(rendered: Path, tmp_path: Path) -> Path:
    """A copy of the rendered set that a test may damage."""
    return Path(shutil.copytree(rendered, tmp_path / "photos"))


@pytest.fixture
def here(monkeypatch) -> Iterator[None]:
    """Parts are prepared in this process, by the same PartPreparer as in an actor."""
    threads = torch.get_num_threads()

    def drive(mode: str, job: Job, listing: Listing, parts):
        preparer = PartPreparer(job, threads=1)
        for part, records in parts.items():
            yield part, (preparer.check if mode == stage.CHECK else preparer.prepare)(part, records)

    monkeypatch.setattr(stage, "_drive", drive)
    monkeypatch.setattr(stage, "connect_ray", lambda: None)
    yield
    torch.set_num_threads(threads)


def prepare(source: Path | str, output: Path | str, **settings) -> dict:
    """Run the stage with parts of 8 pictures and without models unless told otherwise."""
    chosen = {"part_size": 8, "captioner": "none", "segmenter": "none", "matcher": "none", **settings}
    return stage.prepare_photographs.fn(PreprocessSettings(source=str(source), output=str(output), **chosen))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
