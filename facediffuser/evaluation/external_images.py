"""Images of any other system: which file shows which subjects and which prompt."""

import itertools
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from facediffuser.dataset.input_tables import Row, csv_rows, normalised, require_text
from facediffuser.dataset.inputs import Prompt, Subject, parse_template
from facediffuser.errors import InputError, first_few
from facediffuser.number_words import counted
from facediffuser.pictures import EXTENSIONS, is_picture_name, left_out_line
from facediffuser.prompts import IMAGE_MARKER, without_markers
from facediffuser.storage import Store

logger = logging.getLogger(__name__)

FASTCOMPOSER_NAME = re.compile(r"subject_([0-9]{1,9})_prompt_([0-9]{1,9})_instance_([0-9]{1,9})\.[a-z]+", re.IGNORECASE)
NEEDED_COLUMNS = ("image", "subject_ids")


@dataclass(frozen=True)
class ExternalImage:
    """One image file and what it should show. `prompt` is without markers; `instance` counts images of the same row."""

    key: str
    subject_ids: tuple[str, ...]
    prompt_id: str
    prompt: str
    category: str | None
    instance: int


def from_fastcomposer_layout(
    store: Store, subjects: Sequence[Subject], prompts: Sequence[Prompt]
) -> list[ExternalImage]:
    """Return the images of a folder named as FastComposer's evaluation names them, sorted by name.

    `subject_0003_prompt_0012_instance_0000.jpg`: the fourth subject (ids sorted), the thirteenth prompt of the file.
    For a prompt of several subjects the first number counts their sets in the order `generate` makes them: 0 is the
    first and second subject, 1 the first and third, and so on.

    Args:
        store: the folder.
        subjects: sorted by id.
        prompts: in the order of their file.

    Raises:
        InputError: a file has another name, or a number beyond what there is.
    """
    found = []
    seen: dict[tuple[int, ...], str] = {}
    for key in _image_keys(store):
        match = FASTCOMPOSER_NAME.fullmatch(key.rsplit("/", 1)[-1])
        if not match:
            raise InputError(
                f"{store.url_of(key)}: not named subject_0000_prompt_0000_instance_0000.jpg; rename it or give --index"
            )
        number, prompt, instance = numbers = tuple(int(digits) for digits in match.groups())
        if numbers in seen:
            raise InputError(f"{store.url_of(key)}: has the numbers of {seen[numbers]} too; remove one of the two")
        seen[numbers] = key
        if prompt >= len(prompts):
            raise InputError(
                f"{store.url_of(key)}: prompt {prompt} of {counted(len(prompts), 'prompt')}, counted from 0; check --prompts"
            )
        size = prompts[prompt].subjects
        sets = math.comb(len(subjects), size)
        if number >= sets:
            what = counted(sets, "subject") if size == 1 else f"{counted(sets, 'set')} of {counted(size, 'subject')}"
            raise InputError(f"{store.url_of(key)}: subject {number} of {what}, counted from 0; check --subjects")
        people = next(itertools.islice(itertools.combinations(subjects, size), number, None))
        found.append(_image(key, people, prompts[prompt], instance))
    return found


def from_index(
    store: Store, index: bytes, index_name: str, subjects: Sequence[Subject], prompts: Sequence[Prompt]
) -> list[ExternalImage]:
    """Return the images a CSV lists, in its order.

    Columns: `image` (path inside the folder), `subject_ids` (several joined by +), and `prompt_id` (of --prompts) or
    `prompt` (what the image should show; placeholders allowed), optionally `category`. Images that are not listed are
    counted and named in the log.

    Args:
        store: the folder of images.
        index: the CSV.
        index_name: its path, for errors.
        subjects: those that it may name.
        prompts: those that its `prompt_id` may name.

    Raises:
        InputError: a line is wrong; the error says which.
    """
    by_name = {subject.subject_id: subject for subject in subjects}
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    keys = _image_keys(store)
    present: dict[str, list[str]] = {}
    for key in keys:
        present.setdefault(normalised(key), []).append(key)
    instances: Counter[tuple] = Counter()
    lines: dict[tuple, int] = {}
    found = []
    for number, record in _index_lines(index, index_name):
        place = f"{index_name}:{number}"
        name = (record["image"] or "").strip()
        same = present.get(normalised(name), [])
        if not same:
            raise InputError(f"{place}: no image {name!r} in {store.url}; give a path inside that folder")
        if len(same) > 1:
            raise InputError(f"{place}: two images have this name, {' and '.join(map(ascii, same))}; rename one")
        key = same[0]
        names = [normalised(name.strip()) for name in (record["subject_ids"] or "").split("+")]
        unknown = [name for name in names if name not in by_name]
        if unknown:
            raise InputError(f"{place}: subject {unknown[0]!r} is not in --subjects; add their pictures")
        prompt = _prompt_of(record, by_id, len(names), place)
        row = (tuple(names), prompt.prompt_id)
        first = lines.setdefault((key, *row), number)
        if first != number:
            raise InputError(
                f"{place}: image {name!r} stands in line {first} with the same subjects and prompt; keep one"
            )
        found.append(_image(key, [by_name[name] for name in names], prompt, instances[row]))
        instances[row] += 1
    if not found:
        raise InputError(f"{index_name}: no lines below the first; list the images")
    unlisted = sorted(set(keys) - {image.key for image in found})
    if unlisted:
        logger.warning("%s: %s not listed in %s, left out: %s", store.url, counted(len(unlisted), "image"), index_name,
                       first_few(unlisted))  # fmt: skip
    return found


def _image(key: str, people: Sequence[Subject], prompt: Prompt, instance: int) -> ExternalImage:
    names = tuple(person.subject_id for person in people)
    if prompt.order:
        text = prompt.text(person.class_word for person in people)
        names = prompt.subjects_in_order(names)
    else:
        text = prompt.pieces[0]
    return ExternalImage(key, names, prompt.prompt_id, without_markers(text), prompt.category, instance)


def _index_lines(index: bytes, name: str) -> list[Row]:
    rows = csv_rows(index, name)
    columns = rows[0][1] if rows else NEEDED_COLUMNS + ("prompt",)
    missing = [column for column in NEEDED_COLUMNS if column not in columns]
    if missing or not {"prompt", "prompt_id"} & set(columns):
        raise InputError(f"{name}: no column {missing[0] if missing else 'prompt'!r}; add it to the first line")
    return rows


def _prompt_of(record: Mapping[str, str | None], by_id: Mapping[str, Prompt], subjects: int, place: str) -> Prompt:
    prompt_id, text = normalised((record.get("prompt_id") or "").strip()), (record.get("prompt") or "").strip()
    category = (record.get("category") or "").strip() or None
    require_text(prompt_id + (category or ""), place, "prompt_id or category")
    if text:
        require_text(text, place, "prompt")
        named = "{" in text or IMAGE_MARKER in text
        pieces, order = parse_template(text, subjects, place) if named else ((text,), ())
        return Prompt(prompt_id or text, category, pieces, order)
    if prompt_id not in by_id:
        raise InputError(f"{place}: prompt {prompt_id!r} is not in --prompts; add it there, or give a column prompt")
    known = by_id[prompt_id]
    if known.subjects != subjects:
        raise InputError(
            f"{place}: prompt {prompt_id!r} names {counted(known.subjects, 'subject')}, the line {subjects}; correct one of the two"
        )
    return replace(known, category=category or known.category)


def _image_keys(store: Store) -> list[str]:
    store.require_readable()
    every = [info.key for info in store.list()]
    keys = [key for key in every if is_picture_name(key)]
    if not keys:
        raise InputError(f"{store.url}: no image there ({' '.join(EXTENSIONS)}); give the folder of images")
    if len(keys) < len(every):
        logger.warning("%s: %s", store.url, left_out_line(set(every) - set(keys)))
    return keys
