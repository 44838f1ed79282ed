"""Mentions of a subject in a dataset: in every row, footer, statistic, picture, text and name of every object."""

import base64
import html
import io
import json
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facediffuser.dataset.column_meanings import MEANINGS
from facediffuser.dataset.image_files import SOURCE, xmp_packet
from facediffuser.dataset.manifest import Manifest
from facediffuser.dataset.schema import SUBJECTS_KEY, SUBJECTS_SCHEMA, is_list
from facediffuser.errors import DeniedError, InputError
from facediffuser.number_words import counted
from facediffuser.storage import Store
from facediffuser.storage.reading import parse_json

READERS = 4
# Texts that a user wrote: a subject's id may be a word of them.
FREE_TEXT = ("prompt", "category", "class_word")
# Ids, digests and settings of the dataset's own, which name nobody even where their text is a subject's id.
NAMELESS = (
    "prompt_id", "method", "scheduler", "status", "image_sha256", "reference", "source_sha256", "licence", "expires",
)  # fmt: skip
# In these columns of plan and references, and in these words, an id may stand that is not meant.
SHARED_WORDS = (*FREE_TEXT, "prompt_id", "method", "scheduler", "licence")
_OWN_WORDS = " ".join(
    (*MEANINGS, *MEANINGS.values(), *Manifest.model_fields, *SUBJECTS_SCHEMA.names, SOURCE, xmp_packet(""))
)
_DATA_URL = re.compile(rb"data:image/[a-z]+;base64,([A-Za-z0-9+/=]+)")
_WORD = r"[\w.\-]"
# What follows "~" in a sample id, `subjects~prompt_id~number`, is no subject. A text may begin with "~": "~ada/x.png".
_IN_SAMPLE_ID = r"[^\s\"'(>]~"
# Parts of pictures that hold numbers, whose bytes may look like a short id.
_PNG_NUMBERS = (
    b"IDAT", b"IHDR", b"PLTE", b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"tRNS", b"bKGD", b"hIST", b"tIME",
)  # fmt: skip
_JPEG_SCAN, _JPEG_END = 0xDA, 0xD9
_JPEG_NUMBERS = (0xDB, 0xC4, 0xC0, 0xC1, 0xC2, 0xDD, _JPEG_SCAN)  # DQT, DHT, SOF0 to SOF2, DRI, SOS
# In the pixels 0xFF is followed by 0 or by a restart's number.
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string)
_BYTES_TYPES = (pa.types.is_binary, pa.types.is_large_binary)


def subjects_of_sample(sample_id: str) -> list[str]:
    """Return the ids of the subjects that a row shows by its `sample_id`."""
    return sample_id.partition("~")[0].split("+")


def names_subject(text: str, subject: str) -> bool:
    """Return whether a value is a subject's id, or the sample id or the file name of one of its images."""
    return text == subject or ("~" in text and subject in subjects_of_sample(text))


@dataclass(frozen=True)
class Search:
    """What is looked for: a subject's id by itself, not as a part of a longer name.

    common: the id is also a word of the dataset's own. Then texts, names and pictures are searched for sample ids alone.
    """

    subject: str
    common: bool = False

    def in_text(self, text: str) -> bool:
        """Return whether the id stands in a text as a word, also written as JSON, XML or HTML would write it."""
        return any(
            re.search(rf"(?<!{_WORD})(?<!{_IN_SAMPLE_ID}){re.escape(form)}(?!\w|[.\-]\w){self._after}", text)
            is not None
            for form in self._forms
            if form in text
        )

    def in_bytes(self, data: bytes) -> bool:
        """Return whether the id stands in bytes, whatever lies around it."""
        found = any(form.encode() in data for form in self._forms)
        return found and self.in_text(data.decode("utf-8", errors="replace"))

    def in_document(self, text: str) -> bool:
        """Return whether a string of a JSON document names the subject."""
        return names_subject(text, self.subject) and not (self.common and text == self.subject)

    @property
    def _after(self) -> str:
        return r"(?=(?:\+[^~<>\"\n]*)?~)" if self.common else ""

    @property
    def _forms(self) -> set[str]:
        return {self.subject, html.escape(self.subject), json.dumps(self.subject)[1:-1]}

    def in_value(self, value: Any, free: bool = False) -> bool:
        """Return whether a value of a column, or a part of it, names the subject.

        Args:
            value: a string, bytes of a picture, or a list or dictionary of such; other values name nobody.
            free: whether the id also counts as a word of a text.
        """
        if isinstance(value, str):
            return names_subject(value, self.subject) or (free and self.in_text(value))
        if isinstance(value, bytes):
            return self.in_bytes(text_of_picture(value))
        if isinstance(value, dict):
            return any(self.in_value(one, free) for one in value.values())
        if isinstance(value, list):
            return any(self.in_value(one, free) for one in value)
        return False


def text_of_picture(data: bytes) -> bytes:
    """Return the bytes that a PNG, JPEG or WebP file holds beside its pixels and tables; the whole of any other file."""
    try:
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return b"\n".join(body for kind, body in _png_chunks(data) if kind not in _PNG_NUMBERS)
        if data.startswith(b"\xff\xd8"):
            return b"\n".join(body for kind, body in _jpeg_segments(data) if kind not in _JPEG_NUMBERS)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return b"\n".join(body for kind, body in _riff_chunks(data) if kind[:3] != b"VP8" and kind != b"ALPH")
    except (struct.error, ValueError):
        pass
    return data


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 8
    kind = b""
    while at + 8 <= len(data) and kind != b"IEND":
        (size,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        yield kind, data[at + 8 : at + 8 + size]
        at += size + 12
    yield b"tail", data[at:]


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != _JPEG_END:
        kind, (size,) = data[at + 1], struct.unpack(">H", data[at + 2 : at + 4])
        yield kind, data[at + 4 : at + 2 + size]
        at += 2 + size
        if kind == _JPEG_SCAN and (marker := _AFTER_SCAN.search(data, at)):
            at = marker.start()
    yield _JPEG_END, data[at:]


def _riff_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at, end = 12, 8 + struct.unpack("<I", data[4:8])[0]
    while at + 8 <= min(end, len(data)):
        (size,) = struct.unpack("<I", data[at + 4 : at + 8])
        yield data[at : at + 4], data[at + 8 : at + 8 + size]
        at += 8 + size + size % 2
    yield b"tail", data[at:]


# --- columns ----------------------------------------------------------------------------------------------------------


def text_columns(schema: pa.Schema) -> list[str]:
    """Return the columns that can name a subject: those with text in them but pictures, free text and `NAMELESS`."""
    left_out = (*FREE_TEXT, *NAMELESS, "image")
    return [field.name for field in schema if field.name not in left_out and _holds(field.type, *_TEXT_TYPES)]


def _holds(kind: pa.DataType, *types: Callable[[pa.DataType], bool]) -> bool:
    """Return whether a type, or a part of it, is one of some types."""
    if pa.types.is_dictionary(kind) or is_list(kind):
        return _holds(kind.value_type, *types)
    if pa.types.is_struct(kind):
        return any(_holds(field.type, *types) for field in kind)
    return any(is_type(kind) for is_type in types)


def without_mentions(value: Any, subject: str) -> Any:
    """Return a value with null for every text in it that names a subject.

    A struct whose `subject_id` it is, a face of the person, is null in all of its fields. Where another field names the
    subject, such as `other_subject_id`, that and those that begin alike (`other_similarity`) are.

    Args:
        value: a value of a column: text, number, list, dictionary or None.
        subject: the subject's id.
    """
    if isinstance(value, str):
        return None if names_subject(value, subject) else value
    if isinstance(value, list):
        return [without_mentions(one, subject) for one in value]
    if isinstance(value, dict):
        named = [name for name, one in value.items() if isinstance(one, str) and names_subject(one, subject)]
        if "subject_id" in named:
            return dict.fromkeys(value)
        alike = tuple(f"{name.partition('_')[0]}_" for name in named)
        return {
            name: None if name in named or name.startswith(alike) else without_mentions(one, subject)
            for name, one in value.items()
        }
    return value


def mentioned(column: pa.ChunkedArray, subject: str) -> bool:
    """Return whether a column names a subject."""
    search = Search(subject)
    if pa.types.is_string(column.type):
        found = pc.match_substring(column, subject)
        if not pc.any(found).as_py():
            return False
        column = column.filter(pc.fill_null(found, False))
    return any(search.in_value(value) for value in column.to_pylist())


# --- objects ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Absence:
    """What looking for a subject found: a line for each mention, notes, and how much was read."""

    mentions: list[str]
    notes: list[str]
    objects: int
    bytes: int


def find_mentions(store: Store, subject: str) -> Absence:
    """Look for a subject in every byte of a dataset, and in the old versions of its objects that a bucket keeps.

    Parquet is read column by column, with its statistics, page index and footer, so that compression hides nothing;
    pictures by all that they hold beside their pixels.

    Raises:
        InputError: there is nothing at the URL.
    """
    store.require_readable()
    infos = store.list()
    if not infos:
        raise InputError(f"{store.url}: nothing there; check the URL")
    search = Search(subject, common=_is_common(store, Search(subject)))
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(lambda info: list(mentions_in(info.key, store.get(info.key), search)), infos))
    mentions = [line for lines in found for line in lines]
    notes = []
    if search.common:
        notes.append(f"{subject!r} is a word of the prompts or of the dataset's own, too: README.md, card/, other texts and what "
                     "pictures hold were searched for it in sample ids only")  # fmt: skip
    versions = store.old_versions()
    if versions is None:
        notes.append(f"{store.url}: the server does not say whether it keeps old versions of objects (on S3 it takes the right "
                     "s3:ListBucketVersions)")  # fmt: skip
    for version in versions or ():
        try:
            lines = list(mentions_in(version.key, version.read(), search))
        except FileNotFoundError:
            continue  # removed since it was listed
        except DeniedError:
            lines = [f"{version.key}: may not be read, which takes the right s3:GetObjectVersion"]
        mentions += [f"{line} (old version {version.version})" for line in lines]
    return Absence(mentions, notes, len(infos) + len(versions or ()), sum(info.size for info in infos))


def _is_common(store: Store, search: Search) -> bool:
    """Whether the id is a number, or a word of prompts, of their ids or of what every dataset says of itself."""
    if search.subject.isdecimal() or search.in_text(_OWN_WORDS):
        return True
    keys = [info.key for info in store.list("plan/") if info.key.endswith(".parquet")]
    keys += [SUBJECTS_KEY] if store.exists(SUBJECTS_KEY) else []
    for key in keys:
        try:
            with store.open(key) as source, pq.ParquetFile(source) as file:
                marks = file.schema_arrow.metadata or {}
                if any(search.in_text(value.decode()) for value in marks.values()):
                    return True
                names = [name for name in SHARED_WORDS if name in file.schema_arrow.names]
                for batch in file.iter_batches(columns=names):
                    for column in batch.columns:
                        if any(text and search.in_text(text) for text in pc.unique(column).to_pylist()):
                            return True
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            continue
    return False


def mentions_in(key: str, data: bytes, search: Search) -> Iterator[str]:
    """Yield a line for each kind of mention in one object.

    Args:
        key: the object's key.
        data: its bytes.
        search: the id to look for.
    """
    if search.in_text(key.replace("/", " ")):
        yield f"{key}: its name"
    if key.endswith(".parquet"):
        try:
            yield from (f"{key}: {what}" for what in _in_parquet(data, search))
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            if search.in_bytes(data):
                yield f"{key}: not whole Parquet, and holds the id"
    elif key.endswith((".json", ".md", ".html")):
        if search.in_bytes(html.unescape(data.decode("utf-8", errors="replace")).encode()):
            yield f"{key}: its text"
        if any(search.in_bytes(text_of_picture(picture)) for picture in _embedded(data)):
            yield f"{key}: a picture in it"
    elif search.in_bytes(text_of_picture(data)):
        yield f"{key}: its content"


def _embedded(data: bytes) -> Iterator[bytes]:
    for match in _DATA_URL.finditer(data):
        try:
            yield base64.b64decode(match[1])
        except ValueError:
            continue


def _in_parquet(data: bytes, search: Search) -> Iterator[str]:
    with pq.ParquetFile(io.BytesIO(data)) as file:
        metadata, schema = file.metadata, file.schema_arrow
        end = 4
        for group in range(metadata.num_row_groups):
            for place in range(metadata.row_group(group).num_columns):
                chunk = metadata.row_group(group).column(place)
                start = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
                end = max(end, start + chunk.total_compressed_size)
                says_nothing = chunk.path_in_schema.split(".")[0] in (*FREE_TEXT, *NAMELESS)
                if chunk.is_stats_set and chunk.statistics.has_min_max and not says_nothing:
                    for value in (chunk.statistics.min, chunk.statistics.max):
                        if search.in_value(value):
                            yield f"statistics of column {chunk.path_in_schema} in row group {group}"
        for name, value in (schema.metadata or {}).items():
            if search.in_text(name.decode(errors="replace")) or _in_document(value, search):
                yield f"footer, {name.decode(errors='replace')}"
        if search.in_bytes(data[end : len(data) - metadata.serialized_size - 8]):
            yield "page index"
        found: dict[str, int] = {}
        for group in range(metadata.num_row_groups):
            table = file.read_row_group(group)
            for name in table.column_names:
                if name in NAMELESS or (name in FREE_TEXT and search.common):
                    continue
                count = sum(_rows_naming(table[name], search, name in FREE_TEXT))
                if count:
                    found[name] = found.get(name, 0) + count
        for name, count in found.items():
            yield f"{counted(count, 'row')} of column {name}"


def _rows_naming(column: pa.ChunkedArray, search: Search, free: bool) -> Iterable[bool]:
    if not _holds(column.type, *_TEXT_TYPES, *_BYTES_TYPES):
        return ()
    return (search.in_value(value, free) for value in column.to_pylist())


def _in_document(value: bytes, search: Search) -> bool:
    """Whether a value of a footer, JSON or text, names the subject in one of its strings or names."""
    try:
        document = parse_json(value)
    except ValueError:
        return search.in_bytes(value)
    return any(search.in_document(text) for text in _strings(document))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)
    elif isinstance(value, dict):
        for name, one in value.items():
            yield name
            yield from _strings(one)
