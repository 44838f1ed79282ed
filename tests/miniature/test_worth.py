"""What a dataset is worth: faces of the right people, a recogniser that learns, numbers that mean what they say."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from tools.miniature_weights import worth


@pytest.fixture(scope="module")
def faces() -> worth.Faces:
    return worth.rendered_faces(42_000_000, 6, 4)


class Known(nn.Module):
    """Embeds each of the given faces as it is told to."""

    def __init__(self, faces: worth.Faces, vectors: torch.Tensor):
        super().__init__()
        self.faces, self.vectors = faces, vectors

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        same = (pixels[:, None] == self.faces.pixels[None]).flatten(2).all(-1)
        return self.vectors[same.int().argmax(1)]


def test_renderings_have_a_face_of_everybody(faces):
    assert faces.people == 6 and len(faces.pixels) == len(faces.who) > 18
    assert faces.pixels.shape[1:] == (3, 64, 64) and faces.pixels.min() < -0.5 < 0.5 < faces.pixels.max() <= 1
    again = worth.rendered_faces(42_000_000, 6, 4)
    assert torch.equal(again.pixels, faces.pixels) and torch.equal(again.who, faces.who)


def test_who_knows_everybody_has_all_and_who_knows_nobody_has_what_chance_gives(faces):
    who = nn.functional.one_hot(faces.who, 6).float()
    near = who + 0.01 * torch.randn(who.shape, generator=torch.Generator().manual_seed(0))
    assert worth.tested(Known(faces, near), faces) == (1.0, 1.0)
    chance = torch.randn(len(faces.who), 16, generator=torch.Generator().manual_seed(0))
    area, accepted = worth.tested(Known(faces, chance), faces)
    assert abs(area - 0.5) < 0.15 and accepted < 0.2


def test_a_recogniser_learns_the_people_it_is_shown(faces):
    model = worth.train_recogniser(faces, 25, batch=32)
    assert worth.tested(model, faces)[0] > 0.8


def test_smaller_datasets_have_every_category_and_the_plot_every_source(tmp_path, monkeypatch):
    monkeypatch.setattr(worth, "write_subjects", lambda *given, **more: None)
    asked = []
    monkeypatch.setattr(worth, "facediffuser", lambda words: asked.append(words) or 0)
    worth.make_datasets(tmp_path, 4, 8, 12, "miniature")
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert [row["category"] for row in rows[:4]] == [row["category"] for row in rows[4:]]
    assert len({row["category"] for row in rows[:4]}) == 4
    assert [words[words.index("--method") + 1] for words in asked] == list(worth.METHODS)
    found = [
        worth.Worth(name, "all", size, size, size, 0.9, 0.5)
        for name in (*worth.METHODS, worth.CEILING)
        for size in (4, 8)
    ]
    axes = worth.plot([*found, worth.Worth("face-diffuser", "ip > 0.5", 8, 6, 6, 0.91, 0.6)]).axes
    assert len(axes) == 2 and all(len(one.lines) == len(worth.METHODS) + 2 for one in axes)


# Datasets of four methods through Ray, and their exports.
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_faces_of_a_generated_dataset_are_those_of_its_rows(tmp_path, prefect_harness, ray_session):
    worth.make_datasets(tmp_path, 2, 2, 2, "miniature")
    found = worth.measure(tmp_path, 2, 2, 2, 4)
    assert {one.source for one in found} == {*worth.METHODS, worth.CEILING}
    for one in found:
        assert one.kept <= one.images and one.faces <= one.kept
        assert one.filter == "all" or one.source == "face-diffuser"
    assert worth.measure(tmp_path, 2, 2, 2, 4) == found or any(np.isnan(one.auc) for one in found)
