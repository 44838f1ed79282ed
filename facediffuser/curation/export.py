"""A subset of a dataset in the format of a trainer, as a stage: the units are files of so many rows; a manifest comes last."""

import functools
import hashlib
import json
import logging
from dataclasses import dataclass
from typing import Any

from facediffuser.batch_stage import Counts, Results, Stage, Unit, WorkerPool
from facediffuser.curation.curation_settings import ExportSettings
from facediffuser.curation.export_formats import WRITERS, Sample, metadata_lines, sample_of_row
from facediffuser.curation.selection import (
    TEST,
    TRAIN,
    Chunk,
    Condition,
    Selection,
    read_chunk,
    schema_of,
    select_rows,
    split_subjects,
)
from facediffuser.dataset.added_columns import read_added_columns
from facediffuser.dataset.extension import read_references
from facediffuser.dataset.manifest import MANIFEST_KEY, Manifest, object_entry, read_sound_manifest, require_objects
from facediffuser.errors import InputError
from facediffuser.runs import canonical_json, fingerprint_of
from facediffuser.storage import Store, open_store
from facediffuser.storage.reading import parse_json, read_json_object

logger = logging.getLogger(__name__)

FACE_FORMATS = ("faces", "faces-lmdb")
FOLDER_FORMATS = ("imagefolder", "faces")
PARTS_PREFIX = "parts/"
MARK_KEY = f"{PARTS_PREFIX}export.json"


@dataclass(frozen=True)
class Export:
    """A checked export: the dataset, the output, and what decides the files."""

    store: Store
    manifest: Manifest
    output: Store
    identity: dict[str, Any]
    scorers: str | None

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of what decides the export's files."""
        return fingerprint_of(self.identity)


def open_export(settings: ExportSettings) -> Export:
    """Return the export that the settings stand for; nothing is written.

    Raises:
        InputError: the dataset is not finished, the condition is none, the output holds something else, or faces are to be
            exported and neither the dataset nor its scorers tell where they are.
    """
    store, output = open_store(settings.url), open_store(settings.output)
    manifest = read_sound_manifest(store)
    require_objects(store, manifest)
    schema = schema_of(store, manifest)
    Condition(settings.where, schema)
    scorers = None
    if settings.to in FACE_FORMATS and "faces" not in schema.names:
        scorers = settings.scorers or manifest.made_from.get("scorers")
        if scorers is None:
            raise InputError(f"{store.url}: does not say where faces are, nor where its scorers lie; give --scorers")
    given = {"to", "where", "test_share", "seed", "rows_per_file"}
    identity = {
        "dataset": hashlib.sha256(store.get(MANIFEST_KEY)).hexdigest(),
        "settings": settings.model_dump(include=given),
        **({"faces_by": manifest.scorers.get("identity", "")} if scorers else {}),
    }
    export = Export(store, manifest, output, identity, scorers)
    output.require_writable()
    there = _recorded_fingerprint(output)
    if there is None and (present := output.list()):
        raise InputError(f"{output.url}: holds {present[0].key!r}; give an empty output")
    if there is not None and there != export.fingerprint:
        raise InputError(
            f"{output.url}: holds another export, or one of the dataset before it changed; give an empty output"
        )
    return export


def _recorded_fingerprint(output: Store) -> str | None:
    for key in (MANIFEST_KEY, MARK_KEY):
        if not output.exists(key):
            continue
        try:
            found = parse_json(output.get(key))
        except ValueError:
            return ""
        return str(found.get("fingerprint")) if isinstance(found, dict) else ""
    return None


def export_stage(settings: ExportSettings) -> Stage:
    """Return the stage that exports a subset of a dataset; its result is the manifest of the export, a dict."""
    export = open_export(settings)
    output = export.output
    finished = output.exists(MANIFEST_KEY)
    if not finished:
        output.put(MARK_KEY, canonical_json({"fingerprint": export.fingerprint}).encode(), if_absent=True)
    people = read_references(export.store)["subject_id"].to_pylist()
    sides = split_subjects(people, settings.test_share, settings.seed)
    condition = Condition(settings.where, schema_of(export.store, export.manifest))
    selection = Selection([])
    if not finished:
        both = settings.to in FACE_FORMATS
        selection = select_rows(export.store, export.manifest, condition, sides, settings.rows_per_file, both)
    every = [
        Unit(f"{PARTS_PREFIX}{chunk.split}-{chunk.number:06d}.json", chunk.count, chunk) for chunk in selection.chunks
    ]
    there = {info.key for info in output.list(PARTS_PREFIX)}
    units = [unit for unit in every if unit.key not in there]
    return Stage(
        "Export", "images", export.identity, units,
        functools.partial(ExportWorker, settings, sides, export.scorers),
        functools.partial(_finish, export, sides, selection, [unit.key for unit in every]),
        sum(unit.rows for unit in every) - sum(unit.rows for unit in units), WorkerPool(settings.workers),
    )  # fmt: skip


class ExportWorker:
    """Writes the files of one chunk after another, and last what it wrote; `unit.data` is the chunk."""

    def __init__(self, settings: ExportSettings, sides: dict[str, str], scorers: str | None):
        self.settings, self.sides = settings, sides
        self.store, self.output = open_store(settings.url), open_store(settings.output)
        self.added = read_added_columns(self.store)
        self.crops = None
        if settings.to in FACE_FORMATS:
            from facediffuser.curation.face_crops import FaceCrops

            loaded = None
            if scorers is not None:
                from facediffuser.scoring.scorers import load_scorers

                loaded = load_scorers(scorers)
            self.crops = FaceCrops(self.store, loaded)

    def __call__(self, unit: Unit) -> Counts:
        chunk: Chunk = unit.data
        counts = {"rows": 0, "samples": 0, "without_face": 0}
        lines: list[dict[str, Any]] = []

        def samples():
            for row in read_chunk(self.store, chunk.rows, self.added):
                counts["rows"] += 1
                found = self._samples(row, chunk.split)
                counts["without_face"] += not found
                counts["samples"] += len(found)
                lines.extend(sample.facts for sample in found)
                yield from found

        objects = []
        for key, data in WRITERS[self.settings.to](chunk, samples()):
            self.output.put(key, data)
            objects.append(object_entry(key, data).model_dump())
        found = {"objects": objects, "counts": counts}
        if self.settings.to in FOLDER_FORMATS:
            found["facts"] = lines
        self.output.put(unit.key, canonical_json(_finite(found)).encode())
        return dict(counts)

    def _samples(self, row: dict[str, Any], split: str) -> list[Sample]:
        data = (row["image"] or {}).get("bytes")
        # A JPEG with a flipped bit is still one: what is copied to others is compared with its digest.
        if not data or hashlib.sha256(data).hexdigest() != row["image_sha256"]:
            raise InputError(f"{self.store.url}: row {row['sample_id']!r} has no image, or another than its sha256 says; run "
                             "`facediffuser repair`, then the same command again with another output")  # fmt: skip
        if self.crops is None:
            return [sample_of_row(row)]
        return self.crops(row, [name for name in row["subject_ids"] if self.sides.get(name, TRAIN) == split])


def _finite(value: Any) -> Any:
    """The value with null for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list) else value


def _finish(
    export: Export, sides: dict[str, str], selection: Selection, keys: list[str], results: Results
) -> dict[str, Any]:
    output = export.output
    if not output.exists(MANIFEST_KEY):
        counts = {"rows": 0, "samples": 0, "without_face": 0}
        objects = []
        for split in (TRAIN, TEST):
            facts: list[tuple[str, dict[str, Any]]] = []
            for key in (key for key in keys if key.startswith(f"{PARTS_PREFIX}{split}-")):
                fix = "remove it, and run the same command again"
                part = read_json_object(output, key, fix, {"objects": list, "counts": dict})
                objects += part["objects"]
                for name in counts:
                    counts[name] += part["counts"][name]
                facts += [
                    (entry["key"], one) for entry, one in zip(part["objects"], part.get("facts", ()), strict=False)
                ]
            if facts:
                data = metadata_lines(facts, split)
                key = f"{split}/metadata.jsonl"
                output.put(key, data)
                objects.append(object_entry(key, data).model_dump())
        left_out = {"failed": selection.failed, "condition": selection.unlike, "both_sides": selection.mixed}
        document = {
            "fingerprint": export.fingerprint,
            "identity": export.identity,
            "counts": counts,
            "left_out": left_out,
            "subjects": {side: [name for name in sorted(sides) if sides[name] == side] for side in (TRAIN, TEST)},
            "objects": objects,
        }
        output.put(MANIFEST_KEY, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
    for info in output.list(PARTS_PREFIX):
        output.delete(info.key)
    return parse_json(output.get(MANIFEST_KEY))
