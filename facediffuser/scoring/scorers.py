"""The IP and PC scorers of a run, loaded once, with the digests of their weights."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from facediffuser.errors import NotFiniteError
from facediffuser.scoring.folder import PAPER, scorers_folder
from facediffuser.scoring.identity import (
    FaceEmbeddings,
    IdentityScorer,
    detector_digest,
    load_facenet,
    load_identity,
    published_facenet,
)
from facediffuser.scoring.matching import identity_preservation
from facediffuser.scoring.prompt import PromptScorer, load_prompt, published_clip

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageScore:
    """The scores of one picture.

    Attributes:
        ip: identity preservation, 0..1, the minimum of `ip_per_subject`.
        ip_per_subject: the identity score of each subject, 0..1.
        face_count: faces found.
        face_boxes: (x1, y1, x2, y2) of each face, px, the largest face first.
        face_probs: the detector's probability of each face, 0..1.
        pc: prompt consistency, -1..1.
        subject_faces: the index of each subject's face, -1 for none.
        found: the faces and their vectors.
    """

    ip: float
    ip_per_subject: list[float]
    face_count: int
    face_boxes: list[list[float]]
    face_probs: list[float]
    pc: float
    subject_faces: list[int] = field(default_factory=list)
    found: FaceEmbeddings = FaceEmbeddings([], np.zeros((0, 0), np.float32))

    def require_finite(self) -> None:
        """Raise NotFiniteError when a score is NaN or infinite."""
        for name, value in (("ip", self.ip), ("pc", self.pc)):
            if not math.isfinite(value):
                raise NotFiniteError(f"the score {name} is {value}; check the scorer's weights")


@dataclass(frozen=True)
class Scorers:
    """The scorers of IP and PC.

    Attributes:
        name: `paper`, `miniature`, or where they were read.
        identity: finds and embeds faces.
        prompt: embeds pictures and texts.
        digests: the sha256 of each part's weights (face_detector, identity, prompt).
    """

    name: str
    identity: IdentityScorer
    prompt: PromptScorer
    digests: dict[str, str]

    def score(
        self,
        images: Sequence[Image.Image],
        references: Sequence[Sequence[np.ndarray]],
        prompts: Sequence[str],
    ) -> list[ImageScore]:
        """Return the scores of a batch of pictures; the same batch gives the same numbers on the same hardware.

        Args:
            images: n pictures.
            references: for each picture the embedding (d,) of each of its subjects.
            prompts: n prompts, without markers.

        Returns:
            The scores of each picture.

        Raises:
            ValueError: the three differ in length.
        """
        if not len(images) == len(references) == len(prompts):
            raise ValueError(
                f"images, references and prompts: {len(images)}, {len(references)} and {len(prompts)}; give as many of each"
            )
        faces = self.identity.embed_faces(images)
        scores = []
        for found, subjects, pc in zip(faces, references, self.prompt.score(images, prompts), strict=True):
            if not np.isfinite(found.vectors).all():
                # Nothing can be matched; `ImageScore.require_finite` and an evaluation make the row a failed one.
                ip, per_subject, chosen = math.nan, [math.nan] * len(subjects), [-1] * len(subjects)
            else:
                ip, per_subject, chosen = identity_preservation(found.vectors, np.stack(subjects))
            scores.append(
                ImageScore(
                    ip=ip,
                    ip_per_subject=per_subject,
                    face_count=len(found.faces),
                    face_boxes=[[float(value) for value in face.box] for face in found.faces],
                    face_probs=[float(face.prob) for face in found.faces],
                    pc=pc,
                    subject_faces=chosen,
                    found=found,
                )
            )
        return scores


def load_identity_scorer(name: str, device: str | torch.device = "cpu") -> tuple[IdentityScorer, dict[str, str]]:
    """Return an identity scorer, and the digests of its parts (face_detector, identity).

    Args:
        name: paper, miniature, a folder or an s3:// prefix with identity/.
        device: where it runs.

    Raises:
        InputError: a weight is missing; the error names the file.
    """
    if name == PAPER:
        identity, digest = load_facenet(published_facenet(), device)
    else:
        identity, digest = load_identity(scorers_folder(name) / "identity", device)
    return identity, {"face_detector": detector_digest(), "identity": digest}


def load_scorers(name: str, device: str | torch.device = "cpu") -> Scorers:
    """Return the scorers of IP and PC.

    Args:
        name: `paper` (MTCNN, FaceNet trained on vggface2 and CLIP ViT-L/14 from the libraries' caches, downloaded when
            they are missing), `miniature`, or a folder or s3:// prefix with identity/ and prompt/.
        device: where they run, such as `cpu` or `cuda`.

    Raises:
        InputError: a file of weights, which is named, is missing.
    """
    if name == PAPER:
        # Both are looked for before either is loaded: the answer to a missing one comes within seconds.
        _, clip = published_facenet(), published_clip()
    else:
        clip = scorers_folder(name) / "prompt"
    identity, digests = load_identity_scorer(name, device)
    prompt, digests["prompt"] = load_prompt(clip, device)
    logger.info("scorers %s on %s: %s", name, device, {part: digest[:12] for part, digest in digests.items()})
    return Scorers(name, identity, prompt, digests)
