"""The small tokenizer: any text, no unknown token, the end token highest of those learnt and found by the text encoder's pooling."""

import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from facediffuser.miniature.render import Rendering
from facediffuser.shipped import base_folder, scorers_folder
from tools.miniature_weights.tokenizer import make_tokenizer, token_ids

TEXTS = ["a photo of a man with curly red hair", "a woman wearing a blue beanie in the snow", "a man on the beach"] * 4


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(base_folder() / "tokenizer")


@pytest.mark.parametrize("text", ["an astronaut riding a horse", "naïve café, 北京 🎈!", "x" * 50, "3.14 <b>"])
def test_any_text_comes_back_from_its_ids(tokenizer: CLIPTokenizer, text: str):
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in ids[1:-1]
    assert tokenizer.decode(ids[1:-1]).replace(" ", "") == text.lower().replace(" ", "")


def test_the_end_token_has_the_highest_id_of_those_learnt(tokenizer: CLIPTokenizer):
    for shipped in (tokenizer, CLIPTokenizer.from_pretrained(scorers_folder() / "prompt")):
        added = len(shipped.added_tokens_decoder) - 2  # words for people, behind start and end
        assert shipped.eos_token_id == len(shipped) - added - 1


def test_captions_fit(tokenizer: CLIPTokenizer, photos: list[Rendering]):
    longest = max(len(tokenizer(drawn.full_caption.text).input_ids) for drawn in photos)
    assert longest < tokenizer.model_max_length


def test_common_words_are_single_tokens(tokenizer: CLIPTokenizer):
    for word in ("man", "woman", "beanie", "shirt", "beach", "sketch"):
        assert len(tokenizer(word).input_ids) == 3, word


def test_learning_is_repeatable():
    first, again = make_tokenizer(TEXTS, 60), make_tokenizer(TEXTS, 60)
    assert first.get_vocab() == again.get_vocab()
    assert token_ids(first, ["a man"]).tolist() == token_ids(again, ["a man"]).tolist()


def test_pooling_takes_the_end_token_not_the_padding(tokenizer: CLIPTokenizer):
    encoder = CLIPTextModel.from_pretrained(base_folder() / "text_encoder").float().eval()
    text = "a man in the snow"
    length = len(tokenizer(text).input_ids)
    with torch.no_grad():
        output = encoder(token_ids(tokenizer, [text]))
    assert torch.equal(output.pooler_output[0], output.last_hidden_state[0, length - 1])
