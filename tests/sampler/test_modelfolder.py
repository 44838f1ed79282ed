"""Model folders: found, told apart, and assembled from two trainings whole or not at all."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from sampler.conftest import scheduler
from sampler.released import write_base, write_run

from facediffuser.errors import InputError
from facediffuser.model_check import is_finite
from facediffuser.modelfolder import (
    assemble,
    load_image_encoder,
    model_digests,
    resolve_base,
    resolve_image_encoder,
    resolve_model,
)
from facediffuser.pipeline import FaceDiffuserPipeline


@pytest.fixture(scope="module")
def trained(parts, tmp_path_factory):
    """A base folder and the two runs trained from it, as (base, tdm, sdm)."""
    folder = tmp_path_factory.mktemp("trained")
    base = write_base(folder / "base", parts)
    digests = model_digests(base)
    return (
        base,
        write_run(folder / "tdm", "tdm", parts, "unet_text", digests),
        write_run(folder / "sdm", "sdm", parts, "unet", digests),
    )


@pytest.fixture
def own(trained, tmp_path):
    """A copy of the base and the runs that a test may spoil."""
    return tuple(shutil.copytree(folder, tmp_path / "own" / folder.name) for folder in trained)


def edit(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_assembled_folder_loads_and_holds_each_models_weights(trained, parts, picture, tmp_path):
    base, tdm, sdm = trained
    folder = assemble(base, str(tdm), str(sdm), tmp_path / "model")
    pipe = FaceDiffuserPipeline.from_pretrained(folder)
    for name in ("unet", "unet_text", "vae", "text_encoder", "image_encoder", "subject_fuser"):
        assert all(torch.equal(v, parts[name].state_dict()[k]) for k, v in getattr(pipe, name).state_dict().items())
    pipe("a man <|image|>", [picture(0)], 2, fusion_start=0, fusion_end=1)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_runs_may_be_given_as_urls_with_a_slash_and_an_empty_output_is_used(trained, tmp_path):
    (tmp_path / "model").mkdir()
    base, tdm, sdm = trained
    assert (assemble(base, f"{tdm}/", f"{sdm}/", tmp_path / "model") / "model_index.json").is_file()


def test_a_run_of_the_other_role_is_refused(trained, tmp_path):
    base, tdm, sdm = trained
    with pytest.raises(InputError, match="was trained as sdm; give a tdm run"):
        assemble(base, str(sdm), str(tdm), tmp_path / "model")


def test_an_unfinished_run_is_refused(own, tmp_path):
    base, tdm, sdm = own
    (sdm / "final" / "training.json").unlink()
    with pytest.raises(InputError, match="no final/training.json"):
        assemble(base, str(tdm), str(sdm), tmp_path / "model")
    shutil.rmtree(tdm / "final")
    with pytest.raises(InputError, match="final"):
        assemble(base, str(tdm), str(sdm), tmp_path / "model")


def test_runs_from_another_base_are_refused_by_the_part_that_differs(own, tmp_path):
    base, tdm, sdm = own
    edit(base / "vae" / "config.json", scaling_factor=0.5)
    with pytest.raises(InputError, match=r"trained from another base .*vae differs"):
        assemble(base, str(tdm), str(sdm), tmp_path / "model")


def test_a_unet_of_another_shape_is_refused(own, tmp_path):
    base, tdm, sdm = own
    edit(sdm / "final" / "unet" / "config.json", layers_per_block=3)
    with pytest.raises(InputError, match="layers_per_block is 3, the base's is 1"):
        assemble(base, str(tdm), str(sdm), tmp_path / "model")


def test_a_fuser_of_another_width_is_refused(own, tmp_path):
    base, tdm, sdm = own
    edit(sdm / "final" / "subject_fuser" / "config.json", embed_dim=48)
    with pytest.raises(InputError, match="embed_dim 48"):
        assemble(base, str(tdm), str(sdm), tmp_path / "model")


def test_a_run_that_lacks_a_part_is_refused(own, tmp_path):
    base, tdm, sdm = own
    shutil.rmtree(sdm / "final" / "image_encoder")
    with pytest.raises(InputError, match="the image_encoder is missing"):
        assemble(base, str(tdm), str(sdm), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(("run", "change"), [("tdm", "missing"), ("sdm", "missing"), ("tdm", "cut"), ("base", "cut")])
def test_weights_that_are_missing_or_cut_short_are_refused_by_name(own, tmp_path, run, change):
    folder = own[("base", "tdm", "sdm").index(run)]
    path = folder / ("vae" if run == "base" else "final/unet") / "diffusion_pytorch_model.safetensors"
    if change == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    for trained in own[1:]:
        edit(trained / "final" / "training.json", base_digests=model_digests(own[0]))
    with pytest.raises(InputError, match="diffusion_pytorch_model.safetensors: ") as refused:
        assemble(own[0], str(own[1]), str(own[2]), tmp_path / "model")
    assert str(path) in str(refused.value) and not (tmp_path / "model").exists()


def test_an_output_that_holds_something_is_left_alone(trained, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="already holds something"):
        assemble(*(str(folder) for folder in trained), tmp_path / "model")


def test_a_failure_halfway_leaves_nothing(own, tmp_path, monkeypatch):
    base, tdm, sdm = own

    def full(source, target):
        raise OSError("no space left on device")

    monkeypatch.setattr("facediffuser.modelfolder.shutil.copyfile", full)
    with pytest.raises(OSError, match="no space"):
        assemble(base, str(tdm), str(sdm), tmp_path / "new" / "model")
    assert not list((tmp_path / "new").iterdir())


def test_weights_in_a_bin_file_become_safetensors(own, parts, tmp_path):
    base, tdm, sdm = own
    (base / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(parts["vae"].state_dict(), base / "vae" / "diffusion_pytorch_model.bin")
    for run in (tdm, sdm):
        edit(run / "final" / "training.json", base_digests=model_digests(base))
    folder = assemble(base, str(tdm), str(sdm), tmp_path / "model")
    assert not list(folder.rglob("*.bin"))
    pipe = FaceDiffuserPipeline.from_pretrained(folder)
    assert all(torch.equal(v, parts["vae"].state_dict()[k]) for k, v in pipe.vae.state_dict().items())


# --- digests ----------------------------------------------------------------------------------------------------------


def test_digests_depend_on_names_and_contents_only(own, trained):
    ours = model_digests(own[0])
    assert ours == model_digests(trained[0])
    assert set(ours) == {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    (own[0] / "vae" / ".cache").write_text("x")
    (own[0] / "vae" / "README.md").write_text("x")
    assert model_digests(own[0]) == ours
    (own[0] / "vae" / "config.json").rename(own[0] / "vae" / "settings.json")
    changed = model_digests(own[0])
    assert {name for name in ours if changed[name] != ours[name]} == {"vae"}


# --- finding ----------------------------------------------------------------------------------------------------------


def test_a_local_folder_is_itself(trained):
    assert resolve_base(str(trained[0])) == trained[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "empty name"),
        ("./nowhere/model", "no such folder"),
        ("/nowhere/at/all", "no such folder"),
        ("no-such-owner/no-such-model", "not to be had from the hub"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_clear_line(name, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=message) as caught:
        resolve_model(name)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="no model_index.json"):
        resolve_model(str(tmp_path))
    with pytest.raises(InputError, match="no config.json"):
        resolve_image_encoder(str(tmp_path))


def test_the_vision_tower_of_a_folder_is_loaded_and_a_wrong_folder_refused(parts, tmp_path):
    parts["image_encoder"].save_pretrained(tmp_path / "tower")
    loaded = load_image_encoder(resolve_image_encoder(str(tmp_path / "tower")))
    assert torch.equal(loaded.visual_projection.weight, parts["image_encoder"].visual_projection.weight)
    parts["text_encoder"].save_pretrained(tmp_path / "text")
    with pytest.raises(InputError, match="of type clip_text_model"):
        load_image_encoder(tmp_path / "text")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 50, 99])
def test_one_value_that_is_not_finite_is_seen(kind, value, place):
    tensor = torch.linspace(-2, 2, 100, dtype=kind)
    assert is_finite(tensor) and is_finite(tensor[:0])
    tensor[place] = value
    assert not is_finite(tensor.reshape(10, 10))


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_value_of_eight_bits_that_is_not_finite_is_seen(kind):
    tensor = torch.linspace(-2, 2, 100)
    assert is_finite(tensor.to(kind))
    tensor[50] = math.nan
    assert not is_finite(tensor.to(kind))


def test_whole_numbers_are_finite():
    assert is_finite(torch.arange(3)) and is_finite(torch.tensor([True, False]))


def test_a_folder_whose_digests_were_compared_is_not_checked_again(parts, tmp_path):
    FaceDiffuserPipeline(**parts, scheduler=scheduler()).save_pretrained(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    next(iter(state.values())).flatten()[0] = math.nan
    save_file(state, weights)
    with pytest.raises(InputError, match="not finite"):
        FaceDiffuserPipeline.from_pretrained(tmp_path)
    assert FaceDiffuserPipeline.from_pretrained(tmp_path, checked=True).unet is not None
