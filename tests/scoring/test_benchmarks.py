"""The benchmark suites: the shapes they promise, in the format `generate` reads."""

from collections import Counter

import pytest

from facediffuser.dataset.inputs import read_prompts
from facediffuser.dataset.suites import prompts_file, suite_prompts, suite_subjects, suites
from facediffuser.errors import InputError
from facediffuser.miniature.render import person, render
from facediffuser.prompts import without_markers

SHAPES = {
    "single-30": (30, 1),
    "single-40": (40, 1),
    "pairs-20": (20, 2),
    "miniature-30": (30, 1),
    "miniature-pairs-8": (8, 2),
}


@pytest.mark.parametrize("name", suites())
def test_a_suite_has_the_shape_its_name_says(name):
    prompts, subjects = SHAPES[name]
    assert suite_subjects(name) == subjects
    read = read_prompts(str(suite_prompts(name)), subjects)
    assert len(read) == prompts
    assert len({prompt.text(["person"] * subjects) for prompt in read}) == prompts
    categories = Counter(prompt.category for prompt in read)
    assert all("a {subject" in line for line in suite_prompts(name).read_text().splitlines())
    assert set(categories) == {"accessory", "style", "action", "context"}
    assert max(categories.values()) - min(categories.values()) <= 1


def test_single_40_has_ten_prompts_of_each_kind():
    kinds = Counter(prompt.category for prompt in read_prompts(str(suite_prompts("single-40")), 1))
    assert set(kinds.values()) == {10}


def test_a_suite_goes_by_its_name_and_a_file_by_its_path():
    assert prompts_file("pairs-20").endswith("pairs-20.jsonl")
    assert prompts_file("mine.jsonl") == "mine.jsonl"
    with pytest.raises(InputError, match="no such benchmark; give one of .*pairs-20, single-30, single-40"):
        suite_prompts("single-50")


def test_the_miniatures_suites_use_words_its_models_have_learnt():
    known = {word.strip(",") for seed in range(300) for word in render([person(seed)], seed).caption.text.split()}
    for name in ("miniature-30", "miniature-pairs-8"):
        for prompt in read_prompts(str(suite_prompts(name)), suite_subjects(name)):
            assert set(without_markers(prompt.text(["man", "woman"][: suite_subjects(name)])).split()) <= known | {
                "and"
            }
