"""`facediffuser check`: folders in the published layout are read whole, known digests named, known inputs run."""

import hashlib
import shutil

import pytest
import torch
from facenet_pytorch import InceptionResnetV1
from safetensors.torch import load_file, save_file

from facediffuser.errors import InputError
from facediffuser.evaluation import weights_check
from facediffuser.evaluation.weights_check import check_weights, published_name
from facediffuser.evaluation.weights_settings import CheckSettings
from facediffuser.flows.cli import main
from facediffuser.scoring.identity import FACENET_FILE


def found(**given) -> dict[str, tuple[str, bool]]:
    """What the check says, by what was looked at."""
    return {one.what: (one.found, one.good) for one in check_weights(CheckSettings(**given))}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model folder of random weights in diffusers' layout, as Stable Diffusion's is."""
    from generation.world import save_models

    return save_models(tmp_path_factory.mktemp("check") / "models")


@pytest.fixture
def published(scorers_folder, tmp_path):
    """Scorers in the published files' layout: FaceNet's state dict with its classifier, CLIP of transformers, both random."""
    folder = tmp_path / "published"
    shutil.copytree(scorers_folder / "prompt", folder / "prompt")
    (folder / "identity").mkdir()
    torch.manual_seed(0)
    state = InceptionResnetV1(pretrained=None).state_dict()
    torch.save(state | {"logits.weight": torch.zeros(8631, 512)}, folder / "identity" / FACENET_FILE)
    return folder


def test_models_in_the_published_layout_are_read_whole_and_make_an_image(models, monkeypatch):
    weights = models / "unet" / "diffusion_pytorch_model.safetensors"
    monkeypatch.setitem(weights_check.PUBLISHED, hashlib.sha256(weights.read_bytes()).hexdigest(), "a model, unet")
    said = found(models=str(models))
    assert all(good for _, good in said.values())
    assert said[f"unet/{weights.name}"][0].endswith("as published: a model, unet")
    others = [part for part in ("text_encoder", "vae") if f"{part}/" in " ".join(said)]
    assert others == ["text_encoder", "vae"]
    assert all("no published file that is known here" in text for what, (text, _) in said.items()
               if what.startswith(("vae/", "text_encoder/")))  # fmt: skip
    assert said["an image of two steps"][0].startswith("32 x 32")


def test_scorers_in_the_published_layout_are_read_whole_and_run(published):
    said = found(scorers=str(published))
    assert f"identity/{FACENET_FILE}" in said and "prompt/model.safetensors" in said
    assert said["faces of drawn people"] == ("found in 8 of 8 pictures", True)
    # Random weights know nobody; the check says so by numbers, whatever they are.
    assert "cosine of a picture with its JPEG at least" in said["identity"][0]
    assert "cosine with a picture's own caption" in said["prompt"][0]


def test_the_miniatures_own_weights_pass():
    said = found(scorers="miniature")
    assert all(good for _, good in said.values())


def test_weights_that_know_nobody_are_wrong_and_the_command_exits_with_1(published, capsys):
    """A face network that gives everyone the same vector loads, and does not tell people apart."""
    file = published / "identity" / FACENET_FILE
    state = torch.load(file, weights_only=True)
    state["last_linear.weight"].zero_()
    state["last_bn.bias"].fill_(1.0)
    torch.save(state, file)
    assert main(["check", "--scorers", str(published)]) == 1
    lines = capsys.readouterr().out
    assert (
        "WRONG: identity: cosine of a picture with its JPEG at least 1.000, with another person at most 1.000" in lines
    )


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
@pytest.mark.parametrize("how", ["not finite", "missing tensor", "half of the file"])
def test_a_damaged_file_of_a_model_is_one_line_that_names_it(models, tmp_path, part, how):
    folder = shutil.copytree(models, tmp_path / "models")
    [file] = (folder / part).glob("*.safetensors")
    if how == "half of the file":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        state = load_file(file)
        name = sorted(state)[0]
        if how == "not finite":
            state[name].view(-1)[0] = float("nan")
        else:
            del state[name]
        save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(InputError) as refused:
        found(models=str(folder))
    assert f"{part}" in str(refused.value) and "\n" not in str(refused.value)


def test_what_is_missing_is_one_line_and_exit_code_2(models, tmp_path, capsys):
    folder = shutil.copytree(models, tmp_path / "models")
    shutil.rmtree(folder / "vae")
    assert main(["check", "--models", str(folder)]) == 2
    assert "vae" in capsys.readouterr().err


def test_every_digest_that_is_listed_is_a_sha256_and_a_name(tmp_path):
    assert all(len(digest) == 64 and int(digest, 16) and name for digest, name in weights_check.PUBLISHED.items())
    (tmp_path / "weights.bin").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    assert published_name(tmp_path / "weights.bin") == f"{digest[:12]}, no published file that is known here"
