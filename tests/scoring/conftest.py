"""Scorers whose answers are known: real face detection, a face network that looks at colours, a small CLIP."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scoring.small_world import ColourNetwork, save_scorers
from skimage import data

from facediffuser.scoring.face_detector import FaceDetector
from facediffuser.scoring.identity import IdentityScorer, facenet_normalise
from facediffuser.scoring.prompt import load_prompt
from facediffuser.scoring.scorers import Scorers

FACE_BOX = (165, 40, 285, 195)  # of scikit-image's astronaut, with some hair


@pytest.fixture(scope="session")
def photograph() -> Image.Image:
    """A real photograph with one face."""
    return Image.fromarray(data.astronaut())


TINTS = {"ada": (1.0, 1.0, 1.0), "bob": (0.5, 0.8, 1.3), "eve": (0.6, 1.1, 0.6)}


@pytest.fixture(scope="session")
def people(photograph) -> dict[str, Image.Image]:
    """Three faces: one photograph in three tints, which MTCNN finds and the colour network takes for three people."""
    pixels = np.asarray(photograph.crop(FACE_BOX), np.float32)
    return {
        name: Image.fromarray(np.clip(pixels * np.float32(tint), 0, 255).astype(np.uint8))
        for name, tint in TINTS.items()
    }


@pytest.fixture(scope="session")
def scorers_folder(tmp_path_factory) -> Path:
    """A folder of untrained scorers in the miniature's layout."""
    return save_scorers(tmp_path_factory.mktemp("scorers"))


@pytest.fixture(scope="session")
def scorers(scorers_folder) -> Scorers:
    """The paper's face detector and matching around the colour network."""
    identity = IdentityScorer(FaceDetector("cpu", min_side=0), ColourNetwork(), 160, facenet_normalise)
    prompt, digest = load_prompt(scorers_folder / "prompt", "cpu")
    return Scorers("colours", identity, prompt, {"prompt": digest})
