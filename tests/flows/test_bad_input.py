"""Wrong input to `facediffuser generate`: one line that names the fault and the fix, exit code 2, nothing written."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from facediffuser.flows.cli import main
from facediffuser.flows.generate_dataset import generate_dataset
from facediffuser.generation.generate_settings import GenerateSettings


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A folder with one good subject (a real photograph) and one good prompt."""
    (tmp_path / "subjects" / "ada").mkdir(parents=True)
    Image.fromarray(data.astronaut()).save(tmp_path / "subjects" / "ada" / "1.png")
    write_prompts(tmp_path, {"prompt": "{subject} on the beach"})
    return tmp_path


def write_prompts(world: Path, *rows: dict) -> None:
    (world / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def refusal(capfd, world: Path, *options: str, output: str | None = None) -> str:
    """Run `generate`, check that it refuses as promised, and return its one line."""
    target = output or str(world / "dataset")
    args = {
        "--models": "miniature",
        "--subjects": str(world / "subjects"),
        "--prompts": str(world / "prompts.jsonl"),
        "--output": target,
        "--steps": "2",
    }
    for name, value in zip(options[::2], options[1::2], strict=True):
        args[name] = value
    capfd.readouterr()
    code = main(["generate", *(word for pair in args.items() for word in pair)])
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("facediffuser generate:")]
    assert code == 2
    assert len(lines) == 1
    assert not (world / "dataset").exists() or not any((world / "dataset").iterdir())
    return lines[0]


def test_a_subject_folder_without_a_face(world, capfd, prefect_harness, ray_session):
    noise = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    (world / "subjects" / "bob").mkdir()
    Image.fromarray(noise).save(world / "subjects" / "bob" / "2.png")
    line = refusal(capfd, world)
    assert "bob/2.png" in line and "no face found" in line


def test_a_flow_run_fails_with_the_one_line(world, prefect_harness, ray_session):
    Image.new("RGB", (64, 64)).save(world / "subjects" / "ada" / "0.png")
    paths = {"subjects": str(world / "subjects"), "prompts": str(world / "prompts.jsonl")}
    settings = GenerateSettings(models="miniature", output=str(world / "dataset"), steps=2, **paths)
    state = generate_dataset(settings, return_state=True)
    assert state.is_failed() and "ada/0.png: no face" in state.message and "\n" not in state.message
    assert not (world / "dataset").exists()


def test_a_prompt_without_a_subject(world, capfd, prefect_harness, ray_session):
    write_prompts(world, {"prompt": "{subject} on the beach"}, {"prompt": "an empty beach"})
    line = refusal(capfd, world)
    assert "an empty beach" in line and "{subject}" in line


def test_a_prompt_naming_more_subjects_than_given(world, capfd, prefect_harness, ray_session):
    write_prompts(world, {"prompt": "{subject_1} and {subject_2} on the beach"})
    line = refusal(capfd, world)
    assert "prompt p00000 shows 2 subjects" in line and "has 1" in line


def test_more_subjects_an_image_than_there_are(world, capfd, prefect_harness, ray_session):
    write_prompts(world, {"prompt": "{subject_1} and {subject_2} on the beach"})
    line = refusal(capfd, world, "--subjects-per-image", "2")
    assert "2" in line and "subjects" in line


def test_an_unreadable_picture(world, capfd, prefect_harness, ray_session):
    (world / "subjects" / "ada" / "2.jpg").write_bytes(b"this is text")
    line = refusal(capfd, world)
    assert "ada/2.jpg" in line


def test_an_unknown_column(world, capfd, prefect_harness, ray_session):
    write_prompts(world, {"prompt": "{subject} on the beach", "colour": "red"})
    line = refusal(capfd, world)
    assert "colour" in line and "prompts.jsonl" in line


def test_no_prompts_file(world, capfd, prefect_harness, ray_session):
    line = refusal(capfd, world, "--prompts", str(world / "none.jsonl"))
    assert "none.jsonl" in line


def test_no_such_models(world, capfd, prefect_harness, ray_session):
    line = refusal(capfd, world, "--models", str(world / "no-models"))
    assert "no-models" in line


def test_an_output_that_holds_something_else(world, capfd, prefect_harness, ray_session):
    other = world / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    line = refusal(capfd, world, output=str(other))
    assert "other" in line
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]


def test_a_missing_bucket(world, capfd, s3_bucket, prefect_harness, ray_session):
    line = refusal(capfd, world, output="s3://no-such-bucket-here/dataset")
    assert "no-such-bucket-here" in line


def test_wrong_credentials(world, capfd, s3_bucket, monkeypatch, prefect_harness, ray_session):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    line = refusal(capfd, world, output=f"{s3_bucket.url}/dataset")
    assert s3_bucket.name in line and "not-the-secret" not in line
