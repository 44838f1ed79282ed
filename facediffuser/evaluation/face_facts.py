"""What the column `faces` says of a whole dataset, in one pass: identity, pose, size, and what a threshold would keep."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facediffuser.dataset.schema import FACES, IP_MARGIN
from facediffuser.evaluation.score_sample import Highest, rank

COSINES = np.linspace(-1, 1, 101)
MARGINS = np.linspace(-2, 2, 201)
ANGLES = np.linspace(-90, 90, 37)
SIZES = np.array([0, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1 << 20], float)
IP_STEPS, MARGIN_STEPS, SIZE_STEPS = (
    (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    (0.0, 0.1, 0.2, 0.3, 0.4),
    (16, 32, 64, 112, 224),
)
SUBJECTS, FACES_EACH = 150, 30


@dataclass(frozen=True)
class PairFacts:
    """Cosines of the faces of a sample with each other.

    within, between: float32 arrays, of pairs of images that show the same subject, and of faces of different ones.
    rate, threshold: the equal error rate, 0..1, and the cosine at which both errors are that.
    """

    within: np.ndarray
    between: np.ndarray
    rate: float
    threshold: float


@dataclass(frozen=True)
class FaceFacts:
    """What the faces of a dataset say.

    images: finished ones; faces: all; unasked: those of no subject; missing: subjects of images without a face.
    own, other: counts per bin of COSINES of the similarity to the own and to the nearest other subject.
    margins: counts per bin of MARGINS; wrong: images whose margin is below 0.
    yaw, pitch, roll: counts per bin of ANGLES; sizes: per bin of SIZES; all of faces with a subject.
    kept: (threshold in words, share of images that reach it, 0..1).
    pairs: None where there are no embeddings, or no two images of one subject, or one subject.
    """

    images: int
    faces: int
    unasked: int
    missing: int
    own: np.ndarray
    other: np.ndarray
    margins: np.ndarray
    wrong: int
    yaw: np.ndarray
    pitch: np.ndarray
    roll: np.ndarray
    sizes: np.ndarray
    kept: list[tuple[str, float]]
    pairs: PairFacts | None


class FaceCounts:
    """Takes a dataset's rows piece by piece; memory does not grow with them."""

    def __init__(self):
        self.images = self.faces = self.labelled = self.wanted = self.wrong = 0
        self.own, self.other = np.zeros(100, np.int64), np.zeros(100, np.int64)
        self.margins, self.sizes = np.zeros(200, np.int64), np.zeros(len(SIZES) - 1, np.int64)
        self.angles = {name: np.zeros(36, np.int64) for name in ("yaw", "pitch", "roll")}
        self.kept: dict[str, int] = {}
        self.people: dict[str, Highest[tuple[str, np.ndarray]]] = {}
        self.ranks: dict[str, bytes] = {}

    def add(self, rows: pa.Table) -> None:
        """Take rows with sample_id, subject_ids, status, ip, face_count, faces and ip_margin; failed ones do not count."""
        rows = rows.filter(pc.and_kleene(pc.equal(rows["status"], "ok"), pc.is_valid(rows[FACES]))).combine_chunks()
        if not rows.num_rows:
            return
        lists = rows[FACES].combine_chunks()
        lists = lists.chunk(0) if isinstance(lists, pa.ChunkedArray) else lists
        faces, parents = lists.flatten(), pc.list_parent_indices(lists).to_numpy()
        asked = faces.field("subject_id").is_valid().to_numpy(zero_copy_only=False)
        self.images, self.faces = self.images + rows.num_rows, self.faces + len(faces)
        self.labelled += int(asked.sum())
        subjects = pc.list_value_length(rows["subject_ids"]).to_numpy()
        self.wanted += int(subjects.sum())
        self.own += _counts(faces.field("similarity"), COSINES)
        self.other += _counts(faces.field("other_similarity").filter(pa.array(asked)), COSINES)
        for name, counts in self.angles.items():
            counts += _counts(faces.field(name).filter(pa.array(asked)), ANGLES)
        sizes = faces.field("size").to_numpy(zero_copy_only=False)
        self.sizes += np.histogram(sizes[asked], SIZES)[0]
        margins = rows[IP_MARGIN].to_numpy()
        self.margins += _counts(rows[IP_MARGIN], MARGINS)
        self.wrong += int((margins < 0).sum())
        smallest = np.full(rows.num_rows, np.inf)
        np.minimum.at(smallest, parents[asked], sizes[asked])
        found = np.bincount(parents[asked], minlength=rows.num_rows)
        whole = found == subjects
        self._keep("as many faces as subjects", rows["face_count"].to_numpy() == subjects)
        for step in IP_STEPS:
            self._keep(f"ip ≥ {step:g}", rows["ip"].to_numpy() >= step)
        for step in MARGIN_STEPS:
            self._keep(f"ip_margin ≥ {step:g}", margins >= step)
        for step in SIZE_STEPS:
            self._keep(f"every subject's face ≥ {step} px", whole & (smallest >= step))
        if faces.type.get_field_index("embedding") >= 0:
            ids = rows["sample_id"].to_pylist()
            self._sample([ids[parent] for parent in parents], faces, np.flatnonzero(asked))

    def _keep(self, words: str, kept: np.ndarray) -> None:
        self.kept[words] = self.kept.get(words, 0) + int(kept.sum())

    def _sample(self, sample_ids: Sequence[str], faces: pa.StructArray, places: np.ndarray) -> None:
        """Keep of the subjects whose ids hash lowest the faces whose images' ids hash lowest."""
        names, vectors = faces.field("subject_id").to_pylist(), faces.field("embedding")
        for place in places:
            name = names[place]
            if name not in self.people:
                own = rank(name)
                if len(self.people) >= SUBJECTS:
                    last = max(self.ranks, key=self.ranks.__getitem__)
                    if own >= self.ranks[last]:
                        continue
                    del self.people[last], self.ranks[last]
                self.people[name], self.ranks[name] = Highest(FACES_EACH), own
            # Turned over: the lowest ranks are the highest keys.
            key = (bytes(255 - byte for byte in rank(sample_ids[place])), sample_ids[place])
            if self.people[name].takes(key):
                vector = vectors[int(place)].values.to_numpy(zero_copy_only=False).astype(np.float32)
                self.people[name].add(key, (sample_ids[place], vector))

    def facts(self) -> FaceFacts | None:
        """Return what was found, None when no row had faces."""
        if not self.images:
            return None
        return FaceFacts(
            images=self.images, faces=self.faces, unasked=self.faces - self.labelled,
            missing=self.wanted - self.labelled, own=self.own, other=self.other, margins=self.margins, wrong=self.wrong,
            **self.angles, sizes=self.sizes,
            kept=[(words, count / self.images) for words, count in self.kept.items()], pairs=self._pairs(),
        )  # fmt: skip

    def _pairs(self) -> PairFacts | None:
        held = [
            (name, *item)
            for name, kept in sorted(self.people.items())
            for item in sorted(kept.items(), key=itemgetter(0))
        ]
        if not held:
            return None
        vectors = np.stack([vector for _, _, vector in held])
        owners, images = (np.unique([item[place] for item in held], return_inverse=True)[1] for place in (0, 1))
        first, second = np.triu_indices(len(held), 1)
        cosines = (vectors @ vectors.T)[first, second]
        same, other_image = owners[first] == owners[second], images[first] != images[second]
        within, between = cosines[same & other_image], cosines[~same]
        if not len(within) or not len(between):
            return None
        return PairFacts(within, between, *equal_error_rate(within, between))


def equal_error_rate(same: np.ndarray, different: np.ndarray) -> tuple[float, float]:
    """Return the equal error rate of telling pairs apart by a threshold on their similarity, and that threshold.

    Args:
        same: similarities (n,), n >= 1, of pairs that are the same person.
        different: similarities (m,), m >= 1, of pairs that are not.

    Returns:
        The rate, 0..1, at the threshold where the share of `same` below it and of `different` at or above it are nearest
        to each other: the mean of the two.
    """
    same, different = np.sort(same), np.sort(different)
    thresholds = np.unique(np.concatenate([same, different]))
    missed = np.searchsorted(same, thresholds) / len(same)
    taken = 1 - np.searchsorted(different, thresholds) / len(different)
    best = int(np.argmin(np.abs(missed - taken)))
    return float((missed[best] + taken[best]) / 2), float(thresholds[best])


def _counts(values: pa.Array | pa.ChunkedArray, edges: np.ndarray) -> np.ndarray:
    numbers = (
        pc.drop_null(values).to_numpy(zero_copy_only=False)
        if isinstance(values, pa.Array)
        else pc.drop_null(values).to_numpy()
    )
    return np.histogram(np.clip(numbers, edges[0], edges[-1]), edges)[0]
