"""The faces of a dataset's images as aligned crops: where its column `faces` says, else where its own scorer finds them."""

import io
from collections.abc import Sequence
from typing import Any

from facediffuser.curation.export_formats import Sample
from facediffuser.dataset.extension import read_references
from facediffuser.faces import aligned_crop
from facediffuser.pictures import stored_picture
from facediffuser.scoring.matching import cosine_scores, match_greedily
from facediffuser.storage import Store

FACES = "faces"
ABOUT_FACES = ("yaw", "pitch", "roll", "size", "sharpness", "similarity", "other_similarity", "probability")


class FaceCrops:
    """Cuts the faces of subjects out of rows.

    Args:
        store: the dataset.
        scorers: what finds and knows faces where the rows do not say; None: such rows give no crops.
    """

    def __init__(self, store: Store, scorers: Any = None):
        self.identity = self.gallery = None
        if scorers is not None:
            # With torch, which is not needed where the rows say where their faces are.
            from facediffuser.scoring.face_labels import gallery_of

            self.identity = scorers.identity
            self.gallery = gallery_of(read_references(store).select(["subject_id", "identity"]).to_pylist())

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
        if self.identity is None or self.gallery is None:
            return []
        found = self.identity.embed_faces([image])[0]
        if not found.faces:
            return []
        names = row["subject_ids"]
        scores = cosine_scores(found.vectors, self.gallery.vectors[[self.gallery.places[name] for name in names]])
        chosen = match_greedily(scores)
        return [
            (name, found.faces[face].landmarks, {"similarity": float(scores[face, place])})
            for place, (name, face) in enumerate(zip(names, chosen, strict=True))
            if face >= 0
        ]
