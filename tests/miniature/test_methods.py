"""The documentation's pictures of methods: right people, a cell for each, maps that say what was measured."""

import numpy as np
import pytest
from PIL import Image

from facediffuser.scoring.scorers import load_scorers
from tools.miniature_weights import methods


@pytest.fixture(scope="module")
def scorers():
    return load_scorers("miniature", "cpu")


@pytest.fixture(scope="module")
def trial():
    return methods.load_trial("miniature", 2, 2.5)


def test_a_trial_samples_with_the_claims_scheduler_unless_another_is_named(trial):
    assert type(trial.pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"
    pndm = methods.load_trial("miniature", 2, 2.5, "pndm").pipeline.scheduler
    assert type(pndm).__name__ == "PNDMScheduler" and pndm.config.beta_end == trial.pipeline.scheduler.config.beta_end


def test_the_sheet_has_a_reference_and_every_methods_pictures_of_each_person(trial, scorers):
    people = methods.unseen_people(2, scorers)
    sheet = methods.samples(trial, people)
    cells = 1 + len(methods.METHODS) * len(methods.SHOWN)
    assert sheet.height == methods.TITLE + 2 * methods.CELL and sheet.width >= cells * methods.CELL
    for row in range(2):
        bottom = methods.TITLE + (row + 1) * methods.CELL - 1
        assert sheet.getpixel((sheet.width - 10, bottom)) != (255, 255, 255)  # the last picture is there, too


def test_the_sheet_is_of_the_window_that_is_given(trial, monkeypatch):
    asked = []
    picture = Image.new("RGB", (64, 64))
    monkeypatch.setattr(
        methods.Trial, "images", lambda self, people, prompts, **how: asked.append(how) or [picture] * 4
    )
    people = [methods.Unseen("man", picture, np.zeros(1))]
    for window in ((1, 2), None):
        methods.samples(trial, people, window)
    windows = [(how["fusion_start"], how["fusion_end"]) for how in asked if how["method"] == "face-diffuser"]
    assert windows == [(1, 2), methods.default_fusion_window(2)]


def test_the_sweep_has_a_row_for_each_window_and_its_ends_are_the_methods(trial, scorers, monkeypatch):
    monkeypatch.setattr(methods, "STARTS", (0, 3))
    monkeypatch.setattr(methods, "ENDS", (0, 3))
    people = methods.unseen_people(1, scorers)
    rows = methods.sweep(trial, people, scorers)
    assert [(row["fusion_start"], row["fusion_end"]) for row in rows] == [(0, 0), (0, 3), (3, 3)]
    made = {name: trial.images(people, methods.SWEPT, method=name) for name in ("sdm", "tdm")}
    for row, name in ((rows[0], "sdm"), (rows[2], "tdm")):
        again = trial.images(people, methods.SWEPT, fusion_start=row["fusion_start"], fusion_end=row["fusion_end"])
        assert [one.tobytes() for one in again] == [one.tobytes() for one in made[name]]
    maps = methods.heat_maps(rows, 2).axes
    assert [one.get_title() for one in maps] == ["IP (identity)", "PC (prompt)"]
    assert [len(one.texts) for one in maps] == [3, 3]
