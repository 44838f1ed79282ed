"""What a user brings to `generate`: subjects with reference pictures, prompts with places for subjects."""

import csv
import hashlib
import io
import json
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from facediffuser.errors import InputError
from facediffuser.pictures import to_rgb
from facediffuser.prompts import IMAGE_MARKER
from facediffuser.storage import Store, local_copy, open_store

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
DEFAULT_CLASS_WORD = "person"
# These separate the parts of a sample_id, so that it is unique and can be a file name everywhere.
RESERVED = "+~/\\"
PROMPT_COLUMNS = ("prompt", "prompt_id", "category")
SUBJECT_COLUMNS = ("subject_id", "class_word")
MOST_SHOWN = 16
SHOWN_NAMES = 5
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_SUBJECT_NAME = re.compile(r"subject(?:_([1-9]\d*))?")


@dataclass(frozen=True)
class Subject:
    """A person: id, the word prompts use for them, and the keys of their reference pictures, at least one."""

    subject_id: str
    class_word: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Prompt:
    """A template with one place per subject; `order` says which subject (from 0) each place is for."""

    prompt_id: str
    category: str | None
    pieces: tuple[str, ...]
    order: tuple[int, ...]

    @property
    def subjects(self) -> int:
        """How many subjects an image of the prompt shows."""
        return len(self.order)

    def text(self, class_words: Iterable[str]) -> str:
        """Return the prompt with "<class word> <|image|>" in its places; class words in the order of the subjects."""
        words = tuple(class_words)
        parts = [self.pieces[0]]
        for subject, piece in zip(self.order, self.pieces[1:], strict=True):
            # A template may hold the marker itself, after a word of its own: then nothing is filled in.
            parts += [IMAGE_MARKER if subject < 0 else f"{words[subject]} {IMAGE_MARKER}", piece]
        return "".join(parts)

    def subjects_in_order(self, subject_ids: tuple[str, ...]) -> tuple[str, ...]:
        """Return subject ids in the order of the prompt's places."""
        return tuple(subject_ids[place if place >= 0 else n] for n, place in enumerate(self.order))


# --- subjects ---------------------------------------------------------------------------------------------------------


def read_subjects(url: str) -> list[Subject]:
    """Return the subjects of a folder `<subject_id>/*.jpg|png|webp` with an optional `subjects.csv`, sorted by id.

    Raises InputError for a missing or empty folder, ids that cannot be names, unknown columns. Pictures are not opened.
    """
    store = open_store(url)
    store.require_readable()
    pictures: dict[str, list[str]] = {}
    folders = {name for name in store.folders() if not name.startswith(".")}
    for info in store.list():
        folder, _, name = info.key.partition("/")
        if not name or folder.startswith("."):
            continue
        folders.add(folder)
        if "/" not in name and not name.startswith(".") and name.lower().endswith(PICTURE_SUFFIXES):
            pictures.setdefault(folder, []).append(info.key)
    if not folders:
        raise InputError(f"{url}: no subjects there; give a folder of <subject_id>/*.jpg|png|webp")
    words = _class_words(store)
    for folder in sorted(folders):
        _require_id(folder, store.url_of(folder), "subject id")
        if folder not in pictures:
            raise InputError(f"{store.url_of(folder)}: no picture; put a .jpg, .png or .webp of the subject there")
    for name in words:
        if name not in pictures:
            raise InputError(f"{store.url_of('subjects.csv')}: subject {name!r} has no folder; add it or the row goes")
    return [
        Subject(name, words.get(name, DEFAULT_CLASS_WORD), tuple(sorted(pictures[name]))) for name in sorted(pictures)
    ]


def _class_words(store: Store) -> dict[str, str]:
    if not store.exists("subjects.csv"):
        return {}
    name = store.url_of("subjects.csv")
    words: dict[str, str] = {}
    for number, row in _csv_rows(store.get("subjects.csv"), name):
        _require_columns(row, SUBJECT_COLUMNS, ("subject_id",), name)
        identifier, word = (row["subject_id"] or "").strip(), (row.get("class_word") or "").strip()
        if identifier in words:
            raise InputError(f"{name} row {number}: subject {identifier!r} is there twice; keep one")
        if IMAGE_MARKER in word or any(char in word for char in "{}\n"):
            raise InputError(f"{name} row {number}: class word {word!r}; give a plain word such as man or woman")
        words[identifier] = word or DEFAULT_CLASS_WORD
    return words


def class_words_line(subjects: Sequence[Subject]) -> str:
    """Return in one line which class words the prompts use for whom, and how to give another than the default."""
    of_word: dict[str, list[str]] = {}
    for person in subjects:
        of_word.setdefault(person.class_word, []).append(person.subject_id)
    parts = []
    for word, names in sorted(of_word.items()):
        shown = ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")
        parts.append(f"{word!r} for {len(names)} ({shown})")
    line = "class words: " + "; ".join(parts)
    if DEFAULT_CLASS_WORD in of_word:
        line += (
            f"; {DEFAULT_CLASS_WORD!r} is for subjects without an entry in subjects.csv, to give one add a line such as "
            f"{of_word[DEFAULT_CLASS_WORD][0]},woman below its head {','.join(SUBJECT_COLUMNS)}"
        )
    return line


def open_picture(store: Store, key: str) -> tuple[Image.Image, str]:
    """Return a reference picture, upright and in RGB, and the sha256 of its file; InputError when it is unreadable."""
    data = store.get(key)
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            image = to_rgb(picture)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "empty file" if not data else type(error).__name__
        raise InputError(f"{store.url_of(key)}: not a readable picture ({reason}); replace or remove it") from None
    return image, hashlib.sha256(data).hexdigest()


# --- prompts ----------------------------------------------------------------------------------------------------------


def read_prompts(url: str, subjects_per_image: int | None = None) -> list[Prompt]:
    """Return the prompts of a JSONL, CSV or Parquet file, in its order.

    Each prompt says by its places how many subjects it shows. Raises InputError for a missing or empty file, unknown
    columns, ids that repeat, templates that do not name each of their subjects once, and, with `subjects_per_image`,
    prompts that show another number.
    """
    path = local_copy(url)
    if not path.is_file():
        raise InputError(f"{url}: not a file; give a .jsonl, .csv or .parquet of prompts")
    name = posixpath.basename(str(url))
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson", ".json"):
        rows = _json_rows(path.read_bytes(), name)
    elif suffix == ".csv":
        rows = _csv_rows(path.read_bytes(), name)
    elif suffix == ".parquet":
        rows = _parquet_rows(path, name)
    else:
        raise InputError(f"{name}: unknown kind of file {suffix!r}; give .jsonl, .csv or .parquet")
    prompts, seen = [], {}
    for number, row in rows:
        _require_columns(row, PROMPT_COLUMNS, ("prompt",), name)
        prompt = _prompt(row, number, len(prompts), name, subjects_per_image)
        if prompt.prompt_id in seen:
            raise InputError(
                f"{name} row {number}: prompt_id {prompt.prompt_id!r} is that of row {seen[prompt.prompt_id]} too; "
                "give each its own"
            )
        seen[prompt.prompt_id] = number
        prompts.append(prompt)
    if not prompts:
        raise InputError(f"{name}: no prompts in it; give at least one")
    return prompts


def _prompt(row: dict[str, Any], number: int, index: int, name: str, subjects: int | None) -> Prompt:
    text = row["prompt"]
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{name} row {number}: empty prompt; write one or remove the row")
    category = row.get("category")
    if category is not None and not isinstance(category, str):
        raise InputError(f"{name} row {number}: category {category!r} is no text; put it in quotes")
    given = row.get("prompt_id")
    identifier = str(given).strip() if given not in (None, "") else f"p{index:05d}"
    _require_id(identifier, f"{name} row {number}", "prompt_id")
    pieces, order = parse_template(text.strip(), subjects, f"{name} row {number}")
    return Prompt(identifier, category or None, pieces, order)


def parse_template(text: str, subjects: int | None, where: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the pieces of text around a template's places, and whose each place is (from 0; -1: literal marker).

    A place is `{subject}` (of one), `{subject_1}`, `{subject_2}` ..., or the marker `<|image|>` after a word. Raises
    InputError unless every subject is named exactly once, and, with `subjects`, unless there are so many.
    """
    if IMAGE_MARKER in text:
        pieces = text.split(IMAGE_MARKER)
        if _PLACEHOLDER.search(text):
            raise InputError(f"{where}: {text!r} holds {IMAGE_MARKER} and a placeholder; use one of the two")
        if subjects is not None and len(pieces) - 1 != subjects:
            raise InputError(f"{where}: {text!r} holds {len(pieces) - 1} {IMAGE_MARKER} for {subjects} subjects an "
                             "image; give as many markers, or leave --subjects-per-image out")  # fmt: skip
        return tuple(pieces), (-1,) * (len(pieces) - 1)
    names = [match[1].strip() for match in _PLACEHOLDER.finditer(text)]
    wanted = _wanted(subjects or len(names))
    for name in names:
        if not _SUBJECT_NAME.fullmatch(name):
            raise InputError(f"{where}: {{{name}}} in {text!r} is no subject; write {wanted}")
    if not names:
        raise InputError(f"{where}: {text!r} names no subject; write {wanted} where the subject belongs")
    if "subject" in names and (subjects or len(set(names))) > 1:
        raise InputError(f"{where}: {text!r} says {{subject}} for {subjects or len(names)} subjects; write {wanted}")
    order = [int(name.partition("_")[2] or 1) - 1 for name in names]
    if subjects is not None and max(order) >= subjects:
        raise InputError(f"{where}: {text!r} names {{subject_{max(order) + 1}}} but an image has {subjects} "
                         f"subject{'s' * (subjects > 1)}; leave --subjects-per-image out or mend the prompt")  # fmt: skip
    if sorted(order) != list(range(subjects or len(order))):
        needed = wanted if subjects else _wanted(max(*order, len(order) - 1) + 1)
        raise InputError(f"{where}: {text!r} does not name each subject once; write {needed}, each once")
    return tuple(_PLACEHOLDER.sub("\0", text).split("\0")), tuple(order)


def _wanted(subjects: int) -> str:
    if subjects > MOST_SHOWN:
        return "{subject_1}, {subject_2}, ..."
    return "{subject}" if subjects < 2 else ", ".join(f"{{subject_{n + 1}}}" for n in range(subjects))


# --- tables -----------------------------------------------------------------------------------------------------------


def _json_rows(data: bytes, name: str) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for number, line in enumerate(_text(data, name).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise InputError(f"{name} row {number}: not JSON; write one object a line") from None
        if not isinstance(row, dict):
            raise InputError(f'{name} row {number}: not an object; write {{"prompt": "..."}}')
        rows.append((number, row))
    return rows


def _csv_rows(data: bytes, name: str) -> list[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(_text(data, name), newline=""), restkey="", strict=True)
    rows = []
    try:
        for row in reader:
            if "" in row:
                raise InputError(f"{name} row {reader.line_num}: more cells than the header; quote cells with commas")
            rows.append((reader.line_num, row))
    except csv.Error as error:
        raise InputError(f"{name} row {reader.line_num}: not CSV ({error})") from None
    if not rows and reader.fieldnames:
        _require_columns(dict.fromkeys(reader.fieldnames), (*PROMPT_COLUMNS, *SUBJECT_COLUMNS), (), name)
    return rows


def _parquet_rows(path, name: str) -> list[tuple[int, dict[str, Any]]]:
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError):
        raise InputError(f"{name}: not a Parquet file; give another") from None
    return list(enumerate(table.to_pylist(), 1))


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{name}: not UTF-8 text; save it as UTF-8") from None


def _require_columns(row: dict[str, Any], known: tuple[str, ...], needed: tuple[str, ...], name: str) -> None:
    unknown = [column for column in row if column not in known]
    if unknown:
        raise InputError(f"{name}: unknown column {unknown[0]!r}; known are {', '.join(known)}")
    for column in needed:
        if column not in row:
            raise InputError(f"{name}: no column {column!r}; known are {', '.join(known)}")


def _require_id(identifier: str, where: str, kind: str) -> None:
    bad = [char for char in identifier if char in RESERVED or unicodedata.category(char).startswith("C")]
    if bad or identifier in ("", ".", "..") or identifier != identifier.strip() or len(identifier) > 120:
        raise InputError(f"{where}: {kind} {identifier!r} cannot be a name; use letters, digits, '-', '_' and '.'")
