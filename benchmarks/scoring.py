"""How fast images are scored, part by part: `python -m benchmarks.scoring [--scorers miniature] [--images 200]`.

Draws people of the miniature world, so no weights but the scorers' are needed. Prints images per second of the face
search, the face network, PC, both together, all columns, sharpness, and the checks for copies; the best of the repeats counts.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from facediffuser.dataset.image_files import encode_image
from facediffuser.dataset.schema import DATASET_SCHEMA
from facediffuser.devices import pick_device
from facediffuser.evaluation.copies import find_copies
from facediffuser.evaluation.score_settings import CopySettings
from facediffuser.evaluation.similarity import nearest_neighbours
from facediffuser.evaluation.training_faces import TrainingFaces
from facediffuser.miniature.render import person, render
from facediffuser.scoring.columns import Sharpness
from facediffuser.scoring.face_labels import FaceLabels, Gallery, label_faces
from facediffuser.scoring.scorers import Scorers, load_scorers
from facediffuser.storage import open_store

FIRST_PERSON = 70_000_000


def drawn(count: int, size: int) -> tuple[list[Image.Image], list[str]]:
    """Return pictures of people, and their captions."""
    made = [render([person(FIRST_PERSON + number)], number, 64) for number in range(count)]
    pictures = [Image.fromarray(one.image).resize((size, size), Image.Resampling.BICUBIC) for one in made]
    return pictures, [one.caption.text for one in made]


def dataset_of(folder: Path, pictures: list[Image.Image], captions: list[str], scorers: Scorers) -> None:
    """Write the pictures as a dataset's one shard, with their face boxes, without references."""
    found = scorers.identity.detector.detect(pictures)
    rows = [
        {
            "sample_id": f"{number:06d}", "prompt_id": f"{number:06d}", "prompt": text, "subject_ids": ["ada"],
            "seed": 0, "method": "drawn", "num_inference_steps": 0, "guidance_scale": 0.0, "fusion_start": 0,
            "fusion_end": 0, "scheduler": "", "height": picture.height, "width": picture.width, "status": "ok",
            "ip": 0.0, "pc": 0.0, "face_boxes": [list(face.box) for face in faces],
            "image": {"bytes": encode_image(picture, "png", f"{number:06d}"), "path": f"{number:06d}.png"},
        }
        for number, (picture, text, faces) in enumerate(zip(pictures, captions, found, strict=True))
    ]  # fmt: skip
    (folder / "data").mkdir()
    table = pa.Table.from_pylist(rows, schema=DATASET_SCHEMA)
    pq.write_table(table, folder / "data" / "shard-00000-of-00001.parquet", row_group_size=100)


def rate(count: int, repeats: int, run: Callable[[], object]) -> float:
    """Return how many of `count` a second the quickest of the repeats did."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return count / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scorers", default="miniature", help="paper, miniature, or a scorers' folder")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--size", type=int, default=64, help="side of the images, px")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--training", type=int, default=50_000, help="faces of a training set (random vectors)")
    args = parser.parse_args()
    device = pick_device(args.device)
    scorers = load_scorers(args.scorers, device)
    pictures, captions = drawn(args.images, args.size)
    faces = [face for found in scorers.identity.embed_faces(pictures) for face in found.vectors]
    wanted = [[faces[0]]] * len(pictures)
    crops = [np.asarray(picture.resize((scorers.identity.crop_size,) * 2)) for picture in pictures]
    batches = range(0, len(pictures), args.batch_size)

    def part(work: Callable[[slice], object]) -> float:
        return rate(
            args.images, args.repeats, lambda: [work(slice(start, start + args.batch_size)) for start in batches]
        )

    people = np.random.default_rng(1).standard_normal((1000, len(faces[0])))
    people[0] = faces[0]
    names = tuple(f"person {number}" for number in range(1000))
    gallery = Gallery(names, people / np.linalg.norm(people, axis=1, keepdims=True))

    def everything(some: slice) -> list[FaceLabels]:
        scores = scorers.score(pictures[some], wanted[some], captions[some])
        return [
            label_faces(picture, score.found, names[:1], score.subject_faces, gallery)
            for picture, score in zip(pictures[some], scores, strict=True)
        ]

    print(
        f"{args.images} images of {args.size} px, scorers {args.scorers} on {device}, {torch.get_num_threads()} threads"
    )
    for name, value in (
        ("face search (MTCNN)", part(lambda some: scorers.identity.detector.detect(pictures[some]))),
        ("face network", part(lambda some: scorers.identity.embed_crops(crops[some]))),
        ("PC", part(lambda some: scorers.prompt.score(pictures[some], captions[some]))),
        ("IP and PC together", part(lambda some: scorers.score(pictures[some], wanted[some], captions[some]))),
        ("IP, PC, faces and ip_margin (1,000 people)", part(everything)),
        ("sharpness", part(lambda some: Sharpness().score(pictures[some], [], []))),
    ):
        print(f"{name:<46} {value:10,.0f} images/s")
    known = np.random.default_rng(0).standard_normal((args.training, len(faces[0]))).astype(np.float32)
    known /= np.linalg.norm(known, axis=1, keepdims=True)
    with tempfile.TemporaryDirectory(prefix="facediffuser-scoring-") as folder:
        dataset_of(Path(folder), pictures, captions, scorers)
        training = TrainingFaces(known, [str(number) for number in range(args.training)])
        settings = CopySettings(url=folder)
        found = rate(
            args.images, args.repeats, lambda: find_copies(open_store(folder), scorers.identity, settings, training)
        )
        print(f"{f'copies ({args.training:,} training faces)':<46} {found:10,.0f} images/s")
    queries = np.stack(faces)
    value = rate(len(queries), args.repeats, lambda: nearest_neighbours(known, queries, 1))
    print(f"{f'nearest of {args.training:,} training faces alone':<46} {value:10,.0f} faces/s")


if __name__ == "__main__":
    main()
