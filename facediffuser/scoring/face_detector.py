"""MTCNN: where the faces of pictures are."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from facediffuser.faces import Face, box_area
from facediffuser.number_words import counted

logger = logging.getLogger(__name__)

MIN_SEARCH_SIDE = 20
BATCH_PIXELS = 8_000_000
BATCH_IMAGES = 32
# Larger pictures are searched reduced to this: the search takes some 100 bytes a pixel, and a face that is lost by it has
# fewer than 20 px of thousands.
MAX_SEARCH_PIXELS = 4_000_000


class FaceDetector:
    """facenet-pytorch's MTCNN with the settings of the paper's evaluation, for pictures of any mixture of sizes.

    `min_side` (px): a picture whose shorter side is smaller is enlarged to it before the search, since a face of a
    64 px picture is near the smallest MTCNN knows; 0 searches pictures as they are, as the paper did.

    On a CPU pictures are searched side by side, as many as PyTorch has threads, each by one thread: the last digits of a
    convolution depend on the threads that share it, and the same picture shall have the same box on any machine.
    """

    def __init__(
        self,
        device: str | torch.device = "cpu",
        min_side: int = 160,
        min_face_size: int = 20,
        thresholds: tuple[float, float, float] = (0.6, 0.7, 0.7),
        factor: float = 0.709,
    ):
        from facenet_pytorch import MTCNN

        self.min_side = min_side
        self.device = torch.device(device)
        self.network = MTCNN(
            image_size=160,
            margin=0,
            min_face_size=min_face_size,
            thresholds=list(thresholds),
            factor=factor,
            keep_all=True,
            device=self.device,
        ).eval()
        if self.device.type == "cpu":
            for part in (self.network.pnet, self.network.rnet, self.network.onet):
                _replace_max_pooling(part)

    def detect(self, images: Sequence[Image.Image]) -> list[list[Face]]:
        """Return the faces of each picture.

        Args:
            images: pictures of any sizes; on a GPU those of one size are searched together.

        Returns:
            For each picture its faces, the largest first, equal ones from left to right; an empty list where there is
            none. Boxes (x1, y1, x2, y2) and landmarks are in pixels of the pictures as given; `prob` is in 0..1.
        """
        found: list[list[Face]] = [[] for _ in images]
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, image in enumerate(images):
            groups[image.size].append(index)
        batches = []
        for (width, height), members in groups.items():
            size = self._search_size(width, height)
            if min(size) < MIN_SEARCH_SIDE:
                continue  # MTCNN's scale pyramid is empty below its 20 px
            count = self._batch_size(size)
            batches += [(members[start : start + count], size) for start in range(0, len(members), count)]

        def search(batch: tuple[list[int], tuple[int, int]]) -> None:
            members, size = batch
            results = self._search([_rgb(images[index], size) for index in members])
            for index, (boxes, points) in zip(members, results, strict=True):
                width, height = images[index].size
                found[index] = _faces(boxes, points, width / size[0], height / size[1])

        self._run_all(search, batches)
        return found

    def _run_all(self, search: Callable[[Any], None], batches: list[Any]) -> None:
        threads = min(torch.get_num_threads(), len(batches)) if self.device.type == "cpu" else 1
        with _one_thread_each() if self.device.type == "cpu" else nullcontext():
            if threads <= 1:
                for batch in batches:
                    search(batch)
                return
            # A thread does not take over the number of threads that was set in another.
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                for _ in pool.map(search, batches):
                    pass

    def _search_size(self, width: int, height: int) -> tuple[int, int]:
        scale = min(1.0, (MAX_SEARCH_PIXELS / (width * height)) ** 0.5)
        if self.min_side:
            scale = max(scale, min(self.min_side / min(width, height), (MAX_SEARCH_PIXELS / (width * height)) ** 0.5))
        return round(width * scale), round(height * scale)

    def _batch_size(self, size: tuple[int, int]) -> int:
        # On a CPU a batch is no quicker, and alone a picture's boxes do not depend on its neighbours' (MTCNN keeps the
        # pictures of a batch apart by large offsets on float32 coordinates).
        return 1 if self.device.type == "cpu" else max(1, min(BATCH_IMAGES, BATCH_PIXELS // (size[0] * size[1])))

    def _search(self, pictures: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        try:
            return self._run(pictures)
        except (IndexError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            # MTCNN's later stages fail when a candidate lies wholly outside the picture. With a black padding none does.
            logger.debug(
                "face search failed (%s); searching %s again with a padding", error, counted(len(pictures), "picture")
            )
        return [self._run_padded(picture) for picture in pictures]

    def _run_padded(self, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        padding = max(picture.shape[:2]) // 2
        boxes, points = self._run([np.pad(picture, ((padding, padding), (padding, padding), (0, 0)))])[0]
        boxes[:, :4] -= padding
        return boxes, points - padding

    @torch.no_grad()
    def _run(self, pictures: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        from facenet_pytorch.models.utils.detect_face import detect_face

        net = self.network
        # The search behind MTCNN.detect, called directly: detect's last step packs ragged results into numpy arrays.
        boxes, points = detect_face(
            np.stack(pictures),
            net.min_face_size,
            net.pnet,
            net.rnet,
            net.onet,
            net.thresholds,
            net.factor,
            self.device,
        )
        return [
            (np.asarray(box, np.float32).reshape(-1, 5), np.asarray(point, np.float32).reshape(-1, 5, 2))
            for box, point in zip(boxes, points, strict=True)
        ]


@contextmanager
def _one_thread_each() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _MaxPool(nn.Module):
    """nn.MaxPool2d with ceil_mode, from whole rows and columns: the same values, in a fraction of its time on a CPU."""

    def __init__(self, size: int, stride: int):
        super().__init__()
        self.size, self.stride = size, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for dim in (-2, -1):
            count = -(-(x.shape[dim] - self.size) // self.stride) + 1
            reach = (count - 1) * self.stride
            if reach + self.size > x.shape[dim]:
                # The last window reaches over the edge: what is outside of it never is the largest.
                padding = [0, 0, 0, 0]
                padding[1 if dim == -1 else 3] = reach + self.size - x.shape[dim]
                x = nn.functional.pad(x, padding, value=float("-inf"))
            shifted = [
                x.narrow(dim, offset, reach + 1)[(..., slice(None, None, self.stride), *[slice(None)] * (-1 - dim))]
                for offset in range(self.size)
            ]
            x = shifted[0]
            for other in shifted[1:]:
                x = torch.maximum(x, other)
        return x


def _replace_max_pooling(network: nn.Module) -> None:
    for name, layer in list(network.named_children()):
        if isinstance(layer, nn.MaxPool2d) and layer.ceil_mode and not layer.padding:
            setattr(network, name, _MaxPool(layer.kernel_size, layer.stride))


def _rgb(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    image = image.convert("RGB")
    return np.asarray(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC))


def _faces(boxes: np.ndarray, points: np.ndarray, scale_x: float, scale_y: float) -> list[Face]:
    scale = np.array([scale_x, scale_y])
    faces = [
        Face(
            box=tuple((box[:4].astype(float) * np.tile(scale, 2)).tolist()),
            prob=float(box[4]),
            landmarks=tuple(map(tuple, (point.astype(float) * scale).tolist())),
        )
        for box, point in zip(boxes, points, strict=True)
    ]
    return sorted(faces, key=lambda face: (-box_area(face.box), face.box))
