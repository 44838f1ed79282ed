"""Markers in prompts, reference pictures of every kind, and the fuser."""

import copy
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from facediffuser.errors import InputError
from facediffuser.pictures import CLIP_MEAN, CLIP_STD, pad_to_square, to_rgb
from facediffuser.prompt_tokens import tokenize_with_markers
from facediffuser.prompts import IMAGE_MARKER, without_markers
from facediffuser.subject import SubjectFuser, encode_references, preprocess_references

M = IMAGE_MARKER


# --- markers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def marked_tokenizer(tokenizer):
    """The same tokenizer with the marker added as a special token, as the method has it."""
    marked = copy.deepcopy(tokenizer)
    marked.add_tokens([M], special_tokens=True)
    return marked


def ids_by_special_token(marked, prompt: str) -> tuple[list[int], list[int]]:
    """Ids without the marker's, and the index of the token before each marker, read off the added token."""
    marker = marked.convert_tokens_to_ids(M)
    ids, places = [], []
    for token in marked.encode(prompt):
        if token == marker:
            places.append(len(ids) - 1)
        else:
            ids.append(token)
    return ids, places


def assert_same_as_special_token(tokenizer, marked, prompt: str) -> None:
    ids, places = ids_by_special_token(marked, prompt)
    tokens = tokenize_with_markers(tokenizer, [prompt])
    assert tokens.input_ids[0, : len(ids)].tolist() == ids
    assert (tokens.input_ids[0, len(ids) :] == tokenizer.pad_token_id).all()
    assert tokens.subject_mask[0].nonzero().flatten().tolist() == places


@pytest.mark.parametrize(
    "prompt",
    [
        f"a man {M} and a woman {M} in the park",
        f"a man{M}and a woman{M}",
        f"A MAN {M}, smiling",
        f"  it's  the   man {M}\n's hat ",
        f"a person {M}",
        f"\u00c9l\u00e9onore {M} \u4eba {M} caf\u0301e 7 {M}!",
        "no subject at all",
        "",
    ],
)
def test_ids_are_those_of_the_marker_as_a_special_token(tokenizer, marked_tokenizer, prompt):
    assert_same_as_special_token(tokenizer, marked_tokenizer, prompt)


words = st.text(alphabet="abc'sXYZ \t7,!\u00e9\u0130", min_size=1, max_size=8).filter(str.strip)


@settings(max_examples=50, deadline=None)
@given(st.lists(words, min_size=1, max_size=4))
def test_ids_are_those_of_the_marker_as_a_special_token_for_any_words(tokenizer, marked_tokenizer, pieces):
    assert_same_as_special_token(tokenizer, marked_tokenizer, M.join(pieces))


def test_the_tokenizer_is_left_as_it_was(tokenizer):
    before = len(tokenizer), tokenizer("a man").input_ids, tokenizer.model_max_length
    tokenize_with_markers(tokenizer, [f"a man {M} reading"])
    assert (len(tokenizer), tokenizer("a man").input_ids, tokenizer.model_max_length) == before


def test_the_plain_prompt_has_the_same_ids(tokenizer):
    tokens = tokenize_with_markers(tokenizer, [f"a man {M} and a woman {M}, smiling"])
    plain = tokenizer(tokens.texts_without_markers, padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert tokens.texts_without_markers == ["a man and a woman, smiling"]
    assert torch.equal(tokens.input_ids, plain)


def test_prompts_of_one_batch_keep_their_own_subjects(tokenizer):
    tokens = tokenize_with_markers(tokenizer, [f"a man {M}", "a park", f"a man {M} and a woman {M}"])
    assert tokens.subject_counts.tolist() == [1, 0, 2]
    assert tokens.input_ids.shape == tokens.subject_mask.shape == (3, 77)


def test_a_long_prompt_is_cut_as_the_tokenizer_cuts_it_and_says_so(tokenizer, caplog):
    prompt = f"a man {M} " + "reading a book " * 600
    with caplog.at_level(logging.WARNING, logger="facediffuser.subject"):
        tokens = tokenize_with_markers(tokenizer, [prompt])
    plain = tokenizer([without_markers(prompt)], max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(tokens.input_ids, plain)
    assert tokens.subject_counts.tolist() == [1]
    assert "cut to 77" in caplog.text and len(caplog.text) < 1000


def test_a_marker_beyond_the_last_token_is_an_error_that_names_the_subject(tokenizer):
    prompt = f"a man {M} " + "7 " * 80 + f"a woman {M}"
    with pytest.raises(InputError, match="subject 2 stands behind token 75"):
        tokenize_with_markers(tokenizer, [prompt])


@pytest.mark.parametrize(("words_before", "kept"), [(75, 1), (76, 0)])
def test_the_last_usable_token_is_the_one_before_the_end_token(tokenizer, words_before, kept):
    tokens = tokenize_with_markers(tokenizer, ["7 " * words_before + M], lost="drop")
    assert tokens.subject_counts.tolist() == [kept]
    assert tokens.input_ids[0, -1] == tokenizer.eos_token_id


@pytest.mark.parametrize("prompt", [f"{M} a man", f"  {M}", f"\t{M}{M}"])
def test_a_subject_at_the_prompts_start_is_an_error(tokenizer, prompt):
    with pytest.raises(InputError, match="at the start"):
        tokenize_with_markers(tokenizer, [prompt])


@pytest.mark.parametrize("prompt", [f"a man {M}{M}", f"a man {M} {M} and"])
def test_two_subjects_on_one_word_are_an_error(tokenizer, prompt):
    with pytest.raises(InputError, match="two"):
        tokenize_with_markers(tokenizer, [prompt])


# --- reference pictures -----------------------------------------------------------------------------------------------


def rgb_of(image: Image.Image, at=(0, 0)) -> tuple[int, ...]:
    converted = to_rgb(image)
    assert converted.mode == "RGB"
    return converted.getpixel(at)


def test_a_square_picture_is_resized_with_antialiasing_and_normalised(picture):
    image = picture(1, (41, 41))
    pixels = torch.tensor(np.array(image) / 255, dtype=torch.float32).permute(2, 0, 1)[None]
    resized = F.interpolate(pixels, (28, 28), mode="bilinear", antialias=True)[0]
    expected = [(resized[c] - CLIP_MEAN[c]) / CLIP_STD[c] for c in range(3)]
    assert torch.allclose(preprocess_references([image], 28)[0], torch.stack(expected), atol=1e-6)


def test_grey_palette_and_print_colours_become_rgb():
    assert rgb_of(Image.new("L", (2, 2), 100)) == (100, 100, 100)
    assert rgb_of(Image.new("1", (2, 2), 1)) == (255, 255, 255)
    assert rgb_of(Image.new("CMYK", (2, 2), (0, 255, 255, 0))) == (255, 0, 0)
    palette = Image.new("RGB", (2, 2), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert rgb_of(palette) == (10, 200, 30)


def test_alpha_is_laid_over_white():
    assert rgb_of(Image.new("RGBA", (2, 2), (10, 20, 30, 255))) == (10, 20, 30)
    assert rgb_of(Image.new("RGBA", (2, 2), (10, 20, 30, 0))) == (255, 255, 255)
    assert rgb_of(Image.new("LA", (2, 2), (50, 0))) == (255, 255, 255)
    clear = Image.new("P", (2, 2), 0)
    clear.info["transparency"] = 0
    assert rgb_of(clear) == (255, 255, 255)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.full((2, 2), 257 * 100, np.uint16), 100),
        (np.full((2, 2), 65535, np.uint16), 255),
        (np.full((2, 2), 100, np.int32), 100),
        (np.full((2, 2), 25700, np.int32), 100),
        (np.full((2, 2), 0.5, np.float32), 128),
        (np.full((2, 2), 128, np.float32), 128),
    ],
)
def test_deep_grey_is_scaled_to_eight_bits(values, expected):
    assert rgb_of(Image.fromarray(values)) == (expected,) * 3


def test_values_beyond_sixteen_bits_are_refused():
    with pytest.raises(InputError, match="beyond 16 bits"):
        to_rgb(Image.fromarray(np.full((2, 2), 1e6, np.float32)))


def test_a_rotated_photograph_is_turned_upright(picture, tmp_path):
    upright = picture(2, (20, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side: turn by 90 degrees to the right
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    turned = Image.open(tmp_path / "turned.png")
    assert turned.size == (30, 20)
    assert np.array_equal(np.array(to_rgb(turned)), np.array(upright))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (3, 2), (28, 28), (4000, 3000)])
def test_pictures_of_any_size_become_the_towers_size(picture, size):
    pixels = preprocess_references([picture(3, size)], 28)
    assert pixels.shape == (1, 3, 28, 28)
    assert pixels.isfinite().all()


def test_shrinking_a_huge_picture_first_hardly_changes_it():
    gradient = np.linspace(0, 255, 2000, dtype=np.uint8)
    image = Image.fromarray(np.broadcast_to(gradient[:, None, None], (2000, 2000, 3)).copy())
    pixels = torch.tensor(np.array(image) / 255, dtype=torch.float32).permute(2, 0, 1)[None]
    whole = F.interpolate(pixels, (28, 28), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    assert (preprocess_references([image], 28) - (whole - mean) / std).abs().max() < 0.02


def test_padding_to_a_square_keeps_the_proportions(picture):
    padded = pad_to_square(picture(4, (10, 30)))
    assert padded.size == (30, 30)
    assert padded.getpixel((0, 0)) == (0, 0, 0)
    assert np.array_equal(np.array(padded)[:, 10:20], np.array(picture(4, (10, 30))))


def test_what_is_no_picture_is_refused():
    with pytest.raises(InputError, match="type str"):
        preprocess_references(["face.jpg"], 28)


def test_references_embed_alike_together_and_alone(parts, picture):
    images = [picture(5), picture(6, (17, 64)), picture(7, mode="RGBA")]
    with torch.no_grad():
        together = encode_references(parts["image_encoder"], images)
        alone = torch.cat([encode_references(parts["image_encoder"], [image]) for image in images])
    assert together.shape == (3, 32)
    assert torch.allclose(together, alone, atol=1e-5)


# --- the fuser --------------------------------------------------------------------------------------------------------


def layer_norm(x: torch.Tensor, norm) -> torch.Tensor:
    centred = x - x.mean()
    return centred / torch.sqrt((centred**2).mean() + 1e-5) * norm.weight + norm.bias


def mlp(x: torch.Tensor, block) -> torch.Tensor:
    hidden = block.fc1.weight @ layer_norm(x, block.layernorm) + block.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return block.fc2.weight @ hidden + block.fc2.bias


def fuse_token(text: torch.Tensor, image: torch.Tensor, fuser: SubjectFuser) -> torch.Tensor:
    """One token's fusion, as METHOD's formula has it."""
    x = mlp(torch.cat([text, image]), fuser.mlp1) + text
    x = x + mlp(x, fuser.mlp2)
    return layer_norm(x, fuser.layer_norm)


@torch.no_grad()
def test_the_kth_marked_token_takes_the_kth_image_and_no_other_token_changes(parts):
    fuser = parts["subject_fuser"]
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(3, 9, 32, generator=generator)
    images = torch.randn(3, 2, 32, generator=generator)
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[0, 2], mask[0, 5], mask[1, 7] = True, True, True
    before = text.clone()
    fused = fuser(text, images, mask, mask.sum(dim=1))
    expected = text.clone()
    for row, token, image in ((0, 2, 0), (0, 5, 1), (1, 7, 0)):
        expected[row, token] = fuse_token(text[row, token], images[row, image], fuser)
    assert torch.allclose(fused, expected, atol=1e-5)
    assert torch.equal(fused[~mask], text[~mask])
    assert torch.equal(text, before)


@torch.no_grad()
def test_tokens_beyond_a_rows_count_keep_their_text(parts):
    text, images = torch.randn(1, 6, 32), torch.randn(1, 2, 32)
    mask = torch.tensor([[False, True, False, True, False, False]])
    fused = parts["subject_fuser"](text, images, mask, torch.tensor([1]))
    assert torch.equal(fused[0, 3], text[0, 3])
    assert not torch.allclose(fused[0, 1], text[0, 1])


def test_the_fuser_learns_even_from_a_batch_without_subjects():
    fuser = SubjectFuser(embed_dim=8)
    fuser(torch.randn(2, 5, 8), torch.zeros(2, 0, 8), torch.zeros(2, 5, dtype=torch.bool)).sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in fuser.parameters())


def test_more_subjects_than_the_model_takes_are_refused(parts):
    with pytest.raises(InputError, match="up to 4"):
        parts["subject_fuser"](torch.zeros(1, 9, 32), torch.zeros(1, 5, 32), torch.ones(1, 9, dtype=torch.bool))
