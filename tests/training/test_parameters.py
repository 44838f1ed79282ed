"""The table of trained parameters, and that one step moves those and no others."""

import pytest
import torch

from facediffuser.training.denoisers import load_parts
from facediffuser.training.loop import train_model
from facediffuser.training.parameters import TRAINED, select_trained


def test_only_unet_fuser_and_the_last_encoder_layers_are_selected(settings):
    parts = load_parts(settings("sdm"))
    chosen = select_trained("sdm", parts.trained, 2)
    assert {name.split(".")[0] for name in chosen} == set(TRAINED["sdm"])
    layers = {name.split("layers.")[1].split(".")[0] for name in chosen if name.startswith("image_encoder")}
    assert layers == {"2", "3"}
    assert all(parameter.requires_grad for parameter in chosen.values())
    every = {f"{part}.{name}": p for part, module in parts.trained.items() for name, p in module.named_parameters()}
    assert not any(parameter.requires_grad for name, parameter in every.items() if name not in chosen)
    assert not any(p.requires_grad for part in (parts.vae, parts.text_encoder) for p in part.parameters())


@pytest.mark.parametrize("role", ["tdm", "sdm"])
def test_training_moves_every_trained_parameter_and_leaves_the_frozen_ones(settings, tmp_path, role):
    from safetensors.torch import load_file

    chosen = settings(role, train_image_encoder_layers=2, caption_drop=0.0, subject_keep=1.0)
    before = load_parts(chosen)
    names = set(select_trained(role, before.trained, 2))
    train_model(chosen, lambda numbers: None)
    for part, module in before.trained.items():
        file = next((tmp_path / "run" / "final" / part).glob("*.safetensors"))
        after = load_file(file)
        for name, parameter in module.named_parameters():
            moved = not torch.equal(after[name], parameter.detach())
            # The localization loss alone reaches some biases only through others' noise: a bias may stand still, a matrix not.
            if f"{part}.{name}" in names and parameter.ndim > 1:
                assert moved, f"{part}.{name} has not moved"
            if f"{part}.{name}" not in names:
                assert not moved, f"{part}.{name} has moved"
