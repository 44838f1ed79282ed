"""The columns of plan, shards and subjects, and the marks in their Parquet footers."""

from typing import Any

import pyarrow as pa

from facediffuser import __version__
from facediffuser.runs import canonical_json

SCHEMA_VERSION = "1"
SUBJECTS_KEY = "subjects.parquet"
FINGERPRINT_KEY = b"facediffuser_fingerprint"
RUN_KEY = b"facediffuser_run"
SCHEMA_KEY = b"facediffuser_dataset_schema"
# What the media are (synthetic), as opposed to COMPUTED_WITH_KEY, which tells libraries, threads and hardware.
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
DATASET_SCHEMA = pa.schema([*PLAN_FIELDS, *RESULT_FIELDS])
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
        fingerprint, run: the run and the SHA-256 of its document.
        synthetic: mark the data as synthetic media.
        computed_with: the provenance (see `facediffuser.runs.provenance_here`); None: leave it out.
    """
    marks = {
        SCHEMA_KEY: SCHEMA_VERSION.encode(),
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


def _feature(kind: pa.DataType) -> dict[str, Any]:
    if kind == IMAGE:
        return {"_type": "Image"}
    if pa.types.is_list(kind):
        return {"_type": "Sequence", "feature": _feature(kind.value_type), "length": -1}
    names = {pa.float32(): "float32", pa.float64(): "float64", pa.string(): "string"}
    return {"_type": "Value", "dtype": names.get(kind, str(kind))}
