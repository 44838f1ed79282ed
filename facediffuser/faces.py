"""A face in a picture, and the square around one that serves as a reference picture. Without torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]
# Five landmarks of a head that looks at the camera, mm: x to the right of the picture, y down, z away from the camera,
# from the middle between the eyes. Across and down as in the template of ALIGNED_LANDMARKS with eyes 63 mm apart; how far
# the tip of the nose and the corners of the mouth lie before the eyes are means of adults.
HEAD_LANDMARKS = np.array(
    [[-31.5, 0.0, 0.0], [31.5, 0.0, 0.0], [0.0, 36.0, -34.0], [-26.0, 73.0, -12.0], [26.0, 73.0, -12.0]]
)
ALIGNED_SIDE = 112
# Where the landmarks lie in the 112 px crops that most face recognisers are trained on (published with ArcFace).
ALIGNED_LANDMARKS = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


@dataclass(frozen=True)
class Face:
    """A face found in a picture.

    `box` (x1, y1, x2, y2) in pixels of the picture given, may reach over its edge; `prob` 0..1; `landmarks` five
    (x, y): left eye, right eye (as seen by the viewer), nose, left and right corner of the mouth.
    """

    box: Box
    prob: float
    landmarks: tuple[tuple[float, float], ...]


def box_area(box: Sequence[float]) -> float:
    """Return the area of a box, 0 when its sides are negative.

    Args:
        box: (x1, y1, x2, y2).
    """
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def face_crop_box(box: Sequence[float], margin: float = 0.3) -> tuple[int, int, int, int]:
    """Return the square around a face box; it keeps the face's centre, so it may leave the picture (see `crop_square`).

    Args:
        box: (x1, y1, x2, y2), px.
        margin: share of the box's longer side that is added on each side.

    Returns:
        (x1, y1, x2, y2), px.
    """
    side = max(1, round(max(box[2] - box[0], box[3] - box[1]) * (1 + 2 * margin)))
    return _square((box[0] + box[2]) / 2, (box[1] + box[3]) / 2, side)


def _square(center_x: float, center_y: float, side: int) -> tuple[int, int, int, int]:
    left, top = round(center_x - side / 2), round(center_y - side / 2)
    return left, top, left + side, top + side


def ffhq_crop(landmarks: Sequence[Sequence[float]]) -> tuple[tuple[int, int, int, int], float]:
    """Return FFHQ's crop of a face.

    The rule is the data set's (Karras et al. 2019, appendix A): the frame's x axis is the mean of the line between
    the eyes and the normal of the line from eyes to mouth; its half side is the larger of 2 x the eyes' distance and
    1.8 x the distance from eyes to mouth; its centre lies a tenth of the way from eyes to mouth.

    Args:
        landmarks: MTCNN's five points (x, y), px.

    Returns:
        The square (x1, y1, x2, y2), px, and the degrees it is turned about its centre, clockwise as one looks at the picture.
    """
    center, across = _ffhq_frame(landmarks)
    box = _square(center[0], center[1], max(1, round(2 * float(np.hypot(*across)))))
    return box, float(np.degrees(np.arctan2(across[1], across[0])))


def turned_square(box: Sequence[float], degrees: float) -> np.ndarray:
    """Return the corners of a square that is turned about its centre.

    Args:
        box: (x1, y1, x2, y2), px.
        degrees: clockwise as one looks at the picture.

    Returns:
        (4, 2), px: upper left, then on along its left side.
    """
    center = np.array([box[0] + box[2], box[1] + box[3]], np.float64) / 2
    half, angle = (box[2] - box[0]) / 2, np.radians(degrees)
    across = half * np.array([np.cos(angle), np.sin(angle)])
    down = np.array([-across[1], across[0]])
    return center + np.stack([-across - down, down - across, across + down, across - down])


def crop_turned(image: Image.Image, box: Sequence[int], degrees: float, size: int | None = None) -> Image.Image:
    """Return a turned square of a picture as an upright picture; what lies outside is filled with the nearest edge pixels.

    Args:
        image: the picture.
        box: (x1, y1, x2, y2), px, before it is turned about its centre.
        degrees: clockwise as one looks at the picture.
        size: side of the result, px; the square's own by default.

    Returns:
        An RGB picture.
    """
    if not degrees:
        return crop_square(image, box, size)
    side = size or max(1, int(box[2] - box[0]))
    corners = turned_square(box, degrees)
    # Only what the square reaches over, so that a small face of a large picture costs little.
    low, high = np.floor(corners.min(0)).astype(int) - 2, np.ceil(corners.max(0)).astype(int) + 2
    around = crop_square(image, (*low, *high))
    # Cut at twice the size, then reduce: a quadrilateral is sampled without regard to the pixels it skips.
    quad = tuple(float(value) for corner in corners - low for value in corner)
    large = around.transform((side * 2, side * 2), Image.Transform.QUAD, quad, Image.Resampling.BILINEAR)
    return large.resize((side, side), Image.Resampling.LANCZOS)


def _ffhq_frame(landmarks: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """The frame's centre and the vector from it to the middle of the frame's right side."""
    left_eye, right_eye, _, left_mouth, right_mouth = np.asarray(landmarks, np.float64)
    eyes, mouth = (left_eye + right_eye) / 2, (left_mouth + right_mouth) / 2
    between, down = right_eye - left_eye, mouth - eyes
    across = between + np.array([down[1], -down[0]])
    length = float(np.hypot(*across)) or 1.0
    half = max(float(np.hypot(*between)) * 2.0, float(np.hypot(*down)) * 1.8)
    return eyes + down * 0.1, across / length * half


def crop_square(image: Image.Image, box: Sequence[int], size: int | None = None) -> Image.Image:
    """Return a square of a picture; what lies outside is filled with the nearest edge pixels.

    Args:
        image: the picture.
        box: (x1, y1, x2, y2), px.
        size: side of the result, px; the square's own by default.

    Returns:
        An RGB picture.
    """
    x1, y1, x2, y2 = (int(value) for value in box)
    pixels = np.asarray(image.convert("RGB"))
    rows = np.clip(np.arange(y1, max(y2, y1 + 1)), 0, pixels.shape[0] - 1)
    columns = np.clip(np.arange(x1, max(x2, x1 + 1)), 0, pixels.shape[1] - 1)
    crop = Image.fromarray(pixels[rows[:, None], columns[None, :]])
    return crop if size is None else crop.resize((size, size), Image.Resampling.BICUBIC)


def head_pose(landmarks: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Return yaw, pitch and roll of a head in degrees.

    HEAD_LANDMARKS are fitted as a camera sees them from afar: another head's proportions, and landmarks that are a few
    pixels off, show as some degrees; pitch is rough, since a wide smile, which lifts the corners of the mouth, looks
    like a bowed head (up to 30 degrees on photographs).

    Args:
        landmarks: (5, 2), x and y in px: eyes, nose, corners of the mouth, each pair as one looks at the picture.

    Returns:
        Yaw and pitch -90 to 90, roll -180 to 180; zeros for landmarks that coincide. Yaw > 0: it looks to the right of
        the picture; pitch > 0: it looks up; roll > 0: it is tilted clockwise as one looks at the picture.
    """
    points = np.asarray(landmarks, np.float64)
    head = HEAD_LANDMARKS - HEAD_LANDMARKS.mean(0)
    # Least squares: what turns the head's axes into the picture's, rows of a rotation but for noise.
    axes = np.linalg.lstsq(head, points - points.mean(0), rcond=None)[0].T
    u, lengths, v = np.linalg.svd(axes, full_matrices=False)
    if lengths[0] <= 1e-9:
        return 0.0, 0.0, 0.0
    right, down = u @ v
    forward = np.cross(right, down)  # away from the camera, in the head's coordinates
    # Rotation = tilt @ nod @ turn, head to picture.
    yaw = np.arctan2(forward[0], forward[2])
    pitch = np.arcsin(np.clip(-forward[1], -1.0, 1.0))
    roll = np.arctan2(-right[1], down[1])
    return float(np.degrees(yaw)), float(np.degrees(pitch)), float(np.degrees(roll))


def aligned_crop(image: Image.Image, landmarks: Sequence[Sequence[float]]) -> Image.Image:
    """Return the face turned, moved and scaled (not sheared) so that its landmarks lie nearest to ALIGNED_LANDMARKS.

    Args:
        image: the picture.
        landmarks: five (x, y), px of the picture.

    Returns:
        RGB, of ALIGNED_SIDE px each side; black where it reaches over the picture's edge. Pixels that fall together are averaged.
    """
    points = np.asarray(landmarks, np.float64)
    # From crop to picture, as complex numbers: p = a t + b in least squares.
    ours, theirs = (values[:, 0] + 1j * values[:, 1] for values in (ALIGNED_LANDMARKS, points))
    centred = ours - ours.mean()
    a = np.vdot(centred, theirs - theirs.mean()) / np.vdot(centred, centred).real
    b = theirs.mean() - a * ours.mean()
    reduced = max(1, int(abs(a)))
    if reduced > 1:
        image = image.convert("RGB").reduce(reduced)
        a, b = a / reduced, b / reduced
    matrix = (a.real, -a.imag, b.real, a.imag, a.real, b.imag)
    size = ALIGNED_SIDE, ALIGNED_SIDE
    return image.convert("RGB").transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
