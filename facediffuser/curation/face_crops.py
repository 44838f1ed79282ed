"""The faces of a dataset's images as aligned crops: where its column `faces` says, else where its own scorer finds them."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from facediffuser.curation.export_formats import Sample
from facediffuser.faces import aligned_crop
from facediffuser.pictures import stored_picture
from facediffuser.storage import Store

FACES = "faces"
ABOUT_FACES = ("yaw", "pitch", "roll", "size", "sharpness", "similarity", "other_similarity", "probability")


class FaceCrops:
    """Cuts the faces of subjects out of rows.

    Args:
        store: the dataset.
        scorers: what finds and knows faces where the rows do not say, None: rows that do not say are refused.
    """

    def __init__(self, store: Store, scorers: Any = None):
        self.store, self.identity = store, scorers.identity if scorers else None
        self._references: dict[str, np.ndarray] = {}
        if self.identity is not None:
            from facediffuser.dataset.extension import read_references
            from facediffuser.scoring.identity import subject_embedding

            rows = read_references(store).select(["subject_id", "identity"]).to_pylist()
            for name in sorted({row["subject_id"] for row in rows}):
                own = [row["identity"] for row in rows if row["subject_id"] == name]
                self._references[name] = subject_embedding(np.array(own, np.float32))

    def __call__(self, row: dict[str, Any], wanted: Sequence[str]) -> list[Sample]:
        """Return a crop, PNG of 112 px, of each wanted subject whose face is found in a row's image."""
        image = stored_picture(row["image"]["bytes"], row["sample_id"])
        samples = []
        for subject, landmarks, facts in self._faces(row, image):
            if subject not in wanted:
                continue
            sink = io.BytesIO()
            aligned_crop(image, landmarks).save(sink, "PNG", compress_level=4)
            known = {"sample_id": row["sample_id"], "prompt": row["prompt"], "subject_id": subject, **facts}
            name = f"{row['sample_id']}@{subject}" if len(row["subject_ids"]) > 1 else row["sample_id"]
            samples.append(Sample(subject, name, sink.getvalue(), known))
        return samples

    def _faces(self, row: dict[str, Any], image: Any) -> list[tuple[str, Any, dict[str, Any]]]:
        if row.get(FACES) is not None:
            return [
                (face["subject_id"], face["landmarks"], {name: face.get(name) for name in ABOUT_FACES})
                for face in row[FACES]
                if face["subject_id"] is not None and face["landmarks"] is not None
            ]
        if self.identity is None:
            return []
        from facediffuser.scoring.matching import cosine_scores, match_greedily

        found = self.identity.embed_faces([image])[0]
        if not found.faces:
            return []
        names = row["subject_ids"]
        scores = cosine_scores(found.vectors, np.stack([self._references[name] for name in names]))
        chosen = match_greedily(scores)
        return [
            (name, found.faces[face].landmarks, {"similarity": float(scores[face, place])})
            for place, (name, face) in enumerate(zip(names, chosen, strict=True))
            if face >= 0
        ]
