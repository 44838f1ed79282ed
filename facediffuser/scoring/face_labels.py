"""Whom each face of a picture shows, how sure that is, and how the head is turned: the column `faces`, and `ip_margin`."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from facediffuser.faces import Face, crop_square, face_crop_box, head_pose
from facediffuser.scoring.identity import FaceEmbeddings, subject_embedding
from facediffuser.scoring.sharpness import laplacian_variance

SHARPNESS_SIDE = 112


@dataclass(frozen=True)
class Gallery:
    """The people of a dataset: their ids and the unit vectors (n, d) that identity is measured against."""

    ids: tuple[str, ...]
    vectors: np.ndarray

    @functools.cached_property
    def places(self) -> dict[str, int]:
        """Where each person stands."""
        return {name: place for place, name in enumerate(self.ids)}


def gallery_of(references: Iterable[Mapping[str, Any]]) -> Gallery:
    """Return the people of some references, in the order they first come.

    Args:
        references: rows with `subject_id` and `identity`, an embedding of unit length; a row per reference.
    """
    vectors: dict[str, list[list[float]]] = {}
    for row in references:
        vectors.setdefault(row["subject_id"], []).append(row["identity"])
    # float64, as IP is measured, so that both say the same.
    each = [subject_embedding(np.array(found, np.float32)).astype(np.float64) for found in vectors.values()]
    return Gallery(tuple(vectors), np.stack(each) if each else np.zeros((0, 0)))


@dataclass(frozen=True)
class FaceLabels:
    """The labels of one picture.

    faces: as the column `faces` holds them, in the order of the faces; every embedding is float16.
    ip_margin: the least difference, over the faces with a subject, of the similarity to their own subject and to the
        nearest other one of the dataset, -2..2; None without such a face, or where the dataset has one subject.
    """

    faces: list[dict[str, Any]]
    ip_margin: float | None


def label_faces(
    image: Image.Image,
    found: FaceEmbeddings,
    subject_ids: Sequence[str],
    subject_faces: Sequence[int],
    gallery: Gallery,
) -> FaceLabels:
    """Return the labels of a picture's faces.

    Args:
        image: the picture.
        found: its faces and their vectors.
        subject_ids: whom it should show.
        subject_faces: the place in `found` of each subject's face, -1 for none (`identity_preservation`).
        gallery: the people of the dataset, `subject_ids` among them.
    """
    identities, margin = identify_faces(found.vectors, subject_ids, subject_faces, gallery)
    faces = [
        measure_face(image, face) | identity | {"embedding": vector.astype(np.float16)}
        for face, identity, vector in zip(found.faces, identities, found.vectors, strict=True)
    ]
    return FaceLabels(faces, margin)


def identify_faces(
    vectors: np.ndarray, subject_ids: Sequence[str], subject_faces: Sequence[int], gallery: Gallery
) -> tuple[list[dict[str, Any]], float | None]:
    """Return whom each face shows and whom else it is like, and the picture's `ip_margin` (see `FaceLabels`).

    Args:
        vectors: unit vectors (f, d) of the faces.
        subject_ids: as for `label_faces`.
        subject_faces: as for `label_faces`.
        gallery: as for `label_faces`.
    """
    owners = {face: name for name, face in zip(subject_ids, subject_faces, strict=True) if face >= 0}
    identities, margins = [], []
    for place, vector in enumerate(vectors):
        name = owners.get(place)
        similarities = gallery.vectors @ vector.astype(np.float64)
        own = None
        if name is not None:
            own = float(similarities[gallery.places[name]])
            similarities[gallery.places[name]] = -np.inf
        nearest = int(np.argmax(similarities))
        other = float(similarities[nearest]) if np.isfinite(similarities[nearest]) else None
        if own is not None and other is not None:
            margins.append(own - other)
        identities.append(
            {
                "subject_id": name,
                "similarity": own,
                "other_subject_id": None if other is None else gallery.ids[nearest],
                "other_similarity": other,
            }
        )
    return identities, min(margins, default=None)


def measure_face(image: Image.Image, face: Face) -> dict[str, Any]:
    """Return what can be measured of a face without knowing whose it is.

    Args:
        image: the picture.
        face: box and landmarks in px of the picture.

    Returns:
        box, probability, landmarks; yaw, pitch and roll in degrees; `size`, the shorter side of its box in px;
        `sharpness`, the variance of the Laplacian of the brightness (0..255) of the square around it at 112 px, so that
        a small face, which is enlarged to that, is not called sharp.
    """
    yaw, pitch, roll = head_pose(face.landmarks)
    left, top, right, bottom = face.box
    return {
        "box": [float(value) for value in face.box],
        "probability": float(face.prob),
        "landmarks": [[float(value) for value in point] for point in face.landmarks],
        "yaw": yaw,
        "pitch": pitch,
        "roll": roll,
        "size": float(min(right - left, bottom - top)),
        "sharpness": laplacian_variance(crop_square(image, face_crop_box(face.box, margin=0.0), SHARPNESS_SIDE)),
    }
