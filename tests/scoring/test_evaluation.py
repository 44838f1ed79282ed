"""`evaluate`: datasets and folders of other systems, checked first, scored alike, written as promised."""

import io

import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError
from scoring.small_world import beside, row, write_dataset

from facediffuser.dataset.schema import RUN_KEY
from facediffuser.errors import InputError
from facediffuser.evaluation import evaluator as evaluation
from facediffuser.evaluation.evaluate_settings import EvaluateSettings
from facediffuser.evaluation.evaluator import Evaluator
from facediffuser.generation.generate_settings import GenerateSettings
from facediffuser.runs import canonical_json


@pytest.fixture
def colours(monkeypatch, scorers):
    """Let `load_scorers` give the colour scorers, whatever their name."""
    digests = {"identity": "colours", "prompt": scorers.digests["prompt"]}
    named = type(scorers)("colours", scorers.identity, scorers.prompt, digests)
    monkeypatch.setattr(evaluation, "load_scorers", lambda name, device: named)
    return named


@pytest.fixture
def subjects(tmp_path, people):
    """A subjects folder: ada and bob."""
    for name in ("ada", "bob"):
        (tmp_path / "subjects" / name).mkdir(parents=True)
        beside(people[name]).save(tmp_path / "subjects" / name / "1.png")
    return tmp_path / "subjects"


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "{subject} on the beach", "category": "context"}\n'
        '{"prompt": "{subject} in oil", "category": "style"}\n'
    )
    return path


def folder_of(path, **pictures: Image.Image):
    path.mkdir()
    for name, picture in pictures.items():
        picture.save(path / f"{name}.png")
    return path


def evaluate(**settings):
    return Evaluator(EvaluateSettings(**{name: str(value) for name, value in settings.items()})).run()


def test_a_folder_named_as_fastcomposer_names_it_is_scored(tmp_path, colours, people, subjects, prompts):
    images = folder_of(
        tmp_path / "theirs",
        subject_0000_prompt_0000_instance_0000=beside(people["ada"]),
        subject_0001_prompt_0001_instance_0000=beside(people["bob"]),
        subject_0001_prompt_0000_instance_0000=beside(people["ada"]),
        subject_0000_prompt_0001_instance_0000=beside(),
    )
    found = evaluate(images=images, subjects=subjects, prompts=prompts, output=tmp_path / "out")
    scored = {line["sample_id"].split("_instance")[0]: line for line in found.images.to_pylist()}
    assert scored["subject_0000_prompt_0000"]["ip"] > 0.99
    assert scored["subject_0001_prompt_0001"]["ip"] > 0.99
    assert scored["subject_0001_prompt_0000"]["ip"] < 0.7
    assert scored["subject_0000_prompt_0001"]["ip"] == 0 and scored["subject_0000_prompt_0001"]["face_count"] == 0
    assert scored["subject_0001_prompt_0001"]["prompt"] == "person in oil"
    assert scored["subject_0001_prompt_0001"]["category"] == "style"
    assert {line["method"] for line in scored.values()} == {"theirs"}


def test_the_output_is_as_promised_and_twice_the_same(tmp_path, colours, people, subjects, prompts):
    images = folder_of(tmp_path / "theirs", subject_0000_prompt_0000_instance_0000=beside(people["ada"]))
    written = []
    for name in ("one", "two"):
        evaluate(images=f"sdxl={images}", subjects=subjects, prompts=prompts, output=tmp_path / name)
        written.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert written[0] == written[1]
    assert set(written[0]) == {"table.parquet", "per_subject.parquet", "table.md", "plot.png", "scores.parquet"}
    table = pq.read_table(io.BytesIO(written[0]["table.parquet"]))
    assert table.column_names == ["method", "subjects", "category", "metric", "mean", "low", "high", "n"]
    assert table["method"].to_pylist() == ["sdxl"] * 6
    assert table.schema.metadata[b"facediffuser_scorer_identity"] == b"colours"
    assert "| **sdxl** | 1 | **all** | 1 |" in written[0]["table.md"].decode()
    assert Image.open(io.BytesIO(written[0]["plot.png"])).size > (400, 300)


def test_pairs_of_subjects_are_numbered_as_generate_makes_them(tmp_path, colours, people, subjects):
    prompts = tmp_path / "two.jsonl"
    prompts.write_text('{"prompt": "{subject} in oil"}\n{"prompt": "{subject_2} behind {subject_1}"}\n')
    (subjects / "subjects.csv").write_text("subject_id,class_word\nada,woman\nbob,man\n")
    images = folder_of(
        tmp_path / "pairs",
        subject_0000_prompt_0001_instance_0000=beside(people["ada"], people["bob"]),
        subject_0001_prompt_0000_instance_0000=beside(people["bob"]),
    )
    found, single = evaluate(images=images, subjects=subjects, prompts=prompts).images.to_pylist()
    assert (single["subject_ids"], single["prompt"]) == (["bob"], "man in oil")
    assert (found["subject_ids"], found["prompt"]) == (["bob", "ada"], "man behind woman")
    assert min(found["ip_per_subject"]) > 0.98
    left_edges = [found["face_boxes"][face][0] for face in found["subject_faces"]]
    assert left_edges[0] > left_edges[1]  # bob is the one on the right


def test_a_csv_says_what_each_image_shows(tmp_path, colours, people, subjects, prompts):
    images = folder_of(tmp_path / "any", a=beside(people["ada"], people["bob"]), b=beside(people["bob"]))
    index = tmp_path / "index.csv"
    index.write_text("image,subject_ids,prompt,prompt_id\na.png,bob+ada,two people,\nb.png,bob,,p00001\n")
    found = evaluate(images=images, subjects=subjects, prompts=prompts, index=index).images.to_pylist()
    assert [line["prompt"] for line in found] == ["two people", "person in oil"]
    assert found[0]["subject_ids"] == ["bob", "ada"] and min(found[0]["ip_per_subject"]) > 0.98
    assert found[1]["category"] == "style"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("x.png,ada,,p00000", "index.csv:2: no image 'x.png'"),
        ("a.png,eve,,p00000", "index.csv:2: subject 'eve' is not in --subjects"),
        ("a.png,ada,,p9", "index.csv:2: prompt 'p9' is not in --prompts"),
        ("a.png,ada+bob,,p00000", "index.csv:2: prompt 'p00000' names 1 subject, the line 2"),
        ("a.png,ada,a \u0007,", "index.csv:2: character 3 of the prompt"),
        ('a.png,ada,"a woman, <|image|>",', "index.csv:2: <.image.> number 1 stands after"),
        ("a.png,ada,{subject_" + "9" * 5000 + "},", "index.csv:2: .* is no subject"),
    ],
)
def test_a_wrong_line_of_the_csv_is_named(tmp_path, subjects, prompts, line, complaint):
    images = folder_of(tmp_path / "any", a=beside())
    index = tmp_path / "index.csv"
    index.write_text(f"image,subject_ids,prompt,prompt_id\n{line}\n")
    with pytest.raises(InputError, match=f".*{complaint}"):
        evaluate(images=images, subjects=subjects, prompts=prompts, index=index, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("holiday", "holiday.png: not named subject_0000"),
        ("subject_0002_prompt_0000_instance_0000", "subject 2 of 2 subjects, counted from 0"),
        ("subject_0000_prompt_0002_instance_0000", "prompt 2 of 2 prompts, counted from 0"),
    ],
)
def test_a_file_that_fits_no_subject_or_prompt_is_named(tmp_path, subjects, prompts, name, complaint):
    images = folder_of(tmp_path / "any", **{name: beside()})
    with pytest.raises(InputError, match=complaint):
        evaluate(images=images, subjects=subjects, prompts=prompts, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_that_stand_twice_are_refused_and_those_in_no_line_are_named(
    tmp_path, subjects, prompts, colours, people, caplog
):
    images = folder_of(tmp_path / "any", subject_0000_prompt_0000_instance_0000=beside(people["ada"]))
    beside(people["ada"]).save(images / "SUBJECT_0_prompt_0_instance_0.PNG")
    with pytest.raises(InputError, match="has the numbers of SUBJECT_0_prompt_0_instance_0.PNG too; remove one"):
        evaluate(images=images, subjects=subjects, prompts=prompts)
    index = tmp_path / "index.csv"
    line = "SUBJECT_0_prompt_0_instance_0.PNG,ada,p00000\n"
    index.write_text(f"image,subject_ids,prompt_id\n{line}{line}")
    with pytest.raises(InputError, match="index.csv:3: image '.*' stands in line 2 with the same subjects and prompt"):
        evaluate(images=images, subjects=subjects, prompts=prompts, index=index)
    index.write_text(f"image,subject_ids,prompt_id\n{line}")
    assert evaluate(images=images, subjects=subjects, prompts=prompts, index=index).images.num_rows == 1
    assert "1 image not listed in" in caplog.text and "subject_0000_prompt_0000_instance_0000.png" in caplog.text
    for form in ("Zo\u00e9.png", "Zoe\u0301.png"):
        beside(people["ada"]).save(images / form)
    index.write_text("image,subject_ids,prompt_id\nZo\u00e9.png,ada,p00000\n")
    with pytest.raises(InputError, match="index.csv:2: two images have this name"):
        evaluate(images=images, subjects=subjects, prompts=prompts, index=index)


def test_an_unreadable_image_is_named_and_nothing_written(tmp_path, colours, subjects, prompts):
    images = folder_of(tmp_path / "any")
    (images / "subject_0000_prompt_0000_instance_0000.jpg").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"instance_0000\.jpg: not a usable picture"):
        evaluate(images=images, subjects=subjects, prompts=prompts, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({}, "give --dataset or --images"),
        ({"images": "x"}, "needs --subjects"),
        ({"images": "x", "subjects": "y"}, "needs --prompts"),
    ],
)
def test_options_that_do_not_go_together_are_refused(settings, complaint):
    with pytest.raises(ValidationError, match=complaint):
        EvaluateSettings(**settings)


def test_an_image_of_another_system_may_show_as_many_subjects_as_one_of_ours():
    with_subjects = {"images": ["theirs"], "subjects": "people", "prompts": "prompts.jsonl"}
    assert EvaluateSettings(**with_subjects, subjects_per_image=16).subjects_per_image == 16
    for count in (0, 17):
        with pytest.raises(ValidationError):
            EvaluateSettings(**with_subjects, subjects_per_image=count)
    bounds = [
        next(kind for kind in model.model_json_schema()["properties"]["subjects_per_image"]["anyOf"] if "type" in kind)
        for model in (EvaluateSettings, GenerateSettings)
    ]
    assert bounds[0] == bounds[1]


def test_a_dataset_s_recorded_scores_are_used_without_loading_scorers(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "load_scorers", None)
    rows = [row(number, beside(size=32), ip=number / 8) for number in range(5)] + [row(5, None)]
    url = write_dataset(tmp_path / "ds", rows, {})
    found = evaluate(dataset=url)
    overall = next(line for line in found.table if line.category == "all" and line.metric == "ip")
    assert (overall.mean, overall.n) == (0.25, 5)
    assert "6 images, 1 of them failed and not counted" in found.markdown


def test_scores_that_are_not_finite_make_failed_rows(tmp_path, colours, people, subjects, prompts, monkeypatch):
    rows = [row(number, beside(size=32), ip=number / 8) for number in range(3)]
    url = write_dataset(tmp_path / "ds", [*rows, row(3, beside(size=32), pc=float("nan"))], {})
    found = evaluate(dataset=url, output=tmp_path / "out")
    assert found.images["status"].to_pylist() == ["ok", "ok", "ok", "failed"] and "1 of them failed" in found.markdown
    assert next(line for line in found.table if line.category == "all" and line.metric == "pc").n == 3
    names = [f"subject_000{number}_prompt_0000_instance_0000" for number in range(2)]
    images = folder_of(tmp_path / "theirs", **{name: beside(people["ada"]) for name in names})
    monkeypatch.setattr(
        type(colours.prompt), "score", lambda self, images, prompts: [0.25, float("inf")][: len(images)]
    )
    found = evaluate(images=images, subjects=subjects, prompts=prompts, output=tmp_path / "out")
    assert found.images["status"].to_pylist() == ["ok", "failed"] and found.images["ip"].to_pylist()[1] is None
    assert found.images["error"].to_pylist()[1] == "the score pc is inf; check the scorer's weights"
    written = pq.read_table(tmp_path / "out" / "scores.parquet")["pc"].to_pylist()
    assert written == [0.25, None] and "nan" not in (tmp_path / "out" / "table.md").read_text()


def test_scoring_a_dataset_again_replaces_its_scores_and_keeps_failed_rows(tmp_path, colours, people):
    rows = [row(0, beside(people["ada"]), ip=0.1), row(1, beside(people["bob"]), ip=0.1), row(2, None)]
    url = write_dataset(tmp_path / "ds", rows, {"ada": beside(people["ada"])})
    found = evaluate(dataset=url, rescore=True).images.to_pylist()
    assert found[0]["ip"] > 0.99 and found[1]["ip"] < 0.7
    assert (found[2]["status"], found[2]["ip"]) == ("failed", None)


def test_scoring_a_dataset_again_twice_gives_identical_bytes(tmp_path, colours, people):
    rows = [row(0, beside(people["ada"], people["bob"])), row(1, beside(people["bob"])), row(2, None)]
    url = write_dataset(tmp_path / "ds", rows, {"ada": beside(people["ada"])})
    for name in ("one", "two"):
        evaluate(dataset=url, rescore=True, add="sharpness", output=tmp_path / name)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two and pq.read_table(io.BytesIO(one["scores.parquet"]))["sharpness"].null_count == 1


def test_scores_of_different_scorers_do_not_meet_in_one_table(tmp_path, colours, people, subjects, prompts):
    urls = []
    for name in ("colours", "others"):
        urls.append(write_dataset(tmp_path / name, [row(0, beside(people["ada"]), ip=0.5)], {}, shards=1))
        path = next((tmp_path / name / "data").iterdir())
        run = {"scorers": colours.digests | {"identity": name}}
        table = pq.read_table(path)
        pq.write_table(table.replace_schema_metadata({RUN_KEY: canonical_json(run).encode()}), path)
    with pytest.raises(InputError, match="scored with different scorers .identity colours and others.; give the"):
        evaluate(dataset=",".join(map(str, urls)))
    images = folder_of(tmp_path / "any", subject_0000_prompt_0000_instance_0000=beside(people["ada"]))
    folder = {"images": images, "subjects": subjects, "prompts": prompts}
    with pytest.raises(InputError, match=f"{urls[1]} and --scorers paper: scored with different scorers"):
        evaluate(dataset=urls[1], **folder)
    found = evaluate(dataset=f"ours={urls[0]}", **folder)
    assert {row.method for row in found.table} == {"any", "ours"} and found.digests == colours.digests


def test_two_datasets_are_compared_on_the_rows_they_share(tmp_path):
    lead = {"face-diffuser": 0.1, "sdm": 0.0}
    urls = [
        write_dataset(
            tmp_path / method,
            [row(n, beside(size=32), method=method, ip=0.3 + n / 50 + more) for n in range(8)],
            {},
        )
        for method, more in lead.items()
    ]
    found = evaluate(dataset=",".join(map(str, urls)), output=tmp_path / "out")
    ip = next(item for item in found.differences if item.metric == "ip")
    assert (ip.method, ip.other, ip.interval.n) == ("face-diffuser", "sdm", 8)
    assert ip.interval.mean == pytest.approx(0.1, abs=1e-6)
    assert pq.read_table(tmp_path / "out" / "differences.parquet").num_rows == 2
    assert "face-diffuser − sdm" in (tmp_path / "out" / "table.md").read_text()


def test_a_url_that_holds_no_dataset_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no data/\*\.parquet there"):
        evaluate(dataset=tmp_path)


def test_images_of_phones_and_names_of_other_systems_are_scored(tmp_path, colours, people, subjects, prompts, caplog):
    images = tmp_path / "any"
    images.mkdir()
    beside(people["ada"]).save(images / "e\u0301.webp", exif=b"Exif\0\0Exif\0\0II", lossless=True)
    (images / "b.avif").write_bytes(b"x")
    index = tmp_path / "index.csv"
    index.write_text("image,subject_ids,prompt\n\u00e9.webp,ada,a woman\n")
    (found,) = evaluate(images=images, subjects=subjects, prompts=prompts, index=index).images.to_pylist()
    assert found["status"] == "ok" and found["ip"] > 0.98
    assert any("1 other file left out: b.avif" in text for text in caplog.messages)
    index.write_text(",image,subject_ids,prompt\n0,\u00e9.webp,ada,a woman\n")
    with pytest.raises(InputError, match="index.csv: column 1 has no name"):
        evaluate(images=images, subjects=subjects, prompts=prompts, index=index)


def test_an_image_folder_without_images_is_refused(tmp_path, subjects, prompts):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no image there"):
        evaluate(images=tmp_path / "empty", subjects=subjects, prompts=prompts)


def test_the_flow_scores_a_folder_with_the_scorers_of_a_folder(
    tmp_path, people, subjects, prompts, scorers_folder, prefect_harness
):
    from facediffuser.flows.evaluate import evaluate as flow

    images = folder_of(tmp_path / "any", subject_0000_prompt_0000_instance_0000=beside(people["ada"]))
    text = flow(
        EvaluateSettings(
            images=str(images), subjects=str(subjects), prompts=str(prompts), scorers=str(scorers_folder),
            output=str(tmp_path / "out"), device="cpu",
        )
    )  # fmt: skip
    assert "| **any** | 1 | **all** | 1 | 1.000 |" in text
    assert (tmp_path / "out" / "table.md").read_text() == text
