"""Picture files: one list of formats, no other reader of Pillow's is started, damaged EXIF is as none."""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from facediffuser.errors import InputError
from facediffuser.pictures import (
    EXTENSIONS,
    Rejection,
    batches_of_files,
    decode_picture,
    is_picture_name,
    left_out_line,
    open_picture,
    orientation,
    rgb_picture,
    stored_picture,
    to_rgb,
)
from facediffuser.preprocess.read_pictures import read_picture
from facediffuser.storage import open_store

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(ran) print\nshowpage\n%%EOF\n"
DAMAGED_EXIF = (
    b"",
    b"II",
    b"Exif\0\0",
    b"Exif\0\0II",
    b"Exif\0\0Exif\0\0II",
    b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
    b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x09\xff\xff\xff\xff\xff\xff\xff\xff",
    b"Exif\0\0" + bytes(range(256)),
)


def picture() -> Image.Image:
    ramp = np.linspace(0, 255, 40 * 30 * 3).reshape(30, 40, 3).astype(np.uint8)
    return Image.fromarray(ramp)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_with(name: bytes, content: bytes) -> bytes:
    """A PNG with one more chunk behind its header."""
    data = saved(picture(), "PNG")
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return data[:33] + chunk + data[33:]


def pictures_with_damaged_exif() -> dict[str, bytes]:
    found = {}
    for number, block in enumerate(DAMAGED_EXIF):
        for kind in ("WEBP", "JPEG", "PNG"):
            found[f"{kind} {number}"] = saved(picture(), kind, exif=block)
        found[f"eXIf {number}"] = png_with(b"eXIf", block)
    for number, text in enumerate(("", "exif", "\nexif\n 4\nzz", "\nexif\n  9\n4949zz", "\nexif\n 4\n4949", "ü")):
        info = PngImagePlugin.PngInfo()
        info.add_text("Raw profile type exif", text)
        found[f"raw profile {number}"] = saved(picture(), "PNG", pnginfo=info)
    return found


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", pictures_with_damaged_exif())
def test_a_picture_whose_exif_is_damaged_is_used_as_if_it_had_none(name):
    data = pictures_with_damaged_exif()[name]
    plain = Image.open(io.BytesIO(data)).convert("RGB").tobytes()
    prepared = read_picture(data, "phone.webp")
    assert prepared.image.size == (40, 30) and prepared.image.tobytes() == plain
    assert rgb_picture(data, "phone.webp").tobytes() == plain
    # Readers of the prepared data turn by EXIF themselves: what they get must not make them fail.
    Image.open(io.BytesIO(prepared.data)).getexif()


@pytest.mark.parametrize("turn", range(2, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_picture_is_turned_once_however_often_it_is_asked_for(kind, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    upright = rgb_picture(saved(picture(), kind, exif=exif, **options), "a")
    assert upright.size == ((30, 40) if turn >= 5 else (40, 30))
    assert orientation(upright) == 1 and to_rgb(upright).tobytes() == upright.tobytes()
    data = saved(picture(), kind, exif=exif, **options)
    assert to_rgb(Image.open(io.BytesIO(data))).tobytes() == upright.tobytes(), "decoded late"
    whole = read_picture(data, "a.jpg")
    assert whole.image.tobytes() == upright.tobytes()
    # Readers that know nothing of EXIF find faces and segments where they are, too.
    assert orientation(Image.open(io.BytesIO(whole.data))) == 1 and whole.data != data
    assert read_picture(data, "a.jpg", size=15).image.size == (upright.width // 2, upright.height // 2)


def test_a_picture_with_exif_that_says_nothing_is_kept_byte_for_byte():
    exif = Image.Exif()
    exif[0x010F] = "camera"
    for kind in ("JPEG", "PNG", "TIFF", "WEBP"):
        data = saved(picture(), kind, exif=exif)
        assert read_picture(data, "a").data == data


@pytest.mark.parametrize("content", [EPS, b"\xc5\xd0\xd3\xc6" + bytes(40), saved(picture(), "EPS")], ids=len)
def test_no_program_is_started_on_a_picture(tmp_path, monkeypatch, content):
    (tmp_path / "0.png").write_bytes(content)
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: started.append(args))
    with pytest.raises(InputError, match="0.png: not a usable picture .not a picture: none of JPEG, PNG"):
        open_picture(open_store(tmp_path), "0.png")
    with pytest.raises(InputError, match="cannot be read"):
        stored_picture(content)
    assert not started


def test_a_picture_over_the_limit_is_too_large_and_others_name_their_fault(tmp_path, monkeypatch):
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    for side in (11_000, 50_000):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""))
        with pytest.raises(InputError, match="a.png: not a usable picture .too large: "):
            open_picture(open_store(tmp_path), "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "huge.png").write_bytes(bytes(1001))
    monkeypatch.setattr("facediffuser.pictures.MOST_FILE_BYTES", 1000)
    for name, says in (("pipe", "not a regular"), ("zero", "not a regular"), ("none", "no such file"),
                       ("folder", "cannot be read"), ("huge", "file too large")):  # fmt: skip
        with pytest.raises(InputError, match=f"{name}.png: {says}"):
            open_picture(open_store(tmp_path), f"{name}.png")


def test_the_names_that_are_pictures_are_one_list():
    assert all(is_picture_name(f"a/b{ending}") and is_picture_name(f"B{ending.upper()}") for ending in EXTENSIONS)
    assert not any(map(is_picture_name, ("a.avif", "b.HEIC", "scan", "a/.hidden.png", "png", "a.png/b")))
    assert left_out_line(["b.HEIC", "a.avif"]).startswith("2 other files left out: a.avif, b.HEIC")
    assert left_out_line([f"{n}.txt" for n in range(2000)]).startswith("2,000 other files left out")
    assert "\n" not in left_out_line(["a\nb"]) and left_out_line(["\udcff"]).encode()


def test_pictures_are_opened_in_one_place_alone(tmp_path):
    """The lint rule that `Image.open` stands in pictures.py alone is there, and finds it."""
    root = Path(__file__).parents[1]
    (tmp_path / "new.py").write_text("from PIL import Image\n\nImage.open('0.png')\n")
    (tmp_path / "other.py").write_text("import PIL.Image as images\n\nimages.open('0.png')\n")
    call = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--no-cache",
        "--config",
        root / "pyproject.toml",
        "--select",
        "TID251",
    ]
    found = subprocess.run([*call, tmp_path], capture_output=True, text=True)
    assert found.returncode == 1 and found.stdout.count("PIL.Image.open") >= 2
    own = subprocess.run([*call, root / "facediffuser", root / "flows", root / "tasks", root / "tools"], text=True)
    assert own.returncode == 0


def test_files_are_read_in_batches_of_a_bounded_size(monkeypatch):
    monkeypatch.setattr("facediffuser.pictures.MOST_BATCH_BYTES", 10)
    sizes = [4, 4, 4, 25, 1, 1, 1, 1]
    assert batches_of_files(sizes, 3, lambda size: size) == [[4, 4], [4], [25], [1, 1, 1], [1]]
    assert batches_of_files([], 3, lambda size: size) == []


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "group4"])
def test_damaged_tiffs_are_rejected_and_nothing_is_printed(compression, capfd, caplog):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).convert("1" if compression == "group4" else "RGB").save(
        sink, "TIFF", compression=compression
    )
    rejected = 0
    for seed in range(40):
        data, random = bytearray(sink.getvalue()), np.random.default_rng(seed)
        for _ in range(20):
            data[random.integers(8, len(data))] ^= 1 << random.integers(8)
        try:
            decode_picture(bytes(data))
        except Rejection:
            rejected += 1
    assert rejected
    assert capfd.readouterr() == ("", "") and not caplog.records
