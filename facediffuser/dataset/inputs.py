"""What a user brings to `generate`: subjects with reference pictures, prompts with places for subjects."""

import datetime
import logging
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from facediffuser.dataset.input_tables import (
    csv_rows,
    json_rows,
    normalised,
    parquet_rows,
    read_table_file,
    require_columns,
    require_text,
    shown_value,
)
from facediffuser.errors import InputError, first_few
from facediffuser.number_words import counted
from facediffuser.pictures import EXTENSIONS, is_picture_name, left_out_line
from facediffuser.prompts import IMAGE_MARKER, ends_in_word, require_marked_words
from facediffuser.storage import Store, local_copy, open_store

logger = logging.getLogger(__name__)

DEFAULT_CLASS_WORD = "person"
SUBJECTS_TABLE = "subjects.csv"
# These separate the parts of a sample_id, so that it is unique and can be a file name everywhere.
RESERVED = "+~/\\"
PROMPT_COLUMNS = ("prompt", "prompt_id", "category")
# What a person agreed to; optional columns of subjects.csv.
TERMS = ("consent", "licence", "source", "expires")
SUBJECT_COLUMNS = ("subject_id", "class_word", *TERMS)
MOST_SHOWN = 16
# A text encoder reads about 300; more is a file of something else, which takes minutes to split into tokens.
MOST_PROMPT_CHARACTERS = 100_000
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_SUBJECT_NAME = re.compile(r"subject(?:_([1-9][0-9]{0,8}))?")


@dataclass(frozen=True)
class Subject:
    """A person: id, the word prompts use for them, and the keys of their reference pictures, at least one.

    `terms`: what they agreed to, as (column of TERMS, text); nothing of it decides an image.
    """

    subject_id: str
    class_word: str
    references: tuple[str, ...]
    terms: tuple[tuple[str, str], ...] = ()


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
        """Return the prompt with "<class word> <|image|>" in its places.

        Args:
            class_words: one for each subject, in the order of the subjects.
        """
        words = tuple(class_words)
        parts = [self.pieces[0]]
        for subject, piece in zip(self.order, self.pieces[1:], strict=True):
            # A template may hold the marker itself, after a word of its own: then nothing is filled in.
            parts += [IMAGE_MARKER if subject < 0 else f"{words[subject]} {IMAGE_MARKER}", piece]
        return "".join(parts)

    def subjects_in_order(self, subject_ids: tuple[str, ...]) -> tuple[str, ...]:
        """Return the ids of a set of subjects in the order of the prompt's places."""
        return tuple(subject_ids[place if place >= 0 else n] for n, place in enumerate(self.order))


# --- subjects ---------------------------------------------------------------------------------------------------------


def read_subjects(url: str) -> list[Subject]:
    """Return the subjects of a folder `<subject_id>/*.jpg` with an optional `subjects.csv`, sorted by id.

    An id is its folder's name in Unicode's composed form (NFC): file systems give the same name in either form. Files
    that are no pictures by their names are counted and named in the log. Pictures are not opened.

    Args:
        url: a folder or an s3:// prefix.

    Raises:
        InputError: the folder is missing or empty, an id cannot be a name or two are the same in composed form, or
            `subjects.csv` has unknown columns or subjects.
    """
    store = open_store(url)
    store.require_readable()
    pictures: dict[str, list[str]] = {}
    others: list[str] = []
    folders = {name for name in store.folders() if not name.startswith(".")}
    for info in store.list():
        folder, _, name = info.key.partition("/")
        if folder.startswith(".") or info.key == SUBJECTS_TABLE:
            continue
        if name:
            folders.add(folder)
        if name and "/" not in name and is_picture_name(name):
            pictures.setdefault(normalised(folder), []).append(info.key)
        elif not posixpath.basename(info.key).startswith("."):
            others.append(info.key)
    if not folders:
        raise InputError(f"{url}: no subjects there; give a folder of <subject_id>/*.jpg")
    words, terms = _subjects_table(store)
    folder_of: dict[str, str] = {}
    for folder in sorted(folders):
        identifier = normalised(folder)
        _require_id(identifier, store.url_of(folder), "subject id")
        if identifier in folder_of:
            raise InputError(
                f"{store.url_of(folder)}: two folders have this name, {ascii(folder_of[identifier])} and {ascii(folder)}; "
                "merge or rename one"
            )
        folder_of[identifier] = folder
        if identifier not in pictures:
            raise InputError(
                f"{store.url_of(folder)}: no picture ({' '.join(EXTENSIONS)}); put one of the subject there"
            )
    if others:
        logger.warning("%s: %s", store.url, left_out_line(others))
    for name in words:
        if name not in pictures:
            raise InputError(
                f"{store.url_of(SUBJECTS_TABLE)}: subject {name!r} has no folder; add the folder, or remove the row"
            )
    return [
        Subject(name, words.get(name, DEFAULT_CLASS_WORD), tuple(sorted(pictures[name])), terms.get(name, ()))
        for name in sorted(pictures)
    ]


def _subjects_table(store: Store) -> tuple[dict[str, str], dict[str, tuple[tuple[str, str], ...]]]:
    """Return the class words and the terms in subjects.csv."""
    if not store.exists(SUBJECTS_TABLE):
        return {}, {}
    name = store.url_of(SUBJECTS_TABLE)
    words: dict[str, str] = {}
    terms: dict[str, tuple[tuple[str, str], ...]] = {}
    for number, row in csv_rows(read_table_file(store, SUBJECTS_TABLE), name, SUBJECT_COLUMNS):
        require_columns(row, SUBJECT_COLUMNS, ("subject_id",), name)
        identifier, word = normalised((row["subject_id"] or "").strip()), (row.get("class_word") or "").strip()
        if identifier in words:
            raise InputError(f"{name} row {number}: subject {identifier!r} is there twice; keep one")
        require_text(word, f"{name} row {number}", "class word")
        if IMAGE_MARKER in word or any(char in word for char in "{}\n") or (word and not ends_in_word(word)):
            raise InputError(f"{name} row {number}: class word {word!r}; give a plain word such as man or woman")
        words[identifier] = word or DEFAULT_CLASS_WORD
        terms[identifier] = _terms(row, f"{name} row {number}")
    return words, terms


def _terms(row: dict[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    found = tuple((column, text) for column in TERMS if (text := (row.get(column) or "").strip()))
    for column, text in found:
        require_text(text, where, column)
        if column == "expires" and not re.fullmatch(r"\d{4}-\d{2}-\d{2}", text, re.ASCII):
            raise InputError(f"{where}: expires {shown_value(text)} is no date; write it as 2027-12-31")
        try:
            datetime.date.fromisoformat(text if column == "expires" else "2000-01-01")
        except ValueError:
            raise InputError(f"{where}: expires {shown_value(text)} is no day of the calendar; correct it") from None
    return found


def class_words_line(subjects: Sequence[Subject]) -> str:
    """Return in one line which class words the prompts use for whom, and how to give another than the default."""
    of_word: dict[str, list[str]] = {}
    for person in subjects:
        of_word.setdefault(person.class_word, []).append(person.subject_id)
    parts = []
    for word, names in sorted(of_word.items()):
        parts.append(f"{word!r} for {len(names)} ({first_few(names)})")
    line = "class words: " + "; ".join(parts)
    if DEFAULT_CLASS_WORD in of_word:
        line += (
            f"; {DEFAULT_CLASS_WORD!r} is for subjects without an entry in subjects.csv, to give one add a line such as "
            f"{of_word[DEFAULT_CLASS_WORD][0]},woman below its head subject_id,class_word"
        )
    return line


# --- prompts ----------------------------------------------------------------------------------------------------------


def read_prompts(url: str, subjects_per_image: int | None = None) -> list[Prompt]:
    """Return the prompts of a file, in its order.

    Each prompt says by its places how many subjects it shows.

    Args:
        url: a .jsonl, .csv or .parquet file, local or on S3.
        subjects_per_image: how many subjects each prompt must show; None for any number.

    Raises:
        InputError: the file is missing or empty, has unknown columns or ids that repeat, a template does not name
            each of its subjects once, or shows another number of them.
    """
    path = local_copy(url)
    if not path.is_file():
        raise InputError(f"{url}: not a file; give a .jsonl, .csv or .parquet of prompts")
    name = posixpath.basename(str(url))
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".ndjson", ".json", ".csv", ".parquet"):
        raise InputError(f"{name}: unknown kind of file {suffix!r}; give .jsonl, .csv or .parquet")
    data = read_table_file(open_store(path.parent), path.name)
    if suffix == ".csv":
        rows = csv_rows(data, name, PROMPT_COLUMNS)
    elif suffix == ".parquet":
        rows = parquet_rows(data, name, PROMPT_COLUMNS)
    else:
        rows = json_rows(data, name)
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    for number, row in rows:
        require_columns(row, PROMPT_COLUMNS, ("prompt",), name)
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
    text, where = row["prompt"], f"{name} row {number}"
    if text is None or (isinstance(text, str) and not text.strip()):
        raise InputError(f"{where}: empty prompt; write one or remove the row")
    if not isinstance(text, str):
        raise InputError(f"{where}: prompt {shown_value(text)} is no text; put it in quotes")
    if len(text) > MOST_PROMPT_CHARACTERS:
        raise InputError(f"{where}: prompt of {len(text):,} characters, at most {MOST_PROMPT_CHARACTERS:,}; shorten it")
    require_text(text, where, "prompt")
    category = row.get("category")
    if category is not None and not isinstance(category, str):
        raise InputError(f"{where}: category {shown_value(category)} is no text; put it in quotes")
    require_text(category or "", where, "category")
    given = row.get("prompt_id")
    if given is not None and not isinstance(given, str | int | float):
        raise InputError(f"{where}: prompt_id {shown_value(given)} is no text; put it in quotes")
    identifier = normalised(str(given).strip()) if given not in (None, "") else f"p{index:05d}"
    _require_id(identifier, where, "prompt_id")
    pieces, order = parse_template(text.strip(), subjects, where)
    return Prompt(identifier, category or None, pieces, order)


def parse_template(text: str, subjects: int | None, where: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the pieces of text around a template's places, and whose each place is (from 0; -1: literal marker).

    A place is `{subject}` (of one), `{subject_1}`, `{subject_2}` ..., or the marker `<|image|>` after a word.

    Args:
        text: the template.
        subjects: how many subjects it must show; None for any number.
        where: file and row, for errors.

    Raises:
        InputError: a subject is not named exactly once, or there are not so many.
    """
    shown = shown_value(text)
    if IMAGE_MARKER in text:
        pieces = text.split(IMAGE_MARKER)
        if _PLACEHOLDER.search(text):
            raise InputError(f"{where}: {shown} holds {IMAGE_MARKER} and a placeholder; use one of the two")
        if subjects is not None and len(pieces) - 1 != subjects:
            raise InputError(f"{where}: {shown} holds {len(pieces) - 1} {IMAGE_MARKER} for {counted(subjects, 'subject')} an "
                             "image; give as many markers, or leave --subjects-per-image out")  # fmt: skip
        require_marked_words(text, where)
        return tuple(pieces), (-1,) * (len(pieces) - 1)
    names = [match[1].strip() for match in _PLACEHOLDER.finditer(text)]
    wanted = _wanted(subjects or len(names))
    for name in names:
        if not _SUBJECT_NAME.fullmatch(name):
            raise InputError(
                f"{where}: {shown_value('{' + name + '}', quoted=False)} in {shown} is no subject; write {wanted}"
            )
    if not names:
        raise InputError(f"{where}: {shown} names no subject; write {wanted} where the subject belongs")
    if "subject" in names and (subjects or len(set(names))) > 1:
        raise InputError(
            f"{where}: {shown} says {{subject}} for {counted(subjects or len(names), 'subject')}; write {wanted}"
        )
    order = [int(name.partition("_")[2] or 1) - 1 for name in names]
    if subjects is not None and max(order) >= subjects:
        raise InputError(f"{where}: {shown} names {{subject_{max(order) + 1}}} but an image has "
                         f"{counted(subjects, 'subject')}; leave --subjects-per-image out or correct the prompt")  # fmt: skip
    if sorted(order) != list(range(subjects or len(order))):
        needed = wanted if subjects else _wanted(max(*order, len(order) - 1) + 1)
        raise InputError(f"{where}: {shown} does not name each subject once; write {needed}, each once")
    # `split` gives the text between and, at every second place, what the group matched.
    return tuple(_PLACEHOLDER.split(text)[::2]), tuple(order)


def _wanted(subjects: int) -> str:
    if subjects > MOST_SHOWN:
        return "{subject_1}, {subject_2}, ..."
    return "{subject}" if subjects < 2 else ", ".join(f"{{subject_{n + 1}}}" for n in range(subjects))


def _require_id(identifier: str, where: str, kind: str) -> None:
    bad = [char for char in identifier if char in RESERVED or unicodedata.category(char).startswith("C")]
    if bad or identifier in ("", ".", "..") or identifier != identifier.strip() or len(identifier) > 120:
        raise InputError(
            f"{where}: {kind} {shown_value(identifier)} cannot be a name; use letters, digits, '-', '_' and '.'"
        )
