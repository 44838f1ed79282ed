"""Identity: MTCNN finds faces, a face network turns each into a unit vector, cosines compare them."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from facediffuser.digests import files_digest
from facediffuser.errors import InputError, first_few, first_line
from facediffuser.faces import Face, crop_square, face_crop_box
from facediffuser.model_check import require_finite
from facediffuser.scoring.face_detector import FaceDetector
from facediffuser.scoring.files import read_state

logger = logging.getLogger(__name__)

FACENET_CROP = 160
FACENET_FILE = "20180402-114759-vggface2.pt"
MINIATURE_CROP = 64
MINIATURE_MIN_SIDE = 160
BATCH_FACES = 64
SHOWN_FACELESS = 10
"""Pictures without a face that an error names."""


@dataclass(frozen=True)
class FaceEmbeddings:
    """The faces of one picture, the largest first, and their unit vectors (faces, d), float32."""

    faces: list[Face]
    vectors: np.ndarray


class IdentityScorer:
    """Finds the faces of pictures and embeds them.

    `network` maps (n, 3, crop_size, crop_size) to (n, d); `normalise` maps crops of 0..255 to what it was trained on;
    `crop` cuts a face box out of a picture as (crop_size, crop_size, 3) uint8.
    """

    def __init__(
        self,
        detector: FaceDetector,
        network: torch.nn.Module,
        crop_size: int,
        normalise: Callable[[torch.Tensor], torch.Tensor],
        device: str | torch.device = "cpu",
        crop: Callable[[Image.Image, Sequence[float], int], np.ndarray] | None = None,
    ):
        self.detector = detector
        self.crop = crop or face_crop
        self.device = torch.device(device)
        self.network = network.to(self.device).eval().requires_grad_(False)
        self.crop_size = crop_size
        self.normalise = normalise

    @torch.no_grad()
    def embed_faces(self, images: Sequence[Image.Image]) -> list[FaceEmbeddings]:
        """Return the faces of each picture with their embeddings.

        Args:
            images: pictures of any sizes; the crops of all of them are embedded in batches of 64.

        Returns:
            For each picture its faces, the largest first, and their unit vectors (faces, d), float32.
        """
        pictures = [image.convert("RGB") for image in images]
        found = self.detector.detect(pictures)
        crops = [
            self.crop(picture, face.box, self.crop_size)
            for picture, faces in zip(pictures, found, strict=True)
            for face in faces
        ]
        vectors = self.embed_crops(crops)
        ends = np.cumsum([len(faces) for faces in found])
        parts = np.split(vectors, ends[:-1]) if len(found) else []
        return [FaceEmbeddings(faces, part) for faces, part in zip(found, parts, strict=True)]

    @torch.no_grad()
    def embed_crops(self, crops: Sequence[np.ndarray]) -> np.ndarray:
        """Return the embeddings of face crops.

        Args:
            crops: n arrays (crop_size, crop_size, 3), uint8 RGB.

        Returns:
            The unit vectors (n, d), float32; (0, 0) without crops.
        """
        batches = []
        for start in range(0, len(crops), BATCH_FACES):
            pixels = torch.from_numpy(np.stack(crops[start : start + BATCH_FACES])).to(self.device)
            inputs = self.normalise(pixels.permute(0, 3, 1, 2).float().contiguous())
            batches.append(torch.nn.functional.normalize(self.network(inputs).float(), dim=1).cpu().numpy())
        return np.concatenate(batches) if batches else np.zeros((0, 0), np.float32)

    def embed_references(self, images: Sequence[Image.Image], names: Sequence[str]) -> np.ndarray:
        """Return the embedding of each reference picture's largest face.

        Args:
            images: k pictures.
            names: their names, for messages.

        Returns:
            The unit vectors (k, d), float32.

        Raises:
            InputError: no face is found in some of the pictures, which are named.
        """
        found = self.embed_faces(images)
        require_faces([name for name, embedded in zip(names, found, strict=True) if not embedded.faces])
        return np.stack([embedded.vectors[0] for embedded in found])


def require_faces(without: Sequence[str]) -> None:
    """Check that there is no picture without a face.

    Args:
        without: the names of those that have none.

    Raises:
        InputError: there are some; the error names the first ten.
    """
    if len(without) == 1:
        raise InputError(f"{without[0]}: no face found; give a picture with one visible face")
    if without:
        named = first_few(without, SHOWN_FACELESS)
        raise InputError(f"{named}: no face found; give pictures with one visible face each")


def face_crop(image: Image.Image, box: Sequence[float], size: int) -> np.ndarray:
    """Return the picture inside a face box: MTCNN's own extraction with margin 0.

    Args:
        image: an RGB picture.
        box: (x1, y1, x2, y2), px; cut at the picture's edge and truncated to whole pixels, at least one.
        size: side of the result, px; the crop is resized bilinearly without keeping its aspect.

    Returns:
        An array (size, size, 3), uint8.
    """
    left, top = (int(min(max(box[axis], 0), image.size[axis] - 1)) for axis in (0, 1))
    right, bottom = (int(min(box[axis + 2], image.size[axis])) for axis in (0, 1))
    inside = (left, top, max(right, left + 1), max(bottom, top + 1))
    return np.asarray(image.crop(inside).resize((size, size), Image.Resampling.BILINEAR))


def square_face_crop(image: Image.Image, box: Sequence[float], size: int) -> np.ndarray:
    """Return the square around a face box, its aspect kept: what the miniature's embedder was trained on.

    Args:
        image: an RGB picture.
        box: (x1, y1, x2, y2), px.
        size: side of the result, px.

    Returns:
        An array (size, size, 3), uint8.
    """
    return np.asarray(crop_square(image, face_crop_box(box, margin=0.0), size))


def facenet_normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Return FaceNet's fixed standardisation of pixels.

    Args:
        pixels: any shape, 0..255.

    Returns:
        The same shape, about -1..1.
    """
    return (pixels - 127.5) / 128.0


def miniature_normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Return what the miniature's embedder takes.

    Args:
        pixels: any shape, 0..255.

    Returns:
        The same shape, -1..1.
    """
    return pixels / 127.5 - 1.0


def subject_embedding(vectors: np.ndarray) -> np.ndarray:
    """Return one embedding for a subject: the mean of those of its reference pictures, normalised.

    With one reference, as in the paper, it is the reference's own vector.

    Args:
        vectors: the references' unit vectors (k, d).

    Returns:
        A unit vector (d,), float32.
    """
    mean = np.asarray(vectors, np.float64).mean(axis=0)
    return (mean / max(float(np.linalg.norm(mean)), 1e-12)).astype(np.float32)


def load_identity(folder: Path, device: str | torch.device) -> tuple[IdentityScorer, str]:
    """Return the identity scorer of a scorers folder.

    Args:
        folder: its `identity/`, which holds FaceNet's weights (one `.pt` or `.safetensors` state dict of
            InceptionResnetV1), run as in the paper, or the miniature's embedder (`config.json`, `model.safetensors`),
            run on pictures enlarged to 160 px.
        device: where it runs, such as `cpu` or `cuda`.

    Returns:
        The scorer and the sha256 of its weights.

    Raises:
        InputError: the folder holds neither.
    """
    if (folder / "config.json").is_file():
        return _load_miniature(folder, device)
    weights = sorted([*folder.glob("*.pt"), *folder.glob("*.safetensors")]) if folder.is_dir() else []
    if len(weights) != 1:
        found = "no weights" if not weights else f"{len(weights)} weight files"
        raise InputError(f"{folder}: {found}; put FaceNet's {FACENET_FILE} there, or the miniature's identity embedder")
    return load_facenet(weights[0], device)


def load_facenet(weights: Path, device: str | torch.device) -> tuple[IdentityScorer, str]:
    """Return the paper's identity scorer, MTCNN and InceptionResnetV1.

    Args:
        weights: a state dict of InceptionResnetV1, `.safetensors` or `.pt`, which is read with weights_only.
        device: where it runs, such as `cpu` or `cuda`.

    Returns:
        The scorer and the sha256 of its weights.

    Raises:
        InputError: the file does not hold these weights.
    """
    from facenet_pytorch import InceptionResnetV1

    network = InceptionResnetV1(pretrained=None)
    try:
        # The training classifier's weights are in the published file; embeddings do not use them.
        state = {name: value for name, value in read_state(weights).items() if not name.startswith("logits.")}
        network.load_state_dict(state)
    except Exception as error:
        raise InputError(
            f"{weights}: not InceptionResnetV1's weights ({first_line(error)}); give {FACENET_FILE}"
        ) from error
    require_finite(network, weights)
    detector = FaceDetector(device, min_side=0)
    return IdentityScorer(detector, network, FACENET_CROP, facenet_normalise, device), files_digest([weights])


def published_facenet() -> Path:
    """Return the file of FaceNet's published vggface2 weights in facenet-pytorch's cache, downloading it if missing.

    Raises:
        InputError: the file, which is named, is missing and cannot be downloaded.
    """
    from facenet_pytorch import InceptionResnetV1
    from facenet_pytorch.models.inception_resnet_v1 import get_torch_home

    path = Path(get_torch_home()) / "checkpoints" / FACENET_FILE
    if not path.is_file():
        logger.info("%s: not there, downloading it", path)
        try:
            InceptionResnetV1(pretrained="vggface2")
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{path}: FaceNet's weights are missing and cannot be downloaded ({error}); put the file "
                "there, or give --scorers a folder with identity/ and prompt/"
            ) from error
    return path


def _load_miniature(folder: Path, device: str | torch.device) -> tuple[IdentityScorer, str]:
    if not (folder / "model.safetensors").is_file():
        raise InputError(f"{folder}/model.safetensors: missing; give the whole identity/ folder of the scorers")
    from facediffuser.scoring.miniature_embedder import load_identity_embedder

    weights = folder / "model.safetensors"
    try:
        network = load_identity_embedder(folder)
    except Exception as error:  # a damaged file makes the libraries raise as it comes
        raise InputError(
            f"{weights}: not the identity embedder's weights ({first_line(error)}); copy it again"
        ) from error
    require_finite(network, weights)
    detector = FaceDetector(device, min_side=MINIATURE_MIN_SIDE)
    scorer = IdentityScorer(detector, network, MINIATURE_CROP, miniature_normalise, device, square_face_crop)
    return scorer, files_digest([folder / "config.json", folder / "model.safetensors"])


def detector_digest() -> str:
    """Return the sha256 of MTCNN's three weight files as installed."""
    import facenet_pytorch

    folder = Path(facenet_pytorch.__file__).parent / "data"
    return files_digest([folder / f"{name}.pt" for name in ("pnet", "rnet", "onet")])
