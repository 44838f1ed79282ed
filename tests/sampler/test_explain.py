"""The picture of the method, on small random models."""

import numpy as np
import pytest
import torch
from PIL import Image
from sampler.conftest import scheduler

from facediffuser.errors import InputError
from facediffuser.explain import explain, record
from facediffuser.explain_settings import ExplainSettings
from facediffuser.flows.cli import main
from facediffuser.storage import open_store


@pytest.fixture
def model_folder(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def settings_for(tmp_path, model, **changes) -> ExplainSettings:
    fields = {
        "models": str(model), "prompt": "a man <|image|> reading a book", "reference": [tmp_path / "face.png"],
        "output": tmp_path / "pictures" / "explain.png", "steps": 6, "columns": 4, "device": "cpu",
    }  # fmt: skip
    return ExplainSettings(**fields | changes)


def test_the_picture_is_one_png_and_the_same_for_the_same_seed(model_folder, picture, tmp_path):
    picture(0).save(tmp_path / "face.png")
    path = explain(settings_for(tmp_path, model_folder))
    first = np.array(Image.open(path))
    assert Image.open(path).format == "PNG"
    assert first.shape[1] > first.shape[0] > 300
    again = np.array(Image.open(explain(settings_for(tmp_path, model_folder, output=tmp_path / "again.png"))))
    assert np.array_equal(first, again)
    other = np.array(Image.open(explain(settings_for(tmp_path, model_folder, seed=1, output=tmp_path / "b.png"))))
    assert not np.array_equal(first, other)


def test_frames_are_what_the_pipeline_compared_and_decoded(pipeline, picture, tmp_path):
    pipeline.scheduler = scheduler("ddim")
    settings = settings_for(tmp_path, "unused", steps=6, columns=6, fusion_start=1, fusion_end=4)
    frames, result = record(pipeline, settings, [picture(0)])
    assert [frame.index for frame in frames] == list(range(6))
    assert [str(frame.stage) for frame in frames] == ["text"] + ["fusion"] * 3 + ["subject"] * 2
    assert frames[0].subject_saliency is None and frames[-1].text_saliency is None
    for frame in frames[1:4]:
        assert np.array_equal(frame.mask == 1, frame.subject_saliency > frame.text_saliency)
    # DDIM's last step lands on the estimate plus a trace of noise: the strip's end looks like the result.
    assert np.abs(frames[-1].estimate * 255 - np.array(result)).mean() < 8


def test_references_that_cannot_be_read_are_named_and_nothing_is_written(model_folder, tmp_path):
    with pytest.raises(InputError, match="face.png: no such file"):
        explain(settings_for(tmp_path, model_folder))
    (tmp_path / "face.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="face.png: not a usable picture"):
        explain(settings_for(tmp_path, model_folder))
    assert not (tmp_path / "pictures").exists()


def test_a_scheduler_without_a_clean_estimate_is_refused(pipeline, picture, tmp_path):
    from diffusers import EulerDiscreteScheduler

    pipeline.scheduler = EulerDiscreteScheduler()
    with pytest.raises(InputError, match="EulerDiscreteScheduler"):
        record(pipeline, settings_for(tmp_path, "unused"), [picture(0)])
    assert torch.is_grad_enabled()


def test_the_picture_is_put_into_a_bucket(model_folder, picture, tmp_path, s3_bucket, monkeypatch, capsys):
    picture(0).save(tmp_path / "face.png")
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    url = f"{s3_bucket.url}/a/explain.png"
    words = ["explain", "--models", str(model_folder), "--prompt", "a man <|image|> reading a book", "--reference",
             str(tmp_path / "face.png"), "--steps", "2", "--device", "cpu", "--output", url, "--quiet"]  # fmt: skip
    assert main(words) == 0 and capsys.readouterr().out.strip() == url
    with open_store(f"{s3_bucket.url}/a").open("explain.png") as file:
        assert Image.open(file).format == "PNG"
    assert list(empty.iterdir()) == []
