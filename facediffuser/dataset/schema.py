"""The columns of plan, shards and subjects, and the marks in their Parquet footers."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from facediffuser import __version__
from facediffuser.runs import canonical_json

SCHEMA_VERSION = "2"
# Version 1 had neither `faces` nor `ip_margin`; its run documents name no version.
READABLE_VERSIONS = ("1", "2")
MOST_EMBEDDING = 65_536
SUBJECTS_KEY = "subjects.parquet"
FINGERPRINT_KEY = b"facediffuser_fingerprint"
RUN_KEY = b"facediffuser_run"
SCHEMA_KEY = b"facediffuser_dataset_schema"
# What the media are (synthetic), as opposed to COMPUTED_WITH_KEY: libraries, threads and hardware.
PROVENANCE_KEY = b"facediffuser_provenance"
COMPUTED_WITH_KEY = b"facediffuser_computed_with"
# IPTC's word for media made wholly by a trained model.
DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FLOATS = pa.list_(pa.float32())

# `prompt` holds the text as the model reads it: each subject's class word followed by <|image|>. `subject_ids` stand in
# the order of those markers, and `ip_per_subject` in the order of `subject_ids`.
PLAN_FIELDS = [
    pa.field("sample_id", pa.string(), nullable=False),
    pa.field("prompt_id", pa.string(), nullable=False),
    pa.field("prompt", pa.string(), nullable=False),
    pa.field("category", pa.string()),
    pa.field("subject_ids", pa.list_(pa.string()), nullable=False),
    pa.field("seed", pa.int64(), nullable=False),
    pa.field("method", pa.string(), nullable=False),
    pa.field("num_inference_steps", pa.int32(), nullable=False),
    pa.field("guidance_scale", pa.float64(), nullable=False),
    pa.field("fusion_start", pa.int32(), nullable=False),
    pa.field("fusion_end", pa.int32(), nullable=False),
    pa.field("scheduler", pa.string(), nullable=False),
    pa.field("height", pa.int32(), nullable=False),
    pa.field("width", pa.int32(), nullable=False),
]
# Null in a failed row: image, image_sha256, every score. `subject_fraction` is null, too, when no step was fused.
# `ip`, `ip_per_subject`, `face_count`, `face_boxes` and `face_probs` say in other words what `faces` says, for readers of
# version 1.
RESULT_FIELDS = [
    pa.field("image", IMAGE),
    pa.field("image_sha256", pa.string()),
    pa.field("ip", pa.float32()),
    pa.field("ip_per_subject", FLOATS),
    pa.field("face_count", pa.int32()),
    pa.field("face_boxes", pa.list_(FLOATS)),
    pa.field("face_probs", FLOATS),
    pa.field("pc", pa.float32()),
    pa.field("subject_fraction", pa.float32()),
    pa.field("status", pa.string(), nullable=False),
    pa.field("error", pa.string()),
]
PLAN_SCHEMA = pa.schema(PLAN_FIELDS)
FACES, IP_MARGIN = "faces", "ip_margin"
# One row per reference picture: what the model is shown (`image`, cropped as `crop_box` says) and what identity is
# measured against (`identity`, the unit vector of the face in the whole picture).
SUBJECTS_SCHEMA = pa.schema(
    [
        pa.field("subject_id", pa.string(), nullable=False),
        pa.field("class_word", pa.string(), nullable=False),
        pa.field("reference", pa.string(), nullable=False),
        pa.field("source_sha256", pa.string(), nullable=False),
        pa.field("image", IMAGE, nullable=False),
        pa.field("crop_box", pa.list_(pa.int32())),
        pa.field("face_box", FLOATS),
        pa.field("face_prob", pa.float32()),
        pa.field("identity", FLOATS),
    ]
)


def is_list(kind: pa.DataType) -> bool:
    """Return whether a type is a list of any kind: of any length, of a fixed one, or with long offsets."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def face_type(embedding_size: int = 0) -> pa.DataType:
    """Return the type of a face: a struct.

    Args:
        embedding_size: the length of its embedding, kept as float16; 0 keeps none.
    """
    fields = [
        pa.field("box", pa.list_(pa.float32(), 4)),
        pa.field("probability", pa.float32()),
        pa.field("landmarks", pa.list_(pa.list_(pa.float32(), 2), 5)),
        pa.field("subject_id", pa.string()),
        pa.field("similarity", pa.float32()),
        pa.field("other_subject_id", pa.string()),
        pa.field("other_similarity", pa.float32()),
        *(pa.field(name, pa.float32()) for name in ("yaw", "pitch", "roll", "size", "sharpness")),
    ]
    embedding = [pa.field("embedding", pa.list_(pa.float16(), embedding_size))] if embedding_size else []
    return pa.struct([*fields, *embedding])


def face_fields(embedding_size: int = 0) -> list[pa.Field]:
    """Return the fields that version 2 added: `faces`, with embeddings of `embedding_size` numbers, and `ip_margin`."""
    return [pa.field(FACES, pa.list_(face_type(embedding_size))), pa.field(IP_MARGIN, pa.float32())]


def dataset_schema(version: str = SCHEMA_VERSION, embedding_size: int = 0) -> pa.Schema:
    """Return the columns of a dataset.

    Args:
        version: of the schema.
        embedding_size: length of the faces' embeddings; 0: without them.
    """
    return pa.schema([*PLAN_FIELDS, *RESULT_FIELDS, *(face_fields(embedding_size) if version != "1" else [])])


DATASET_SCHEMA = dataset_schema()


def run_schema_version(run: Mapping[str, Any]) -> str:
    """Return the version of the schema that a run writes: what its document says, "1" where it says nothing."""
    return str(_schema_part(run).get("version", "1"))


def schema_of_run(run: Mapping[str, Any]) -> pa.Schema:
    """Return the columns of a run's shards, as its document says."""
    size = _schema_part(run).get("embedding_size", 0)
    return dataset_schema(run_schema_version(run), size if isinstance(size, int) and 0 <= size <= MOST_EMBEDDING else 0)


def _schema_part(run: Mapping[str, Any]) -> Mapping[str, Any]:
    # A damaged manifest may hold anything; that its run is not the one of its fingerprint is found elsewhere.
    part = run.get("schema")
    return part if isinstance(part, Mapping) else {}


def with_marks(
    schema: pa.Schema,
    fingerprint: str,
    run: dict[str, Any],
    synthetic: bool,
    computed_with: dict[str, Any] | None = None,
) -> pa.Schema:
    """Return the schema with the footer marks: fingerprint and its run, Hugging Face features, and what the data are.

    Args:
        schema: the columns.
        fingerprint: the SHA-256 of the run's document.
        run: that document.
        synthetic: mark the data as synthetic media.
        computed_with: the provenance (see `facediffuser.runs.current_provenance`); None: leave it out.
    """
    marks = {
        SCHEMA_KEY: run_schema_version(run).encode(),
        FINGERPRINT_KEY: fingerprint.encode(),
        RUN_KEY: canonical_json(run).encode(),
        b"huggingface": canonical_json({"info": {"features": hugging_face_features(schema)}}).encode(),
    }
    if synthetic:
        marks[PROVENANCE_KEY] = canonical_json(provenance()).encode()
    if computed_with is not None:
        marks[COMPUTED_WITH_KEY] = canonical_json(computed_with).encode()
    return schema.with_metadata(marks)


def provenance() -> dict[str, Any]:
    """Return what images and shards say of their origin."""
    return {"synthetic": True, "digital_source_type": DIGITAL_SOURCE_TYPE, "software": f"facediffuser {__version__}"}


def hugging_face_features(schema: pa.Schema) -> dict[str, Any]:
    """Return the features that make `datasets.load_dataset("parquet")` decode the images by itself."""
    return {field.name: _feature(field.type) for field in schema}


def _feature(kind: pa.DataType) -> dict[str, Any] | list[Any]:
    if kind == IMAGE:
        return {"_type": "Image"}
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    if pa.types.is_list(kind) and pa.types.is_struct(kind.value_type):
        return [_feature(kind.value_type)]  # a Sequence of a struct would be read as a struct of sequences
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        length = kind.list_size if pa.types.is_fixed_size_list(kind) else -1
        return {"_type": "Sequence", "feature": _feature(kind.value_type), "length": length}
    names = {pa.float16(): "float16", pa.float32(): "float32", pa.float64(): "float64", pa.string(): "string"}
    return {"_type": "Value", "dtype": names.get(kind, str(kind))}
