"""Panoptic segmentation of photographs by Mask2Former."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from facediffuser.preprocess.segment_maps import Segment, resize_map, segment_box

# Maps are drawn at most this large and then stretched: each of Mask2Former's masks takes 4 bytes a pixel at once.
MAX_MAP_PIXELS = 4_000_000


class Segmenter:
    """Panoptic segments by a Mask2Former in transformers layout (a folder or a hub id)."""

    def __init__(self, model: str | Path, device: str | torch.device = "cpu"):
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        self.device = torch.device(device)
        self.processor = AutoImageProcessor.from_pretrained(model)
        self.model = Mask2FormerForUniversalSegmentation.from_pretrained(model).to(self.device).eval()

    def segment(self, images: Sequence[Image.Image]) -> list[tuple[np.ndarray, list[Segment]]]:
        """Return for each picture its map, (height, width) int32 with 0 for no segment, and the map's segments."""
        # Only pictures of one size together: the processor pads a mixed batch, and stretches the padding back with it.
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, image in enumerate(images):
            groups[image.size].append(index)
        results: dict[int, tuple[np.ndarray, list[Segment]]] = {}
        for members in groups.values():
            results.update(zip(members, self._segment([images[index] for index in members]), strict=True))
        return [results[index] for index in range(len(images))]

    @torch.no_grad()
    def _segment(self, images: list[Image.Image]) -> list[tuple[np.ndarray, list[Segment]]]:
        inputs = self.processor(images=images, return_tensors="pt").to(self.device)
        outputs = self.model(**inputs)
        width, height = images[0].size
        scale = min(1.0, (MAX_MAP_PIXELS / (width * height)) ** 0.5)
        drawn = (max(1, round(height * scale)), max(1, round(width * scale)))
        results = self.processor.post_process_panoptic_segmentation(outputs, target_sizes=[drawn] * len(images))
        return [self._read(result, width, height) for result in results]

    def _read(self, result: dict, width: int, height: int) -> tuple[np.ndarray, list[Segment]]:
        raw = resize_map(result["segmentation"].cpu().numpy().astype(np.int32), width, height)
        infos = sorted(result["segments_info"], key=lambda info: info["id"])
        # Numbered anew from 1, since versions of the library differ in the first id and in the mark for no segment.
        ids = np.zeros_like(raw)
        segments: list[Segment] = []
        for info in infos:
            ids[raw == info["id"]] = len(segments) + 1
            box = segment_box(ids, len(segments) + 1)
            if box is not None:
                label = self.model.config.id2label.get(int(info["label_id"]), str(info["label_id"]))
                segments.append(Segment(len(segments) + 1, label, box))
        return ids, segments
