"""An output that holds another run: the error says in words what differs, and names it."""

import shutil
from pathlib import Path

import pytest
from PIL import Image
from world import PROMPTS, save_people, save_prompts

from facediffuser.dataset.schema import SUBJECTS_KEY
from facediffuser.errors import InputError
from facediffuser.generation.generate_check import check_generate
from facediffuser.generation.job import prepare


@pytest.fixture
def begun(made, tmp_path) -> Path:
    """The output of a run of `PROMPTS` that has just begun: its plan and its references."""
    source = Path(made[0].output)
    shutil.copytree(source / "plan", tmp_path / "out" / "plan")
    shutil.copy(source / SUBJECTS_KEY, tmp_path / "out" / SUBJECTS_KEY)
    return tmp_path / "out"


def refusal(function, settings) -> str:
    with pytest.raises(InputError, match="holds another run") as caught:
        function(settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(place: int, **values) -> list[dict]:
    """PROMPTS with one of them changed."""
    return [row | values if number == place else row for number, row in enumerate(PROMPTS)]


@pytest.mark.parametrize(("rows", "says"), [
    (changed(1, prompt="{subject} in the sea"),
     "prompts differ (3 there, 3 here): number 2, the first that differs, is p00001 'woman <|image|> in the park' of "
     "context there, p00001 'woman <|image|> in the sea' of context here"),
    (changed(0, category="hobby"), "of action there, book 'woman <|image|> reading a book' of hobby here"),
    (changed(0, prompt_id="novel"), "is book 'woman <|image|> reading a book' of action there, novel"),
    (changed(1, prompt="{subject_1} with {subject_2}"), "(3 there, 3 here): number 2, the first that differs,"),
    (PROMPTS[:2], "(3 there, 2 here): the first only is p00002 'a photo of a person <|image|>, smiling' there"),
    ([*PROMPTS, {"prompt": "{subject}"}], "(3 there, 4 here): the first only is p00003 'woman <|image|>' here"),
    ([*PROMPTS[1:], PROMPTS[0]], "number 1, the first that differs,"),
])  # fmt: skip
def test_other_prompts_are_named_without_loading_anything(begun, world, tmp_path, rows, says):
    prompts = save_prompts(tmp_path / "prompts.jsonl", rows)
    line = refusal(check_generate, world.settings(begun, prompts=str(prompts)))
    assert (
        says in line
        and ("--extend" in line) == ("settings." not in line)
        and "plan" not in line
        and "subjects differ" not in line
    )


def test_other_subjects_are_named(begun, world, tmp_path):
    people = save_people(tmp_path / "people")
    shutil.copytree(people / "bob", people / "eve")
    shutil.rmtree(people / "bob")
    line = refusal(check_generate, world.settings(begun, subjects=str(people)))
    assert "(subjects differ (2 there, 2 here): bob only there, eve only here)" in line


def test_class_words_that_changed_are_named_and_are_no_other_prompts(begun, world, tmp_path):
    people = save_people(tmp_path / "people")
    (people / "subjects.csv").write_text("subject_id,class_word\nada,girl\n")
    line = refusal(check_generate, world.settings(begun, subjects=str(people)))
    assert "(class word of ada: woman there, girl here)" in line


def test_reference_pictures_that_changed_are_named(begun, world, tmp_path):
    people = save_people(tmp_path / "people")
    Image.open(people / "ada" / "1.png").resize((180, 180)).save(people / "ada" / "1.png")
    (people / "ada" / "2.jpg").rename(people / "ada" / "3.jpg")
    line = refusal(prepare, world.settings(begun, subjects=str(people)))
    pictures = "ada/2.jpg only there, ada/3.jpg only here, ada/1.png with another content"
    assert f"(reference pictures differ: {pictures})" in line


def test_other_models_are_named_by_part(begun, world, tmp_path):
    models = Path(shutil.copytree(world.models, tmp_path / "models"))
    config = models / "vae" / "config.json"
    config.write_text(config.read_text() + "\n")
    line = refusal(prepare, world.settings(begun, models=str(models)))
    assert "(models differ in vae)" in line


def test_settings_are_reported_beside_prompts_and_without_ray(begun, world, tmp_path):
    prompts = save_prompts(tmp_path / "prompts.jsonl", PROMPTS[:1])
    line = refusal(
        check_generate, world.settings(begun, prompts=str(prompts), guidance_scale=2.5, negative_prompt="hat")
    )
    assert "prompts differ (3 there, 1 here)" in line and "settings.guidance_scale 5.0 there, 2.5 here" in line
    assert "negative_prompt None there, hat here" in line


def test_a_run_that_is_the_same_as_far_as_is_known_passes(begun, world):
    assert len(check_generate(world.settings(begun, workers=2, batch_size=1)).plan) == 12
