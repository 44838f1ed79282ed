"""The paper's ordering on a small fixed subset: three unseen people, eight prompts, one image of each and method."""

import numpy as np
import pytest

from facediffuser.prompts import without_markers
from facediffuser.scoring.scorers import load_scorers
from tools.miniature_weights import methods


@pytest.fixture(scope="module")
def means() -> dict[str, dict[str, float]]:
    """Mean IP, PC and share of pictures with one face, by method."""
    scorers = load_scorers("miniature", "cpu")
    trial, people = methods.load_trial("miniature", 12, 2.5), methods.unseen_people(3, scorers)
    references = [[one.embedding] for one in people for _ in methods.SWEPT]
    texts = [without_markers(prompt.format(one.word)) for one in people for prompt in methods.SWEPT]
    found = {}
    for name in methods.METHODS:
        window = {"fusion_start": 3, "fusion_end": 11} if name == "face-diffuser" else {}
        scores = scorers.score(trial.images(people, methods.SWEPT, method=name, **window), references, texts)
        found[name] = {
            "ip": float(np.mean([score.ip for score in scores])),
            "pc": float(np.mean([score.pc for score in scores])),
            "faces": float(np.mean([score.face_count == 1 for score in scores])),
        }
    return found


def test_the_sdm_knows_people_whom_the_tdm_does_not(means):
    assert means["sdm"]["ip"] > 2 * means["tdm"]["ip"] and means["sdm"]["ip"] > means["tdm"]["ip"] + 0.3


def test_fusion_has_more_of_the_prompt_than_the_sdm_and_more_of_the_person_than_the_tdm(means):
    assert means["face-diffuser"]["pc"] > means["sdm"]["pc"] + 0.04
    assert means["face-diffuser"]["ip"] > means["tdm"]["ip"] + 0.3


def test_fusion_keeps_most_of_what_each_model_is_best_at(means):
    assert means["face-diffuser"]["ip"] >= 0.95 * means["sdm"]["ip"]
    assert means["face-diffuser"]["pc"] >= 0.95 * means["tdm"]["pc"]


def test_fusion_has_more_of_the_person_than_fastcomposer(means):
    assert means["face-diffuser"]["ip"] > means["fastcomposer"]["ip"] + 0.03


def test_faces_are_found(means):
    assert means["face-diffuser"]["faces"] > 0.9
