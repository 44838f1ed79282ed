"""What a prepared row holds: the Parquet schema that preprocess writes and training reads."""

import json
from typing import Any

import pyarrow as pa

SCHEMA_VERSION = "2"
SCHEMA_KEY = b"facediffuser_prepared_schema"
FINGERPRINT_KEY = b"facediffuser_fingerprint"
# Sides of face crops are counted in steps of so many px.
CROP_STEP = 8

_POINT = pa.list_(pa.float32())
_FACE = pa.struct(
    [
        ("box", pa.list_(pa.float32())),
        ("prob", pa.float32()),
        ("landmarks", pa.list_(_POINT)),
        ("crop_box", pa.list_(pa.int32())),
        ("crop_turn", pa.float32()),
    ]
)
_SUBJECT = pa.struct(
    [
        ("phrase", pa.string()),
        ("start", pa.int32()),
        ("end", pa.int32()),
        ("segment_id", pa.int32()),
        ("box", pa.list_(pa.int32())),
        ("face_index", pa.int32()),
    ]
)
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

_PREPARED_FIELDS = pa.schema(
    [
        ("image_id", pa.string()),
        ("image", _IMAGE),
        ("image_sha256", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("caption", pa.string()),
        ("faces", pa.list_(_FACE)),
        ("subjects", pa.list_(_SUBJECT)),
        ("segmentation", pa.binary()),
        ("split", pa.string()),
        ("identity", pa.string()),
        ("licence", pa.string()),
        ("author", pa.string()),
        ("source", pa.string()),
    ]
)

_REJECTED_FIELDS = pa.schema([("image_id", pa.string()), ("path", pa.string()), ("reason", pa.string())])


def _value(dtype: str) -> dict[str, str]:
    return {"dtype": dtype, "_type": "Value"}


def _list(feature: dict[str, Any]) -> dict[str, Any]:
    return {"feature": feature, "_type": "List"}


def _hugging_face(fields: pa.Schema) -> bytes:
    """The `datasets` library's description of the columns; it is what makes load_dataset decode the images."""
    floats, ints = _list(_value("float32")), _list(_value("int32"))
    special = {
        "image": {"_type": "Image"},
        "faces": _list(
            {
                "box": floats,
                "prob": _value("float32"),
                "landmarks": _list(floats),
                "crop_box": ints,
                "crop_turn": _value("float32"),
            }
        ),
        "subjects": _list(
            {
                "phrase": _value("string"),
                "start": _value("int32"),
                "end": _value("int32"),
                "segment_id": _value("int32"),
                "box": ints,
                "face_index": _value("int32"),
            }
        ),
    }
    features = {field.name: special.get(field.name) or _value(str(field.type)) for field in fields}
    return json.dumps({"info": {"features": features}}).encode()


def _versioned(fields: pa.Schema) -> pa.Schema:
    return fields.with_metadata({SCHEMA_KEY: SCHEMA_VERSION.encode(), b"huggingface": _hugging_face(fields)})


PREPARED_SCHEMA = _versioned(_PREPARED_FIELDS)
"""The rows of train/ and test/.

image_id: the source's own id, unique in a set. image: the file, untouched or encoded again at the chosen size;
image_sha256: of the file in the source. width, height: of `image`, px, after EXIF rotation. caption: without markers.
faces: largest first; box, landmarks and crop_box in pixels of `image`, crop_box a square that may leave
the picture, crop_turn the degrees it is turned clockwise about its centre.
subjects: from left to right; phrase = caption[start:end] (characters); segment_id: the phrase's id in `segmentation`;
box: the segment's x1, y1, x2, y2 in pixels, the far edges exclusive; face_index: into faces, -1 for none.
segmentation: PNG of segment ids (0 = none), as large as `image`. split: train or test. identity: of each person from
left to right joined by "+", null when unknown. licence, author: null when unknown. source: the source's format.
"""

REJECTED_SCHEMA = _versioned(_REJECTED_FIELDS)
"""The rows of rejected/: what was in the source and could not be prepared, with one line of reason."""
