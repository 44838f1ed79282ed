"""Where photographs come from: the layouts that are read, and the list of pictures in one of them."""

import hashlib
import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import ijson

from facediffuser.errors import InputError
from facediffuser.number_words import counted
from facediffuser.pictures import EXTENSIONS, MOST_FILE_BYTES, first_names, is_picture_name, left_out_line
from facediffuser.preprocess.archives import SUFFIXES, is_archive, scan_archive
from facediffuser.preprocess.source_files import (
    FFHQ_FOLDERS,
    FFHQ_METADATA,
    ID_LISTS,
    FileTable,
    Record,
    has_triples,
    is_fastcomposer_path,
    require_list_size,
)
from facediffuser.preprocess.splits import TEST, TRAIN
from facediffuser.storage import TEMPORARY_SUFFIX, LocalStore, open_store

FFHQ, FASTCOMPOSER, FOLDER = "ffhq", "ffhq-fastcomposer", "folder"
FFHQ_ENTRIES = {"aligned": "image", "in-the-wild": "in_the_wild", "thumbnails": "thumbnail"}
FFHQ_SPLITS = {"training": TRAIN, "validation": TEST}
FFHQ_TRAINING_IDS = 60_000
# A caption or an annotation; FFHQ's own in FastComposer's copy have a few kB.
MOST_TEXT_BYTES = 1 << 24


@dataclass(frozen=True)
class Listing:
    """A source's pictures in order; `left_out`: the files that belong to none; `digest` changes with the source."""

    url: str
    format: str
    records: list[Record]
    left_out: tuple[str, ...]
    digest: str
    archive: bool = False
    top: str = ""

    @property
    def ignored(self) -> int:
        """How many files belong to no picture."""
        return len(self.left_out)

    def left_out_line(self) -> str:
        """Return one line that names the files that belong to no picture; call it where there are some.

        What lies beside the pictures of a layout is usual (licences, lists, people to generate), so of folders without
        pictures only the folder is named.
        """
        if self.format == FOLDER:
            return left_out_line(self.left_out)
        folders = {record.image.partition("/")[0] for record in self.records}
        names = {key if (top := key.partition("/"))[0] in folders else "".join(top[:2]) for key in self.left_out}
        return f"beside the pictures of the set: {counted(len(self.left_out), 'other file')} ({first_names(names)})"

    @property
    def has_splits(self) -> bool:
        """Whether the source says of any picture which side it is on."""
        return any(record.split for record in self.records)


def list_source(url: str, format: str = "auto", ffhq_images: str = "auto") -> Listing:
    """Return the pictures found at a URL.

    Args:
        url: a folder, an s3:// prefix, or a .tgz, .tar.gz or .tar file in either, which is read without unpacking.
        format: `ffhq`, `ffhq-fastcomposer`, `folder`, or `auto` for what the file names show.
        ffhq_images: which of FFHQ's folders: `aligned`, `in-the-wild`, `thumbnails`, or `auto` for the one there is.

    Raises:
        InputError: there is nothing of that format, or it cannot be read.
    """
    archive = is_archive(url)
    table = scan_archive(url) if archive else scan_store(url)
    if not table.sizes:
        raise InputError(f"{url}: no files there; give a folder of pictures")
    format = recognise(table) if format == "auto" else format
    lister = {FFHQ: lambda: _list_ffhq(table, ffhq_images), FASTCOMPOSER: lambda: _list_fastcomposer(table)}
    records = lister.get(format, lambda: _list_folder(table))()
    if not records:
        others = left_out_line(table.sizes)
        raise InputError(f"{url}: no pictures of format {format}; give their folder, or another --format; {others}")
    used = {key for record in records for key in (record.image, record.annotation, record.segmentation)}
    records = _check_twice([_check_names(record, table) for record in records])
    records = [replace(record, bytes=sum(table.sizes[key] for key in record.files)) for record in records]
    if archive:
        records = _in_archive_order(records, table)
    used |= {*ID_LISTS.values(), FFHQ_METADATA}
    left_out = tuple(key for key in table.sizes if key not in used)
    return Listing(url, format, records, left_out, _digest(format, records, table), archive, table.top)


def recognise(table: FileTable) -> str:
    """Return the format that a source's file names show: FFHQ's folders, FastComposer's lists or triples, or folder."""
    folders = tuple(f"{name}/" for name in FFHQ_FOLDERS.values())
    if FFHQ_METADATA in table or any(key.startswith(folders) for key in table.sizes):
        return FFHQ
    if any(name in table for name in ID_LISTS.values()):
        return FASTCOMPOSER
    return FASTCOMPOSER if has_triples(table.sizes) else FOLDER


def scan_store(url: str) -> FileTable:
    """Return the table of the files in a folder or below an s3:// prefix.

    Raises:
        InputError: the URL is a file that is no archive, or cannot be read.
    """
    store = open_store(url)
    if isinstance(store, LocalStore) and store.root.is_file():
        raise InputError(
            f"{url}: a file; give a folder of pictures, or a {', '.join(SUFFIXES)} archive (unpack others)"
        )
    store.require_readable()
    if isinstance(store, LocalStore):
        sizes, others = _scan_folder(store.root)
        return FileTable(url, sizes, store.open, others=others)
    return FileTable(url, {info.key: info.size for info in store.list()}, store.open)


def _scan_folder(root: Path) -> tuple[dict[str, int], frozenset[str]]:
    """The sizes of a folder's files, and the names that are no files; linked folders are gone into, each once."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from error

    sizes, others, seen = {}, set(), set()
    for folder, below, names in os.walk(root, followlinks=True, onerror=refuse):
        place = os.path.realpath(folder)
        if place in seen:
            below.clear()
            continue
        seen.add(place)
        for name in names:
            path = Path(folder, name)
            key = path.relative_to(root).as_posix()
            if path.is_file():
                sizes[key] = path.stat().st_size
            elif not name.endswith(TEMPORARY_SUFFIX):
                sizes[key] = 0
                others.add(key)
    return dict(sorted(sizes.items())), frozenset(others)


def _text(table: FileTable, key: str) -> str:
    require_list_size(table.url, key, table.sizes[key])
    try:
        with table.open(key) as stream:
            return stream.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{table.url}: {key} is not UTF-8 text; write it again") from error


def _list_fastcomposer(table: FileTable) -> list[Record]:
    lists = {name: _text(table, key).split() for name, key in ID_LISTS.items() if key in table}
    ids = [image_id for name in ("all", TRAIN, TEST) for image_id in lists.get(name, ())]
    if not ids:
        ids = [posixpath.splitext(posixpath.basename(key))[0] for key in sorted(table.sizes) if _is_triple(key)]
    train, test = set(lists.get(TRAIN, ())), set(lists.get(TEST, ()))
    records = []
    for image_id in dict.fromkeys(ids):
        stem = f"{image_id[:5]}/{image_id}"
        image = next((stem + end for end in EXTENSIONS if stem + end in table), None)
        missing = [
            name
            for name, found in (
                ("picture", image),
                ("annotation .json", f"{stem}.json" in table),
                ("segmentation map .npy", f"{stem}.npy" in table),
            )
            if not found
        ]
        problem = f"missing file: no {', no '.join(missing)}" if missing else None
        if image_id in train and image_id in test:
            problem = f"in two splits: both {ID_LISTS[TRAIN]} and {ID_LISTS[TEST]} list it"
        split = TRAIN if image_id in train else TEST if image_id in test else None
        records.append(Record(image_id, image or f"{stem}.jpg", f"{stem}.json", f"{stem}.npy", split, problem=problem))
    return records


def _is_triple(key: str) -> bool:
    return key.lower().endswith((*EXTENSIONS, ".json", ".npy")) and is_fastcomposer_path(key)


def _list_ffhq(table: FileTable, images: str) -> list[Record]:
    there = [name for name, folder in FFHQ_FOLDERS.items() if any(key.startswith(f"{folder}/") for key in table.sizes)]
    wanted = [images] if images != "auto" else there
    if not there or wanted[0] not in there:
        folder = FFHQ_FOLDERS[wanted[0]] if wanted else " or ".join(FFHQ_FOLDERS.values())
        raise InputError(f"{table.url}: no folder {folder}; download FFHQ's pictures or choose another --ffhq-images")
    kind = wanted[0]
    described = FFHQ_METADATA in table
    metadata = dict(_ffhq_metadata(table, FFHQ_ENTRIES[kind])) if described else {}
    if described and not metadata:
        raise InputError(f"{table.url}: {FFHQ_METADATA} is damaged (no object of pictures); download it again")
    records = []
    for key in sorted(table.sizes):
        if not key.startswith(f"{FFHQ_FOLDERS[kind]}/") or not is_picture_name(key):
            continue
        image_id = posixpath.splitext(posixpath.basename(key))[0]
        if not (image_id.isascii() and image_id.isdigit()):
            records.append(Record(key, key, problem="not an FFHQ name: give <number>.png"))
        elif described and int(image_id) not in metadata:
            records.append(Record(image_id, key, problem=f"not in the metadata: {FFHQ_METADATA} has no such id"))
        else:
            split = TRAIN if int(image_id) < FFHQ_TRAINING_IDS else TEST
            known = metadata.get(int(image_id), Record("", "", split=split))
            records.append(replace(known, image_id=image_id, image=key))
    return records


def _ffhq_metadata(table: FileTable, entry: str) -> Iterator[tuple[int, Record]]:
    """Each id of FFHQ's JSON with what is kept of it; read item by item, since all of it as objects takes gigabytes."""
    require_list_size(table.url, FFHQ_METADATA, table.sizes[FFHQ_METADATA])
    try:
        with table.open(FFHQ_METADATA) as stream:
            for key, value in ijson.kvitems(stream, "", buf_size=1 << 20, use_float=True):
                details = value.get("metadata") or {}
                yield (
                    int(key),
                    Record(
                        key,
                        "",
                        split=FFHQ_SPLITS[value["category"]],
                        licence=_plain_text(details.get("license")),
                        author=_plain_text(details.get("author")),
                        pixel_md5=(value.get(entry) or {}).get("pixel_md5"),
                    ),
                )
    except (ijson.JSONError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{table.url}: {FFHQ_METADATA} is damaged ({error!r}); download it again") from error


def _plain_text(value: object) -> str | None:
    # JSON can spell half of a surrogate pair, which Parquet cannot hold.
    return None if value is None else str(value).encode("utf-8", "replace").decode()


def _list_folder(table: FileTable) -> list[Record]:
    records = []
    for key in sorted(table.sizes):
        if is_picture_name(key):
            caption = f"{posixpath.splitext(key)[0]}.txt"
            records.append(Record(key, key, caption if caption in table else None))
    return records


def _check_names(record: Record, table: FileTable) -> Record:
    try:
        "".join((record.image_id, *record.files)).encode()
    except UnicodeEncodeError:
        # Bytes of a file name that are no UTF-8 cannot stand in Parquet: show them escaped.
        shown = record.image.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        return replace(record, image_id=shown, image=shown, problem="unreadable name: not UTF-8; rename the file")
    if any(ord(char) < 32 for char in record.image):
        shown = record.image.encode("unicode_escape").decode()
        return replace(record, image_id=shown, image=shown, problem="unreadable name: control characters; rename it")
    links = [key for key in record.files if key in table.links]
    if links:
        return replace(record, problem=f"a link: {links[0]} is a link inside of the archive; archive files themselves")
    others = [key for key in record.files if key in table.others]
    if others:
        return replace(record, problem=f"not a file: {others[0]} is a link that leads nowhere, a pipe or the like")
    twice = [key for key in record.files if key in table.twice]
    if twice:
        return replace(record, problem=f"name stands twice: {twice[0]} is in the archive more than once; pack it again")
    most = dict.fromkeys(record.files, MOST_FILE_BYTES)
    if record.annotation in most:
        most[record.annotation] = MOST_TEXT_BYTES
    large = [key for key in record.files if table.sizes[key] > most[key]]
    if large:
        size = f"{table.sizes[large[0]]:,} bytes, at most {most[large[0]]:,} are read"
        return replace(record, problem=f"file too large: {large[0]} has {size}")
    return record


def _check_twice(records: list[Record]) -> list[Record]:
    seen: set[str] = set()
    checked = []
    for record in records:
        twice = record.image_id in seen and not record.problem
        checked.append(replace(record, problem="id stands twice: another file has it too") if twice else record)
        seen.add(record.image_id)
    return checked


def _in_archive_order(records: list[Record], table: FileTable) -> list[Record]:
    # By the place where the last of a picture's files stands, so that parts are complete one after another.
    place = {key: index for index, key in enumerate(table.sizes)}
    return sorted(records, key=lambda record: max((place[key] for key in record.files), default=-1))


def _digest(format: str, records: list[Record], table: FileTable) -> str:
    digest = hashlib.sha256(format.encode())
    for record in records:
        sizes = [table.sizes[key] for key in record.files]
        digest.update(repr((record, sizes)).encode())
    return digest.hexdigest()
