"""The rehearsal at its smallest; what does not fit is said, and an output in use is refused."""

import json
import re

import pytest
import torch

from facediffuser.dataset.verify import verify
from facediffuser.flows import rehearse as flow_module
from facediffuser.flows.cli import main
from facediffuser.rehearsal import rehearsal as module
from facediffuser.rehearsal.rehearsal import Measured, Rehearsed, rehearse, table
from facediffuser.rehearsal.rehearse_settings import RehearseSettings

SMALLEST = {"try_pictures": 2, "try_steps": 1, "try_images": 2, "steps": 3, "batch_size": 2, "size": "miniature"}


def test_every_stage_runs_and_the_table_says_what_the_real_run_takes(tmp_path, monkeypatch, capsys):
    shown: list[str] = []
    monkeypatch.setattr(flow_module, "show_markdown", lambda text, **_: shown.append(text))
    output = tmp_path / "out"
    result = flow_module.rehearse.fn(RehearseSettings(output=str(output), gpu_hour_price=2.0, **SMALLEST))
    assert shown == [result["table"]] and (output / "rehearsal.md").read_text() == result["table"]
    assert "Every stage fits." in result["table"] and "| money |" in result["table"]
    document = json.loads((output / "rehearsal.json").read_text())
    assert [one["stage"] for one in document["stages"]] == [
        "faces", "captions", "segments", "latents and text embeddings", "train the TDM", "train the SDM", "generate and score",
    ]  # fmt: skip
    assert all(one["rate"] > 0 and one["host_gib"] > 0 and one["fits"] for one in document["stages"])
    assert verify(str(output / "dataset")) == []
    assert main(["rehearse", "--output", str(output)]) == 2
    assert "give a new or an empty output" in capsys.readouterr().err


def test_a_stage_that_does_not_fit_is_said_and_the_others_go_on(tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr(module, "captioner", full)
    monkeypatch.setattr(module, "TrainingRun", full)
    monkeypatch.setattr(module, "ShardGenerator", full)
    seen: list[Measured] = []
    found = rehearse(RehearseSettings(output=str(tmp_path / "out"), **SMALLEST), lambda job: None, seen.append)
    assert [one.stage for one in found.stages if one.fits] == ["faces", "segments"] and seen == found.stages
    assert "These do not fit: captions, latents and text embeddings, train the TDM" in table(found, None)
    assert "does not fit: CUDA out of memory. Tried to allocate 9 GiB." in table(found, None)


def test_hours_and_money_follow_from_the_rate():
    stage = Measured("generate and score", "images", planned=7200, items=10, seconds=5.0)
    assert (stage.rate, stage.hours) == (2.0, 1.0)
    text = table(Rehearsed("a card", "full", [stage]), 2.5)
    assert re.search(r"\| generate and score \| 2 images \|.*\| 7,200 images \| 1.0 \| 2 \|", text)
    assert pytest.approx(Measured("x", "images", 10).hours) == 0.0
