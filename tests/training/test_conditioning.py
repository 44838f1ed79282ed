"""What the models are told: markers in the right places, drops as often as asked."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from facediffuser.prompt_tokens import tokenize_with_markers
from facediffuser.prompts import IMAGE_MARKER, without_markers
from facediffuser.training.conditioning import draw_condition_dropout, mark_caption


def test_markers_follow_the_phrases_whatever_their_order():
    caption = "a man and a woman in a park"
    assert mark_caption(caption, [17, 5]) == f"a man {IMAGE_MARKER} and a woman {IMAGE_MARKER} in a park"
    assert mark_caption(caption, []) == caption


@given(st.lists(st.integers(0, 3), max_size=4))
def test_a_marked_caption_without_its_markers_is_the_caption(places):
    caption, ends = "a man, a woman and a child, smiling", [5, 14, 26, 35]
    assert without_markers(mark_caption(caption, [ends[place] for place in places])) == caption


def test_marked_captions_have_the_ids_of_plain_ones_so_cached_embeddings_fit():
    from transformers import CLIPTokenizer

    from facediffuser.shipped import base_folder

    tokenizer = CLIPTokenizer.from_pretrained(base_folder() / "tokenizer")
    caption = "a woman wearing a hat, and a man in the park"
    marked = tokenize_with_markers(tokenizer, [mark_caption(caption, [7, 28]), caption])
    assert torch.equal(marked.input_ids[0], marked.input_ids[1])
    assert marked.subject_counts.tolist() == [2, 0]


def test_captions_and_subjects_are_dropped_as_often_as_asked():
    generator = torch.Generator().manual_seed(0)
    told = [draw_condition_dropout(2, 0.1, 0.9, generator) for _ in range(4000)]
    dropped = [one for one in told if not one.caption]
    assert abs(len(dropped) / len(told) - 0.1) < 0.02
    assert all(one.subjects == () for one in dropped)
    kept = sum(len(one.subjects) for one in told if one.caption) / (2 * (len(told) - len(dropped)))
    assert abs(kept - 0.9) < 0.02
