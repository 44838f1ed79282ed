"""Captions, segments and matches come from the real transformers classes, loaded from a folder."""

import numpy as np
import pytest
from PIL import Image
from preprocess.tiny_models import tiny_blip, tiny_blip2, tiny_clip, tiny_mask2former
from skimage import data

from facediffuser.errors import InputError
from facediffuser.preprocess import segmenter as segmenter_module
from facediffuser.preprocess.captioners import Captioner
from facediffuser.preprocess.preprocess_settings import PreprocessSettings
from facediffuser.preprocess.required_models import require_models
from facediffuser.preprocess.segment_maps import segment_box
from facediffuser.preprocess.segmenter import Segmenter
from facediffuser.preprocess.source_files import Record
from facediffuser.preprocess.sources import Listing
from facediffuser.preprocess.subject_segments import PhraseMatcher

PICTURES = [Image.fromarray(data.astronaut()).resize(size) for size in ((64, 64), (96, 64), (64, 64))]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "captioner": tiny_blip(root / "blip"),
        "segmenter": tiny_mask2former(root / "mask2former"),
        "matcher": tiny_clip(root / "clip"),
        "blip-2": tiny_blip2(root / "blip2"),
    }


@pytest.mark.parametrize("kind", ["captioner", "blip-2"])
def test_captions_are_text_and_the_same_every_time(models, kind):
    captioner = Captioner(models[kind], max_tokens=5)
    captions = captioner.caption(PICTURES)
    assert len(captions) == 3 and captions[0] == captions[2] and captions == captioner.caption(PICTURES)
    assert all(caption == " ".join(caption.split()) for caption in captions)
    assert any(captions)
    assert not any("<image>" in caption or "[" in caption.replace("[UNK]", "") for caption in captions)
    assert all(len(caption.split()) <= 5 for caption in captions)


def test_a_model_of_another_kind_is_refused(models):
    with pytest.raises(InputError, match="a clip model; give a BLIP"):
        Captioner(models["matcher"])


def test_segments_cover_pictures_of_their_own_sizes(models):
    segmenter = Segmenter(models["segmenter"])
    results = segmenter.segment(PICTURES)
    assert sum(len(segments) for _, segments in results) > 0
    for picture, (ids, segments) in zip(PICTURES, results, strict=True):
        assert ids.shape == (picture.height, picture.width) and ids.dtype == np.int32
        assert set(np.unique(ids)) - {0} == {segment.id for segment in segments}
        assert all(segment.label in ("person", "tree") for segment in segments)
        assert all(segment_box(ids, segment.id) == segment.box for segment in segments)
    alone = segmenter.segment(PICTURES[1:2])[0]
    np.testing.assert_array_equal(alone[0], results[1][0])


def test_the_map_of_a_huge_picture_is_drawn_smaller_and_stretched(models, monkeypatch):
    segmenter = Segmenter(models["segmenter"])
    asked = []
    real = segmenter.processor.post_process_panoptic_segmentation

    def post_process(outputs, target_sizes):
        asked.extend(target_sizes)
        return real(outputs, target_sizes=target_sizes)

    monkeypatch.setattr(segmenter.processor, "post_process_panoptic_segmentation", post_process)
    monkeypatch.setattr(segmenter_module, "MAX_MAP_PIXELS", 96 * 64 / 4)
    ((ids, segments),) = segmenter.segment(PICTURES[1:2])
    assert asked == [(32, 48)] and ids.shape == (64, 96)
    assert segments and all(segment_box(ids, segment.id) == segment.box for segment in segments)


def test_a_phrase_is_compared_with_a_crop_of_any_shape(models):
    matcher = PhraseMatcher(models["matcher"])
    crops = [PICTURES[0].resize(size) for size in ((1, 50), (50, 1), (3, 40), (40, 3), (1, 1))]
    assert matcher.similarity(crops, ["a man"]).shape == (1, 5)


def test_similarity_is_the_cosine_of_phrase_and_crop(models):
    matcher = PhraseMatcher(models["matcher"])
    table = matcher.similarity(PICTURES[:2], ["a young man", "a woman on the beach", "a man"])
    assert table.shape == (3, 2) and (np.abs(table) <= 1 + 1e-6).all()
    for row, phrase in enumerate(["a young man", "a woman on the beach", "a man"]):
        np.testing.assert_allclose(matcher.similarity(PICTURES[:1], [phrase])[0, 0], table[row, 0], atol=1e-5)


def test_a_model_that_cannot_be_had_is_reported_before_any_work(models, tmp_path):
    plain = Listing("here", "folder", [Record("a", "a.png")], 0, "")
    good = {name: str(models[name]) for name in ("captioner", "segmenter", "matcher")}
    require_models(PreprocessSettings(source="s", output="o", **good), plain)
    for option in good:
        for wrong in (str(tmp_path / "nothing"), str(tmp_path)):
            with pytest.raises(InputError, match=f"--{option} {wrong}: no such model"):
                require_models(PreprocessSettings(source="s", output="o", **{**good, option: wrong}), plain)
        require_models(PreprocessSettings(source="s", output="o", **{**good, option: "none"}), plain)
    described = Listing("here", "ffhq-fastcomposer", [Record("a", "a.png", "a.json", "a.npy")], 0, "")
    require_models(PreprocessSettings(source="s", output="o", captioner="nowhere/at-all"), described)
