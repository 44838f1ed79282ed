"""Every file is either an upright RGB picture or rejected with its reason; good ones are kept byte for byte."""

import hashlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from facediffuser.pictures import Rejection
from facediffuser.preprocess.read_pictures import read_picture


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    ramp = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3).astype(np.uint8)
    return Image.fromarray(ramp).convert(mode)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(20_000 * 3 + 1))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


RED = Image.new("RGB", (40, 30), "red")
SIXTEEN_BITS = Image.fromarray(np.asarray(picture("L")).astype(np.uint16) * 257)
BAD = {
    "zero bytes": (b"", "empty file"),
    "text": (b"this is no picture, though its name ends in .png", "not a picture"),
    "truncated JPEG": (saved(picture(), "JPEG")[:-200], "damaged picture"),
    "header only": (saved(picture(), "PNG")[:50], "damaged picture"),
    "damaged PNG": (saved(picture(), "PNG")[:80] + b"\0" * 400, "damaged picture"),
    "animated GIF": (saved(picture(), "GIF", save_all=True, append_images=[RED]), "moving picture"),
    "animated WebP": (saved(picture(), "WEBP", save_all=True, append_images=[RED]), "moving picture"),
    "bomb": (bomb(), "too large"),
    "above the limit": (saved(picture(size=(1100, 1000)), "PNG"), "too large"),
    "small": (saved(picture(size=(100, 19)), "PNG"), "too small"),
    "floating point": (saved(Image.new("F", (40, 30)), "TIFF"), "unknown pixels"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_rejected_with_its_reason(name):
    data, kind = BAD[name]
    with pytest.raises(Rejection) as rejection:
        read_picture(data, "a/b.png", min_side=20, max_megapixels=1)
    assert rejection.value.kind == kind
    assert rejection.value.reason.startswith(f"{kind}: ") and "\n" not in rejection.value.reason


@pytest.mark.parametrize(("mode", "kind"), [("RGB", "JPEG"), ("L", "JPEG"), ("RGB", "PNG"), ("RGB", "WEBP")])
def test_a_good_file_is_kept_byte_for_byte(mode, kind):
    data = saved(picture(mode), kind)
    result = read_picture(data, "ä b.jpg")
    assert result.data == data and result.path == "ä b.jpg"
    assert result.sha256 == hashlib.sha256(data).hexdigest()
    assert result.image.mode == "RGB" and result.image.size == (40, 30)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_picture_turned_by_exif_is_stored_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    result = read_picture(saved(picture(), "JPEG", exif=exif, quality=95), "a.jpg")
    stored = Image.open(io.BytesIO(result.data))
    assert stored.size == result.image.size == ((30, 40) if orientation >= 5 else (40, 30))
    assert stored.getexif().get(0x0112, 1) == 1
    np.testing.assert_allclose(np.asarray(stored).astype(int), np.asarray(result.image).astype(int), atol=8)


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (picture("CMYK"), "JPEG"),
        (picture("RGBA"), "PNG"),
        (picture("P"), "GIF"),
        (picture("P"), "PNG"),
        (picture("1"), "PNG"),
        (SIXTEEN_BITS, "PNG"),
        (SIXTEEN_BITS, "TIFF"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.mode,
)
def test_other_pixels_become_rgb_of_the_same_look(image, kind):
    result = read_picture(saved(image, kind), "folder.with.dots/a.b.tif")
    stored = Image.open(io.BytesIO(result.data))
    assert stored.mode == "RGB" and result.path.startswith("folder.with.dots/a.b.")
    expected = (picture("L") if "16" in image.mode else image).convert("RGB")
    np.testing.assert_allclose(np.asarray(stored).astype(int), np.asarray(expected).astype(int), atol=8)


def test_what_is_transparent_becomes_white():
    clear = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    assert read_picture(saved(clear, "PNG"), "a.png").image.getpixel((3, 3)) == (255, 255, 255)
    grey = saved(Image.new("L", (8, 8), 7), "PNG", transparency=7)
    assert read_picture(grey, "a.png").image.getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize(("encode", "ending"), [("same", "png"), ("jpeg", "jpg"), ("png", "png")])
def test_larger_pictures_are_reduced_to_the_chosen_shorter_side(encode, ending):
    result = read_picture(saved(picture(size=(90, 60)), "PNG"), "a.png", size=40, encode=encode)
    assert result.image.size == (60, 40) and result.path == f"a.{ending}"
    assert Image.open(io.BytesIO(result.data)).size == (60, 40)


def test_smaller_pictures_are_never_enlarged():
    data = saved(picture(), "PNG")
    assert read_picture(data, "a.png", size=512).data == data


def test_pixels_that_are_not_ffhqs_are_rejected():
    data = saved(picture(), "PNG")
    right = hashlib.md5(np.asarray(picture()).tobytes()).hexdigest()
    assert read_picture(data, "a.png", pixel_md5=right).data == data
    with pytest.raises(Rejection, match="does not match its metadata"):
        read_picture(data, "a.png", pixel_md5="0" * 32)
