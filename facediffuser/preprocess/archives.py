"""Pictures in a tar archive, read from beginning to end without unpacking it: neither to disk nor all into memory."""

import gzip
import io
import posixpath
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

from facediffuser.errors import InputError
from facediffuser.preprocess.source_files import (
    FFHQ_FOLDERS,
    FFHQ_METADATA,
    ID_LISTS,
    FileTable,
    Record,
    has_triples,
    require_list_size,
)
from facediffuser.storage import StorageError, open_store

SUFFIXES = (".tgz", ".tar.gz", ".tar")
# Files kept while waiting for the others of their picture; tar files made of a sorted folder need next to nothing.
WAITING_LIMIT = 1 << 30
READ_BYTES = 8 << 20
GZIP_MAGIC = b"\x1f\x8b"
# A header may be followed by names and attributes, which tarfile reads whole, whatever size they claim.
MOST_HEADER_BYTES = 1 << 20
LONGEST_NAME = 4096
# Headers pack 1,000 to 1: without a limit a small file names more members than the memory holds.
MOST_MEMBERS = 10_000_000
_ATTRIBUTES = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE
)  # fmt: skip


def is_archive(url: str) -> bool:
    """Return whether a URL names a tar archive."""
    return url.lower().endswith(SUFFIXES)


def scan_archive(url: str) -> FileTable:
    """Return the table of an archive's files, by one reading of it; a single folder around all of them is left off.

    Args:
        url: a .tar, .tar.gz or .tgz file, local or on S3.

    Raises:
        InputError: the archive is damaged, has more than MOST_MEMBERS files or two lists of ids of one name, or a
            member's name leads out of it (`../`, absolute): such an archive was made to harm, and nothing of it is used.
    """
    sizes: dict[str, int] = {}
    links: set[str] = set()
    others: set[str] = set()
    twice: set[str] = set()
    lists: dict[str, bytes] = {}
    for name, member, read in _members(url):
        if member.isdir():
            continue
        if name in sizes:
            twice.add(name)
            if name in lists:
                raise InputError(f"{url}: two members are called {name}; pack it again with one of them")
        if len(sizes) == MOST_MEMBERS:
            raise InputError(f"{url}: more than {MOST_MEMBERS:,} files; split the archive")
        sizes.setdefault(name, member.size)
        if member.issym() or member.islnk():
            links.add(name)
        elif not member.isfile():
            others.add(name)
        elif posixpath.basename(name) in (*ID_LISTS.values(), FFHQ_METADATA):
            require_list_size(url, name, member.size)
            lists[name] = read()
    top = _top_folder(sizes)
    kept = {name.removeprefix(top): data for name, data in lists.items()}
    return FileTable(
        url,
        {name.removeprefix(top): size for name, size in sizes.items()},
        lambda key: io.BytesIO(kept[key]),
        links=frozenset(name.removeprefix(top) for name in links),
        others=frozenset(name.removeprefix(top) for name in others),
        twice=frozenset(name.removeprefix(top) for name in twice),
        top=top,
    )


def _top_folder(names: dict[str, int]) -> str:
    known = (*FFHQ_FOLDERS.values(), "")
    tops = {name.split("/", 1)[0] if "/" in name else "" for name in names}
    top = tops.pop() if len(tops) == 1 else ""
    # FastComposer's first thousand pictures are in one folder, which belongs to their names.
    return "" if top in known or has_triples(names) else f"{top}/"


def read_records(url: str, top: str, records: Sequence[Record]) -> Iterator[tuple[Record, dict[str, bytes]]]:
    """Yield the records, each with the bytes of its files by name.

    Args:
        url: the archive.
        top: the folder that the listing left off, with its slash, or "".
        records: those to read, in the order of `list_source`, which is the archive's.

    Raises:
        InputError: the files of one picture stand too far apart to be read in place, or the archive changed meanwhile.
    """
    owners: dict[str, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        for key in record.files:
            owners[key].append(index)
    missing = [len(record.files) for record in records]
    waiting: dict[str, bytes] = {}
    following = held = 0
    for name, member, read in _members(url):
        key = name.removeprefix(top)
        # A file whose owners have all been yielded stands here once more.
        if key not in owners or key in waiting or owners[key][-1] < following or not member.isfile():
            continue
        waiting[key] = zlib.compress(read(), 1)
        held += len(waiting[key])
        for index in owners[key]:
            missing[index] -= 1
        while following < len(records) and not missing[following]:
            record = records[following]
            yield record, {file: zlib.decompress(waiting[file]) for file in record.files}
            for file in record.files:
                if owners[file][-1] == following:
                    held -= len(waiting.pop(file))
            following += 1
        if held > WAITING_LIMIT:
            raise InputError(f"{url}: the files of one picture stand too far apart to read in place; unpack it first")
    # Those rejected by name have no files, so that none may have been met that brings them.
    while following < len(records) and not missing[following]:
        yield records[following], {}
        following += 1
    if following < len(records):
        raise InputError(f"{url}: changed while it was read; run again")


class _Header(tarfile.TarInfo):
    """A member's header; tarfile would take a damaged one for the end of the archive and stop there without a word."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise  # a block of zeros: the end, which `_require_end` looks behind
            reason = "it ends without the blocks that close it" if not buf else f"header: {error}"
            raise tarfile.ReadError(reason) from error
        if header.type in _ATTRIBUTES and not 0 <= header.size <= MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"{header.size:,} bytes of names and attributes, at most {MOST_HEADER_BYTES:,}")
        if header.size < 0:
            raise tarfile.ReadError(f"a member of {header.size} bytes")
        return header


@contextmanager
def _archive_errors(url: str) -> Iterator[None]:
    """Turn whatever a damaged archive makes tarfile and gzip raise into one line."""
    try:
        yield
    except (InputError, StorageError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise InputError(f"{url}: no such file; check the URL") from error
    except (IsADirectoryError, PermissionError) as error:
        raise InputError(f"{url}: cannot be read ({error.strerror}); give a .tgz or .tar file") from error
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError) as error:
        raise InputError(f"{url}: damaged archive ({error}); fetch it again") from error


@contextmanager
def _opened(url: str) -> Iterator[BinaryIO | gzip.GzipFile]:
    """Yield the archive's bytes, unpacked; gzip's checksum is compared when they are read to the end."""
    parent, name = posixpath.split(url)
    with open_store(parent or ".").open(name, READ_BYTES) as stream:
        packed = stream.read(len(GZIP_MAGIC)) == GZIP_MAGIC
        stream.seek(0)
        if not packed:
            yield stream
            return
        with gzip.GzipFile(fileobj=stream, mode="rb") as unpacked:
            yield unpacked


def _members(url: str) -> Iterator[tuple[str, tarfile.TarInfo, Callable[[], bytes]]]:
    """Yield each member's name, header, and how to read it; InputError unless the archive is whole to its last byte.

    Of an archive without compression the headers have checksums, the files do not: what is damaged in them shows when
    the picture is decoded, if at all.
    """
    with _archive_errors(url):
        with _opened(url) as stream, tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header) as archive:

            def read() -> bytes:
                with _archive_errors(url):
                    file = archive.extractfile(member)
                    return file.read() if file else b""

            for member in archive:
                if len(member.name) > LONGEST_NAME:
                    raise tarfile.ReadError(f"a name of {len(member.name):,} characters")
                parts = member.name.split("/")
                if member.name.startswith("/") or ".." in parts:
                    raise InputError(
                        f"{url}: member {member.name!r} leads out of the archive; such an archive is not read"
                    )
                yield "/".join(part for part in parts if part not in ("", ".")), member, read
                # tarfile remembers each member it has met, which is no use in a stream and grows with it.
                archive.members.clear()  # type: ignore[attr-defined]  # no part of its interface
            _require_end(archive.fileobj)  # type: ignore[arg-type]  # what it reads from; None once closed


def _require_end(stream: BinaryIO) -> None:
    """Read what stands behind the first closing block; ReadError unless it is zeros to the end."""
    while block := stream.read(READ_BYTES):
        if block.strip(b"\0"):
            raise tarfile.ReadError("more data behind its end: several archives in one file, or a header of zeros")
