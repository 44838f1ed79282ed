"""Which face is whose: greedy best-first matching of the faces of a picture to the subjects it should show."""

import numpy as np


def cosine_scores(faces: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Return the identity score of every face with every reference, 0..1: cosine with negatives set to 0.

    `faces` (f, d) and `references` (s, d) are unit vectors; the result is (f, s), float64.
    """
    products = np.asarray(faces, np.float64) @ np.asarray(references, np.float64).T
    return np.clip(products, 0.0, 1.0)


def match_greedily(scores: np.ndarray) -> list[int]:
    """Return for every subject the index of its face, -1 for none; no face serves two subjects.

    `scores` (faces, subjects). The best pair of all is taken first, then the best among what is left (METHOD:
    Evaluation). Of equal pairs the earlier face, then the earlier subject, is taken, so the result is one.
    """
    faces, subjects = scores.shape
    left = scores.astype(np.float64, copy=True)
    chosen = [-1] * subjects
    for _ in range(min(faces, subjects)):
        face, subject = np.unravel_index(np.argmax(left), left.shape)
        chosen[subject] = int(face)
        left[face, :] = -1.0
        left[:, subject] = -1.0
    return chosen


def identity_preservation(faces: np.ndarray, references: np.ndarray) -> tuple[float, list[float], list[int]]:
    """Return a picture's IP (the minimum over its subjects), the value of each subject, and each subject's face.

    `faces` (f, d), `references` (s, d): unit vectors, s >= 1. A subject without a face scores 0 (face -1), so a picture
    with fewer faces than subjects has IP 0.
    """
    if len(references) == 0:
        raise ValueError("no references to score against")
    if len(faces) == 0:
        return 0.0, [0.0] * len(references), [-1] * len(references)
    scores = cosine_scores(faces, references)
    chosen = match_greedily(scores)
    values = [float(scores[face, subject]) if face >= 0 else 0.0 for subject, face in enumerate(chosen)]
    return min(values), values, chosen
