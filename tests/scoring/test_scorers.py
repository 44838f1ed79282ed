"""IP and PC of pictures: found faces, known answers, weights that are checked at the start."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from facenet_pytorch import MTCNN, InceptionResnetV1
from PIL import Image, ImageEnhance
from safetensors.torch import load_file, save_file
from scoring.small_world import beside

from facediffuser.errors import InputError, NotFiniteError
from facediffuser.scoring.identity import face_crop, load_identity, subject_embedding
from facediffuser.scoring.prompt import clip_crop
from facediffuser.scoring.scorers import load_scorers


@pytest.fixture(scope="module")
def known(scorers, people):
    """The reference embedding of each of the three people."""
    pictures = [beside(face) for face in people.values()]
    return dict(zip(people, scorers.identity.embed_references(pictures, list(people)), strict=True))


def score(scorers, known, picture: Image.Image, *subjects: str):
    return scorers.score([picture], [[known[name] for name in subjects]], ["a person"])[0]


def test_a_person_is_recognised_and_another_is_not(scorers, known, people):
    assert score(scorers, known, beside(people["ada"]), "ada").ip > 0.99
    assert score(scorers, known, beside(people["ada"]), "bob").ip < 0.7


def test_two_people_standing_the_other_way_round_are_still_themselves(scorers, known, people):
    picture = beside(people["bob"], people["ada"])
    found = score(scorers, known, picture, "ada", "bob")
    assert found.face_count == 2 and min(found.ip_per_subject) > 0.98
    left_edges = [found.face_boxes[face][0] for face in found.subject_faces]
    assert left_edges[0] > left_edges[1]  # ada is the one on the right


def test_three_faces_for_two_subjects_leave_the_stranger_out(scorers, known, people):
    picture = beside(people["eve"], people["ada"], people["bob"])
    found = score(scorers, known, picture, "ada", "bob")
    assert found.face_count == 3 and found.ip > 0.98


def test_a_picture_without_a_face_scores_zero(scorers, known):
    found = score(scorers, known, beside(), "ada", "bob")
    assert (found.ip, found.ip_per_subject, found.face_count, found.face_boxes) == (0.0, [0.0, 0.0], 0, [])


def test_the_same_person_twice_does_not_stand_for_two_people(scorers, known, people):
    found = score(scorers, known, beside(people["ada"], people["ada"]), "ada", "bob")
    assert found.ip_per_subject[0] > 0.98
    assert found.ip == found.ip_per_subject[1] < 0.7


def test_a_small_face_in_the_background_does_not_take_the_subjects_place(scorers, known, people):
    picture = beside(people["ada"], size=320)
    small = people["bob"].resize((45, 58), Image.Resampling.LANCZOS)
    picture.paste(small, (10, 10))
    found = score(scorers, known, picture, "ada")
    assert found.face_count == 2 and found.ip > 0.98


def test_a_reference_is_its_largest_face(scorers, known, people):
    picture = beside(people["ada"], size=320)
    picture.paste(people["bob"].resize((45, 58), Image.Resampling.LANCZOS), (10, 10))
    vector = scorers.identity.embed_references([picture], ["two.png"])[0]
    assert vector @ known["ada"] > 0.98


def test_a_reference_without_a_face_is_named(scorers, people):
    with pytest.raises(InputError, match=r"^ada/2\.png: no face found; give a picture with one visible face$"):
        scorers.identity.embed_references([beside(people["ada"]), beside()], ["ada/1.png", "ada/2.png"])


def test_a_real_photograph_stays_itself_when_turned_darkened_or_made_smaller(scorers, photograph):
    """With the face crop MTCNN gives; how much a turn may cost depends on the network, so the order is tested."""
    reference = scorers.identity.embed_references([photograph], ["astronaut"])
    changed = {
        "itself": photograph,
        "darkened": ImageEnhance.Brightness(photograph).enhance(0.6),
        "smaller": photograph.resize((256, 256), Image.Resampling.LANCZOS),
        "turned": photograph.rotate(12, Image.Resampling.BICUBIC, fillcolor=(90, 90, 90)),
        "mirrored colours": Image.fromarray(np.ascontiguousarray(np.asarray(photograph)[:, :, ::-1])),
    }
    ips = {name: scorers.score([picture], [[reference[0]]], ["a woman"])[0].ip for name, picture in changed.items()}
    assert ips["itself"] == pytest.approx(1.0, abs=1e-6)
    assert min(ips[name] for name in ("darkened", "smaller")) > 0.95
    assert ips["turned"] > 0.75
    assert ips["mirrored colours"] < ips["turned"]


def test_the_crop_and_the_embedding_are_those_of_facenet_pytorch(photograph, tmp_path):
    torch.manual_seed(0)
    network = InceptionResnetV1(pretrained=None).eval()
    torch.save(network.state_dict() | {"logits.weight": torch.zeros(3, 512)}, tmp_path / "facenet.pt")
    theirs = MTCNN(image_size=160, margin=0, keep_all=True)(photograph)
    scorer, _ = load_identity(tmp_path, "cpu")
    ours = scorer.embed_faces([photograph])[0]
    crop = face_crop(photograph, ours.faces[0].box, 160)
    assert np.array_equal(crop.transpose(2, 0, 1), (theirs[0] * 128 + 127.5).round().byte().numpy())
    with torch.no_grad():
        assert np.allclose(network(theirs).numpy(), ours.vectors, atol=1e-6)


def test_a_box_at_or_over_the_edge_still_gives_a_crop(photograph):
    for box in ((-20.0, -5.0, 30.0, 40.0), (500.0, 500.0, 600.0, 600.0), (511.6, 511.7, 511.9, 511.9)):
        assert face_crop(photograph, box, 160).shape == (160, 160, 3)


def test_pc_is_the_cosine_that_transformers_gives(scorers, photograph):
    model, tokenizer = scorers.prompt.model, scorers.prompt.tokenizer
    text = "a person on the beach"
    with torch.no_grad():
        output = model(
            pixel_values=torch.from_numpy(clip_crop(photograph, 32))[None],
            **tokenizer([text], return_tensors="pt"),
        )
    expected = float((output.image_embeds * output.text_embeds).sum())
    assert scorers.prompt.score([photograph], [text])[0] == pytest.approx(expected, abs=1e-5)


def test_clip_sees_the_middle_of_a_picture_with_its_shorter_side_resized(photograph):
    wide = Image.new("RGB", (768, 512), (255, 0, 0))
    wide.paste(photograph, (128, 0))
    difference = np.abs(clip_crop(wide, 32)[:, :, 2:-2] - clip_crop(photograph, 32)[:, :, 2:-2])
    assert difference.max() < 0.02


def test_a_prompt_longer_than_the_text_encoder_is_cut(scorers, photograph):
    words = "beach " * 400
    assert scorers.prompt.score([photograph], [words]) == scorers.prompt.score([photograph], [words + "book"])


def test_scoring_twice_gives_the_same_numbers(scorers, known, people):
    pictures = [beside(people["ada"], people["bob"]), beside(people["eve"]), beside()]
    wanted = [[known["ada"], known["bob"]], [known["eve"]], [known["ada"]]]
    prompts = ["a person on the beach", "a man", "a man"]
    first, second = (scorers.score(pictures, wanted, prompts) for _ in range(2))
    # Scores hold arrays, of which `==` makes arrays: pickled they are compared bit for bit.
    assert [pickle.dumps(score) for score in first] == [pickle.dumps(score) for score in second]


def test_several_references_count_by_their_mean():
    first, second = np.eye(3, dtype=np.float32)[:2]
    assert np.array_equal(subject_embedding(first[None]), first)
    assert np.allclose(subject_embedding(np.stack([first, second])), [0.5**0.5, 0.5**0.5, 0])


def test_scorers_of_a_folder_carry_the_digests_of_their_weights(scorers_folder):
    first, second = load_scorers(str(scorers_folder)), load_scorers(str(scorers_folder))
    assert first.digests == second.digests
    assert set(first.digests) == {"face_detector", "identity", "prompt"}
    assert all(len(digest) == 64 for digest in first.digests.values())


def test_a_missing_weight_is_reported_at_the_start_by_name(scorers_folder, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no such file or folder"):
        load_scorers(str(tmp_path / "none"))
    (tmp_path / "identity").mkdir()
    with pytest.raises(InputError, match="prompt: missing"):
        load_scorers(str(tmp_path))
    (tmp_path / "prompt").symlink_to(scorers_folder / "prompt")
    with pytest.raises(InputError, match="identity: no weights; put FaceNet's"):
        load_scorers(str(tmp_path))
    (tmp_path / "identity" / "wrong.pt").write_bytes(b"not weights")
    with pytest.raises(InputError, match=r"wrong\.pt: not InceptionResnetV1's weights"):
        load_scorers(str(tmp_path))


def test_the_papers_scorers_name_the_file_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(InputError, match=r"20180402-114759-vggface2\.pt: FaceNet's weights are missing"):
        load_scorers("paper")


def refuse(*args, **kwargs):
    raise OSError("no network")


def damaged(path: Path, how: str) -> None:
    """Spoil a safetensors file: one value NaN or infinite, one tensor gone, or half of the file."""
    if how == "truncated":
        os.truncate(path, path.stat().st_size // 2)
        return
    state = load_file(path)
    name = sorted(name for name, value in state.items() if value.is_floating_point() and value.numel() > 1)[0]
    if how == "gone":
        del state[name]
    else:
        state[name].view(-1)[0] = float(how)
    save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize("how", ["nan", "inf", "gone", "truncated"])
@pytest.mark.parametrize("part", ["identity", "prompt"])
def test_damaged_weights_of_a_scorer_are_refused_by_name(scorers_folder, tmp_path, part, how):
    folder = shutil.copytree(scorers_folder, tmp_path / "scorers")
    damaged(folder / part / "model.safetensors", how)
    with pytest.raises(InputError, match=rf"scorers.{part}") as refused:
        load_scorers(str(folder))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["identity/config.json", "prompt/config.json", "prompt/tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe"])
def test_damaged_configurations_of_a_scorer_are_refused_by_name(scorers_folder, tmp_path, name, content):
    folder = shutil.copytree(scorers_folder, tmp_path / "scorers")
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=f"scorers.{name.partition('/')[0]}"):
        load_scorers(str(folder))


def test_a_face_without_numbers_has_no_score(scorers, known, people, monkeypatch):
    monkeypatch.setattr(scorers.identity.network, "forward", lambda crops: torch.full((len(crops), 75), torch.nan))
    found = scorers.score([beside(people["ada"])], [[known["ada"], known["bob"]]], ["a man"])[0]
    assert np.isnan(found.ip) and found.subject_faces == [-1, -1]
    with pytest.raises(NotFiniteError, match="the score ip is nan"):
        found.require_finite()
