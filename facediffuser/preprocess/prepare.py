"""Preparing one part of a source, with models that are loaded once."""

import itertools
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from facediffuser.errors import InputError
from facediffuser.faces import Face, face_crop_box, ffhq_crop
from facediffuser.pictures import Rejection, batches_of_files
from facediffuser.preprocess.annotations import (
    EMPTY_CAPTION,
    annotated_segments,
    annotated_subjects,
    identity_of,
    read_annotation,
    read_caption,
)
from facediffuser.preprocess.parts import REJECTED, part_name, put_part, to_json
from facediffuser.preprocess.photo_stages import STAGES, Findings, Item, Job
from facediffuser.preprocess.prepared_schema import CROP_STEP
from facediffuser.preprocess.preprocess_settings import NONE
from facediffuser.preprocess.read_pictures import Picture, read_picture
from facediffuser.preprocess.segment_maps import encode_map, read_map, resize_map
from facediffuser.preprocess.source_files import Record
from facediffuser.preprocess.sources import FASTCOMPOSER
from facediffuser.preprocess.splits import TEST, TRAIN, perceptual_hash, split_of
from facediffuser.preprocess.subject_segments import assign_faces
from facediffuser.runs import check_provenance, current_provenance
from facediffuser.stage_timer import StageTimer
from facediffuser.storage import StorageError, open_store, safe_key

logger = logging.getLogger(__name__)

READERS = 8
# Failures of the run, not of the picture at hand: storage, a model that cannot be had, memory.
NOT_OF_A_PICTURE = (InputError, StorageError, MemoryError, torch.OutOfMemoryError)
Files = dict[str, bytes]


class PartPreparer:
    """Turns parts of a source into parts of prepared data; holds the models, loaded once, when first needed."""

    def __init__(self, job: Job, threads: int | None = None):
        if threads:
            torch.set_num_threads(threads)
        self.job, self.settings = job, job.settings
        device = job.device
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        gpu = torch.cuda.get_device_name() if str(self.device).startswith("cuda") else None
        self.provenance = current_provenance(torch.get_num_threads(), gpu)
        for recorded in job.required:
            check_provenance(self.settings.output, [recorded], self.provenance, exact=True)
        self.store = open_store(self.settings.output)
        self.source = open_store(self.settings.source)
        self.kept = open_store(self.settings.stages) if self.settings.stages else self.store.child("stages")
        self.stages = [stage(job, self.device) for stage in STAGES]
        self.timer = StageTimer()

    def prepare(self, part: int, records: Sequence[Record], files: Sequence[Files] | None = None) -> dict[str, Any]:
        """Prepare and write one part.

        Args:
            part: its number, from 0.
            records: its pictures.
            files: the bytes of the records' files, where the caller has read them (an archive is read in one go); None
                reads them from the source.

        Returns:
            The part's summary, with the seconds of each stage under `seconds`.
        """
        self.timer = StageTimer()
        rows: dict[str, list[dict[str, Any]]] = {TRAIN: [], TEST: [], REJECTED: []}
        rejected: Counter[str] = Counter()
        facts = _Facts()
        findings = [Findings(self.kept, stage, records) for stage in self.stages]
        for chunk, content in self._chunks(records, files, self.settings.batch_size):
            for record, result in zip(chunk, self._prepare_chunk(chunk, content, findings), strict=True):
                if isinstance(result, Rejection):
                    rows[REJECTED].append({"image_id": record.image_id, "path": record.image, "reason": result.reason})
                    rejected[result.kind] += 1
                else:
                    row = self._row(result)
                    rows[row["split"]].append(row)
                    facts.add(row)
        counts = {TRAIN: len(rows[TRAIN]), TEST: len(rows[TEST]), REJECTED: len(rows[REJECTED])}
        known = {
            "pictures": len(records),
            "counts": counts,
            "rejected": dict(rejected),
            "facts": facts.to_dict(),
            "computed_with": self.provenance,
        }
        with self.timer("write"):
            for found in findings:
                found.keep()
            summary = put_part(self.store, part, self.job.fingerprint, rows, known)
        return {**summary, "seconds": dict(self.timer.seconds)}

    def check(self, part: int, records: Sequence[Record], files: Sequence[Files] | None = None) -> dict[str, Any]:
        """Write the perceptual hashes of a part's pictures, by which near-identical ones are found.

        Args:
            part: its number, from 0.
            records: its pictures.
            files: as for `prepare`.

        Returns:
            What was written: under `hashes` 64 hexadecimal digits for each picture, None for one that will be rejected.
        """
        hashes: list[str | None] = []
        for chunk, content in self._chunks(records, files, READERS):
            for record, data in zip(chunk, content, strict=True):
                picture = self._check(record, data)
                hashes.append(None if isinstance(picture, Rejection) else perceptual_hash(picture.picture.image).hex())
        result = {"part": part, "fingerprint": self.job.fingerprint, "hashes": hashes}
        self.store.put(part_name("checks", part, "json"), to_json(result))
        return result

    def _chunks(
        self, records: Sequence[Record], files: Sequence[Files] | None, size: int
    ) -> Iterator[tuple[Sequence[Record], Sequence[Files]]]:
        """The records, at most so many at a time, with their files; the next ones are read while these are worked on.

        The seconds of `read` are those that had to be waited.
        """
        chunks = batches_of_files(records, size, lambda record: record.bytes)
        if files is not None:
            given = iter(files)
            yield from ((chunk, list(itertools.islice(given, len(chunk)))) for chunk in chunks)
            return
        with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(READERS) as pool:

            def read(chunk: Sequence[Record]) -> list[Files]:
                return list(pool.map(self._read_files, chunk))

            following = [ahead.submit(read, chunk) for chunk in chunks[:1]]
            for index, chunk in enumerate(chunks):
                with self.timer("read"):
                    content = following.pop().result()
                following = [ahead.submit(read, after) for after in chunks[index + 1 : index + 2]]
                yield chunk, content

    def _read_files(self, record: Record) -> Files:
        files = {}
        for key in record.files:
            # A key without its file is reported by `_check` as this picture's rejection. Anything else is the storage's
            # failure: credentials that ran out on the way must stop the run, not reject all that is left.
            try:
                safe_key(key)
            except InputError as error:
                logger.warning("%s: %s", self.source.url, error)
                continue
            try:
                files[key] = self.source.get(key)
            except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
                logger.warning("%s: %s", self.source.url_of(key), error)
        return files

    def _prepare_chunk(
        self, records: Sequence[Record], content: Sequence[Files], findings: Sequence[Findings]
    ) -> list[Item | Rejection]:
        with self.timer("check"):
            results = [self._check(record, files) for record, files in zip(records, content, strict=True)]
        for found in findings:
            with self.timer(found.stage.name):
                results = self._complete(found, results)
        with self.timer("subjects"):
            for item in results:
                if isinstance(item, Item) and item.ids is not None:
                    item.subjects = assign_faces(item.subjects, item.faces, item.ids)
        return results

    def _complete(self, found: Findings, results: list[Item | Rejection]) -> list[Item | Rejection]:
        """Have a stage complete the items; a picture that it fails at, alone too, becomes a rejection."""
        items = [result for result in results if isinstance(result, Item)]
        try:
            found.complete(items)
            return results
        except NOT_OF_A_PICTURE:
            raise
        except Exception as error:
            failure = error
        rejections: dict[str, Rejection] = {}
        for item in items:
            try:
                found.complete([item])
            except NOT_OF_A_PICTURE:
                raise
            except Exception as error:
                rejection = Rejection("cannot be prepared", f"{found.stage.name}: {type(error).__name__}: {error}")
                logger.warning("%s: %s", self.source.url_of(item.record.image), rejection.reason)
                rejections[item.record.image_id] = rejection
        if len(rejections) == len(items):
            # Where it works for none, the fault is rather the stage's own: it must work for a plain picture.
            try:
                found.stage.run([Item(Record("", ""), Picture(Image.new("RGB", (256, 256), "grey"), b"", "", ""))])
            except Exception:
                raise failure from None
        return [
            rejections.get(result.record.image_id, result) if isinstance(result, Item) else result for result in results
        ]

    def _check(self, record: Record, files: Files) -> Item | Rejection:
        """The picture and what its source says of it, each checked against the other."""
        try:
            if record.problem:
                raise Rejection(*record.problem.split(": ", 1))
            missing = [key for key in record.files if key not in files]
            if missing:
                raise Rejection("cannot be read", missing[0])
            settings = self.settings
            described = self.job.format == FASTCOMPOSER
            picture = read_picture(
                files[record.image],
                record.image,
                min_side=settings.min_side,
                max_megapixels=settings.max_megapixels,
                size=None if described else settings.size,
                encode=settings.encode,
                pixel_md5=record.pixel_md5,
            )
            item = Item(record, picture)
            if described:
                self._read_fastcomposer(item, files)
                if settings.size and min(picture.image.size) > settings.size:
                    self._reduce(item, files[record.image])
            elif record.annotation:
                item.annotation = read_caption(files[record.annotation])
                item.caption = item.annotation.caption
            if item.annotation:
                self._require_caption(item)
            return item
        except Rejection as rejection:
            return rejection
        except MemoryError:
            raise
        except Exception as error:
            # Nothing here but this picture's own files: whatever they make a library raise is their fault alone.
            unknown = Rejection("cannot be prepared", f"{type(error).__name__}: {error}")
            logger.warning("%s: %s", self.source.url_of(record.image), unknown.reason)
            return unknown

    def _require_caption(self, item: Item) -> None:
        """Reject a blank caption of a source whose pictures all bring one: the captioner was not looked for then."""
        if item.caption.strip() or self.settings.captioner == NONE or "captioner" in self.job.models:
            return
        remove = "" if self.job.format == FASTCOMPOSER else ", or remove the file and --captioner makes one"
        raise Rejection(EMPTY_CAPTION, f"{item.record.annotation} has no words; write some{remove}")

    def _read_fastcomposer(self, item: Item, files: Files) -> None:
        image, record = item.picture.image, item.record
        assert record.annotation is not None and record.segmentation is not None  # a record of this source has both
        item.annotation = annotation = read_annotation(files[record.annotation])
        item.caption = annotation.caption
        item.ids = read_map(files[record.segmentation], image.height, image.width)
        item.segments = annotated_segments(annotation, item.ids)
        item.subjects = annotated_subjects(annotation, item.segments)
        item.identity = identity_of(annotation, item.segments)

    def _reduce(self, item: Item, data: bytes) -> None:
        settings = self.settings
        item.picture = read_picture(
            data, item.record.image, max_megapixels=settings.max_megapixels, size=settings.size, encode=settings.encode
        )
        # What the source says was checked at its own size, in whose pixels its `bbox` is; the boxes are now taken at the
        # new one, and segments of a few pixels may be gone.
        assert item.ids is not None and item.annotation is not None  # `_read_fastcomposer` noted both
        item.ids = resize_map(item.ids, *item.picture.image.size)
        kept = {int(value) for value in np.unique(item.ids)}
        segments = tuple({**part, "bbox": None} for part in item.annotation.segments if part["id"] in kept)
        item.annotation = replace(item.annotation, segments=segments)
        item.segments = annotated_segments(item.annotation, item.ids)
        item.subjects = annotated_subjects(item.annotation, item.segments)

    def _row(self, item: Item) -> dict[str, Any]:
        record, picture = item.record, item.picture
        return {
            "image_id": record.image_id,
            "image": {"bytes": picture.data, "path": picture.path},
            "image_sha256": picture.sha256,
            "width": picture.image.width,
            "height": picture.image.height,
            "caption": item.caption,
            "faces": [self._face(face) for face in item.faces],
            "subjects": [vars(subject) for subject in item.subjects],
            "segmentation": None if item.ids is None else encode_map(item.ids),
            "split": record.split or split_of(record.image_id, self.settings.test_share),
            "identity": item.identity,
            "licence": record.licence,
            "author": record.author,
            "source": self.job.format,
        }

    def _face(self, face: Face) -> dict[str, Any]:
        if self.settings.reference_crop == "ffhq":
            crop, turn = ffhq_crop(face.landmarks)
        else:
            crop, turn = face_crop_box(face.box, self.settings.face_margin), 0.0
        return {
            "box": face.box,
            "prob": face.prob,
            "landmarks": face.landmarks,
            "crop_box": crop,
            "crop_turn": turn,
        }


class _Facts:
    """Small tables of numbers for the card: how many pictures have 0, 1, 2, ... faces, and so on."""

    def __init__(self) -> None:
        self.tables: dict[str, Counter[int]] = defaultdict(Counter)

    def add(self, row: dict[str, Any]) -> None:
        """Count one prepared row."""
        self.tables["faces"][len(row["faces"])] += 1
        self.tables["subjects"][len(row["subjects"])] += 1
        self.tables["caption_words"][len(row["caption"].split())] += 1
        self.tables["side_px"][min(row["width"], row["height"])] += 1
        for face in row["faces"]:
            x1, _, x2, _ = face["crop_box"]
            self.tables["crop_px"][(x2 - x1) // CROP_STEP * CROP_STEP] += 1

    def to_dict(self) -> dict[str, dict[str, int]]:
        """The tables as they stand in JSON."""
        return {name: {str(key): table[key] for key in sorted(table)} for name, table in self.tables.items()}
