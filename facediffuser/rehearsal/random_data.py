"""Renderings of the miniature world as the data of a rehearsal: prepared Parquet, people, prompts."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from facediffuser.miniature.render import render_set
from facediffuser.pictures import stored_picture
from facediffuser.preprocess.parts import encode_part
from facediffuser.preprocess.prepared_schema import PREPARED_SCHEMA
from facediffuser.scoring.face_detector import FaceDetector
from facediffuser.storage.reading import parse_json

RENDERED_PX = 128
MTCNN_PX = 160


def write_prepared(folder: Path, count: int, side: int) -> Path:
    """Write renderings as prepared Parquet, without the search for faces; return its folder.

    Args:
        folder: where `photos/` and `data/` are written.
        count: how many pictures.
        side: their side in px.
    """
    render_set(count, 0, folder / "photos", min(side, RENDERED_PX), subjects=0)
    rows = [_row(path, side) for path in sorted((folder / "photos").glob("[0-9]*/*.json"))]
    (folder / "data" / "train").mkdir(parents=True)
    part = folder / "data" / "train" / "part-00000.parquet"
    part.write_bytes(encode_part(rows, PREPARED_SCHEMA, "benchmark"))
    files = {"train/part-00000.parquet": {"bytes": part.stat().st_size}}
    (folder / "data" / "manifest.json").write_text(json.dumps({"files": files}))
    return folder / "data"


def _row(path: Path, side: int) -> dict:
    content, picture = (
        parse_json(path.read_text()),
        stored_picture(next(path.parent.glob(f"{path.stem}.[jp][pn]g")).read_bytes(), path.stem),
    )
    factor = side // picture.width
    ids = np.kron(np.load(path.with_suffix(".npy")).astype(np.uint8), np.ones((factor, factor), np.uint8))
    jpeg, png = io.BytesIO(), io.BytesIO()
    picture.resize((side, side), Image.Resampling.BICUBIC).convert("RGB").save(jpeg, format="JPEG", quality=95)
    Image.fromarray(ids).save(png, format="PNG")
    subjects: list[dict] = []
    faces: list[dict] = []
    for segment in content["segments"]:
        ys, xs = np.nonzero(ids == segment["id"])
        box = [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]
        head = [box[0], box[1], box[2], box[1] + box[2] - box[0]]
        start = content["caption"].rfind(" ", 0, segment["end"]) + 1
        subjects.append(
            {"phrase": content["caption"][start : segment["end"]], "start": start, "end": segment["end"],
             "segment_id": segment["id"], "box": box, "face_index": len(faces)}
        )  # fmt: skip
        faces.append({"box": head, "prob": 1.0, "landmarks": [[0.0, 0.0]] * 5, "crop_box": head, "crop_turn": 0.0})
    return {
        "image_id": path.stem, "image": {"bytes": jpeg.getvalue(), "path": f"{path.stem}.jpg"},
        "image_sha256": path.stem, "width": side, "height": side, "caption": content["caption"], "faces": faces,
        "subjects": subjects, "segmentation": png.getvalue(), "split": "train", "identity": None, "licence": None,
        "author": None, "source": "rendered",
    }  # fmt: skip


def write_people(folder: Path, count: int, side: int) -> Path:
    """Write renderings of people of `side` px as `subjects/`, those in which MTCNN finds a face; return that folder.

    Args:
        folder: where they go.
        count: how many people, 1 to 15, with three pictures each.
        side: of a picture, px.
    """
    render_set(1, 1, folder, 64, subjects=count)
    detector = FaceDetector(min_side=MTCNN_PX)
    for path in sorted((folder / "subjects").rglob("*.png")):
        picture = stored_picture(path.read_bytes(), path.name)
        picture = picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        path.unlink()
        if detector.detect([picture])[0]:
            picture.save(path)
    people = folder / "subjects"
    kept = {path.parent.name for path in people.rglob("*.png")}
    table = (people / "subjects.csv").read_text().splitlines()
    (people / "subjects.csv").write_text(
        "\n".join(line for line in table if line.split(",")[0] in {"subject_id", *kept}) + "\n"
    )
    for left_out in people.iterdir():
        if left_out.is_dir() and left_out.name not in kept:
            left_out.rmdir()
    return people
