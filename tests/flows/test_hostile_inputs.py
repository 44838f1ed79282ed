"""Inputs that would be taken wrongly without a word, one by one: each is one line with exit code 2, nothing written."""

import os
import shutil
from pathlib import Path

import pytest
from fuzzing import contents, make_templates, run, words

from facediffuser.dataset import plan
from facediffuser.dataset.plan import find_sample
from facediffuser.flows.cli import main
from facediffuser.storage import open_store

pytestmark = pytest.mark.usefixtures("plain_plots")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A small world of valid files, and some that no command can use."""
    root = tmp_path_factory.mktemp("world")
    make_templates(root)
    (root / "photos.zip").write_bytes(b"PK")
    os.mkfifo(root / "pipe")
    os.mkfifo(root / "pipe.yaml")
    (root / "zero.yaml").symlink_to("/dev/zero")
    (root / "laugh.yaml").write_text("url: [&a [x, x], &b [*a, *a], &c [*b, *b], &d [*c, *c]]\n")
    (root / "deep.yaml").write_text("url: " + "[" * 1_000_000)
    (root / "steps.yaml").write_text("- " * 500_000)
    (root / "large.toml").write_text("#" * (1 << 20) + "\n")
    (root / "secret.yaml").write_text("url: https://user:MARKED@host/x\n")
    return root


CASES: dict[str, tuple[str, dict[str, str], str]] = {
    "a dataset twice": ("evaluate", {"dataset": "dataset,dataset"}, "given twice"),
    "a dataset twice in other words": ("evaluate", {"dataset": "dataset,./dataset/"}, "given twice"),
    "a folder of images twice": ("evaluate", {"images": "a=theirs,a=theirs"}, "given twice"),
    "tables into the dataset": ("evaluate", {"output": "dataset"}, "holds a dataset; give another output"),
    "an image into the dataset": ("remake", {"output": "dataset"}, "holds a dataset; give another output"),
    "a dataset as training set": ("copies", {"training": "dataset"}, "a generated dataset; give preprocess's output"),
    "a picture over a pipe": ("explain", {"output": "pipe"}, "a pipe, socket or device stands where"),
    "a picture over a device": ("explain", {"output": "/dev/null"}, "a pipe, socket or device stands where"),
    "a zip archive": ("preprocess", {"source": "photos.zip"}, "a file; give a folder of pictures, or a .tgz"),
    "a URL with one slash": ("assemble", {"output": "s3:/bucket/x"}, "write s3://bucket/x"),
    "a file URL that is half an address": ("verify", {"url": "FILE://["}, "of another machine"),
    "an index that cannot be read": ("evaluate", {"index": "/proc/self/mem"}, "cannot be read"),
    "a scorer without a class": ("score", {"add": "os:"}, "names no class"),
    "more rows than a plan has": (
        "generate",
        {"images_per_prompt": "1000000", "subject_sets": "20000000"},
        "subject-sets",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_in_one_line_and_nothing_is_written(root, name):
    command, given, says = CASES[name]
    before = contents(root)
    code, err = run(words(command, root, given), root)
    assert code == 2 and says in err.splitlines()[-1], err
    assert contents(root) == before


@pytest.mark.parametrize(("name", "says"), [
    ("pipe.yaml", "not a regular file"), ("zero.yaml", "not a regular file"), ("laugh.yaml", "holds an alias"),
    ("deep.yaml", "nested more than 20 deep"), ("steps.yaml", "nested more than 20 deep"),
    ("large.toml", "file too large"), ("dataset", "not a YAML or TOML file"),
    ("missing.yaml", "cannot be read"), ("secret.yaml", "cannot carry credentials"),
])  # fmt: skip
def test_a_file_of_options_is_read_with_bounds(root, name, says, capsys):
    assert main(["card", "--config", str(root / name), "--quiet"]) == 2
    err = capsys.readouterr().err
    assert says in err and len(err.splitlines()) == 1 and "MARKED" not in err


def test_a_plan_is_bounded_before_it_is_made(root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    monkeypatch.setattr("facediffuser.generation.generate_check.MOST_ROWS", 9)
    monkeypatch.setattr("facediffuser.generation.generate_check.MOST_SHARDS", 4)
    monkeypatch.setattr(plan.Plan, "rows", None)  # no row is made
    given = {"images_per_prompt": "10"}
    assert main([*words("generate", root, given), "--quiet"]) == 2
    says = "1 prompt x 1 set of subjects x 10 images are 10 rows in 1 shard, at most 9 and 4; lower"
    assert says in capsys.readouterr().err
    given = {"images_per_prompt": "9", "shard_size": "2"}
    assert main([*words("generate", root, given), "--quiet"]) == 2
    assert "9 rows in 5 shards" in capsys.readouterr().err and not (root / "out").exists()


def test_a_row_is_found_by_its_id_in_either_of_unicodes_forms(tmp_path):
    from dataset.finished import finish_dataset

    from facediffuser.dataset.manifest import read_manifest

    store = finish_dataset(tmp_path / "dataset")
    layout = read_manifest(store).layout
    assert find_sample(open_store(store.url), layout, "bob~p1~0") == (1, 1)
    assert find_sample(store, layout, "b\u00f3b~p1~0") is None


@pytest.mark.parametrize(
    "key", ["subjects.parquet", "data/shard-00000-of-00002.parquet", "plan/part-00000-of-00001.parquet"]
)
@pytest.mark.parametrize("command", ["retract", "export", "merge", "publish"])
def test_an_object_of_the_dataset_that_is_missing_is_named(root, tmp_path, command, key):
    shutil.copytree(root, tmp_path / "world", ignore=shutil.ignore_patterns("pipe*", "zero*"))
    (tmp_path / "world" / "dataset" / key).unlink()
    before = contents(tmp_path / "world")
    code, err = run(words(command, tmp_path / "world", {}), tmp_path / "world")
    assert code == 2 and f"{key}: missing" in err.splitlines()[-1], err
    assert contents(tmp_path / "world") == before
