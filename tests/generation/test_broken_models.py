"""A model folder with any one thing wrong is refused in one line that names the file, before anything is written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from facediffuser.errors import InputError
from facediffuser.explain import ExplainSettings, explain
from facediffuser.generation.job import prepare
from facediffuser.model_check import MODULES, check_model_folder, weight_files
from facediffuser.pipeline import FaceDiffuserPipeline

Breaking = Callable[[Path], None]


def written(name: str, content: bytes) -> Breaking:
    return lambda folder: (folder / name).write_bytes(content) and None


def removed(name: str) -> Breaking:
    return lambda folder: (folder / name).unlink()


def removed_folder(name: str) -> Breaking:
    return lambda folder: shutil.rmtree(folder / name)


def changed(name: str, **values) -> Breaking:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def weights(component: str, change: Callable[[Path], None]) -> Breaking:
    return lambda folder: change(weight_files(folder / component, component)[0])


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def lengthened(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 40)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def header_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


def tensors(edit: Callable[[dict, str], None]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        state = load_file(path)
        edit(state, sorted(state)[0])
        save_file(state, path, metadata={"format": "pt"})

    return change


def _set(state: dict, key: str, value: float) -> None:
    state[key] = state[key].clone()
    state[key].view(-1)[0] = value


shape = tensors(lambda state, key: state.update({key: torch.zeros(*state[key].shape, 2)}))
key_gone = tensors(dict.__delitem__)
key_more = tensors(lambda state, key: state.update({"more.weight": torch.zeros(2)}))
integers = tensors(lambda state, key: state.update({key: state[key].long()}))
nan = tensors(lambda state, key: _set(state, key, float("nan")))
infinite = tensors(lambda state, key: _set(state, key, float("inf")))

OF_WEIGHTS = {
    "missing": Path.unlink, "empty": emptied, "truncated": truncated, "with more bytes": lengthened, "garbage": garbage,
    "header cut": header_cut, "wrong shape": shape, "key missing": key_gone, "key more": key_more, "integers": integers,
    "NaN": nan, "infinite": infinite,
}  # fmt: skip
OF_CONFIG = {
    "missing": removed, "empty": lambda name: written(name, b""), "not JSON": lambda name: written(name, b"{"),
    "a list": lambda name: written(name, b"[]"), "not text": lambda name: written(name, b"\xff\xfe{}"),
}  # fmt: skip
KINDS: dict[str, Breaking] = {
    **{f"{part} weights {kind}": weights(part, change) for part in ("unet", "vae", "text_encoder")
       for kind, change in OF_WEIGHTS.items()},
    **{f"{part} weights {kind}": weights(part, OF_WEIGHTS[kind]) for part in set(MODULES) - {"unet", "vae", "text_encoder"}
       for kind in ("missing", "truncated", "wrong shape", "NaN")},
    **{f"{part} config {kind}": change(f"{part}/config.json") for part in ("unet", "vae", "text_encoder", "subject_fuser")
       for kind, change in OF_CONFIG.items()},
    **{f"{name} {kind}": change(name) for name in ("model_index.json", "scheduler/scheduler_config.json")
       for kind, change in OF_CONFIG.items()},
    **{f"{part} missing": removed_folder(part) for part in (*MODULES, "tokenizer", "scheduler")},
    "unet of another class": changed("unet/config.json", _class_name="UNet3DConditionModel"),
    "vae of another class": changed("vae/config.json", _class_name="AutoencoderTiny"),
    "text encoder of another type": changed("text_encoder/config.json", model_type="bert"),
    "image encoder of another type": changed("image_encoder/config.json", model_type="clip_text_model"),
    "unet with other widths": changed("unet/config.json", block_out_channels=[16, 32]),
    "unet with a width that is a word": changed("unet/config.json", block_out_channels="wide"),
    "unet for inpainting": changed("unet_text/config.json", in_channels=9),
    "unet of another text width": changed("unet/config.json", cross_attention_dim=24),
    "text encoder with more layers": changed("text_encoder/config.json", num_hidden_layers=3),
    "fuser of another width": changed("subject_fuser/config.json", embed_dim=8),
    "model_index entry": changed("model_index.json", unet="UNet2DConditionModel"),
    "scheduler without class": changed("scheduler/scheduler_config.json", _class_name=None),
    "scheduler of an unknown class": changed("scheduler/scheduler_config.json", _class_name="NoScheduler"),
    "scheduler of no scheduler class": changed("scheduler/scheduler_config.json", _class_name="AutoencoderKL"),
    "scheduler with words for numbers": changed("scheduler/scheduler_config.json", num_train_timesteps="many"),
    "scheduler with noise beyond 1": changed("scheduler/scheduler_config.json", beta_start=2.0, beta_end=3.0),
    "scheduler with noise that is NaN": changed("scheduler/scheduler_config.json", trained_betas=[float("nan")] * 1000),
    "scheduler with a billion steps": changed("scheduler/scheduler_config.json", num_train_timesteps=10**9),
    "vae that divides by zero": changed("vae/config.json", scaling_factor=0),
    "vae that divides by NaN": changed("vae/config.json", scaling_factor=float("nan")),
    "unet with a billion layers": changed("unet/config.json", layers_per_block=10**9),
    "unet with a list of a billion layers": changed("unet_text/config.json", transformer_layers_per_block=[1, 10**9]),
    "text encoder with a billion layers": changed("text_encoder/config.json", num_hidden_layers=10**9),
    "vocabulary not JSON": written("tokenizer/tokenizer.json", b"{"),
    "vocabulary without model": written("tokenizer/tokenizer.json", b"{}"),
    "vocabulary of garbage": written("tokenizer/tokenizer.json", b'{"model": {"type": "BPE", "vocab": 3}}'),
    "tokenizer files missing": removed("tokenizer/tokenizer.json"),
    "tokenizer config not JSON": written("tokenizer/tokenizer_config.json", b"{"),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_broken_folder_is_refused_in_one_line_and_nothing_is_written(world, tmp_path, kind):
    models = shutil.copytree(world.models, tmp_path / "models")
    KINDS[kind](models)
    with pytest.raises(InputError) as refused:
        prepare(world.settings(tmp_path / "output", models=str(models)))
    assert "\n" not in str(refused.value) and str(models) in str(refused.value)
    assert not (tmp_path / "output").exists()
    picture = next((world.subjects / "ada").iterdir())
    settings = {"prompt": "a man <|image|>", "reference": [picture], "output": tmp_path / "new" / "explain.png"}
    with pytest.raises(InputError) as refused:
        explain(ExplainSettings(models=str(models), **settings))
    assert "\n" not in str(refused.value) and str(models) in str(refused.value)
    assert not (tmp_path / "new").exists()


def test_a_whole_folder_and_weights_in_parts_pass(world, tmp_path):
    check_model_folder(world.models, MODULES)
    models = shutil.copytree(world.models, tmp_path / "models")
    whole = models / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(whole)
    names, parts = sorted(state), {}
    for number, chosen in enumerate((names[::2], names[1::2])):
        file = f"diffusion_pytorch_model-{number + 1:05d}-of-00002.safetensors"
        save_file({name: state[name] for name in chosen}, models / "unet" / file, metadata={"format": "pt"})
        parts |= dict.fromkeys(chosen, file)
    whole.unlink()
    (whole.parent / f"{whole.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    check_model_folder(models, MODULES)
    (models / "unet" / parts[names[0]]).unlink()
    with pytest.raises(InputError, match=r"00001-of-00002.safetensors: missing"):
        check_model_folder(models)


def test_the_files_of_a_variant_are_the_ones_checked(world, tmp_path):
    models = tmp_path / "models"
    FaceDiffuserPipeline.from_pretrained(world.models).save_pretrained(models, variant="fp16")
    with pytest.raises(InputError, match=r"diffusion_pytorch_model.safetensors: missing"):
        FaceDiffuserPipeline.from_pretrained(models)
    assert FaceDiffuserPipeline.from_pretrained(models, variant="fp16").unet is not None
    path = models / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    whole = path.read_bytes()
    for change, says in ((nan, "not finite"), (truncated, "its header describes"), (emptied, "no safetensors")):
        path.write_bytes(whole)
        change(path)
        with pytest.raises(InputError, match=rf"unet.diffusion_pytorch_model.fp16.safetensors: .*{says}"):
            FaceDiffuserPipeline.from_pretrained(models, variant="fp16")
    with pytest.raises(InputError, match="no weight file of variant 'bf16' in it"):
        FaceDiffuserPipeline.from_pretrained(world.models, variant="bf16")
