"""What a source itself says of a picture: FastComposer's JSON and the caption files of plain folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from facediffuser.pictures import Rejection
from facediffuser.preprocess.phrases import Phrase, phrase_ending_at
from facediffuser.preprocess.segment_maps import PERSON_LABELS, Segment, segment_box
from facediffuser.preprocess.subject_segments import Subject
from facediffuser.prompts import IMAGE_MARKER, without_markers
from facediffuser.storage.reading import parse_json

MISMATCH = "annotation does not match"
DAMAGED = "damaged annotation"
EMPTY_CAPTION = "empty caption"


@dataclass(frozen=True)
class Annotation:
    """A picture's caption, its segments, the phrases that the source ties to some of them, and who is on it."""

    caption: str
    segments: tuple[dict[str, Any], ...] = ()
    identity: str | None = None


def read_caption(data: bytes) -> Annotation:
    """Return the caption of a text file.

    Args:
        data: the file, UTF-8 with or without a byte order mark; white space of any length becomes one space, and the
            markers of prompts (`<|image|>`) are left out.

    Raises:
        Rejection: the file is not UTF-8, has NUL characters, or `unmarked` rejects its caption.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Rejection(DAMAGED, f"the caption file is not UTF-8 ({error.reason})") from error
    if "\0" in text:
        # UTF-16 without its mark is valid UTF-8, with NUL between the letters.
        raise Rejection(DAMAGED, "the caption file has NUL characters, as UTF-16 does; save it as UTF-8")
    return Annotation(unmarked(" ".join(text.split())))


def unmarked(caption: str) -> str:
    """Return a caption without the markers of prompts, which training puts into it itself.

    Args:
        caption: from any source.

    Raises:
        Rejection: markers stand within one another, so that leaving one out gives another.
    """
    plain = without_markers(caption) if IMAGE_MARKER in caption else caption
    if IMAGE_MARKER in plain:
        raise Rejection(DAMAGED, f"the caption has {IMAGE_MARKER} within {IMAGE_MARKER}; write it without")
    return plain


def _require_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, which no file of text can hold.
        raise Rejection(DAMAGED, f"`{name}` is no text (character {error.start} is half of one)") from error


def read_annotation(data: bytes) -> Annotation:
    """Return what a FastComposer JSON says of its picture.

    Args:
        data: the file: an object with `caption` and, if it has them, `segments` (objects with `id`, `bbox`, `start`,
            `end` and `identity`) and `identity`. Markers of prompts (`<|image|>`) are left out of the caption.

    Raises:
        Rejection: the file is not JSON of that layout, or `start` and `end` count the markers in its caption.
    """
    try:
        content = parse_json(data.decode("utf-8-sig"))
    except ValueError as error:
        raise Rejection(DAMAGED, f"not JSON ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("caption"), str):
        raise Rejection(DAMAGED, "no text under `caption`")
    segments = content.get("segments", [])
    if not isinstance(segments, list) or not all(isinstance(segment, dict) for segment in segments):
        raise Rejection(DAMAGED, "`segments` is not a list of objects")
    for segment in segments:
        for key in ("id", "start", "end"):
            value = segment.get(key)
            if not (_is_integer(value) or (value is None and key != "id")):
                raise Rejection(DAMAGED, f"segment {segment.get('id')!r}: `{key}` is {value!r}, not an integer")
        if not _is_box(segment.get("bbox")):
            raise Rejection(DAMAGED, f"segment {segment['id']}: `bbox` is {segment['bbox']!r}, not four numbers")
        _require_text("identity", str(segment.get("identity")))
    _require_text("caption", content["caption"])
    identity = content.get("identity")
    if isinstance(identity, list):
        identity = "+".join(map(str, identity))
    _require_text("identity", str(identity))
    caption = content["caption"]
    plain = unmarked(caption)
    end = max([0, *(segment["end"] for segment in segments if segment.get("end") is not None)])
    if plain[:end] != caption[:end]:
        raise Rejection(MISMATCH, f"`caption` has {IMAGE_MARKER} before subject end {end}; write it without markers")
    return Annotation(plain, tuple(segments), None if identity is None else str(identity))


def _is_box(value: Any) -> bool:
    numbers = isinstance(value, list) and len(value) == 4
    return value is None or (numbers and all(isinstance(item, int | float) for item in value))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def annotated_segments(annotation: Annotation, ids: np.ndarray) -> list[Segment]:
    """Return the annotation's segments, with boxes taken from the map.

    The JSON's own `bbox` only repeats what the map says, so it serves as a check: elsewhere than its segment, the JSON
    is another picture's. It is read both as h1, w1, h2, w2 and as x1, y1, x2, y2, since the released code does either.

    Args:
        annotation: what the JSON says.
        ids: the picture's segment map, (height, width) integers.

    Raises:
        Rejection: a segment is not in the map, its `bbox` is elsewhere, or an id stands twice.
    """
    segments = []
    for item in annotation.segments:
        box = segment_box(ids, item["id"])
        if box is None:
            raise Rejection(MISMATCH, f"segment {item['id']} is not in the segmentation map")
        said = item.get("bbox")
        if said is not None and not any(_touch(box, other) for other in (said, (said[1], said[0], said[3], said[2]))):
            raise Rejection(
                MISMATCH, f"segment {item['id']} is in {list(box)} of the map, its bbox {said} is elsewhere"
            )
        segments.append(Segment(item["id"], str(item.get("coco_label", PERSON_LABELS[0])), box))
    repeated = len({segment.id for segment in segments}) != len(segments)
    if repeated:
        raise Rejection(MISMATCH, "a segment id stands twice")
    return segments


def _touch(box: Sequence[float], other: Sequence[float]) -> bool:
    return all(box[i] < other[i + 2] and other[i] < box[i + 2] for i in (0, 1))


def annotated_subjects(annotation: Annotation, segments: list[Segment]) -> list[Subject]:
    """Return the person segments to which the source gives a phrase, in the order of the caption.

    `end` is taken as it stands; where `start` is missing the phrase is parsed backwards from `end`.

    Args:
        annotation: what the JSON says.
        segments: those of `annotated_segments`, in the annotation's order.

    Raises:
        Rejection: an offset is outside of the caption or cuts a word. Then caption and offsets are not of the same
            text, and no guess would be right.
    """
    subjects = []
    for item, segment in zip(annotation.segments, segments, strict=True):
        if item.get("end") is None or segment.label not in PERSON_LABELS:
            continue
        phrase = _phrase(annotation.caption, item.get("start"), item["end"])
        subjects.append(Subject(phrase.text, phrase.start, phrase.end, segment.id, segment.box))
    return sorted(subjects, key=lambda subject: (subject.end, subject.box))


def _phrase(caption: str, start: int | None, end: int) -> Phrase:
    try:
        parsed = phrase_ending_at(caption, end)
    except ValueError as error:
        raise Rejection(MISMATCH, str(error)) from error
    if start is None:
        return parsed
    if not 0 <= start < end or not caption[start:end].strip():
        raise Rejection(MISMATCH, f"subject start {start} is not before its end {end}")
    return Phrase(caption[start:end], start, end, parsed.plural)


def identity_of(annotation: Annotation, segments: list[Segment]) -> str | None:
    """Return who is on the picture: the annotation's own word, or the segments' identities from left to right.

    Args:
        annotation: what the JSON says.
        segments: those of `annotated_segments`, in the annotation's order.

    Returns:
        One identity, several joined by `+`, or None where the source names nobody.
    """
    if annotation.identity is not None:
        return annotation.identity
    named = [
        (segment.box, str(item["identity"]))
        for item, segment in zip(annotation.segments, segments, strict=True)
        if item.get("identity") is not None
    ]
    return "+".join(identity for _, identity in sorted(named)) or None
