"""Subjects and prompts: what is taken, and what is refused in one line that names the place and the mend."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from facediffuser.dataset.inputs import Subject, class_words_line, read_prompts, read_subjects
from facediffuser.errors import InputError
from facediffuser.pictures import open_picture
from facediffuser.storage import ObjectInfo, open_store


@pytest.fixture
def people(tmp_path):
    for name in ("bob", "ada"):
        (tmp_path / "people" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "people" / name / "1.png")
    return tmp_path / "people"


def prompts_file(tmp_path, text: str, name="prompts.jsonl") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_subjects_come_sorted_with_their_words(people):
    (people / "subjects.csv").write_text("subject_id,class_word\nada,woman\n")
    (people / "ada" / "0.JPG").write_bytes(b"x")
    (people / "ada" / "notes.txt").write_text("not a picture")
    found = read_subjects(str(people))
    assert [(one.subject_id, one.class_word, one.references) for one in found] == [
        ("ada", "woman", ("ada/0.JPG", "ada/1.png")),
        ("bob", "person", ("bob/1.png",)),
    ]


@pytest.mark.parametrize(
    "key", ["../1.png", "..\\evil/1.png", "a~b/1.png", "a+b/1.png", "a\nb/1.png", "x" * 121 + "/1.png"]
)
def test_a_subject_id_cannot_leave_its_folder(people, monkeypatch, key):
    # A bucket may hold any key; a folder could not.
    monkeypatch.setattr("facediffuser.storage.LocalStore.folders", lambda store: [])
    monkeypatch.setattr("facediffuser.storage.LocalStore.list", lambda store, prefix="": [ObjectInfo(key, 1)])
    with pytest.raises(InputError, match="cannot be a name|no subjects there"):
        read_subjects(str(people))


@pytest.mark.parametrize(("table", "says"), [
    ("subject_id,age\nada,3\n", "unknown column 'age'"),
    ("class_word\nman\n", "no column 'subject_id'"),
    ("subject_id,class_word\neve,woman\n", "'eve' has no folder"),
    ("subject_id,class_word\nada,man\nada,woman\n", "twice"),
    ("subject_id,class_word\nada,a <|image|>\n", "plain word"),
])  # fmt: skip
def test_a_wrong_subjects_table_is_told(people, table, says):
    (people / "subjects.csv").write_text(table)
    with pytest.raises(InputError, match="subjects.csv") as caught:
        read_subjects(str(people))
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["a+b", "a~b", "tab\tin", " blank", "x" * 121])
def test_subject_ids_that_cannot_be_names_are_refused(people, name):
    (people / name).mkdir()
    Image.new("RGB", (8, 8)).save(people / name / "1.png")
    with pytest.raises(InputError, match="cannot be a name"):
        read_subjects(str(people))


def test_folders_without_subjects_or_pictures_are_told(people, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no subjects there"):
        read_subjects(str(tmp_path / "empty"))
    with pytest.raises(InputError, match="no such folder"):
        read_subjects(str(tmp_path / "none"))
    (people / "eve").mkdir()
    for name in ("", "me.heic"):
        if name:
            (people / "eve" / name).write_bytes(b"x")
        with pytest.raises(InputError, match="eve: no picture"):
            read_subjects(str(people))
    for path in (people / "eve").iterdir():
        path.unlink()
    (people / "eve" / "0.png").symlink_to(people / "none.png")
    with pytest.raises(InputError, match="eve/0.png: a link that leads nowhere"):
        read_subjects(str(people))


def test_a_subject_may_be_a_link_to_a_folder(people, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "0.png").write_bytes(b"x")
    (people / "zoe").symlink_to(tmp_path / "elsewhere")
    assert ("zoe", ("zoe/0.png",)) in [(one.subject_id, one.references) for one in read_subjects(str(people))]


@pytest.mark.parametrize("content", [b"", b"this is text", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_an_unreadable_picture_is_told(people, content):
    (people / "ada" / "2.jpg").write_bytes(content)
    with pytest.raises(InputError, match="ada/2.jpg: not a usable picture"):
        open_picture(open_store(people), "ada/2.jpg")


def test_prompts_are_the_same_from_every_kind_of_file(tmp_path):
    rows = [
        {"prompt": "{subject} reading, slowly", "prompt_id": "a", "category": "action"},
        {"prompt": "a man <|image|>", "prompt_id": "b", "category": None},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    table = 'prompt,prompt_id,category\n"{subject} reading, slowly",a,action\na man <|image|>,b,\n'
    (tmp_path / "p.csv").write_text(table)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    read = [read_prompts(str(tmp_path / f"p.{kind}"), 1) for kind in ("jsonl", "csv", "parquet")]
    assert read[0] == read[1] == read[2]
    assert [prompt.category for prompt in read[0]] == ["action", None]


def test_prompts_without_ids_are_numbered(tmp_path):
    path = prompts_file(tmp_path, '{"prompt": "{subject}"}\n{"prompt": "{subject_1} in a park"}\n')
    assert [prompt.prompt_id for prompt in read_prompts(path, 1)] == ["p00000", "p00001"]


def test_each_prompt_says_how_many_subjects_it_shows(tmp_path):
    texts = [
        "{subject}",
        "{subject_1}",
        "a man <|image|>",
        "{subject_2} and {subject_1}",
        "man <|image|>, woman <|image|>",
    ]
    path = prompts_file(tmp_path, "".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    assert [prompt.subjects for prompt in read_prompts(path)] == [1, 1, 1, 2, 2]
    with pytest.raises(InputError, match="prompts.jsonl row 4: .*{subject_2} but an image has 1 subject; leave"):
        read_prompts(path, 1)


@pytest.mark.parametrize(("row", "subjects", "says"), [
    ({"prompt": "an empty beach"}, None, "names no subject; write {subject}"),
    ({"prompt": "{subject} and {subject}"}, None, "write {subject_1}, {subject_2}, each once"),
    ({"prompt": "{subject_1} and {subject_1}"}, None, "write {subject_1}, {subject_2}, each once"),
    ({"prompt": "{subject} and {subject_2}"}, None, "write {subject_1}, {subject_2}"),
    ({"prompt": "{subject_3} and {subject_1}"}, None, "write {subject_1}, {subject_2}, {subject_3}, each once"),
    ({"prompt": "{subject_2} alone"}, None, "write {subject_1}, {subject_2}, each once"),
    ({"prompt": "{subject_999999999}"}, None, "write {subject_1}, {subject_2}, ..., each once"),
    ({"prompt": "{subject} <|image|>"}, None, "one of the two"),
    ({"prompt": "an empty beach"}, 1, "names no subject; write {subject}"),
    ({"prompt": "{subject_1} and {subject_2}"}, 1, "{subject_2} but an image has 1 subject"),
    ({"prompt": "{subject_3} and {subject_1} and {subject_2}"}, 2, "{subject_3}"),
    ({"prompt": "{subject_1} alone"}, 2, "each once"),
    ({"prompt": "{subject} twice, {subject}"}, 1, "each once"),
    ({"prompt": "{subject} and friend"}, 2, "write {subject_1}, {subject_2}"),
    ({"prompt": "{person} reading"}, 1, "{person}"),
    ({"prompt": "man <|image|> and <|image|>"}, 1, "2 <|image|>"),
    ({"prompt": "{subject} <|image|>"}, 1, "one of the two"),
    ({"prompt": "  "}, 1, "empty prompt"),
    ({"prompt": "{subject}", "colour": "red"}, 1, "unknown column 'colour'"),
    ({"text": "{subject}"}, 1, "unknown column 'text'"),
    ({"category": "x"}, 1, "no column 'prompt'"),
    ({"prompt": "{subject}", "prompt_id": "../x"}, 1, "cannot be a name"),
])  # fmt: skip
def test_a_wrong_prompt_is_told_with_its_mend(tmp_path, row, subjects, says):
    with pytest.raises(InputError, match="prompts.jsonl") as caught:
        read_prompts(prompts_file(tmp_path, json.dumps(row) + "\n"), subjects)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "text", "says"), [
    ("prompts.jsonl", "", "no prompts"),
    ("prompts.jsonl", "{subject} reading\n", "row 1: not JSON"),
    ("prompts.jsonl", "[1]\n", "not an object"),
    ("prompts.csv", "prompt\n{subject}, reading\n", "more cells"),
    ("prompts.csv", "prompt,mood\n", "unknown column 'mood'"),
    ("prompts.parquet", "no parquet", "not a Parquet file"),
    ("prompts.yaml", "prompt: x", "unknown kind"),
    ("prompts.jsonl", '{"prompt": "{subject}", "prompt_id": "a"}\n' * 2, "row 2: prompt_id 'a'"),
])  # fmt: skip
def test_a_wrong_prompts_file_is_told(tmp_path, name, text, says):
    with pytest.raises(InputError, match=name) as caught:
        read_prompts(prompts_file(tmp_path, text, name), 1)
    assert says in str(caught.value)


def test_a_missing_prompts_file_is_told(tmp_path):
    with pytest.raises(InputError, match="none.jsonl"):
        read_prompts(str(tmp_path / "none.jsonl"), 1)


def test_the_class_words_in_use_and_how_to_give_one_are_told_in_one_line():
    people = [Subject(name, word, ("1.png",)) for name, word in (("ada", "woman"), ("bob", "person"), ("cy", "person"))]
    line = class_words_line(people)
    assert line.startswith(
        "class words: 'person' for 2 (bob, cy); 'woman' for 1 (ada); 'person' is for subjects without"
    )
    assert "bob,woman below its head subject_id,class_word" in line and "\n" not in line
    assert class_words_line(people[:1]) == "class words: 'woman' for 1 (ada)"
    assert "s4, ..." in class_words_line([Subject(f"s{n}", "man", ()) for n in range(1000)])
