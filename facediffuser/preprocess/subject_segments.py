"""Subjects: which phrase of the caption is which segment, and which face belongs to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from facediffuser.faces import Face
from facediffuser.preprocess.phrases import Phrase
from facediffuser.preprocess.segment_maps import PERSON_LABELS, Segment
from facediffuser.scoring.matching import greedy_pairs


@dataclass(frozen=True)
class Subject:
    """A phrase of the caption (`start`, `end` in characters) tied to a segment and to a face (index, -1 for none)."""

    phrase: str
    start: int
    end: int
    segment_id: int
    box: tuple[int, int, int, int]
    face_index: int = -1


class PhraseMatcher:
    """CLIP's similarity of phrases and parts of a picture; the model is a transformers folder or a hub id."""

    def __init__(self, model: str | Path, device: str | torch.device = "cpu"):
        from transformers import AutoProcessor, CLIPModel

        self.device = torch.device(device)
        self.processor = AutoProcessor.from_pretrained(model)
        self.model = CLIPModel.from_pretrained(model).to(self.device).eval()

    @torch.no_grad()
    def similarity(self, crops: Sequence[Image.Image], phrases: Sequence[str]) -> np.ndarray:
        """Return the cosine of each phrase and each crop: (phrases, crops) float32."""
        inputs = self.processor(
            text=list(phrases), images=list(crops), return_tensors="pt", padding=True, truncation=True
        ).to(self.device)
        outputs = self.model(**inputs)
        image = torch.nn.functional.normalize(outputs.image_embeds.float(), dim=-1)
        text = torch.nn.functional.normalize(outputs.text_embeds.float(), dim=-1)
        return (text @ image.T).cpu().numpy()


def match_subjects(
    image: Image.Image, phrases: Sequence[Phrase], segments: Sequence[Segment], matcher: PhraseMatcher | None
) -> list[Subject]:
    """Return the subjects, from left to right in the caption: phrases tied to person segments one to one.

    Greedily by the similarity of crop and phrase. One phrase and one segment need no comparison. Phrases or segments left
    over are no subjects.

    Args:
        image: the picture, from which the segments are cropped.
        phrases: the person phrases of its caption.
        segments: its segments; only those of people count.
        matcher: compares crops and phrases; without one all pairs are equally similar, so they go from left to right.
    """
    people = sorted((item for item in segments if item.label in PERSON_LABELS), key=lambda item: (item.box, item.id))
    if not phrases or not people:
        return []
    similarity = np.zeros((len(phrases), len(people)), np.float32)
    if matcher is not None and similarity.size > 1:
        similarity = matcher.similarity([image.crop(item.box) for item in people], [item.text for item in phrases])
    return [
        Subject(phrases[row].text, phrases[row].start, phrases[row].end, people[column].id, people[column].box)
        for row, column in sorted(greedy_pairs(similarity))
    ]


def assign_faces(subjects: Sequence[Subject], faces: Sequence[Face], ids: np.ndarray) -> list[Subject]:
    """Return the subjects, each with the face that lies most in its segment, one to one.

    A face with none of its pixels in the segment is not the subject's.

    Args:
        subjects: the subjects of a picture.
        faces: its faces.
        ids: its segment map, (height, width).
    """
    share = np.array([[_share(face, ids, subject.segment_id) for face in faces] for subject in subjects])
    faces_of = {}
    if share.size:
        faces_of = {row: column for row, column in greedy_pairs(share) if share[row, column] > 0}
    return [
        Subject(item.phrase, item.start, item.end, item.segment_id, item.box, faces_of.get(index, -1))
        for index, item in enumerate(subjects)
    ]


def _share(face: Face, ids: np.ndarray, segment_id: int) -> float:
    height, width = ids.shape
    x1, y1, x2, y2 = face.box
    left, top = max(0, int(x1)), max(0, int(y1))
    part = ids[top : min(height, max(top, round(y2))), left : min(width, max(left, round(x2)))]
    return float((part == segment_id).mean()) if part.size else 0.0
