"""Which face is whose: greedy best-first matching of the faces of a picture to the subjects it should show."""

import numpy as np


def cosine_scores(faces: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Return the identity score of every face with every reference, 0..1: cosine with negatives set to 0.

    `faces` (f, d) and `references` (s, d) are unit vectors; the result is (f, s), float64.
    """
    products = np.asarray(faces, np.float64) @ np.asarray(references, np.float64).T
    return np.clip(products, 0.0, 1.0)


def greedy_pairs(scores: np.ndarray) -> list[tuple[int, int]]:
    """Return pairs (row, column) of a matrix, each row and column at most once, the highest score first.

    Of equal scores that of the first row is taken, then that of the first column.
    """
    left, pairs = scores.astype(np.float64), []
    for _ in range(min(scores.shape)):
        row, column = map(int, np.unravel_index(np.argmax(left), left.shape))
        pairs.append((row, column))
        left[row, :] = left[:, column] = -np.inf
    return pairs


def match_greedily(scores: np.ndarray) -> list[int]:
    """Return for every subject the index of its face, -1 for none; no face serves two subjects.

    `scores` (faces, subjects). The best pair of all is taken first, then the best among what is left (METHOD:
    Evaluation). Of equal pairs the earlier face, then the earlier subject, is taken, so the result is one.
    """
    chosen = [-1] * scores.shape[1]
    for face, subject in greedy_pairs(scores):
        chosen[subject] = face
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
