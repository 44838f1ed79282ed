"""Every bad input has its outcome: a prepared row, a rejected one with the reason, or a refusal; none is lost."""

import io
import json
import shutil
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from preprocess.conftest import COUNT, contents, prepare
from preprocess.tiny_models import tiny_blip
from skimage import data

from facediffuser.errors import InputError
from facediffuser.preprocess import parts, sources
from facediffuser.preprocess.photo_stages import Faces, Job
from facediffuser.preprocess.prepare import PartPreparer
from facediffuser.preprocess.preprocess_check import check_preprocess
from facediffuser.preprocess.preprocess_settings import PreprocessSettings
from facediffuser.preprocess.read_pictures import read_picture
from facediffuser.preprocess.required_models import needed_models
from facediffuser.preprocess.source_files import Record
from facediffuser.preprocess.sources import list_source


def rows(output: Path, *folders: str) -> list[dict]:
    paths = [path for folder in folders for path in sorted((output / folder).glob("*.parquet"))]
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, bits: int, packed: bytes) -> bytes:
    """An RGB PNG around rows that are compressed already."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def bomb(side: int = 20_000) -> bytes:
    """A whole black PNG of side x side pixels: about a megabyte that decodes to 1.2 GB, made without holding them."""
    rows_at_once = 100
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = deflate.compress(bytes(rows_at_once * (3 * side + 1))) + deflate.flush(zlib.Z_FULL_FLUSH)
    # After a full flush nothing refers back, so the block may be repeated; Adler-32 of n zeros is n mod 65521, then 1.
    total = side * (3 * side + 1)
    packed = b"\x78\xda" + block * (side // rows_at_once) + deflate.flush(zlib.Z_FINISH)
    return png(side, side, 8, packed + struct.pack(">HH", total % 65_521, 1))


def test_the_bomb_of_these_tests_is_a_whole_picture():
    small = read_picture(bomb(200), "small.png").image
    assert small.size == (200, 200) and small.getextrema() == ((0, 0), (0, 0), (0, 0))
    assert 500_000 < len(bomb()) < 3_000_000


ASTRONAUT = Image.fromarray(data.astronaut()).crop((128, 0, 320, 192))
GREY16 = Image.fromarray(np.asarray(ASTRONAUT.convert("L")).astype(np.uint16) * 257)
COLOUR16 = png(192, 192, 16, zlib.compress(b"".join(
    b"\0" + (row.astype(">u2") * 257).tobytes() for row in np.asarray(ASTRONAUT)
)))  # fmt: skip
GOOD = {
    "cmyk.jpg": saved(ASTRONAUT.convert("CMYK"), "JPEG", quality=95),
    "grey 16 bits.png": saved(GREY16, "PNG"),
    "colour 16 bits.png": COLOUR16,
    "still.gif": saved(ASTRONAUT.convert("P"), "GIF"),
    "copy 1.jpg": saved(ASTRONAUT, "JPEG"),
    "copy 2.jpg": saved(ASTRONAUT, "JPEG"),
    "höhle/名前 und ein Leerzeichen.webp": saved(ASTRONAUT, "WEBP"),
    unicodedata.normalize("NFD", "zerlegtes ä.png"): saved(ASTRONAUT.convert("L"), "PNG"),
}
BAD = {
    "truncated.jpg": (saved(ASTRONAUT, "JPEG")[:-400], "damaged picture"),
    "zero.jpg": (b"", "empty file"),
    "text.png": (b"a text file", "not a picture"),
    "moving.gif": (saved(ASTRONAUT, "GIF", save_all=True, append_images=[ASTRONAUT.rotate(9)]), "moving picture"),
    "bomb.png": (bomb(), "too large"),
    "tiny.png": (saved(ASTRONAUT.resize((9, 9)), "PNG"), "too small"),
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    """A plain folder of everything."""
    root = tmp_path_factory.mktemp("zoo") / "photos and others"
    for name, content in {**GOOD, **{name: content for name, (content, _) in BAD.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "notes.md").write_text("no picture")
    return root


@pytest.mark.parametrize("megapixels", [100.0, 1000.0])
def test_what_goes_in_comes_out_prepared_or_rejected_with_its_reason(zoo, tmp_path, here, megapixels):
    result = prepare(zoo, tmp_path / "out", test_share=0.5, max_megapixels=megapixels)
    found = {row["image_id"]: row for row in rows(tmp_path / "out", "train", "test")}
    rejected = {row["path"]: row["reason"].split(":")[0] for row in rows(tmp_path / "out", "rejected")}
    assert rejected == {name: kind for name, (_, kind) in BAD.items()}
    assert set(found) == set(GOOD)
    assert result["pictures"] == len(found) + len(rejected) == result["train"] + result["test"] + result["rejected"]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["counts"]["pictures"] == len(GOOD) + len(BAD) and manifest["source"]["ignored_files"] == 1
    for row in found.values():
        stored = Image.open(io.BytesIO(row["image"]["bytes"]))
        assert stored.mode in ("RGB", "L") and stored.size == (192, 192) == (row["width"], row["height"])
        assert np.abs(np.asarray(stored.convert("L")).astype(int) - np.asarray(ASTRONAUT.convert("L"))).mean() < 12
    assert len({row["split"] for row in found.values()}) == 1, "they are all the same picture"


def test_colour_of_16_bits_is_stored_with_8():
    result = read_picture(COLOUR16, "a.png")
    assert result.data != COLOUR16 and len(result.data) < len(COLOUR16)
    np.testing.assert_array_equal(np.asarray(result.image), np.asarray(ASTRONAUT))


def test_a_file_that_would_fill_the_memory_is_not_read(tmp_path, here, monkeypatch):
    (tmp_path / "photos").mkdir()
    for name, count in (("large.png", 5001), ("good.png", 0)):
        (tmp_path / "photos" / name).write_bytes(bytes(count) or saved(Image.new("RGB", (64, 64)), "PNG"))
    monkeypatch.setattr(sources, "MOST_FILE_BYTES", 5000)
    prepare(tmp_path / "photos", tmp_path / "out")
    (rejected,) = rows(tmp_path / "out", "rejected")
    assert rejected["reason"] == "file too large: large.png has 5,001 bytes, at most 5,000 are read"
    assert len(rows(tmp_path / "out", "train", "test")) == 1


def test_json_that_is_another_pictures_is_rejected(photos, tmp_path, here):
    first = photos / "00000" / "00000000.json"
    said = json.loads(first.read_text())
    ids = np.load(first.with_suffix(".npy"))
    ids[:] = 0
    ids[:4, :4] = said["segments"][0]["id"]
    np.save(first.with_suffix(".npy"), ids)
    said["segments"] = [{**said["segments"][0], "bbox": [30, 40, 60, 64]}]
    first.write_text(json.dumps(said))
    second = photos / "00000" / "00000001.json"
    second.write_text(json.dumps({**json.loads(second.read_text()), "caption": "a man \ud83d"}))
    result = prepare(photos, tmp_path / "out")
    reasons = {row["image_id"]: row["reason"] for row in rows(tmp_path / "out", "rejected")}
    assert reasons["00000000"].endswith("is in [0, 0, 4, 4] of the map, its bbox [30, 40, 60, 64] is elsewhere")
    assert reasons["00000001"] == "damaged annotation: `caption` is no text (character 6 is half of one)"
    assert result["rejected"] == 2 and result["train"] + result["test"] == COUNT - 2


def test_credentials_that_run_out_stop_the_run_and_reject_nothing(tmp_path):
    preparer = PartPreparer(Job(PreprocessSettings(source=str(tmp_path), output=str(tmp_path / "out")), "folder", "f"))

    class Denied:
        url = "s3://bucket"

        def url_of(self, key):
            return f"{self.url}/{key}"

        def get(self, key):
            raise InputError("s3://bucket/a.png: access denied (ExpiredToken)")

    preparer.source = Denied()
    with pytest.raises(InputError, match="ExpiredToken"):
        preparer.prepare(0, [Record("a", "a.png")])
    assert not (tmp_path / "out").exists()
    assert preparer._read_files(Record("b", "a//b.png")) == {}, "a key that no store can hold is that picture's fault"


class Odd(Faces):
    """A stage that fails at every picture with a red corner, and at every one when it is broken."""

    broken = False

    def run(self, items):
        if self.broken or any(item.picture.image.getpixel((0, 0)) == (255, 0, 0) for item in items):
            raise RuntimeError("cannot\nbe")


@pytest.mark.parametrize("count", [1, 3])
def test_a_picture_at_which_a_stage_fails_is_rejected_and_the_others_are_not(tmp_path, count):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (64, 64), "red").save(photos / "red.png")
    for number in range(count - 1):
        Image.new("RGB", (64, 64), (0, number, 0)).save(photos / f"{number}.png")
    settings = PreprocessSettings(source=str(photos), output=str(tmp_path / "out"), captioner="none", segmenter="none")
    job = Job(settings, "folder", "f", device="cpu")
    preparer = PartPreparer(job)
    preparer.stages = [Odd(job, "cpu")]
    counts = preparer.prepare(0, list_source(str(photos)).records)["counts"]
    assert counts["rejected"] == 1 and counts["train"] + counts["test"] == count - 1
    (rejected,) = rows(tmp_path / "out", "rejected")
    assert rejected["reason"] == "cannot be prepared: faces: RuntimeError: cannot be"
    shutil.rmtree(tmp_path / "out")
    preparer.stages[0].broken = True
    with pytest.raises(RuntimeError):
        preparer.prepare(1, list_source(str(photos)).records)


def test_the_terminal_names_what_is_no_picture_and_no_unused_model_is_asked_for(tmp_path, here, caplog):
    photos = tmp_path / "photos"
    photos.mkdir()
    exif = {"exif": b"Exif\0\0Exif\0\0II"}
    for name, kind, options in (("a.png", "PNG", {}), ("b.jfif", "JPEG", {}), ("phone.webp", "WEBP", exif)):
        (photos / name).write_bytes(saved(ASTRONAUT, kind, **options))
    for name in ("c.avif", "d.HEIC", "scan"):
        (photos / name).write_bytes(b"x")
    models = {"captioner": "none", "segmenter": "none", "matcher": str(tmp_path / "no-such-clip")}
    check_preprocess(PreprocessSettings(source=str(photos), output=str(tmp_path / "out"), **models))
    result = prepare(photos, tmp_path / "out", **models)
    assert (result["pictures"], result["rejected"], result["left_out"]) == (3, 0, 3)
    (line,) = [text for text in caplog.messages if "left out" in text]
    assert line.startswith(f"{photos}: 3 other files left out: c.avif, d.HEIC, scan (pictures are named .jpg ")
    (photos / "a.txt").write_text("a woman in an orange suit")
    for matcher, more in ((True, {"segmenter": str(photos)}), (False, {})):
        wanted = PreprocessSettings(source=str(photos), output=str(tmp_path / "other"), **models | more)
        assert ("matcher" in needed_models(wanted, "folder", "some")) == matcher


def test_a_blank_caption_brings_in_no_model_that_was_not_looked_for(tmp_path, here):
    photos = tmp_path / "photos"
    photos.mkdir()
    captions = {"a": "", "b": "a woman", "c": " \r\n", "d": "<|image|>"}
    for name, caption in captions.items():
        Image.new("RGB", (64, 64)).save(photos / f"{name}.png")
        (photos / f"{name}.txt").write_text(caption)
    prepare(photos, tmp_path / "out", captioner="no/such-captioner")
    said = "empty caption: {}.txt has no words; write some, or remove the file and --captioner makes one"
    rejected = {row["path"]: row["reason"] for row in rows(tmp_path / "out", "rejected")}
    assert rejected == {f"{name}.png": said.format(name) for name in "acd"}
    (row,) = rows(tmp_path / "out", "train", "test")
    assert row["caption"] == "a woman"
    assert json.loads((tmp_path / "out/run.json").read_text())["models"] == {}
    prepare(photos, tmp_path / "plain")
    assert sorted(row["caption"] for row in rows(tmp_path / "plain", "train", "test")) == ["", "", "", "a woman"]
    (photos / "b.txt").unlink()
    captioner = str(tiny_blip(tmp_path / "blip"))
    prepare(photos, tmp_path / "made", captioner=captioner, caption_tokens=4)
    assert [bool(row["caption"]) for row in rows(tmp_path / "made", "train", "test")] == [True] * 4
    assert set(json.loads((tmp_path / "made/run.json").read_text())["models"]) == {"captioner"}


def test_a_blank_caption_of_an_annotation_is_rejected(photos, tmp_path, here):
    for number, caption in ((0, ""), (1, "\n ")):
        (photos / "00000" / f"0000000{number}.json").write_text(json.dumps({"caption": caption, "segments": []}))
    prepare(photos, tmp_path / "out", captioner="no/such-captioner")
    reasons = [row["reason"] for row in rows(tmp_path / "out", "rejected")]
    assert reasons == [f"empty caption: 00000/0000000{number}.json has no words; write some" for number in (0, 1)]
    assert len(rows(tmp_path / "out", "train", "test")) == COUNT - 2


@pytest.mark.parametrize("packed", [False, True])
def test_odd_captions_and_names_are_prepared_or_rejected_and_never_end_the_run(tmp_path, here, packed):
    photos = tmp_path / "photos"
    photos.mkdir()
    captions = {
        "a word.png": "x" * 1_100_000,
        "words.png": "a young man, " * 10_000,
        'it\'s "a" $(b) `c` <|image|>.png': "a man \x1b[31m and\x7f a \u202ewoman\u2028 '; -- \"",
        "wide.png": "a man".encode("utf-16-le"),
        "new\nline.png": "a man",
    }
    for name, caption in captions.items():
        Image.new("RGB", (64, 64)).save(photos / name)
        text = caption if isinstance(caption, bytes) else caption.encode()
        (photos / name).with_suffix(".txt").write_bytes(text)
    source = Path(shutil.make_archive(str(tmp_path / "set"), "tar", photos)) if packed else photos
    result = prepare(source, tmp_path / "out")
    assert (result["train"] + result["test"], result["rejected"]) == (3, 2)
    found = {row["image_id"]: row["caption"] for row in rows(tmp_path / "out", "train", "test")}
    assert found == {name: " ".join(caption.split()) for name, caption in list(captions.items())[:3]}
    rejected = {row["path"]: row["reason"] for row in rows(tmp_path / "out", "rejected")}
    assert rejected["wide.png"].startswith("damaged annotation: the caption file has NUL characters, as UTF-16 does")
    assert rejected["new\\nline.png"] == "unreadable name: control characters; rename it"
    assert (tmp_path / "out/card/contact-sheet.png").exists()


def test_authors_are_text_whatever_the_json_says(tmp_path):
    (tmp_path / "images1024x1024").mkdir()
    (tmp_path / "images1024x1024" / "00000.png").write_bytes(b"x")
    entry = {"category": "training", "metadata": {"author": "half \ud83d", "license": 4}}
    (tmp_path / "ffhq-dataset-v2.json").write_text(json.dumps({"0": entry}))
    (record,) = list_source(str(tmp_path)).records
    assert (record.author, record.licence) == ("half ?", "4")


def test_a_source_on_s3_gives_the_rows_of_its_folder(zoo, tmp_path, here, s3_bucket):
    from facediffuser.storage import open_store

    store = open_store(f"{s3_bucket.url}/in")
    for key, content in contents(zoo).items():
        store.put(key, content)
    prepare(f"{s3_bucket.url}/in", f"{s3_bucket.url}/out/prepared")
    prepare(zoo, tmp_path / "out")
    there = open_store(f"{s3_bucket.url}/out/prepared")
    for folder in ("train", "test", "rejected"):
        for path in (tmp_path / "out" / folder).glob("*"):
            remote = pq.read_table(io.BytesIO(there.get(f"{folder}/{path.name}"))).to_pylist()
            assert remote == pq.read_table(path).to_pylist()
    shutil.make_archive(str(tmp_path / "set"), "gztar", zoo)
    store.put("set.tar.gz", (tmp_path / "set.tar.gz").read_bytes())
    assert {record.image for record in list_source(f"{s3_bucket.url}/in/set.tar.gz").records} == {*GOOD, *BAD}


def test_pictures_that_do_not_fit_the_memory_of_a_worker_together_are_refused(tmp_path, monkeypatch):
    source = tmp_path / "photos"
    source.mkdir()
    for number in range(4):
        (source / f"{number}.png").write_bytes(bytes(100))
    settings = {"source": str(source), "output": str(tmp_path / "out"), "captioner": "none", "segmenter": "none"}
    monkeypatch.setattr(parts, "MOST_PART_BYTES", 250)
    with pytest.raises(
        InputError, match="4 pictures from 0.png on take 400 bytes, a part holds at most 250; lower --part"
    ):
        check_preprocess(PreprocessSettings(**settings))
    check_preprocess(PreprocessSettings(**settings, part_size=2))
    assert not (tmp_path / "out").exists()
