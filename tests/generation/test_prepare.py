"""Before the first pixel: inputs checked, nothing written when they are wrong, another run's output refused."""

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from skimage import data
from world import save_people, save_prompts

from facediffuser.dataset.references import load_references
from facediffuser.errors import InputError
from facediffuser.generation.generate_check import check_generate
from facediffuser.generation.generate_settings import GenerateSettings
from facediffuser.generation.job import default_batch_size, prepare


def test_preparing_writes_nothing(world, tmp_path):
    prepared = prepare(world.settings(tmp_path / "out"))
    assert prepared.job.layout.rows == 12 and not (tmp_path / "out").exists()


def test_what_does_not_change_pixels_does_not_change_the_fingerprint(made, world, tmp_path):
    assert prepare(world.settings(tmp_path / "x", workers=7, max_failed=0.5)).job.fingerprint == made[0].fingerprint
    assert prepare(world.settings(tmp_path / "x", seed=1)).job.fingerprint != made[0].fingerprint


@pytest.mark.parametrize(("given", "scheduler"), [
    ({"steps": 12}, "DPMSolverMultistepScheduler"),
    ({"steps": 50}, "PNDMScheduler"),
    ({"steps": 12, "scheduler": "pndm"}, "PNDMScheduler"),
    ({"steps": 50, "scheduler": "ddim"}, "DDIMScheduler"),
])  # fmt: skip
def test_few_steps_get_a_scheduler_that_bears_them_and_a_named_one_is_kept(world, tmp_path, given, scheduler):
    prepared = prepare(world.settings(tmp_path / "out", **given))
    assert prepared.job.settings["scheduler"] == scheduler
    assert {scheduler} == set(next(prepared.plan.tables(3))["scheduler"].to_pylist())


def test_a_run_with_another_scheduler_is_refused_with_the_difference(made, world):
    with pytest.raises(InputError, match="scheduler DPMSolverMultistepScheduler there, PNDMScheduler here"):
        prepare(world.settings(made[0].output, scheduler="pndm"))


def test_a_negative_prompt_makes_another_run_and_none_leaves_the_run_document_as_it_was(made, world, tmp_path):
    plain = prepare(world.settings(tmp_path / "x", negative_prompt="")).job
    assert plain.run == made[0].run and "negative_prompt" not in made[0].settings
    other = prepare(world.settings(tmp_path / "x", negative_prompt="a hat")).job
    assert other.settings == made[0].settings | {"negative_prompt": "a hat"}
    assert other.fingerprint != made[0].fingerprint and other.run["plan"] == made[0].run["plan"]
    with pytest.raises(InputError, match="settings.negative_prompt None there, a hat here"):
        prepare(world.settings(made[0].output, negative_prompt="a hat"))


@pytest.mark.parametrize(("given", "says"), [
    ({"negative_prompt": "a hat", "method": "sdm"}, "method sdm .* does not read it"),
    ({"negative_prompt": "a man <|image|>"}, "names a subject"),
    ({"negative_prompt": "{subject} with a hat"}, "names a subject"),
    ({"negative_prompt": " "}, "names a subject, or nothing"),
])  # fmt: skip
def test_negative_prompts_that_cannot_be_used_are_refused(given, says):
    with pytest.raises(ValidationError, match=says):
        GenerateSettings(models="m", subjects="s", prompts="p", output="o", **given)


def test_another_run_is_refused_with_the_difference(made, world):
    with pytest.raises(InputError) as caught:
        prepare(world.settings(made[0].output, steps=9))
    assert "num_inference_steps 3 there, 9 here" in str(caught.value)


def test_the_same_run_is_taken_up_again(made, world):
    prepared = prepare(world.settings(made[0].output, workers=2))
    before = made[0].store().list()
    assert prepared.write() == 0
    assert made[0].store().list() == before


def test_an_output_with_other_files_is_refused(world, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="thesis.txt"):
        prepare(world.settings(tmp_path / "out"))


def test_of_two_runs_begun_at_once_the_second_is_refused(world, tmp_path):
    first, second = (prepare(world.settings(tmp_path / "out", seed=seed)) for seed in (1, 2))
    first.write()
    with pytest.raises(InputError, match="another run"):
        second.write()
    assert prepare(world.settings(tmp_path / "out", seed=1)).write() == 0


class Unasked:
    """Machines that only a run with good input may ask for: the question can start Ray."""

    gpus = cpus = gpu_gib = property(lambda self: pytest.fail("the machines were asked for"))


def test_a_picture_without_a_face_is_reported(world, tmp_path):
    people = save_people(tmp_path / "people")
    noise = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save(people / "bob" / "2.png")
    with pytest.raises(InputError, match="bob/2.png: no face found"):
        prepare(world.settings(tmp_path / "out", subjects=str(people)), Unasked())
    Image.fromarray(noise).save(people / "ada" / "3.png")
    with pytest.raises(
        InputError, match="ada/3.png, .*bob/2.png: no face found; give pictures with one visible face each"
    ):
        prepare(world.settings(tmp_path / "out", subjects=str(people)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("others", "says"), [
    ({"subjects_per_image": 3}, "2 subjects for 3"),
    ({"subjects_per_image": 5}, "this model takes up to 4"),
    ({"height": 33}, "multiples of 2"),
    ({"models": "/no/such/folder"}, "no such folder"),
])  # fmt: skip
def test_what_the_models_or_subjects_cannot_give_is_reported(world, tmp_path, others, says):
    with pytest.raises(InputError, match=says):
        prepare(world.settings(tmp_path / "out", **others))


@pytest.mark.parametrize(("prompt", "says"), [
    ("{subject_1}, {subject_2} and {subject_3}", "prompt p00001 shows 3 subjects, .*subjects has 2; add subjects"),
    ("a <|image|> b <|image|> c <|image|> d <|image|> e <|image|>", "prompt p00001 shows 5 subjects, this model takes up to 4"),
])  # fmt: skip
def test_a_prompt_of_more_subjects_than_can_be_shown_is_refused(world, tmp_path, prompt, says):
    prompts = save_prompts(tmp_path / "many.jsonl", [{"prompt": "{subject}"}, {"prompt": prompt}])
    with pytest.raises(InputError, match=says):
        check_generate(world.settings(tmp_path / "out", prompts=str(prompts)))


def test_a_prompt_that_is_too_long_for_its_subject_is_reported(world, tmp_path):
    prompts = save_prompts(tmp_path / "long.jsonl", [{"prompt": "a photo " * 80 + "of {subject}", "prompt_id": "long"}])
    with pytest.raises(InputError, match="prompt long"):
        prepare(world.settings(tmp_path / "out", prompts=str(prompts)))


@pytest.mark.parametrize("wrong", [
    {"fusion_start": 30, "fusion_end": 20}, {"fusion_end": 51}, {"steps": 0}, {"method": "magic"}, {"max_failed": 2},
])  # fmt: skip
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValidationError):
        GenerateSettings(models="m", subjects="s", prompts="p", output="o", **wrong)


def test_a_benchmark_stands_for_its_prompts_and_its_number_of_subjects(world, tmp_path):
    settings = world.settings(tmp_path / "out", prompts=None, benchmark="pairs-20")
    assert settings.subjects_per_image == 2
    plan = prepare(settings).plan
    assert len(plan) == 20 * settings.images_per_prompt
    assert {row[4] for row in plan.rows()} == {("ada", "bob")}
    assert GenerateSettings.model_validate(settings.model_dump()) == settings


@pytest.mark.parametrize(("given", "says"), [
    ({"prompts": None}, "give --prompts or --benchmark"),
    ({"benchmark": "single-30"}, "not both"),
    ({"prompts": None, "benchmark": "single-31"}, "no such benchmark; give one of"),
    ({"prompts": None, "benchmark": "pairs-20", "subjects_per_image": 3}, "shows 2 in an image"),
])  # fmt: skip
def test_prompts_and_benchmarks_that_do_not_go_together_are_refused(given, says):
    with pytest.raises(ValidationError, match=says):
        GenerateSettings(**({"models": "m", "subjects": "s", "prompts": "p", "output": "o"} | given))


def test_the_fusion_window_scales_with_the_steps():
    from facediffuser.window import default_fusion_window

    for steps in (1, 7, 20, 30, 50, 100):
        settings = GenerateSettings(models="m", subjects="s", prompts="p", output="o", steps=steps)
        assert settings.fusion_window == default_fusion_window(steps)


def test_batches_shrink_with_the_image():
    assert default_batch_size(512, 512, True) == 8
    assert default_batch_size(64, 64, False) == 8
    assert default_batch_size(512, 512, False) == 1


def test_a_real_photograph_becomes_a_square_around_its_face(world, tmp_path):
    (tmp_path / "people" / "eileen").mkdir(parents=True)
    Image.fromarray(data.astronaut()).save(tmp_path / "people" / "eileen" / "1.png")
    settings = world.settings(tmp_path / "out", subjects=str(tmp_path / "people"))
    prepared = prepare(settings)
    prepared.write()
    row = prepared.references.to_pylist()[0]
    shown = load_references(prepared.job.store(), ["eileen"])["eileen"]
    left, top, right, bottom = row["crop_box"]
    assert right - left == bottom - top == shown.images[0].width < 512
    # Eileen Collins's face is near the middle of the upper half of the picture.
    assert 150 < (left + right) / 2 < 300 and 50 < (top + bottom) / 2 < 200
    assert np.linalg.norm(shown.identities[0]) == pytest.approx(1, abs=1e-5)
