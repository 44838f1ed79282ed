"""Person phrases are found with their exact places in the caption."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from facediffuser.preprocess.phrases import find_person_phrases, phrase_ending_at


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        ("a young woman with long hair and a bearded man in a suit", ["a young woman", "a bearded man"]),
        ("a close up of a man's face", ["a man"]),
        ("a close up of a man’s face", ["a man"]),
        ("man wearing a hat", ["man"]),
        ("a homeless man on a bench", ["a homeless man"]),
        ("a man holding a young smiling woman", ["a man", "a young smiling woman"]),
        ("A tall, dark man next to a dog", ["A tall, dark man"]),
        ("woman and her 5-year-old son", ["woman", "her 5-year-old son"]),
        ("a baby boy in a hat", ["a baby boy"]),
        ("a middle-aged woman doctor", ["a middle-aged woman doctor"]),
        ("a dog licking woman", ["woman"]),
        ("a person, smiling", ["a person"]),
        ("ein Haus, ünïcode: a blonde girl 👩 and a man", ["a blonde girl", "a man"]),
        ("a baby elephant and a boy band", []),
        ("a red car on the road", []),
        ("a human-made lake", []),
        ("", []),
    ],
)
def test_single_people(caption, phrases):
    found = find_person_phrases(caption)
    assert [phrase.text for phrase in found] == phrases
    assert not any(phrase.plural for phrase in found)


@pytest.mark.parametrize(
    ("caption", "phrase"),
    [
        ("two men standing next to each other", "two men"),
        ("the two older ladies", "the two older ladies"),
        ("a group of people on a beach", "a group of people"),
        ("a couple of kids playing", "a couple of kids"),
        ("portrait of 3 young women", "3 young women"),
        ("an old couple", "an old couple"),
    ],
)
def test_several_people_are_one_plural_phrase(caption, phrase):
    (found,) = find_person_phrases(caption)
    assert found.text == phrase and found.plural


@given(st.lists(st.sampled_from("a the two young man woman's men and , of holding group people 7 é".split())))
def test_phrases_stand_where_they_say_and_do_not_overlap(words):
    caption = " ".join(words)
    last = 0
    for phrase in find_person_phrases(caption):
        assert caption[phrase.start : phrase.end] == phrase.text
        assert phrase.start >= last
        last = phrase.end


@pytest.mark.parametrize(
    ("caption", "end", "phrase"),
    [
        ("a photo of an old man in a hat", 21, "an old man"),
        ("a red balloon on grass", 13, "a red balloon"),
        ("woman", 5, "woman"),
        ("a man and two women", 19, "two women"),
    ],
)
def test_the_phrase_before_an_offset(caption, end, phrase):
    found = phrase_ending_at(caption, end)
    assert found.text == phrase == caption[found.start : found.end] and found.end == end


@pytest.mark.parametrize("end", [-1, 0, 3, 2, 99])
def test_an_offset_that_ends_no_word_is_refused(end):
    with pytest.raises(ValueError, match=f"subject end {end} "):
        phrase_ending_at("a man", end)
