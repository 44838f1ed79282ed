"""Prepared rows made of rendered pictures, without searching for faces."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from facediffuser.preprocess.parts import encode_part
from facediffuser.preprocess.prepared_schema import PREPARED_SCHEMA


def write_prepared(folder: Path, rows: list[dict], schema=PREPARED_SCHEMA) -> None:
    """Write rows as preprocess does: parts of 8 by split, and a manifest."""
    files = {}
    for split in ("train", "test"):
        chosen = [row for row in rows if row["split"] == split]
        for part, start in enumerate(range(0, len(chosen), 8)):
            path = folder / split / f"part-{part:05d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_part(chosen[start : start + 8], schema, "test"))
            data = path.read_bytes()
            entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            files[path.relative_to(folder).as_posix()] = entry
    (folder / "manifest.json").write_text(json.dumps({"files": files}))


def read_prepared(folder: Path) -> list[dict]:
    """Return the rows that `write_prepared` wrote, the training split's first."""
    files = [file for split in ("train", "test") for file in sorted((folder / split).glob("*.parquet"))]
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def prepared_row(path: Path, split: str) -> dict:
    content = json.loads(path.read_text())
    image = next(path.with_suffix(ending) for ending in (".jpg", ".png") if path.with_suffix(ending).exists())
    picture, ids = Image.open(image), np.load(path.with_suffix(".npy"))
    png = io.BytesIO()
    Image.fromarray(ids.astype(np.uint8)).save(png, format="PNG")
    subjects, faces = [], []
    for segment in content["segments"]:
        ys, xs = np.nonzero(ids == segment["id"])
        x1, y1, x2, y2 = int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1
        end = segment["end"]
        start = content["caption"].rfind(" ", 0, end) + 1
        subjects.append(
            {"phrase": content["caption"][start:end], "start": start, "end": end, "segment_id": segment["id"],
             "box": [x1, y1, x2, y2], "face_index": len(faces)}
        )  # fmt: skip
        side = (x2 - x1) * 2 // 3
        left = (x1 + x2 - side) // 2
        box = [left, y1, left + side, y1 + side]
        faces.append({"box": box, "prob": 1.0, "landmarks": [[0.0, 0.0]] * 5, "crop_box": box, "crop_turn": 0.0})
    return {
        "image_id": path.stem,
        "image": {"bytes": image.read_bytes(), "path": image.name},
        "image_sha256": path.stem,
        "width": picture.width,
        "height": picture.height,
        "caption": content["caption"],
        "faces": faces,
        "subjects": subjects,
        "segmentation": png.getvalue(),
        "split": split,
        "identity": None,
        "licence": None,
        "author": None,
        "source": "rendered",
    }
