"""What `ip_margin` finds: images of two people whose subjects were exchanged on purpose, precision and recall.

    python -m benchmarks.exchanged out/pairs

Every image of two subjects with a face for each is taken three times: as it was made; with one of the two exchanged for
somebody else of the dataset; with both. The faces' embeddings are matched to those subjects anew, as `generate` does it. An
image is flagged where its margin is below a threshold. Two subjects of one image that changed places are not among them: both
are still in it, and no label says who stands where.
"""

import argparse

import numpy as np

from facediffuser.dataset import open_dataset
from facediffuser.dataset.reading import read_columns
from facediffuser.dataset.schema import SUBJECTS_KEY
from facediffuser.scoring.face_labels import Gallery, gallery_of, identify_faces
from facediffuser.scoring.matching import identity_preservation
from facediffuser.storage import open_store

THRESHOLDS = (0.0, 0.05, 0.1, 0.2)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("dataset")
    url = arguments.parse_args().dataset
    gallery = gallery_of(read_columns(open_store(url), SUBJECTS_KEY, ["subject_id", "identity"]).to_pylist())
    rows = open_dataset(url).to_table(["subject_ids", "faces", "status"]).to_pylist()
    pairs = [row for row in rows if row["status"] == "ok" and len(row["subject_ids"]) == 2 and len(row["faces"]) >= 2]
    generator = np.random.default_rng(0)
    made, one, both = [], [], []
    for row in pairs:
        first, second = row["subject_ids"]
        others = [name for name in gallery.ids if name not in (first, second)]
        third, fourth = generator.choice(others, 2, replace=False)
        vectors = np.array([face["embedding"] for face in row["faces"]], np.float32)
        made.append(margin(vectors, (first, second), gallery))
        one.append(margin(vectors, (first, str(third)), gallery))
        both.append(margin(vectors, (str(third), str(fourth)), gallery))
    print(f"{len(pairs)} images of two subjects with two faces or more, of {len(rows)}; {len(gallery.ids)} subjects")
    for name, exchanged in (("one of two exchanged", one), ("both exchanged", both)):
        for threshold in THRESHOLDS:
            flagged_made, flagged = np.array(made) < threshold, np.array(exchanged) < threshold
            precision = flagged.sum() / max(1, flagged.sum() + flagged_made.sum())
            print(f"{name}, ip_margin < {threshold:g}: precision {precision:.3f}, recall {flagged.mean():.3f}")


def margin(vectors: np.ndarray, subject_ids: tuple[str, str], gallery: Gallery) -> float:
    """Return the margin of an image with these faces (f, d), were it to show those subjects."""
    wanted = np.stack([gallery.vectors[gallery.places[name]] for name in subject_ids])
    chosen = identity_preservation(vectors, wanted)[2]
    found = identify_faces(vectors, subject_ids, chosen, gallery)[1]
    assert found is not None  # there are faces, and others in the dataset
    return found


if __name__ == "__main__":
    main()
