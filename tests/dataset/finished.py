"""Finished datasets made without a model: plan, references, shards, stats, card, manifest."""

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from facediffuser.cards.dataset_card import write_card
from facediffuser.dataset.image_files import encode_image
from facediffuser.dataset.inputs import Prompt, Subject
from facediffuser.dataset.manifest import build_manifest, build_part, object_entries, shard_entry
from facediffuser.dataset.plan import Layout, Plan, RowSettings, read_shard_rows, write_plan
from facediffuser.dataset.reading import list_shards
from facediffuser.dataset.references import encode_references
from facediffuser.dataset.schema import (
    PLAN_SCHEMA,
    SCHEMA_VERSION,
    SUBJECTS_KEY,
    SUBJECTS_SCHEMA,
    canonical_json,
    dataset_schema,
    with_marks,
)
from facediffuser.dataset.seal import seal
from facediffuser.dataset.shards import encode_shard
from facediffuser.storage import Store, open_store

WORDS = {"ada": "woman", "bob": "man"}
ALONE = (Prompt("p0", "context", ("a photo of ", ""), (0,)), Prompt("p1", "action", ("", " at sea"), (0,)))
TOGETHER = Prompt("pair", "pair", ("", " and ", " at sea"), (0, 1))


def finish_dataset(
    folder: Path | str,
    names: Sequence[str] = ("ada", "bob"),
    prompts: Sequence[Prompt] = ALONE,
    images: int = 1,
    side: int = 8,
    shard_size: int = 2,
    labels: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda row: {},
    embedding_size: int = 0,
) -> Store:
    """Write the dataset to `folder`, a folder or a URL; return its store. By default: four rows in two shards.

    `labels` returns further columns of a row of the plan; `embedding_size` is the length of its faces' embeddings.
    """
    people = tuple(Subject(name, WORDS.get(name, "person"), (f"{name}/1.png",)) for name in sorted(names))
    row = RowSettings(method="face-diffuser", num_inference_steps=2, guidance_scale=5.0, fusion_start=0, fusion_end=1,
                      scheduler="PNDMScheduler", height=side, width=side)  # fmt: skip
    plan = Plan(people, tuple(prompts), images, 7, row)
    run = {"settings": {"batch_size": 2, "shard_size": shard_size, "device": "cpu"}, "libraries": {}, "code": "0"}
    if (tuple(names), tuple(prompts), images) != (("ada", "bob"), ALONE, 1):
        run["plan"] = plan.digest()
    return finish_plan(folder, plan, run, labels, embedding_size)


def finish_plan(
    folder: Path | str,
    plan: Plan,
    run: Mapping[str, Any],
    labels: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda row: {},
    embedding_size: int = 0,
) -> Store:
    """Write the dataset of a plan to `folder`; return its store. `run`: its document, but for models, scorers, schema."""
    store, shard_size, side = open_store(folder), run["settings"]["shard_size"], plan.row.height
    run = {**run, "models": {"unet": "0" * 64}, "scorers": {"identity": "1" * 64}}
    run |= {"schema": {"version": SCHEMA_VERSION, "embedding_size": embedding_size}}
    fingerprint = hashlib.sha256(canonical_json(run).encode()).hexdigest()
    layout = Layout(len(plan), shard_size)
    write_plan(store, plan, layout, with_marks(PLAN_SCHEMA, fingerprint, run, False))
    faces = [
        {"subject_id": one.subject_id, "class_word": one.class_word, "reference": one.references[0],
         "source_sha256": "2" * 64, "image": {"bytes": _png("green"), "path": "1.png"}, "crop_box": [0, 0, 8, 8],
         "identity": [1.0, 0.0]}
        for one in plan.subjects
    ]  # fmt: skip
    columns = {field.name: field.type for field in SUBJECTS_SCHEMA}
    table = pa.Table.from_pylist([{name: face.get(name) for name in columns} for face in faces], schema=SUBJECTS_SCHEMA)
    store.put(SUBJECTS_KEY, encode_references(table, with_marks(SUBJECTS_SCHEMA, fingerprint, run, False)))
    schema = dataset_schema(SCHEMA_VERSION, embedding_size)
    for shard in range(layout.shards):
        rows = read_shard_rows(store, layout, shard)
        for values in rows:
            data = encode_image(_picture(values["seed"], side), "png", values["sample_id"])
            path = f"{values['sample_id']}.png"
            values |= {"image": {"bytes": data, "path": path}, "image_sha256": hashlib.sha256(data).hexdigest(),
                       "ip": values["seed"] % 100 / 100, "pc": 0.2, "status": "ok", **labels(values)}  # fmt: skip
        store.put(layout.shard_key(shard), encode_shard(rows, with_marks(schema, fingerprint, run, True)))
    entries = [shard_entry(store, layout, shard, info) for shard, info in enumerate(list_shards(store))]
    for shard, entry in enumerate(entries):
        stats = entry.model_dump(exclude={"key"}) | {"seconds": {"total": 1.5}, "device": "cpu"}
        store.put(layout.stats_key(shard), json.dumps(stats).encode())
    write_card(store)
    places = {"models": "miniature", "scorers": "miniature"}
    keys = [*layout.part_keys(), SUBJECTS_KEY]
    seal(store, build_manifest([build_part(fingerprint, run, layout, entries, places)], object_entries(store, keys)))
    return store


def _picture(seed: int, side: int) -> Image.Image:
    """A picture of its own for each row."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8))


def _png(colour: str) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(sink, "PNG")
    return sink.getvalue()
