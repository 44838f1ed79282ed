"""What each column of a dataset means, in one line: for a dataset's own card."""

from collections.abc import Iterable

import pyarrow as pa

MEANINGS = {
    "sample_id": "the row's name, unique in the dataset",
    "prompt_id": "of the prompts file",
    "prompt": "as the model reads it: each subject's class word followed by <|image|>",
    "category": "of the prompts file; null when it has none",
    "subject_ids": "whom the image should show, in the order of the markers",
    "seed": "of the image's noise",
    "method": "face-diffuser, tdm, sdm or fastcomposer",
    "num_inference_steps": "denoising steps",
    "guidance_scale": "strength of the guidance",
    "fusion_start": "first step of both models",
    "fusion_end": "first step of the person's model alone",
    "scheduler": "class of the scheduler",
    "height": "px",
    "width": "px",
    "image": "the file; null in a failed row, as all scores are",
    "image.bytes": "PNG, JPEG or WebP",
    "image.path": "a name for the file",
    "image_sha256": "of the image file",
    "ip": "identity preservation, 0 to 1: the least of ip_per_subject",
    "ip_per_subject": "cosine of the matched face and the reference, in the order of subject_ids, negatives as 0; 0 without a face",
    "face_count": "faces found",
    "face_boxes": "x1, y1, x2, y2, px; as in faces, in the way of schema version 1",
    "face_probs": "the detector's, 0 to 1; as in faces",
    "pc": "prompt consistency: cosine of image and prompt without markers, -1 to 1",
    "subject_fraction": "share of the cells that took the person's model's noise, over the fused steps; null when no step was fused",
    "status": "ok or failed",
    "error": "of a failed row",
    "faces": "every face, the largest first",
    "faces.box": "x1, y1, x2, y2, px; may reach over the image's edge",
    "faces.probability": "the detector's, 0 to 1",
    "faces.landmarks": "x, y, px: left eye, right eye (as one looks at the image), nose, left and right corner of the mouth",
    "faces.subject_id": "whose face it was taken for, by greedy best-first matching; null for a face that nobody asked for",
    "faces.similarity": "cosine with that subject's reference (the mean of several), -1 to 1",
    "faces.other_subject_id": "the nearest other subject of the dataset",
    "faces.other_similarity": "cosine with it",
    "faces.yaw": "degrees; above 0 the head looks to the right of the image",
    "faces.pitch": "degrees; above 0 the head looks up",
    "faces.roll": "degrees; above 0 the head is tilted clockwise",
    "faces.size": "shorter side of the box, px",
    "faces.sharpness": "variance of the Laplacian of the face at 112 px",
    "faces.embedding": "unit vector of the identity network",
    "ip_margin": "least difference, over the faces with a subject, of the similarity to their own and to the nearest other subject",
}


def column_lines(schema: pa.Schema) -> list[tuple[str, str, str]]:
    """Return (column, type, meaning) of a dataset's columns, the fields of structs below them; "" where none is known."""
    return list(_lines(schema))


def _lines(fields: Iterable[pa.Field], prefix: str = "") -> Iterable[tuple[str, str, str]]:
    for field in fields:
        name = prefix + field.name
        yield name, type_words(field.type), MEANINGS.get(name, "")
        inner = field.type.value_type if pa.types.is_list(field.type) else field.type
        if pa.types.is_struct(inner):
            yield from _lines(inner, f"{name}.")


def type_words(kind: pa.DataType) -> str:
    """Return a type in words that readers of any language know, such as `list of float32`."""
    if pa.types.is_struct(kind):
        return "struct"
    if pa.types.is_list(kind):
        return f"list of {type_words(kind.value_type)}"
    if pa.types.is_fixed_size_list(kind):
        return (
            f"{kind.list_size} of {type_words(kind.value_type)}"
            if not pa.types.is_nested(kind.value_type)
            else (f"{kind.list_size} x {kind.value_type.list_size} of {type_words(kind.value_type.value_type)}")
        )
    return {pa.float16(): "float16", pa.float32(): "float32", pa.float64(): "float64"}.get(kind, str(kind))
