"""An archive is read whole or refused: no bit of it is lost without a word, and nothing in it fills the memory."""

import gzip
import io
import os
import random
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from facediffuser.errors import InputError
from facediffuser.preprocess import archives, source_files
from facediffuser.preprocess.archives import read_records
from facediffuser.preprocess.sources import list_source

BLOCK = tarfile.BLOCKSIZE
PICTURES = {f"{number}.png": random.Random(number).randbytes(40 + number) for number in range(6)}
GZIP_HEADER = 10
SHOWN = "damaged archive"


def packed(members: dict[str, bytes], mode: str = "w", format: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def pictures_in(path: Path) -> dict[str, bytes]:
    listing = list_source(str(path))
    read = read_records(str(path), listing.top, listing.records)
    return {record.image: files[record.image] for record, files in read}


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def outcome(path: Path, data: bytes) -> dict[str, bytes] | None:
    """What is read of an archive; None when it is refused as damaged."""
    path.write_bytes(data)
    try:
        return pictures_in(path)
    except InputError as error:
        assert SHOWN in str(error) and path.name in str(error)
        return None


@pytest.mark.parametrize("name", ["set.tgz", "set.tar.gz"])
def test_every_flipped_bit_of_a_packed_archive_is_noticed_or_changes_nothing(tmp_path, name):
    plain = packed(PICTURES)
    data = gzip.compress(plain, 9, mtime=0)
    assert outcome(tmp_path / name, data) == PICTURES
    for bit in random.Random(name).sample(range(GZIP_HEADER * 8, len(data) * 8), 400):
        changed = flipped(data, bit)
        # Of two equal stretches before it a run of bytes may be copied from the other one.
        assert outcome(tmp_path / name, changed) is None or gzip.decompress(changed) == plain
    # gzip's own header has bits without meaning: the time, the system.
    assert all(outcome(tmp_path / name, flipped(data, bit)) in (None, PICTURES) for bit in range(GZIP_HEADER * 8))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_flipped_bit_of_a_header_is_noticed_or_changes_nothing(tmp_path, format):
    data = packed(PICTURES, format=format)
    assert outcome(tmp_path / "set.tar", data) == PICTURES
    noticed = 0
    for member in (0, 2, 5):
        start = member * 2 * BLOCK
        for bit in random.Random(member).sample(range(start * 8, (start + BLOCK) * 8), 150):
            found = outcome(tmp_path / "set.tar", flipped(data, bit))
            assert found in (None, PICTURES)
            noticed += found is None
    # The last two bytes of the checksum are not read.
    assert noticed > 440


def test_a_flipped_bit_outside_of_the_headers_leaves_every_picture_in_its_place(tmp_path):
    # Without compression the files have no checksum: there it is for the decoder to notice.
    data = packed(PICTURES)
    for bit in random.Random(1).sample(range(len(data) * 8), 300):
        if bit // 8 // BLOCK % 2 == 0 and bit // 8 < 12 * BLOCK:
            continue
        found = outcome(tmp_path / "set.tar", flipped(data, bit))
        if bit // 8 >= 12 * BLOCK:
            assert found is None, "the closing blocks are zeros"
        else:
            assert found.keys() == PICTURES.keys()
            assert sum(found[name] != PICTURES[name] for name in found) <= 1


def long_names() -> dict[str, bytes]:
    return {f"{'folder/' * 30}{name}": data for name, data in PICTURES.items()}


@pytest.mark.parametrize("damage", [
    lambda data: data[: 5 * BLOCK],
    lambda data: data[: 6 * BLOCK],
    lambda data: data[: 12 * BLOCK],
    lambda data: data + data,
    lambda data: data + b"\0" * BLOCK + b"x",
    lambda data: data[: 4 * BLOCK] + b"\0" * BLOCK + data[5 * BLOCK :],
    lambda data: data[: 4 * BLOCK] + data[5 * BLOCK :],
    lambda data: gzip.compress(data)[:-1],
    lambda data: gzip.compress(data)[:-8],
    lambda data: gzip.compress(data) + b"garbage",
    lambda data: gzip.compress(data[: 6 * BLOCK]),
    lambda data: b"BZh9" + data,
    lambda data: b"",
    lambda data: b"\x1f\x8b",
])  # fmt: skip
def test_an_archive_cut_or_joined_is_refused(tmp_path, damage):
    with pytest.raises(InputError, match=SHOWN):
        (tmp_path / "set.tgz").write_bytes(damage(packed(PICTURES)))
        pictures_in(tmp_path / "set.tgz")


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_whole_archives_of_each_kind_are_read(tmp_path, format):
    for members in (PICTURES, long_names()):
        data = packed(members, format=format)
        alone = next(size for size in range(len(data), 0, -BLOCK) if data[size - BLOCK : size].strip(b"\0"))
        wanted = list(PICTURES.values())
        for kept in (data, data[: alone + BLOCK], data + b"\0" * BLOCK * 40, gzip.compress(data),
                     gzip.compress(data[:BLOCK]) + gzip.compress(data[BLOCK:]) + b"\0" * 99):  # fmt: skip
            assert list(outcome(tmp_path / "set.tgz", kept).values()) == wanted


def header(name: str, size: int, kind: bytes, **more) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for field, value in more.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_names_and_attributes_that_would_fill_the_memory_are_refused(tmp_path, kind):
    size = 200 << 20
    with gzip.open(tmp_path / "set.tgz", "wb", compresslevel=1) as file:
        file.write(packed(PICTURES)[: 12 * BLOCK] + header("x", size, kind))
        for _ in range(size >> 20):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    with pytest.raises(InputError, match="damaged archive .209,715,200 bytes of names"):
        pictures_in(tmp_path / "set.tgz")
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()


def test_a_list_that_would_fill_the_memory_is_refused_before_it_is_read(tmp_path):
    with gzip.open(tmp_path / "set.tgz", "wb", compresslevel=1) as file:
        file.write(packed(PICTURES)[: 12 * BLOCK] + header("image_ids.txt", 1500 << 20, tarfile.REGTYPE))
    with pytest.raises(InputError, match="image_ids.txt has 1,572,864,000 bytes, at most 16,777,216 are read"):
        list_source(str(tmp_path / "set.tgz"))
    folder = tmp_path / "set"
    folder.mkdir()
    for name, most in (("image_ids.txt", source_files.MOST_LIST_BYTES),
                       ("ffhq-dataset-v2.json", source_files.MOST_METADATA_BYTES)):  # fmt: skip
        (folder / "images1024x1024").mkdir(exist_ok=True)
        (folder / "images1024x1024" / "00000.png").write_bytes(b"x")
        with open(folder / name, "wb") as file:
            file.truncate(most + 1)
        with pytest.raises(InputError, match=f"{name} has "):
            list_source(str(folder), "ffhq-fastcomposer" if name.endswith("txt") else "ffhq")


def test_places_that_are_no_archive_are_reported(tmp_path):
    (tmp_path / "folder.tgz").mkdir()
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "zero.tar").symlink_to("/dev/zero")
    for name, says in (("folder.tgz", "cannot be read"), ("pipe.tar", "not a regular file"), ("none.tar", "no such file"),
                       ("zero.tar", "not a regular file")):  # fmt: skip
        with pytest.raises(InputError, match=f"{name}: {says}"):
            list_source(str(tmp_path / name))
    names = {f"{'x' * 5000}.png": b"x"}
    with pytest.raises(InputError, match="damaged archive .a name of 5,004 characters"):
        outcome(tmp_path / "set.tar", packed(names)) and pytest.fail("taken")
        pictures_in(tmp_path / "set.tar")


def test_what_stands_twice_in_an_archive_or_is_no_file_is_rejected_by_name(tmp_path):
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("0.png", "1.png", "./1.png", "2.png", "./2.txt", "2.txt"):
            info = tarfile.TarInfo(name)
            info.size = 5
            tar.addfile(info, io.BytesIO(b"12345"))
        kinds = {"pipe.png": tarfile.FIFOTYPE, "device.png": tarfile.CHRTYPE, "folder.png": tarfile.DIRTYPE}
        for name, kind in kinds.items():
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
    found = {record.image: record.problem for record in list_source(str(path)).records}
    assert found.keys() == {"0.png", "1.png", "2.png", "pipe.png", "device.png"} and found["0.png"] is None
    assert found["1.png"].startswith("name stands twice: 1.png") and found["2.png"].startswith(
        "name stands twice: 2.txt"
    )
    assert all(found[name].startswith(f"not a file: {name}") for name in ("pipe.png", "device.png"))
    listing = list_source(str(path))
    read = {record.image: files for record, files in read_records(str(path), listing.top, listing.records)}
    assert {name: bool(files) for name, files in read.items()} == {
        name: problem is None for name, problem in found.items()
    }


def test_a_list_of_ids_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "set.tar"
    path.write_bytes(packed({"image_ids.txt": b"00000", "./image_ids.txt": b"00001"}))
    with pytest.raises(InputError, match="set.tar: two members are called image_ids.txt; pack it again"):
        list_source(str(path))


def test_an_archive_names_so_many_members_at_most(tmp_path, monkeypatch):
    path = tmp_path / "set.tgz"
    path.write_bytes(gzip.compress(packed(PICTURES)))
    monkeypatch.setattr(archives, "MOST_MEMBERS", len(PICTURES) - 1)
    with pytest.raises(InputError, match="set.tgz: more than 5 files; split the archive"):
        list_source(str(path))
