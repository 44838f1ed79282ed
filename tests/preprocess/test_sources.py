"""Every layout is recognised and listed whole: a picture is listed, or rejected for a reason, or the source refused."""

import io
import itertools
import json
import os
import tarfile
from pathlib import Path
from random import Random

import pytest

from facediffuser.errors import InputError
from facediffuser.preprocess import archives
from facediffuser.preprocess.archives import read_records
from facediffuser.preprocess.sources import list_source


def write(root: Path, *names: str, data: bytes = b"x") -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def triple(image_id: str) -> tuple[str, str, str]:
    return tuple(f"{image_id[:5]}/{image_id}{ending}" for ending in (".jpg", ".json", ".npy"))


@pytest.fixture
def fastcomposer(tmp_path: Path) -> Path:
    root = write(tmp_path / "set", *triple("00000001"), *triple("00000002"), *triple("00000003"))
    (root / "image_ids.txt").write_text("00000001\n00000002\n00000003\n")
    (root / "image_ids_train.txt").write_text("00000001\n00000003\n")
    (root / "image_ids_test.txt").write_text("00000002\n")
    return root


def archive(path: Path, members: list[tuple[str, bytes]], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_fastcomposers_copy_with_its_own_splits(fastcomposer):
    listing = list_source(str(fastcomposer))
    assert listing.format == "ffhq-fastcomposer" and listing.has_splits
    assert [(record.image_id, record.split) for record in listing.records] == [
        ("00000001", "train"),
        ("00000002", "test"),
        ("00000003", "train"),
    ]
    assert listing.records[0].files == triple("00000001")
    assert listing.ignored == 0


def test_fastcomposers_copy_without_lists_is_known_by_its_triples(fastcomposer):
    for path in fastcomposer.glob("*.txt"):
        path.unlink()
    listing = list_source(str(fastcomposer))
    assert listing.format == "ffhq-fastcomposer" and len(listing.records) == 3 and not listing.has_splits


def test_a_listed_picture_without_its_files_is_rejected_not_missing(fastcomposer):
    (fastcomposer / "00000" / "00000002.npy").unlink()
    (fastcomposer / "image_ids.txt").write_text("00000001\n00000002\n00000003\n77777777\n")
    (fastcomposer / "image_ids_test.txt").write_text("00000002\n00000003\n")
    one, two, both, none = list_source(str(fastcomposer)).records
    assert one.problem is None
    assert two.problem == "missing file: no segmentation map .npy"
    assert both.problem.startswith("in two splits: ")
    assert none.problem == "missing file: no picture, no annotation .json, no segmentation map .npy"


def test_files_that_belong_to_no_picture_are_counted(fastcomposer):
    write(fastcomposer, "subjects/1/1.jpg", "subjects/2/1.jpg", "prompts.jsonl", "00000/00000009.jpg")
    listing = list_source(str(fastcomposer))
    assert len(listing.records) == 3 and listing.ignored == 4
    said = "beside the pictures of the set: 4 other files (00000/00000009.jpg, prompts.jsonl, subjects/)"
    assert listing.left_out_line() == said


def ffhq(root: Path, ids: list[str], described: list[str] | None = None, folder: str = "images1024x1024") -> Path:
    write(root, *(f"{folder}/{int(i) // 1000 * 1000:05d}/{i}.png" for i in ids))
    if described is not None:
        metadata = {
            str(int(i)): {
                "category": "training" if int(i) < 60000 else "validation",
                "metadata": {"author": "Ada", "license": "Public Domain Mark", "country": ""},
                "image": {"pixel_md5": "aligned", "face_landmarks": [[1.0, 2.0]]},
                "in_the_wild": {"pixel_md5": "wild", "face_rect": [0, 0, 9, 9]},
            }
            for i in described
        }
        (root / "ffhq-dataset-v2.json").write_text(json.dumps(metadata, indent=1))
    return root


def test_ffhq_as_published(tmp_path):
    root = ffhq(tmp_path, ["00000", "00999", "60000"], ["00000", "60000"])
    write(root, "LICENSE.txt", "images1024x1024/cover.png")
    listing = list_source(str(root))
    assert listing.format == "ffhq" and listing.ignored == 1
    first, second, last, odd = listing.records
    assert (first.image_id, first.split, first.licence, first.author) == ("00000", "train", "Public Domain Mark", "Ada")
    assert first.pixel_md5 == "aligned" and last.split == "test"
    assert second.problem.startswith("not in the metadata: ") and odd.problem.startswith("not an FFHQ name: ")


def test_two_files_of_one_id_are_one_picture_and_one_rejection(tmp_path):
    root = write(ffhq(tmp_path, ["00000"]), "images1024x1024/00000/00000.jpg")
    one, two = list_source(str(root)).records
    assert {one.problem, two.problem} == {None, "id stands twice: another file has it too"}


def test_ffhq_without_its_json_is_split_by_its_ids(tmp_path):
    root = ffhq(tmp_path, ["59999", "60000"], folder="in-the-wild-images")
    assert [record.split for record in list_source(str(root)).records] == ["train", "test"]


def test_of_two_picture_sets_of_ffhq_the_chosen_one_is_read(tmp_path):
    root = ffhq(ffhq(tmp_path, ["00000"]), ["00001"], ["00000", "00001"], "in-the-wild-images")
    assert [record.image_id for record in list_source(str(root)).records] == ["00000"]
    (wild,) = list_source(str(root), ffhq_images="in-the-wild").records
    assert (wild.image_id, wild.pixel_md5) == ("00001", "wild")
    with pytest.raises(InputError, match="no folder thumbnails128x128"):
        list_source(str(root), ffhq_images="thumbnails")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"0": 1}', '{"0": {}}', '{"a": {"category": "training"}}'])
def test_a_damaged_ffhq_json_is_refused(tmp_path, text):
    root = ffhq(tmp_path, ["00000"])
    (root / "ffhq-dataset-v2.json").write_text(text)
    with pytest.raises(InputError, match="ffhq-dataset-v2.json is damaged"):
        list_source(str(root))


def test_a_plain_folder_with_any_names(tmp_path):
    root = write(tmp_path, "b/ä ö.JPG", "a.png", "a.txt", "notes.md", ".hidden.png", "c/x.gif")
    listing = list_source(str(root))
    assert listing.format == "folder" and listing.ignored == 2 and not listing.has_splits
    assert [(record.image_id, record.annotation) for record in listing.records] == [
        ("a.png", "a.txt"),
        ("b/ä ö.JPG", None),
        ("c/x.gif", None),
    ]


def test_linked_folders_are_read_and_what_is_no_file_is_rejected(tmp_path):
    root, elsewhere = tmp_path / "photos", write(tmp_path / "elsewhere", "far.png", "deep/er.png")
    write(root, "a.png")
    (root / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    (root / "b.png").symlink_to(elsewhere / "far.png")
    (root / "nowhere.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(root / "pipe.png")
    records = {record.image: record.problem for record in list_source(str(root)).records}
    assert {name for name, problem in records.items() if problem is None} == {
        "a.png", "b.png", "linked/far.png", "linked/deep/er.png",
    }  # fmt: skip
    assert records["nowhere.png"] == "not a file: nowhere.png is a link that leads nowhere, a pipe or the like"
    assert records["pipe.png"].startswith("not a file: ") and len(records) == 6


def test_names_that_are_no_text_are_rejected(tmp_path):
    with open(bytes(tmp_path) + b"/\xff.png", "wb") as file:
        file.write(b"x")
    write(tmp_path, "new\nline.png")
    newline, latin = sorted(list_source(str(tmp_path)).records, key=lambda record: record.problem)
    assert {newline.problem.split(":")[0], latin.problem.split(":")[0]} == {"unreadable name"}
    for record in (newline, latin):
        assert record.image.encode() and "\n" not in record.image


@pytest.mark.parametrize("names", [(), ("readme.txt",)])
def test_a_source_without_pictures_is_refused(tmp_path, names):
    with pytest.raises(InputError, match="no files there|no pictures.*other file left out: readme.txt"):
        list_source(str(write(tmp_path, *names)))


def test_a_missing_source_is_refused(tmp_path):
    for name in ("none", "none.tgz"):
        with pytest.raises(InputError, match="no such"):
            list_source(str(tmp_path / name))


def test_the_digest_changes_with_the_source(fastcomposer):
    before = list_source(str(fastcomposer)).digest
    assert list_source(str(fastcomposer)).digest == before
    (fastcomposer / "00000" / "00000001.jpg").write_bytes(b"more")
    assert list_source(str(fastcomposer)).digest != before


@pytest.mark.parametrize("top", ["", "./", "ffhq_fastcomposer/", "./ffhq_fastcomposer/"])
@pytest.mark.parametrize("by_ending", [False, True])
def test_an_archive_lists_and_reads_as_its_folder(tmp_path, fastcomposer, top, by_ending):
    names = sorted(path.relative_to(fastcomposer).as_posix() for path in fastcomposer.rglob("*") if path.is_file())
    names.sort(key=lambda name: name.rsplit(".")[-1] if by_ending else name, reverse=by_ending)
    data = {name: (fastcomposer / name).read_bytes() + name.encode() * name.endswith("jpg") for name in names}
    path = archive(tmp_path / "set.tgz", [(f"{top}{name}", data[name]) for name in names])
    listing = list_source(str(path))
    assert listing.archive and listing.format == "ffhq-fastcomposer" and listing.ignored == 0
    assert listing.records == list_source(str(fastcomposer)).records
    read = list(read_records(str(path), listing.top, listing.records))
    assert [record for record, _ in read] == listing.records
    for record, files in read:
        assert files == {name: data[name] for name in record.files}
    (only,) = read_records(str(path), listing.top, listing.records[1:2])
    assert only[0] == listing.records[1]


def test_an_archive_of_one_of_fastcomposers_folders_lists_as_its_folder(tmp_path):
    names = (*triple("00000001"), *triple("00000002"))
    folder = list_source(str(write(tmp_path / "set", *names)))
    for top in ("", "some/"):
        path = archive(tmp_path / "set.tar", [(f"{top}{name}", b"x") for name in names], "w")
        listing = list_source(str(path))
        assert (listing.format, listing.records, listing.top) == ("ffhq-fastcomposer", folder.records, top)
        assert len(list(read_records(str(path), listing.top, listing.records))) == 2


def test_pictures_of_an_archive_may_share_a_caption(tmp_path):
    names = ["p/x.jpg", "p/x.png", "p/x.txt", "p/x.webp", "q.png"]
    for order in itertools.permutations(names):
        path = archive(tmp_path / "set.tar", [(name, name.encode()) for name in order], "w")
        listing = list_source(str(path))
        assert {record.image: record.annotation for record in listing.records} == {
            "p/x.jpg": "p/x.txt", "p/x.png": "p/x.txt", "p/x.webp": "p/x.txt", "q.png": None,
        }  # fmt: skip
        for records in (listing.records, listing.records[1:], listing.records[-1:]):
            read = list(read_records(str(path), listing.top, records))
            assert [record for record, _ in read] == records
            assert all(files == {name: name.encode() for name in record.files} for record, files in read)


def test_a_caption_is_held_no_longer_than_pictures_wait_for_it(tmp_path, monkeypatch):
    random = Random(0)
    members = [(f"{n}{end}", random.randbytes(999)) for n in range(9) for end in (".jpg", ".png", ".txt")]
    path = archive(tmp_path / "set.tar", members, "w")
    listing = list_source(str(path))
    monkeypatch.setattr(archives, "WAITING_LIMIT", 3 * 1100)
    assert len(list(read_records(str(path), listing.top, listing.records))) == 18
    monkeypatch.setattr(archives, "WAITING_LIMIT", 1100)
    with pytest.raises(InputError, match="stand too far apart"):
        list(read_records(str(path), listing.top, listing.records))


def test_records_that_are_rejected_by_name_need_no_file_of_the_archive(tmp_path):
    path = archive(tmp_path / "set.tar", [("a.jpg", b"x"), ("notes.md", b"x")], "w")
    with tarfile.open(path, "a") as tar:
        for name in ("b.jpg", "c.jpg"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    listing = list_source(str(path))
    linked = [record for record in listing.records if record.problem]
    assert list(read_records(str(path), listing.top, linked)) == [(record, {}) for record in linked]
    assert len(linked) == 2 and list(read_records(str(path), listing.top, [])) == []


@pytest.mark.parametrize("name", ["../evil.jpg", "a/../../evil.jpg", "/etc/evil.jpg"])
def test_an_archive_with_a_name_that_leads_out_of_it_is_refused(tmp_path, name):
    path = archive(tmp_path / "set.tgz", [("a.jpg", b"x"), (name, b"x")])
    with pytest.raises(InputError, match="leads out of the archive"):
        list_source(str(path))


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"no archive", lambda data: b""])
def test_a_damaged_archive_is_refused(tmp_path, damage):
    path = archive(tmp_path / "set.tgz", [(f"{number}.jpg", bytes(range(256)) * 99) for number in range(9)])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="damaged archive|no files there"):
        list_source(str(path))


def test_a_link_inside_of_an_archive_is_rejected(tmp_path):
    path = archive(tmp_path / "set.tar", [("a.jpg", b"x")], "w")
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    linked, good = sorted(list_source(str(path)).records, key=lambda record: record.problem is None)
    assert linked.problem.startswith("a link: ") and good.image == "a.jpg"
