"""Words for people that no caption has: tokens of their own, known words' meaning, all other texts as they were."""

import numpy as np
import pytest
import torch
from miniature.conftest import picture
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from facediffuser.dataset.inputs import DEFAULT_CLASS_WORD
from facediffuser.faces import crop_square, face_crop_box
from facediffuser.modelfolder import model_digests, same_part
from facediffuser.pipeline import FaceDiffuserPipeline
from facediffuser.schedulers import SCHEDULER_CLASSES, set_scheduler
from facediffuser.scoring.face_detector import FaceDetector
from facediffuser.shipped import EARLIER_PARTS, WEIGHTS, base_folder, models_folder
from tools.miniature_weights.tokenizer import make_tokenizer, token_ids
from tools.miniature_weights.words import LIKE, add_words

CAPTIONS = ["a man and a woman on the beach", "a photo of a woman, smiling", "a man reading a book"]


def made():
    """A tokenizer of a few captions and an untrained text model for it."""
    tokenizer = make_tokenizer(CAPTIONS * 2, merges=200)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return tokenizer, CLIPTextModel(config).eval()


@torch.no_grad()
def states(tokenizer, model, texts) -> torch.Tensor:
    return model(token_ids(tokenizer, texts)).last_hidden_state


def test_texts_without_such_words_have_the_ids_and_the_embeddings_they_had():
    tokenizer, model = made()
    texts = [*CAPTIONS, "", "personal ladylike boyish", "123, höh!"]
    ids, before = token_ids(tokenizer, texts), states(tokenizer, model, texts)
    add_words(tokenizer, model.get_input_embeddings())
    assert torch.equal(token_ids(tokenizer, texts), ids)
    assert torch.equal(states(tokenizer, model, texts), before)


def test_a_word_stands_for_the_known_ones_and_doing_it_twice_changes_nothing():
    tokenizer, model = made()
    rows = add_words(tokenizer, model.get_input_embeddings())
    first = model.get_input_embeddings().weight.clone()
    assert rows == len(tokenizer) == len(first)
    assert add_words(tokenizer, model.get_input_embeddings()) == rows
    assert torch.equal(model.get_input_embeddings().weight, first)
    assert torch.equal(*(states(tokenizer, model, [f"a {word} on the beach"]) for word in ("lady", "woman")))
    row = {word: first[tokenizer.convert_tokens_to_ids(word)] for word in ("person", "man</w>", "woman</w>")}
    assert torch.allclose(row["person"], (row["man</w>"] + row["woman</w>"]) / 2)


@pytest.mark.parametrize("folder", ["base/tokenizer", "models/tokenizer", "scorers/prompt"])
def test_the_shipped_parts_know_each_word_wherever_it_stands(folder):
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / folder)
    assert DEFAULT_CLASS_WORD in LIKE
    for word in LIKE:
        assert tokenizer.tokenize(f"a {word.title()}, a {word}") == ["a</w>", word, ",</w>", "a</w>", word]
        assert word not in tokenizer.tokenize(f"{word}ish pre{word}")


def test_what_was_trained_on_the_parts_before_the_words_still_fits():
    shipped = model_digests(base_folder())
    assert {shipped["text_encoder"], shipped["tokenizer"]} == set(EARLIER_PARTS.values())
    assert (
        model_digests(models_folder()).items()
        >= {name: shipped[name] for name in ("text_encoder", "tokenizer")}.items()
    )
    for earlier, now in EARLIER_PARTS.items():
        assert same_part(earlier, now) and same_part(now, now)
        assert not same_part(now, earlier) and not same_part(None, now)


def test_two_people_without_a_word_of_their_own_are_two_faces():
    people = [picture(100 + number) for number in range(4)]
    shown = [crop_square(Image.fromarray(one.image), face_crop_box(one.face_boxes[0], 0.3)) for one in people]
    pipe = FaceDiffuserPipeline.from_pretrained("miniature")
    pipe.set_progress_bar_config(disable=True)
    set_scheduler(pipe, SCHEDULER_CLASSES["dpm"])
    prompts = [f"a {DEFAULT_CLASS_WORD} <|image|> and a {DEFAULT_CLASS_WORD} <|image|> {where}"
               for where in ("on the beach", "in the snow", "in a room", "in the city")]  # fmt: skip
    images = pipe(
        prompts, [[shown[number], shown[(number + 1) % 4]] for number in range(4)], num_inference_steps=12,
        fusion_start=4, fusion_end=7, generator=[torch.Generator().manual_seed(number) for number in range(4)],
    ).images  # fmt: skip
    assert np.mean([len(faces) == 2 for faces in FaceDetector().detect(images)]) >= 0.75
