"""What only saves time or memory changes nothing of what is learnt; what averages, averages."""

import pytest
import torch
from training.test_loop import weights

from facediffuser.training.loop import train_model


def first_step(settings, tmp_path, **given) -> dict[str, float]:
    """Return the numbers of a run's first step; its result lies in tmp_path/NAME."""
    told = []
    name = "-".join(f"{option}-{value}" for option, value in given.items()) or "plain"
    train_model(settings("sdm", steps=1, batch_size=4, output=str(tmp_path / name), **given), told.append)
    return told[0]


@pytest.mark.parametrize(
    "given",
    [
        {"channels_last": True},
        {"gradient_checkpointing": True},
        {"attention": "sdpa"},
        {"attention": "eager"},
    ],
)
def test_loss_and_gradient_are_the_plain_ones(settings, tmp_path, given):
    plain, other = (first_step(settings, tmp_path, **options) for options in ({}, given))
    for name in ("loss", "localization", "grad_norm"):
        assert other[name] == pytest.approx(plain[name], rel=1e-3), name


@pytest.mark.slow  # Tracing the UNet takes most of a minute, making machine code of it some more.
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("backend", "given"),
    [("inductor", {"compile": True}), ("aot_eager", {"compile": True, "gradient_checkpointing": True})],
)
def test_a_compiled_unet_has_the_plain_loss_and_gradient(settings, tmp_path, monkeypatch, backend, given):
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_module(module, backend=backend))
    plain, other = (first_step(settings, tmp_path, **options) for options in ({}, given))
    for name in ("loss", "localization", "grad_norm"):
        assert other[name] == pytest.approx(plain[name], rel=1e-3), name


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("role", ["tdm", "sdm"])
def test_twenty_compiled_steps_have_the_losses_of_eager_ones(settings, tmp_path, role):
    losses = {}
    for compiled in (False, True):
        told: list[dict[str, float]] = []
        given = settings(
            role, steps=20, batch_size=2, log_every=1, output=str(tmp_path / str(compiled)), compile=compiled
        )
        train_model(given, told.append)
        losses[compiled] = [numbers["loss"] for numbers in told]
    assert len(losses[True]) == 20
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
    first, second = weights(tmp_path / "False"), weights(tmp_path / "True")
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-2, atol=1e-4)


def test_in_bfloat16_loss_and_gradient_are_near_and_the_weights_stay_float32(settings, tmp_path):
    plain, half = (first_step(settings, tmp_path, precision=precision) for precision in ("fp32", "bf16"))
    assert half["loss"] == pytest.approx(plain["loss"], rel=0.02) and half["loss"] != plain["loss"]
    assert half["grad_norm"] == pytest.approx(plain["grad_norm"], rel=0.1)
    assert {tensor.dtype for tensor in weights(tmp_path / "precision-bf16").values()} == {torch.float32}


def test_averaged_weights_are_the_result_and_lie_between_the_first_and_the_last(settings, tmp_path):
    from facediffuser.training.denoisers import load_parts

    start = {f"unet/{name}": p.detach() for name, p in load_parts(settings("tdm")).denoiser.unet.named_parameters()}
    given = dict(steps=1, warmup_steps=0)
    train_model(settings("tdm", output=str(tmp_path / "last"), **given), lambda numbers: None)
    train_model(settings("tdm", output=str(tmp_path / "mean"), ema=0.9, **given), lambda numbers: None)
    last, mean = weights(tmp_path / "last"), weights(tmp_path / "mean")
    for name, first in start.items():
        # The decay rises towards the one asked for: (1 + step) / (10 + step).
        torch.testing.assert_close(mean[name], first.lerp(last[name], 1 - 2 / 11))
