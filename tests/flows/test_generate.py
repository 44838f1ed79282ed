"""`facediffuser generate` as its users run it: a real photograph in, rows with scores out, readable by what they read with."""

import json
from pathlib import Path

import pyarrow.dataset as ds
import ray.data
from PIL import Image
from skimage import data

from facediffuser.flows.cli import main


def test_a_real_photograph_becomes_rows_with_a_found_face_and_scores(
    tmp_path: Path, prefect_harness, ray_session, without_ray
):
    (tmp_path / "subjects" / "eileen").mkdir(parents=True)
    Image.fromarray(data.astronaut()).save(tmp_path / "subjects" / "eileen" / "portrait.png")
    (tmp_path / "subjects" / "subjects.csv").write_text("subject_id,class_word\neileen,woman\n")
    prompts = [{"prompt": "a {subject} on the beach", "category": "context"}, {"prompt": "a {subject} in the snow"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    output = tmp_path / "dataset"
    options = {
        "--models": "miniature", "--subjects": tmp_path / "subjects", "--prompts": tmp_path / "prompts.jsonl",
        "--output": output, "--steps": 4,
    }  # fmt: skip
    with without_ray():  # the demonstration and the deployed run make theirs on Ray
        assert main(["generate", *(str(word) for pair in options.items() for word in pair)]) == 0

    # The face that was found is the astronaut's: the reference the models were shown lies around it.
    (reference,) = ds.dataset(output / "subjects.parquet").to_table().to_pylist()
    left, top, right, bottom = reference["face_box"]
    assert (reference["subject_id"], reference["class_word"]) == ("eileen", "woman")
    assert left < 225 < right and top < 115 < bottom and right - left < 200

    rows = ds.dataset(output / "data", format="parquet").to_table().to_pylist()
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert {row["prompt"] for row in rows} == {"a woman <|image|> on the beach", "a woman <|image|> in the snow"}
    assert all(0 <= row["ip"] <= 1 and -1 <= row["pc"] <= 1 and len(row["ip_per_subject"]) == 1 for row in rows)
    counts = json.loads((output / "manifest.json").read_text())["counts"]
    assert ray.data.read_parquet(str(output / "data")).count() == counts["rows"] == 2
