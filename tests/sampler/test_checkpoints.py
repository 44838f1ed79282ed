"""Released checkpoints become model folders: every key counted, every misfit named, the same images."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from sampler import plain_sampler
from sampler.conftest import scheduler
from sampler.released import OLD_ATTENTION, released_state, write_base, write_clip
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from facediffuser.checkpoints import SDM_PARTS, TDM_PARTS, convert, match_keys
from facediffuser.errors import InputError
from facediffuser.flows.cli import main
from facediffuser.pipeline import FaceDiffuserPipeline
from facediffuser.storage import open_store
from facediffuser.subject import SubjectFuser

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def released(parts, tmp_path_factory):
    """The arguments of `convert` but the output: base, image_encoder, sdm, tdm."""
    folder = tmp_path_factory.mktemp("released")
    torch.save(released_state(parts, "unet", with_subject=True), folder / "sdm.bin")
    torch.save(released_state(parts, "unet_text", with_subject=False), folder / "tdm.bin")
    return {
        "base": write_base(folder / "base", parts),
        "image_encoder": write_clip(folder / "clip", parts["image_encoder"]),
        "sdm": folder / "sdm.bin",
        "tdm": folder / "tdm.bin",
    }


def altered(released, tmp_path, role: str, change) -> dict:
    """The same arguments with one file changed by `change(state)`."""
    state = torch.load(released[role], weights_only=True)
    change(state)
    torch.save(state, tmp_path / f"{role}.bin")
    return {**released, role: tmp_path / f"{role}.bin"}


def test_a_converted_model_has_the_released_weights_and_samples_as_they_do(released, parts, picture, tmp_path):
    folder = convert(**released, output=tmp_path / "model")
    pipe = FaceDiffuserPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    for name in ("unet", "unet_text", "vae", "text_encoder", "image_encoder", "subject_fuser"):
        ours, theirs = getattr(pipe, name).state_dict(), parts[name].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    prompt, images = "a man <|image|> reading a book", [picture(0)]
    expected, _ = plain_sampler.sample(parts, scheduler(), prompt, images, noise[0], 8, 5.0, 3, 6)
    made = pipe(prompt, images, 8, 5.0, 3, 6, latents=noise, output_type="latent").images[0]
    assert (made - expected).abs().max() < 1e-3
    files = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert files == {".json", ".safetensors"}
    assert not [path for path in tmp_path.iterdir() if path != folder]


def test_new_names_and_a_text_model_prefix_and_safetensors_are_read_as_well(released, parts, tmp_path):
    def renewed(state):
        renewed = {}
        for key, value in state.items():
            if key.endswith("position_ids"):
                continue
            for new, old in OLD_ATTENTION.items():
                key = key.replace(old, new)
            renewed[key.replace("text_encoder.", "text_encoder.text_model.", 1)] = value
        return renewed

    sdm = renewed(torch.load(released["sdm"], weights_only=True))
    save_file(sdm, tmp_path / "sdm.safetensors")
    folder = convert(**{**released, "sdm": tmp_path / "sdm.safetensors"}, output=tmp_path / "model")
    loaded = CLIPTextModel.from_pretrained(folder / "text_encoder").state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in parts["text_encoder"].state_dict().items())


@pytest.mark.parametrize("role", ["sdm", "tdm"])
@pytest.mark.parametrize(
    "key",
    [
        "unet.conv_in.weight",
        "text_encoder.final_layer_norm.bias",
        "vae.encoder.mid_block.attentions.0.to_q.weight",
        "postfuse_module.mlp1.fc1.weight",
        "image_encoder.visual_projection.weight",
    ],
)
def test_a_missing_key_is_named(released, tmp_path, role, key):
    if role == "tdm" and key.split(".")[0] in ("postfuse_module", "image_encoder"):
        key = "unet.conv_out.bias"
    arguments = altered(released, tmp_path, role, lambda state: state.pop(key.replace("to_q", "query")))
    with pytest.raises(InputError, match=f"{role}.bin: {key} missing"):
        convert(**arguments, output=tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("key", ["unet.conv_in.scale", "safety_checker.weight", "epoch", "text_encoder.position_ids"])
def test_a_key_without_a_place_is_named(released, tmp_path, key):
    arguments = altered(released, tmp_path, "sdm", lambda state: state.update({key: torch.zeros(1)}))
    with pytest.raises(InputError, match=f"{key} has no place"):
        convert(**arguments, output=tmp_path / "model")


def test_a_key_given_twice_under_two_names_is_named(released, tmp_path):
    def twice(state):
        state["text_encoder.text_model.final_layer_norm.bias"] = state["text_encoder.final_layer_norm.bias"]

    with pytest.raises(InputError, match="text_model.final_layer_norm.bias has no place"):
        convert(**altered(released, tmp_path, "sdm", twice), output=tmp_path / "model")


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("unet.conv_in.weight", (16, 4, 1, 1)),
        ("text_encoder.embeddings.position_ids", (1, 78)),
        ("postfuse_module.layer_norm.weight", (33,)),
    ],
)
def test_a_misshapen_key_is_named_with_both_shapes(released, tmp_path, key, shape):
    arguments = altered(released, tmp_path, "sdm", lambda state: state.update({key: torch.zeros(shape)}))
    with pytest.raises(InputError, match=f"{key} has shape {'x'.join(map(str, shape))}, the base models need"):
        convert(**arguments, output=tmp_path / "model")


def test_frozen_parts_that_differ_between_the_files_are_named(released, tmp_path):
    arguments = altered(released, tmp_path, "tdm", lambda state: state["vae.quant_conv.bias"].add_(1))
    with pytest.raises(InputError, match="vae.quant_conv.bias differs"):
        convert(**arguments, output=tmp_path / "model")


def test_swapped_files_are_distinguished(released, tmp_path):
    with pytest.raises(InputError, match="tdm.bin: image_encoder.* missing"):
        convert(**{**released, "sdm": released["tdm"], "tdm": released["sdm"]}, output=tmp_path / "model")


class Evil:
    def __reduce__(self):
        return (open, ("/dev/null",))


def test_files_that_are_no_checkpoints_are_refused_and_code_in_them_is_not_run(released, tmp_path):
    torch.save({"unet.conv_in.weight": Evil()}, tmp_path / "evil.bin")
    torch.save({"epoch": 3}, tmp_path / "numbers.bin")
    (tmp_path / "text.bin").write_text("no checkpoint")
    for name, message in (
        ("evil.bin", "cannot be read"),
        ("text.bin", "cannot be read"),
        ("numbers.bin", "no state_dict"),
        ("absent.bin", "no such file"),
    ):
        with pytest.raises(InputError, match=message):
            convert(**{**released, "sdm": tmp_path / name}, output=tmp_path / "model")


def test_an_output_that_holds_something_is_left_alone(released, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="already holds something"):
        convert(**released, output=tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["notes.txt"]


def test_a_base_without_a_part_is_refused(released, parts, tmp_path):
    base = write_base(tmp_path / "base", parts)
    (base / "vae").rename(tmp_path / "vae")
    with pytest.raises(InputError, match="has no vae"):
        convert(**{**released, "base": base}, output=tmp_path / "model")


# --- the real thing's names and shapes --------------------------------------------------------------------------------


def real_modules() -> dict:
    """Stable Diffusion v1-5 and CLIP ViT-L/14, without weights, by their published configurations."""
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "patch_size": 14, "image_size": 224, "projection_dim": 768,
    }  # fmt: skip
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        return {
            "unet": unet,
            "unet_text": unet,
            "vae": vae,
            "text_encoder": CLIPTextModel(CLIPTextConfig(vocab_size=49408, **text)),
            "image_encoder": CLIPVisionModelWithProjection(CLIPVisionConfig(**vision)),
            "subject_fuser": SubjectFuser(embed_dim=768),
        }


def published(name: str) -> dict[str, torch.Tensor]:
    """The keys and shapes of a released file, without weights."""
    rows = [line.split("\t") for line in (DATA / f"official_{name}_state_dict.tsv").read_text().splitlines()]
    return {key: torch.empty([int(side) for side in shape.split("x")], device="meta") for key, shape in rows}


@pytest.mark.parametrize(("name", "parts_of", "keys"), [("sdm", SDM_PARTS, 1538), ("tdm", TDM_PARTS, 1131)])
def test_every_published_key_and_shape_has_its_place(name, parts_of, keys):
    state, modules = published(name), real_modules()
    assert len(state) == keys
    states = match_keys(state, parts_of, modules, name)
    dropped = [key for key in state if key.endswith("position_ids")]
    assert sum(len(part) for part in states.values()) == keys - len(dropped)
    for component, part in states.items():
        wanted = modules[component].state_dict()
        assert {key: value.shape for key, value in part.items()} == {key: value.shape for key, value in wanted.items()}


def write_full_size(folder: Path) -> None:
    """Released files at full size with random weights: `sdm.bin` (5.5 GB) and `tdm.bin` (4.3 GB)."""
    generator = torch.Generator().manual_seed(0)

    def drawn(key: str, value: torch.Tensor) -> torch.Tensor:
        if key.endswith("position_ids"):
            return torch.arange(value.numel()).view(value.shape)
        if value.ndim == 1:
            return torch.ones(value.shape) if key.endswith("weight") else torch.zeros(value.shape)
        return torch.randn(value.shape, generator=generator) * 0.02

    sdm = {key: drawn(key, value) for key, value in published("sdm").items()}
    torch.save(sdm, folder / "sdm.bin")
    tdm = {key: drawn(key, value) if key.startswith("unet.") else sdm[key] for key, value in published("tdm").items()}
    torch.save(tdm, folder / "tdm.bin")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_full_size_conversion_makes_an_image_of_512_pixels(tokenizer, picture, tmp_path):
    write_full_size(tmp_path)
    modules = real_modules()
    base = tmp_path / "base"
    for name in ("unet", "vae"):
        modules[name].save_config(base / name)
    modules["text_encoder"].config.save_pretrained(base / "text_encoder")
    tokenizer.save_pretrained(base / "tokenizer")
    scheduler().save_pretrained(base / "scheduler")
    (base / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    modules["image_encoder"].config.save_pretrained(tmp_path / "clip")
    folder = convert(base, tmp_path / "clip", tmp_path / "sdm.bin", tmp_path / "tdm.bin", tmp_path / "model")
    pipe = FaceDiffuserPipeline.from_pretrained(folder).to("cuda" if torch.cuda.is_available() else "cpu")
    image = pipe("a man <|image|>", [picture(0, (300, 300))], 2, fusion_start=0, fusion_end=1).images[0]
    assert image.size == (512, 512)
    assert pipe.unet.state_dict()["conv_in.weight"].std() > 0.01
    shutil.rmtree(tmp_path)  # 18 GB


def test_a_model_is_converted_into_a_bucket(released, s3_bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [part for name, value in released.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["convert", *words, "--output", f"{s3_bucket.url}/models", "--quiet"]) == 0
    keys = {info.key for info in open_store(f"{s3_bucket.url}/models").list()}
    assert "model_index.json" in keys and "unet_text/diffusion_pytorch_model.safetensors" in keys
    assert list(tmp_path.iterdir()) == []
