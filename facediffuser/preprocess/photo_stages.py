"""The stages that a picture goes through, and what each of them found, kept so that it is done again only when needed.

<stages>/<stage>/<key>.arrow holds what one stage found in one part. The key is made of all that decides it: the stage's
settings, its model's weights, the part's pictures. A run with another captioner therefore makes captions and
subjects anew and takes faces and segments from there. By default it is the output's own folder `stages`.
"""

import hashlib
import io
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import feather

from facediffuser.faces import Face
from facediffuser.preprocess.annotations import Annotation, unmarked
from facediffuser.preprocess.captioners import Captioner
from facediffuser.preprocess.phrases import find_person_phrases
from facediffuser.preprocess.preprocess_settings import PreprocessSettings
from facediffuser.preprocess.read_pictures import Picture
from facediffuser.preprocess.required_models import model_folder
from facediffuser.preprocess.segment_maps import PERSON_LABELS, Segment, decode_map, encode_map
from facediffuser.preprocess.segmenter import Segmenter
from facediffuser.preprocess.source_files import Record
from facediffuser.preprocess.sources import FASTCOMPOSER
from facediffuser.preprocess.subject_segments import PhraseMatcher, Subject, match_subjects
from facediffuser.runs import Document
from facediffuser.scoring.face_detector import FaceDetector
from facediffuser.storage import Store
from facediffuser.storage.reading import parse_json

logger = logging.getLogger(__name__)

# Raised when a stage comes to find something else in the same picture: what earlier versions kept is then not used.
VERSION = 1
# Person phrases of a caption that are compared with its people.
MOST_PHRASES = 256
KEPT_SCHEMA = pa.schema(
    [("image_id", pa.string()), ("inputs", pa.string()), ("found", pa.string()), ("map", pa.binary())]
)


@dataclass(frozen=True)
class Job:
    """What every part of a run has in common; small enough to be sent to each worker.

    models: the digest of each model in use, by option.
    required: the provenances a worker must have; none when any will do.
    """

    settings: PreprocessSettings
    format: str
    fingerprint: str
    device: str = "auto"
    models: dict[str, str] = field(default_factory=dict)
    required: tuple[Document, ...] = ()


@dataclass
class Item:
    """A picture on its way through the stages."""

    record: Record
    picture: Picture
    annotation: Annotation | None = None
    ids: np.ndarray | None = None
    segments: list[Segment] = field(default_factory=list)
    subjects: list[Subject] = field(default_factory=list)
    faces: list[Face] = field(default_factory=list)
    caption: str = ""
    identity: str | None = None


class Stage(ABC):
    """One stage; keeps its model, loaded when it is first needed."""

    name: str
    option: str | None = None
    """The setting that names the stage's model, when it has one."""
    settings: tuple[str, ...] = ()
    """The settings that decide what it finds in a picture."""

    def __init__(self, job: Job, device: str):
        self.job, self.device = job, device

    @property
    def model_name(self) -> str:
        """The name of the stage's model: a folder, an s3:// URL, a hub id, or none."""
        assert self.option is not None  # asked of stages with a model alone
        return getattr(self.job.settings, self.option)

    @property
    def has_model(self) -> bool:
        """Whether the run has the stage's model: those that its source needs were looked for when it began."""
        return self.option in self.job.models

    def key(self, records: Sequence[Record]) -> str:
        """Return the name under which the stage's findings in these pictures are kept."""
        known = {
            "version": VERSION,
            "settings": {name: getattr(self.job.settings, name) for name in ("size", *self.settings)},
            "model": self.option and (self.job.models.get(self.option) or self.model_name),
            "pictures": [record.image_id for record in records],
        }
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]

    def inputs(self, item: Item) -> str:
        """Return a digest of what the stage looks at."""
        return item.picture.sha256

    @abstractmethod
    def wants(self, item: Item) -> bool:
        """Return whether the stage has something to find in this picture that the source does not say already."""

    @abstractmethod
    def run(self, items: Sequence[Item]) -> None:
        """Find it in the pictures, and write it into the items."""

    @abstractmethod
    def pack(self, item: Item) -> tuple[Any, bytes | None]:
        """Return what was found: JSON values, and bytes for what is no JSON."""

    @abstractmethod
    def unpack(self, item: Item, found: Any, map: bytes | None) -> None:
        """Write into the item what `pack` returned earlier.

        Args:
            item: the picture.
            found: the JSON values.
            map: the bytes, None where `pack` gave none.
        """


class Faces(Stage):
    """Boxes, probabilities and landmarks."""

    name, settings = "faces", ("face_search_side",)

    @cached_property
    def detector(self) -> FaceDetector:
        """The face detector."""
        return FaceDetector(self.device, min_side=self.job.settings.face_search_side)

    def wants(self, item: Item) -> bool:
        return True

    def run(self, items: Sequence[Item]) -> None:
        found = self.detector.detect([item.picture.image for item in items])
        for item, faces in zip(items, found, strict=True):
            item.faces = faces

    def pack(self, item: Item) -> tuple[Any, bytes | None]:
        return [vars(face) for face in item.faces], None

    def unpack(self, item: Item, found: Any, map: bytes | None) -> None:
        item.faces = [
            Face(tuple(face["box"]), face["prob"], tuple(tuple(point) for point in face["landmarks"])) for face in found
        ]


class Captions(Stage):
    """A caption, where the source has none."""

    name, option, settings = "captions", "captioner", ("caption_tokens", "batch_size")

    @cached_property
    def captioner(self) -> Captioner:
        """The captioning model."""
        return Captioner(model_folder(self.model_name), self.device, self.job.settings.caption_tokens)

    def wants(self, item: Item) -> bool:
        return not item.caption and self.has_model

    def run(self, items: Sequence[Item]) -> None:
        captions = self.captioner.caption([item.picture.image for item in items])
        for item, caption in zip(items, captions, strict=True):
            item.caption = unmarked(caption)

    def pack(self, item: Item) -> tuple[Any, bytes | None]:
        return item.caption, None

    def unpack(self, item: Item, found: Any, map: bytes | None) -> None:
        # Earlier versions kept captions with markers.
        item.caption = unmarked(found)


class Segments(Stage):
    """A map of segments and their labels, where the source has none."""

    name, option, settings = "segments", "segmenter", ("batch_size",)

    @cached_property
    def segmenter(self) -> Segmenter:
        """The segmentation model."""
        return Segmenter(model_folder(self.model_name), self.device)

    def wants(self, item: Item) -> bool:
        return item.ids is None and self.has_model

    def run(self, items: Sequence[Item]) -> None:
        results = self.segmenter.segment([item.picture.image for item in items])
        for item, (ids, segments) in zip(items, results, strict=True):
            item.ids, item.segments = ids, segments

    def pack(self, item: Item) -> tuple[Any, bytes | None]:
        assert item.ids is not None  # `run` noted it
        return [vars(segment) for segment in item.segments], encode_map(item.ids)

    def unpack(self, item: Item, found: Any, map: bytes | None) -> None:
        assert map is not None  # `pack` gave one
        item.ids = decode_map(map)
        item.segments = [Segment(part["id"], part["label"], tuple(part["box"])) for part in found]


class Subjects(Stage):
    """Person phrases of the caption, each with its segment, where the source does not tie them itself."""

    name, option = "subjects", "matcher"

    @cached_property
    def matcher(self) -> PhraseMatcher | None:
        """The model that compares phrases and crops, None when the run has none."""
        return PhraseMatcher(model_folder(self.model_name), self.device) if self.has_model else None

    def wants(self, item: Item) -> bool:
        # FastComposer's segments without `end` are no subjects: that is what the source says.
        return self.job.format != FASTCOMPOSER and bool(item.segments)

    def inputs(self, item: Item) -> str:
        digest = hashlib.sha256(repr((item.picture.sha256, item.caption, item.segments)).encode())
        assert item.ids is not None  # there are no segments without a map
        digest.update(item.ids.tobytes())
        return digest.hexdigest()

    def run(self, items: Sequence[Item]) -> None:
        for item in items:
            # A text encoder reads 77 tokens: later phrases of a long text never matter, but would fill the memory.
            phrases = find_person_phrases(item.caption)[:MOST_PHRASES]
            people = sum(segment.label in PERSON_LABELS for segment in item.segments)
            # CLIP is loaded only when there is a choice.
            matcher = self.matcher if phrases and people and len(phrases) * people > 1 else None
            item.subjects = match_subjects(item.picture.image, phrases, item.segments, matcher)

    def pack(self, item: Item) -> tuple[Any, bytes | None]:
        return [vars(subject) for subject in item.subjects], None

    def unpack(self, item: Item, found: Any, map: bytes | None) -> None:
        item.subjects = [Subject(**{**subject, "box": tuple(subject["box"])}) for subject in found]


STAGES: tuple[type[Stage], ...] = (Faces, Captions, Segments, Subjects)


class Findings:
    """What one stage found in one part: as it was kept by an earlier run, and what comes to it now."""

    def __init__(self, store: Store, stage: Stage, records: Sequence[Record]):
        self.store, self.stage = store, stage
        self.name = f"{stage.name}/{stage.key(records)}.arrow"
        self.rows: list[dict[str, Any]] = []
        self.news = False

    @cached_property
    def _kept(self) -> dict[tuple[str, str], dict[str, Any]]:
        try:
            table = feather.read_table(io.BytesIO(self.store.get(self.name)), columns=KEPT_SCHEMA.names)
        except FileNotFoundError:
            return {}
        except pa.ArrowException as error:
            logger.warning("%s: damaged (%s); made anew", self.store.url_of(self.name), error)
            return {}
        return {(row["image_id"], row["inputs"]): row for row in table.to_pylist()}

    def complete(self, items: Sequence[Item]) -> None:
        """Write into the items what the stage found: kept from an earlier run of the same inputs, or found now."""
        wanted = [item for item in items if self.stage.wants(item)]
        inputs = [self.stage.inputs(item) for item in wanted]
        new = []
        for item, seen in zip(wanted, inputs, strict=True):
            row = self._kept.get((item.record.image_id, seen))
            if row is None:
                new.append(item)
            else:
                self.stage.unpack(item, parse_json(row["found"]), row["map"])
        if new:
            self.stage.run(new)
            self.news = True
        for item, seen in zip(wanted, inputs, strict=True):
            found, map = self.stage.pack(item)
            text = json.dumps(found, ensure_ascii=False)
            self.rows.append({"image_id": item.record.image_id, "inputs": seen, "found": text, "map": map})

    def keep(self) -> None:
        """Write what was found, unless all of it was read from there."""
        if self.news:
            buffer = io.BytesIO()
            # Not Parquet: whoever reads all Parquet of the output wants its rows, not these.
            feather.write_feather(pa.Table.from_pylist(self.rows, KEPT_SCHEMA), buffer, compression="zstd")
            self.store.put(self.name, buffer.getvalue())
