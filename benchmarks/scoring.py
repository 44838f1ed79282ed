"""Where the time of scoring goes: IP and PC as schema version 1 had them, and what the column `faces` adds.

    python -m benchmarks.scoring out/mine [--images 64]

Takes images of a finished dataset with its own scorers, in batches of 16 on one thread. Counted are seconds of the processor,
which other work on the machine does not change, the least of three times.
"""

import argparse
import time
from collections.abc import Callable

import torch

from facediffuser.dataset import open_dataset
from facediffuser.dataset.reading import read_columns
from facediffuser.dataset.schema import SUBJECTS_KEY
from facediffuser.evaluation.copies import recorded_scorers
from facediffuser.pictures import stored_picture
from facediffuser.prompts import without_markers
from facediffuser.scoring.face_labels import gallery_of, label_faces
from facediffuser.scoring.scorers import load_scorers
from facediffuser.storage import open_store

BATCH, TIMES = 16, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset")
    parser.add_argument("--images", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    store = open_store(options.dataset)
    rows = open_dataset(options.dataset).to_table(["sample_id", "image", "prompt", "subject_ids", "status"]).to_pylist()
    rows = [row for row in rows if row["status"] == "ok"][: options.images]
    pictures = [stored_picture(row["image"]["bytes"], row["sample_id"]) for row in rows]
    prompts = [without_markers(row["prompt"]) for row in rows]
    gallery = gallery_of(read_columns(store, SUBJECTS_KEY, ["subject_id", "identity"]).to_pylist())
    wanted = [[gallery.vectors[gallery.places[name]] for name in row["subject_ids"]] for row in rows]
    scorers = load_scorers(recorded_scorers(store))
    parts = [slice(start, start + BATCH) for start in range(0, len(rows), BATCH)]
    scored = [one for part in parts for one in scorers.score(pictures[part], wanted[part], prompts[part])]

    def label() -> None:
        for picture, score, row in zip(pictures, scored, rows, strict=True):
            label_faces(picture, score.found, row["subject_ids"], score.subject_faces, gallery)

    def each(work: Callable[[slice], object]) -> Callable[[], None]:
        return lambda: [work(part) for part in parts] and None

    steps = {
        "IP and PC": each(lambda part: scorers.score(pictures[part], wanted[part], prompts[part])),
        "  of it finding faces": each(lambda part: scorers.identity.detector.detect(pictures[part])),
        "  of it finding and embedding": each(lambda part: scorers.identity.embed_faces(pictures[part])),
        "  of it PC": each(lambda part: scorers.prompt.score(pictures[part], prompts[part])),
        "faces and ip_margin": label,
    }
    spent = {name: _seconds(work) / len(rows) for name, work in steps.items()}
    print(
        f"{len(rows)} images of {pictures[0].width} x {pictures[0].height} px, {sum(one.face_count for one in scored)} faces"
    )
    for name, seconds in spent.items():
        print(f"{name:<32}{1000 * seconds:>8.2f} ms an image")
    before, added = spent["IP and PC"], spent["faces and ip_margin"]
    print(f"images a second of a core: {1 / before:.1f} without the column faces, {1 / (before + added):.1f} with it")


def _seconds(work: Callable[[], None]) -> float:
    def once() -> float:
        began = time.process_time()
        work()
        return time.process_time() - began

    return min(once() for _ in range(TIMES))


if __name__ == "__main__":
    main()
