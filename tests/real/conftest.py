"""Real weights and real photographs, from packages: `make test-real` installs them; no photograph is kept in git."""

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

SOURCE = Path(__file__).resolve().parents[2] / ".real" / "face_recognition-1.3.0.tar.gz"
FOLDER = "face_recognition-1.3.0/tests/test_images/"


@pytest.fixture(scope="session")
def portraits() -> dict[str, Image.Image]:
    """Official portraits of two presidents of the United States, obama three times, from the package face-recognition."""
    assert SOURCE.is_file(), f"{SOURCE}: missing; run `make test-real`"
    with tarfile.open(SOURCE) as archive:
        files = {
            name: archive.extractfile(f"{FOLDER}{name}.jpg").read() for name in ("obama", "obama2", "obama3", "biden")
        }
    return {name: Image.open(io.BytesIO(data)).convert("RGB") for name, data in files.items()}


@pytest.fixture(scope="session")
def photographs(portraits) -> dict[str, Image.Image]:
    """The portraits, and the photographs that scikit-image and matplotlib ship: an astronaut, an admiral."""
    import matplotlib.cbook
    from skimage import data

    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        hopper = Image.open(file).convert("RGB")
    return portraits | {"astronaut": Image.fromarray(data.astronaut()), "hopper": hopper}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Random small models, as in the tests of generation."""
    from generation.world import World

    return World(tmp_path_factory.mktemp("world"))
