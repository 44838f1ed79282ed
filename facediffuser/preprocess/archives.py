"""Pictures in a tar archive, read from beginning to end without unpacking it: neither to disk nor all into memory."""

import gzip
import io
import posixpath
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from facediffuser.errors import InputError
from facediffuser.preprocess.source_files import FFHQ_FOLDERS, FFHQ_METADATA, ID_LISTS, FileTable, Record
from facediffuser.storage import open_store

SUFFIXES = (".tgz", ".tar.gz", ".tar")
# Files kept while waiting for the others of their picture; tar files made of a sorted folder need next to nothing.
WAITING_LIMIT = 1 << 30
READ_BYTES = 8 << 20


def is_archive(url: str) -> bool:
    """Return whether a URL names a tar archive."""
    return url.lower().endswith(SUFFIXES)


def scan_archive(url: str) -> FileTable:
    """Return the table of an archive's files, by one reading of it; a single folder around all of them is left off.

    InputError for a damaged archive, and for a member whose name leads out of it (`../`, absolute): such an archive was
    made to harm, and nothing of it is used.
    """
    sizes: dict[str, int] = {}
    links: set[str] = set()
    lists: dict[str, bytes] = {}
    for name, member, archive in _members(url):
        if not (member.isfile() or member.issym() or member.islnk()):
            continue
        sizes.setdefault(name, member.size)
        if not member.isfile():
            links.add(name)
        elif posixpath.basename(name) in (*ID_LISTS.values(), FFHQ_METADATA):
            lists[name] = archive.extractfile(member).read()
    top = _top_folder(sizes)
    kept = {name.removeprefix(top): data for name, data in lists.items()}
    return FileTable(
        url,
        {name.removeprefix(top): size for name, size in sizes.items()},
        lambda key: io.BytesIO(kept[key]),
        links=frozenset(name.removeprefix(top) for name in links),
        top=top,
    )


def _top_folder(names: dict[str, int]) -> str:
    known = (*FFHQ_FOLDERS.values(), "")
    tops = {name.split("/", 1)[0] if "/" in name else "" for name in names}
    top = tops.pop() if len(tops) == 1 else ""
    return "" if top in known else f"{top}/"


def read_records(url: str, top: str, records: Sequence[Record]) -> Iterator[tuple[Record, dict[str, bytes]]]:
    """Yield the records, which must be in the order of `list_source`, each with the bytes of its files by name.

    `top`: the folder that the listing left off. Of members with one name the first counts.
    """
    owner = {key: index for index, record in enumerate(records) for key in record.files}
    missing = [len(record.files) for record in records]
    waiting: dict[str, bytes] = {}
    following = held = 0
    for name, member, archive in _members(url):
        key = name.removeprefix(top)
        if key not in owner or key in waiting or not missing[owner[key]] or not member.isfile():
            continue
        waiting[key] = zlib.compress(archive.extractfile(member).read(), 1)
        missing[owner[key]] -= 1
        held += len(waiting[key])
        while following < len(records) and not missing[following]:
            packed = {file: waiting.pop(file) for file in records[following].files}
            held -= sum(map(len, packed.values()))
            yield records[following], {file: zlib.decompress(data) for file, data in packed.items()}
            following += 1
        if held > WAITING_LIMIT:
            raise InputError(f"{url}: the files of one picture stand too far apart to read in place; unpack it first")
    if following < len(records):
        raise InputError(f"{url}: changed while it was read; run again")


@contextmanager
def _opened(url: str) -> Iterator[tarfile.TarFile]:
    parent, name = posixpath.split(url)
    store = open_store(parent or ".")
    try:
        with store.open(name, READ_BYTES) as stream:
            with tarfile.open(fileobj=stream, mode="r|*") as archive:
                yield archive
    except FileNotFoundError as error:
        raise InputError(f"{url}: no such file; check the URL") from error
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{url}: damaged archive ({error}); fetch it again") from error


def _members(url: str) -> Iterator[tuple[str, tarfile.TarInfo, tarfile.TarFile]]:
    with _opened(url) as archive:
        for member in archive:
            parts = member.name.split("/")
            if member.name.startswith("/") or ".." in parts:
                raise InputError(f"{url}: member {member.name!r} leads out of the archive; such an archive is not read")
            yield "/".join(part for part in parts if part not in ("", ".")), member, archive
            # tarfile remembers each member it has met, which is no use in a stream and grows with it.
            archive.members.clear()
