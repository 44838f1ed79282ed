"""Pictures of runs: read from what a run leaves, a run that was gone on with counting once."""

import pytest
from PIL import Image

from facediffuser.training.loop import train_model
from tools import curves


def test_curves_and_samples_of_a_run_that_was_resumed(settings, tmp_path):
    told: dict[int, float] = {}
    for steps in (2, 5):
        chosen = settings(
            "tdm", steps=steps, schedule="constant", checkpoint_every=1, validate_every=1, sample_every=5,
            sample_images=2, validation_images=2,
        )  # fmt: skip
        train_model(
            chosen, lambda numbers: told.update({int(numbers["step"]): numbers["loss"]} if "loss" in numbers else {})
        )
    [run] = curves.read_runs([chosen.output])
    assert run.name == "TDM"
    assert run.numbers["loss"] == pytest.approx(told) and list(run.numbers["loss"]) == [1, 2, 3, 4, 5]
    assert list(run.numbers["validation_loss"]) == [0, 1, 2, 3, 4, 5]
    plot, samples = tmp_path / "docs" / "curves.png", tmp_path / "docs" / "samples.png"
    assert curves.main([chosen.output, "--plot", str(plot), "--samples", str(samples)]) == 0
    assert Image.open(plot).width > 500
    assert Image.open(samples).width >= 2 * (2 * 64 + 4)


def test_a_folder_without_a_run_is_one_clear_line(tmp_path, capsys):
    assert curves.main([str(tmp_path), "--plot", str(tmp_path / "plot.png")]) == 2
    assert "no tensorboard/" in capsys.readouterr().err
