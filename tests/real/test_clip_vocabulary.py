"""Markers, subject words and truncation on CLIP's own vocabulary (from open-clip-torch), not the miniature's alone."""

import gzip
import json
from pathlib import Path

import pytest

from facediffuser.errors import InputError
from facediffuser.prompts import IMAGE_MARKER, ids_and_places

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """transformers' CLIPTokenizer with the vocabulary that OpenAI's CLIP was trained with."""
    import open_clip
    from open_clip.tokenizer import bytes_to_unicode
    from transformers import CLIPTokenizer

    packed = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    letters = list(bytes_to_unicode().values())
    words = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *map("".join, merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


def test_it_is_clips_vocabulary(tokenizer):
    import open_clip

    text = "a photo of a woman reading a book in a café, 1920s!"
    assert len(tokenizer) == 49_408
    assert tokenizer(text).input_ids == [token for token in open_clip.tokenize([text])[0].tolist() if token]


def test_the_mask_is_at_the_last_token_of_each_subjects_word(tokenizer):
    ids, places = ids_and_places(tokenizer, f"a firefighter {IMAGE_MARKER} and an astrophysicist {IMAGE_MARKER} at sea")
    plain = tokenizer("a firefighter and an astrophysicist at sea").input_ids
    assert list(ids)[: len(plain)] == plain
    words = [tokenizer.convert_ids_to_tokens(int(ids[place])) for place in places]
    assert [word.endswith("</w>") for word in words] == [True, True]
    assert "firefighter".endswith(words[0].removesuffix("</w>")) and "astrophysicist".endswith(
        words[1].removesuffix("</w>")
    )


def test_a_marker_is_dropped_and_changes_no_other_token(tokenizer):
    assert len(tokenizer(IMAGE_MARKER, add_special_tokens=False).input_ids) == 5  # it is no token of the vocabulary
    with_marker, _ = ids_and_places(tokenizer, f"a man {IMAGE_MARKER} smiling")
    assert list(with_marker)[:5] == tokenizer("a man smiling").input_ids


def test_a_subject_behind_the_77th_token_is_refused_and_one_before_it_is_not(tokenizer):
    filler = "very " * 70
    ids, places = ids_and_places(tokenizer, f"a {filler}tall man {IMAGE_MARKER} at sea")
    assert places[0] < 76
    with pytest.raises(InputError):
        ids_and_places(tokenizer, f"a {'very ' * 80}tall man {IMAGE_MARKER}")


def test_a_long_text_is_cut_at_77_with_its_end_kept(tokenizer):
    ids, places = ids_and_places(tokenizer, f"a man {IMAGE_MARKER} " + "walking " * 200)
    assert len(ids) == 77 and ids[-1] == tokenizer.eos_token_id and list(places) == [2]
