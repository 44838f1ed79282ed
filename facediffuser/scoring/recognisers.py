"""Further measures of identity: dlib's face network, and any recogniser in ONNX. Neither is the paper's IP."""

import hashlib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from facediffuser.digests import files_digest
from facediffuser.errors import InputError, first_line
from facediffuser.extras import require_extra
from facediffuser.faces import Face, aligned_crop
from facediffuser.scoring.face_detector import FaceDetector
from facediffuser.scoring.files import onnx_session, scorer_file
from facediffuser.scoring.identity import detector_digest, subject_embedding
from facediffuser.scoring.matching import greedy_pairs, identity_preservation

References = Sequence[Sequence[Sequence[Image.Image]]]
MIN_SIDE = 160  # smaller pictures are enlarged for the search, as for the miniature
DLIB_PARTS = ("dlib_face_recognition_resnet_model_v1.dat", "shape_predictor_5_face_landmarks.dat")


class DlibScorer:
    """dlib's face ResNet: the Euclidean distance of 128 numbers, aligned by five landmarks; below 0.6 it is one person.

    `dlib_l2_per_subject`: of the face that lies nearest to the subject's references (greedy best-first matching, the mean
    over several references), null without a face; `dlib_l2`: the largest of them, null when a subject has no face.
    """

    columns = pa.schema([("dlib_l2", pa.float32()), ("dlib_l2_per_subject", pa.list_(pa.float32()))])
    licence = "CC0-1.0"

    def __init__(self, device: str = "cpu"):
        require_extra("dlib")
        import dlib

        folder = Path(importlib.util.find_spec("face_recognition_models").origin).parent / "models"  # type: ignore[union-attr, arg-type]
        files = [folder / name for name in DLIB_PARTS]
        self.network = dlib.face_recognition_model_v1(str(files[0]))
        self.landmarks = dlib.shape_predictor(str(files[1]))
        self.detector = FaceDetector(device, min_side=MIN_SIDE)
        self.digest = hashlib.sha256(f"{files_digest(files)} {detector_digest()} l2 1".encode()).hexdigest()
        self.known: dict[int, tuple[Image.Image, np.ndarray]] = {}

    def embed(self, image: Image.Image) -> np.ndarray:
        """Return the vectors (faces, 128) of a picture's faces, the largest first; they are not of unit length."""
        import dlib

        [faces] = self.detector.detect([image])
        # The landmarks of a face of 64 px are vague: it is enlarged to what the network takes.
        vectors = [self._embed_face(dlib, image.convert("RGB"), face) for face in faces]
        return np.stack(vectors) if vectors else np.zeros((0, 128))

    def _embed_face(self, dlib, image: Image.Image, face: Face) -> np.ndarray:
        left, top, right, bottom = face.box
        scale = max(1.0, 150 / max(1.0, min(right - left, bottom - top)))
        if scale > 1:
            image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        box = dlib.rectangle(*(round(value * scale) for value in face.box))
        pixels = np.asarray(image)
        return np.array(self.network.compute_face_descriptor(pixels, self.landmarks(pixels, box)))

    def score(self, images: Sequence[Image.Image], references: References, prompts: Sequence[str]) -> pa.Table:
        """Return the columns of `columns`, a row per image; see `ColumnScorer.score`."""
        rows = []
        for image, subjects in zip(images, references, strict=True):
            faces = self.embed(image)
            people = [self._person(pictures) for pictures in subjects]
            distances = _distances(faces, people)
            each: list[float | None] = [None] * len(people)
            for face, subject in greedy_pairs(-distances):
                each[subject] = float(distances[face, subject]) if np.isfinite(distances[face, subject]) else None
            found = [value for value in each if value is not None]
            largest = max(found) if found and len(found) == len(each) else None
            rows.append({"dlib_l2": largest, "dlib_l2_per_subject": each})
        return pa.Table.from_pylist(rows, schema=self.columns)

    def _person(self, pictures: Sequence[Image.Image]) -> np.ndarray | None:
        vectors = [vector for picture in pictures for vector in _first(self.known, picture, self.embed)]
        return np.mean(vectors, axis=0) if vectors else None


class OnnxFaceScorer:
    """A face recogniser in ONNX that takes 112-pixel crops aligned by five landmarks (ArcFace, AdaFace, AuraFace, ...).

    `<file>_cosine`: the least, over the image's subjects, of the cosine with the mean of their references, negatives and
    missing faces 0, matched as IP is. Crops are RGB, (value - 127.5) / 127.5; `#bgr` behind the path turns the channels
    over, as AdaFace wants them.
    """

    licence = "the file's own"

    def __init__(self, device: str, argument: str):
        path, _, order = argument.partition("#")
        if order not in ("", "bgr"):
            raise InputError(f"onnx-face:{argument}: unknown #{order}; give #bgr or nothing")
        file = scorer_file("onnx-face", path)
        self.session = onnx_session(file, device)
        [entry, *_] = self.session.get_inputs()
        if not _takes_crops(entry.shape):
            raise InputError(f"{path}: takes {entry.shape}; give a recogniser of (n, 3, 112, 112)")
        self.entry, self.single = entry.name, entry.shape[0] == 1
        self.bgr = order == "bgr"
        self._require_vectors(path)
        name = re.sub(r"\W+", "_", file.stem).strip("_").lower() or "onnx_face"
        self.columns = pa.schema([(f"{name}_cosine", pa.float32())])
        self.detector = FaceDetector(device, min_side=MIN_SIDE)
        method = f"{files_digest([file])} {detector_digest()} {order} aligned 112 cosine 1"
        self.digest = hashlib.sha256(method.encode()).hexdigest()
        self.known: dict[int, tuple[Image.Image, np.ndarray]] = {}

    def _require_vectors(self, path: str) -> None:
        """Raise InputError for a model that does not make a vector of finite numbers of each crop, before the first image."""
        crops = np.zeros((1 if self.single else 2, 3, 112, 112), np.float32)
        try:
            found = np.asarray(self.session.run(None, {self.entry: crops})[0], np.float32)
            fits = found.size > 0 and found.shape[0] == len(crops) and bool(np.isfinite(found).all())
        except Exception as error:  # onnxruntime's errors have no common base but Exception
            raise InputError(
                f"{path}: does not run on crops ({first_line(error)}); give a recogniser of (n, 3, 112, 112)"
            ) from None
        if not fits:
            raise InputError(
                f"{path}: makes no vector of finite numbers of each crop; give a recogniser of (n, 3, 112, 112)"
            )

    def embed(self, image: Image.Image) -> np.ndarray:
        """Return the unit vectors (faces, d) of a picture's faces, the largest first."""
        [faces] = self.detector.detect([image])
        crops = [np.asarray(aligned_crop(image, face.landmarks), np.float32) for face in faces]
        if not crops:
            return np.zeros((0, 0), np.float32)
        pixels = (np.stack(crops)[..., :: -1 if self.bgr else 1].transpose(0, 3, 1, 2) - 127.5) / 127.5
        pixels = np.ascontiguousarray(pixels, np.float32)
        batches = np.split(pixels, len(pixels)) if self.single else [pixels]
        vectors = np.concatenate([self.session.run(None, {self.entry: batch})[0] for batch in batches])
        vectors = vectors.reshape(len(pixels), -1)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def score(self, images: Sequence[Image.Image], references: References, prompts: Sequence[str]) -> pa.Table:
        """Return the column of `columns`, a row per image; see `ColumnScorer.score`."""
        values = []
        for image, subjects in zip(images, references, strict=True):
            people = [self._person(pictures) for pictures in subjects]
            present = [person for person in people if person is not None]
            faces = self.embed(image)
            least = identity_preservation(faces, np.stack(present))[0] if present and len(faces) else 0.0
            values.append(least if len(present) == len(people) else None)
        return pa.table([pa.array(values, pa.float32())], schema=self.columns)

    def _person(self, pictures: Sequence[Image.Image]) -> np.ndarray | None:
        vectors = [vector for picture in pictures for vector in _first(self.known, picture, self.embed)]
        return subject_embedding(np.stack(vectors)) if vectors else None


def _first(known: dict[int, tuple[Image.Image, np.ndarray]], picture: Image.Image, embed) -> np.ndarray:
    """The vector of a reference's largest face, (1, d) or (0, d); references come with every row and are embedded once."""
    if id(picture) not in known or known[id(picture)][0] is not picture:
        known[id(picture)] = (picture, embed(picture)[:1])
    return known[id(picture)][1]


def _distances(faces: np.ndarray, people: Sequence[np.ndarray | None]) -> np.ndarray:
    """The distances (faces, people), infinite to a person whose references show no face."""
    columns = [
        np.full(len(faces), np.inf) if person is None else np.linalg.norm(faces - person, axis=1) for person in people
    ]
    return np.stack(columns, axis=1) if columns else np.zeros((len(faces), 0))


def _takes_crops(shape: Sequence[int | str | None]) -> bool:
    """Whether a model's input may be (n, 3, 112, 112); a size that is no number is free."""
    wanted = (3, 112, 112)
    return len(shape) == 4 and all(not isinstance(a, int) or a == b for a, b in zip(shape[1:], wanted, strict=True))
