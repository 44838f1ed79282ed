"""The benchmark of training: its ways run, and its full size is the size it says."""

import argparse

import torch

from benchmarks import training as benchmark
from facediffuser.rehearsal.random_models import Size, modules, write_base

TINY = Size(
    unet=(8, 16),
    vae=(8, 8),
    text=(24, 1, 2),
    vision=(32, 2, 2),
    reference_px=32,
    patch_px=16,
    groups=4,
    blocks=1,
    heads=2,
)


def test_the_full_size_is_stable_diffusion_v1_5_and_clip_vit_l_14():
    with torch.device("meta"):
        parts = modules(Size())
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    # As published for the two models.
    assert counts == {
        "unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480, "image_encoder": 303_966_208,
    }  # fmt: skip


def test_all_ways_train_a_base_of_that_layout_and_are_reported_in_a_table(settings, tmp_path):
    base, data = write_base(tmp_path / "base", TINY), benchmark.write_prepared(tmp_path, 6, 64)
    chosen = settings("sdm", base=str(base), data=str(data), cache=None, steps=1000, localization=0.0)
    measured = benchmark.compare(chosen, steps=1, rounds=1, loaders=1, device="cpu")
    options = argparse.Namespace(role="sdm", full_size=True, device="cpu", threads=1, loaders=1)
    lines = benchmark.table(measured, 2, options).splitlines()
    assert [line[:28].strip() for line in lines[2:]] == list(measured)
    assert len(measured) == 4 and all(one.seconds > 0 for one in measured.values())
