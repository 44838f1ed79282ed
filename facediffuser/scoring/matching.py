"""Greedy best-first matching of the faces of a picture to the subjects it should show, and the IP that follows."""

import numpy as np


def cosine_scores(faces: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Return the identity score of every face with every reference: the cosine, negatives set to 0.

    Args:
        faces: unit vectors (f, d).
        references: unit vectors (s, d).

    Returns:
        An array (f, s), float64, in 0..1.
    """
    products = np.asarray(faces, np.float64) @ np.asarray(references, np.float64).T
    return np.clip(products, 0.0, 1.0)


def greedy_pairs(scores: np.ndarray) -> list[tuple[int, int]]:
    """Return pairs of a score matrix, each row and column at most once, the highest score first.

    Args:
        scores: a matrix; of equal scores that of the first row is taken, then that of the first column.

    Returns:
        min(rows, columns) pairs (row, column).
    """
    left, pairs = scores.astype(np.float64), []
    for _ in range(min(scores.shape)):
        row, column = map(int, np.unravel_index(np.argmax(left), left.shape))
        pairs.append((row, column))
        left[row, :] = left[:, column] = -np.inf
    return pairs


def match_greedily(scores: np.ndarray) -> list[int]:
    """Return the face of every subject; no face is matched to two subjects.

    The best pair is taken first, then the best of those that remain. Of equal pairs the earlier face, then the earlier
    subject, is taken.

    Args:
        scores: (faces, subjects).

    Returns:
        For every subject the index of its face, -1 for none.
    """
    chosen = [-1] * scores.shape[1]
    for face, subject in greedy_pairs(scores):
        chosen[subject] = face
    return chosen


def identity_preservation(faces: np.ndarray, references: np.ndarray) -> tuple[float, list[float], list[int]]:
    """Return the identity preservation (IP) of a picture.

    A subject without a face scores 0, so a picture with fewer faces than subjects has IP 0.

    Args:
        faces: unit vectors (f, d) of the faces found in the picture.
        references: unit vectors (s, d) of the subjects, s >= 1.

    Returns:
        IP, the minimum over the subjects, 0..1; the value of each subject; the index of each subject's face, -1 for none.

    Raises:
        ValueError: there are no references.
    """
    if len(references) == 0:
        raise ValueError("no references to score against")
    if len(faces) == 0:
        return 0.0, [0.0] * len(references), [-1] * len(references)
    scores = cosine_scores(faces, references)
    chosen = match_greedily(scores)
    values = [float(scores[face, subject]) if face >= 0 else 0.0 for subject, face in enumerate(chosen)]
    return min(values), values, chosen
