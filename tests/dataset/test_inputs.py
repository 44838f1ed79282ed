"""Subjects and prompts: what is taken, and what is refused in one line that names the place and the mend."""

import contextlib
import errno
import json
import os
import unicodedata

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
def test_a_wrong_subjects_table_is_reported(people, table, says):
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


def test_folders_without_subjects_or_pictures_are_reported(people, tmp_path):
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
def test_an_unreadable_picture_is_reported(people, content):
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
def test_a_wrong_prompt_is_reported_with_its_fix(tmp_path, row, subjects, says):
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
def test_a_wrong_prompts_file_is_reported(tmp_path, name, text, says):
    with pytest.raises(InputError, match=name) as caught:
        read_prompts(prompts_file(tmp_path, text, name), 1)
    assert says in str(caught.value)


def test_a_missing_prompts_file_is_reported(tmp_path):
    with pytest.raises(InputError, match="none.jsonl"):
        read_prompts(str(tmp_path / "none.jsonl"), 1)


def test_the_class_words_in_use_and_how_to_give_one_are_reported_in_one_line():
    people = [Subject(name, word, ("1.png",)) for name, word in (("ada", "woman"), ("bob", "person"), ("cy", "person"))]
    line = class_words_line(people)
    assert line.startswith(
        "class words: 'person' for 2 (bob, cy); 'woman' for 1 (ada); 'person' is for subjects without"
    )
    assert "bob,woman below its head subject_id,class_word" in line and "\n" not in line
    assert class_words_line(people[:1]) == "class words: 'woman' for 1 (ada)"
    assert "s4 and 995 more" in class_words_line([Subject(f"s{n}", "man", ()) for n in range(1000)])


# --- odd bytes, names and numbers ----------------------------------------------------------------------------------------

DEEP = "[" * 200_000
DIGITS = "9" * 5000


@pytest.mark.parametrize(("line", "says"), [
    ('{"prompt": "{subject} \\u0000"}', "character 11 of the prompt is '\\x00'"),
    ('{"prompt": "{subject}\\u0007"}', "character 10 of the prompt is '\\x07'"),
    ('{"prompt": "{subject} \\ud83d"}', "character 11 of the prompt is '\\ud83d'"),
    ('{"prompt": "{subject}", "category": "\\udc00"}', "character 1 of the category"),
    ('{"prompt": "{subject}", "prompt_id": "\\ud83d"}', "cannot be a name"),
    ('{"prompt": "{subject}", "\\ud83d": 1}', "unknown column"),
    ('{"prompt": "{subject}", "prompt": "{subject} at sea"}', "two values are called 'prompt'; keep one"),
    ('{"prompt": "{subject}", "prompt_id": {"a": 1, "a": 2}}', "two values are called 'a'; keep one"),
    ('{"prompt": ["{subject}"]}', "prompt ['{subject}'] is no text"),
    ('{"prompt": NaN}', "prompt nan is no text"),
    ('{"prompt": "{subject} %s"}' % ("x" * 100_001), "prompt of 100,011 characters, at most 100,000; shorten it"),
    ('{"prompt": "{subject}", "prompt_id": [1]}', "prompt_id [1] is no text"),
    (f'{{"prompt": "{{subject}}", "category": {DEEP}}}', "not JSON"),
    (DEEP, "not JSON"),
    ('{"a":' * 100_000, "not JSON"),
    (f'{{"prompt": "{{subject}}", "prompt_id": {DIGITS}}}', "not JSON"),
    (f'{{"prompt": "{{subject_{DIGITS}}}"}}', "is no subject; write {subject}"),
    ('{"prompt": "{%s}"}' % ("x" * 90_000), "is no subject; write {subject}"),
    ('{"prompt": "{subject_\u0661}"}', "is no subject"),
    ('{"prompt": "a woman, <|image|>"}', "<|image|> number 1 stands after 'a woman,'; put it right after the word"),
    ('{"prompt": "a man <|image|> and a woman. <|image|>"}', "number 2 stands after 'and a woman.'"),
    ('{"prompt": "<|image|> a man"}', "at the start"),
    ('{"prompt": "a man <|image|> <|image|>"}', "two <|image|> after one word"),
])  # fmt: skip
def test_a_hostile_line_of_prompts_is_refused_in_one_short_line(tmp_path, line, says):
    good = '{"prompt": "{subject}", "prompt_id": "good"}\n'
    with pytest.raises(InputError, match="prompts.jsonl") as caught:
        read_prompts(prompts_file(tmp_path, good + line + "\n"))
    text = str(caught.value)
    assert says in text and "\n" not in text and len(text) < 700 and text.encode()
    if "column" not in says:
        assert "prompts.jsonl row 2: " in text


def test_json_lines_end_at_line_feeds_alone(tmp_path):
    texts = [f"{{subject}} one{end}two" for end in ("\u2028", "\u2029", "\x85", "\v".replace("\v", " "))]
    path = prompts_file(tmp_path, "\r\n".join(json.dumps({"prompt": text}, ensure_ascii=False) for text in texts))
    assert [prompt.text(["man"]) for prompt in read_prompts(path)] == [
        text.replace("{subject}", "man <|image|>") for text in texts
    ]


@pytest.mark.parametrize("text", ["a man <|image|>", "a man<|image|>", "un garçon <|image|>", "Zoe\u0301 <|image|>",
                                  "person 2 <|image|>, smiling", "女人<|image|>在公园", "महिला <|image|>"])  # fmt: skip
def test_a_marker_after_a_word_of_any_script_is_taken(tmp_path, text):
    (prompt,) = read_prompts(prompts_file(tmp_path, json.dumps({"prompt": text})))
    assert prompt.text([]) == text


@pytest.mark.parametrize(("text", "says"), [
    (",prompt\n0,{subject}\n", "column 1 has no name"),
    ("prompt, \n{subject},x\n", "column 2 has no name"),
    ("prompt,prompt\na,{subject}\n", "two columns are called 'prompt'"),
    ("prompt\n{subject}\x00\n", "prompts.csv row"),
    ("prompt\n" + "{subject}" + "x" * 200_000, "not CSV (field larger"),
    ('prompt\n"{subject}\n', "not CSV"),
])  # fmt: skip
def test_a_hostile_table_of_prompts_is_refused(tmp_path, text, says):
    with pytest.raises(InputError, match="prompts.csv") as caught:
        read_prompts(prompts_file(tmp_path, text, "prompts.csv"))
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.csv"])
def test_bytes_that_are_no_text_are_named_with_their_row(tmp_path, name):
    (tmp_path / name).write_bytes(b'prompt\n{"prompt": "\xff"}\n')
    with pytest.raises(InputError, match=f"{name} row 2: not UTF-8 text"):
        read_prompts(str(tmp_path / name))


def test_parquet_of_no_text_is_refused_with_its_row(tmp_path):
    good, bad = b"{subject}", b"{subject} \xff"
    column = pa.array([good, bad, good], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": column}), tmp_path / "p.parquet")
    with pytest.raises(InputError, match="p.parquet row 2: prompt is not UTF-8 text"):
        read_prompts(str(tmp_path / "p.parquet"))
    whole = (tmp_path / "p.parquet").read_bytes()
    for start in range(0, len(whole), 7):
        (tmp_path / "p.parquet").write_bytes(whole[:start] + bytes([whole[start] ^ 0x55]) + whole[start + 1 :])
        with contextlib.suppress(InputError):
            read_prompts(str(tmp_path / "p.parquet"))


def test_a_parquet_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    pq.write_table(pa.table({"prompt": ["{subject} " + "x" * 10_000] * 5000}), tmp_path / "p.parquet")
    assert (tmp_path / "p.parquet").stat().st_size < 100_000
    monkeypatch.setattr("facediffuser.dataset.input_tables.MOST_TABLE_BYTES", 20_000_000)
    with pytest.raises(InputError, match="p.parquet: holds more than 20,000,000 bytes"):
        read_prompts(str(tmp_path / "p.parquet"))


def test_files_that_cannot_be_read_whole_are_refused(people, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(InputError, match="pipe.jsonl: not a file"):
        read_prompts(str(tmp_path / "pipe.jsonl"))
    path = prompts_file(tmp_path, '{"prompt": "{subject}"}')
    (people / "subjects.csv").write_text("subject_id,class_word\nada,woman\n")

    def denied(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    with monkeypatch.context() as patched:
        patched.setattr("facediffuser.storage.LocalStore.reader", denied)  # the tests may run as root
        with pytest.raises(InputError, match=r"prompts.jsonl: cannot be read \(Permission denied\)"):
            read_prompts(path)
        with pytest.raises(InputError, match=r"subjects.csv: cannot be read"):
            read_subjects(str(people))
    monkeypatch.setattr("facediffuser.dataset.input_tables.MOST_TABLE_BYTES", 20)
    with pytest.raises(InputError, match="prompts.jsonl: file too large"):
        read_prompts(path)


# --- names in two forms of Unicode -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("folder", "written"), [("NFD", "NFC"), ("NFC", "NFD"), ("NFD", "NFD"), ("NFC", "NFC")])
def test_a_subject_is_known_in_either_form_of_unicode(tmp_path, folder, written):
    (tmp_path / "people" / unicodedata.normalize(folder, "Zoé")).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "people" / unicodedata.normalize(folder, "Zoé") / "1.png")
    row = unicodedata.normalize(written, "Zoé,woman")
    (tmp_path / "people" / "subjects.csv").write_text(f"subject_id,class_word\n{row}\n")
    (found,) = read_subjects(str(tmp_path / "people"))
    assert (found.subject_id, found.class_word) == (unicodedata.normalize("NFC", "Zoé"), "woman")
    assert open_picture(open_store(tmp_path / "people"), found.references[0])[0].size == (8, 8)


def test_two_subjects_of_one_name_in_two_forms_are_refused(tmp_path):
    for form in ("NFC", "NFD"):
        (tmp_path / "people" / unicodedata.normalize(form, "Zoé")).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "people" / unicodedata.normalize(form, "Zoé") / "1.png")
    with pytest.raises(InputError, match=r"two folders have this name, 'Zoe\\u0301' and 'Zo\\xe9'"):
        read_subjects(str(tmp_path / "people"))
    rows = "".join(json.dumps({"prompt": "{subject}", "prompt_id": unicodedata.normalize(form, "é")}) + "\n"
                   for form in ("NFC", "NFD"))  # fmt: skip
    with pytest.raises(InputError, match="row 2: prompt_id 'é' is that of row 1 too"):
        read_prompts(prompts_file(tmp_path, rows))


def test_files_that_are_no_pictures_are_counted_and_named(people, caplog):
    for name in ("ada/0.avif", "ada/1.HEIC", "bob/scan", "ada/deep/2.png", "readme.txt", "ada/.DS_Store"):
        (people / name).parent.mkdir(exist_ok=True)
        (people / name).write_bytes(b"x")
    (people / "ada" / "2.jfif").write_bytes(b"x")
    (ada, _) = read_subjects(str(people))
    assert ada.references == ("ada/1.png", "ada/2.jfif")
    (line,) = caplog.messages
    assert "5 other files left out: ada/0.avif, ada/1.HEIC, ada/deep/2.png, bob/scan, readme.txt (pictures are" in line


def test_two_columns_of_parquet_with_one_name_are_refused(tmp_path):
    table = pa.table([pa.array(["{subject} at sea"]), pa.array(["{subject} in a boat"])], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "prompts.parquet")
    with pytest.raises(InputError, match="prompts.parquet: two columns are called 'prompt'; keep one"):
        read_prompts(str(tmp_path / "prompts.parquet"))
