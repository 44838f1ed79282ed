"""The documentation's sheets of renderings: `python -m tools.miniature_weights.sheets docs/images`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from facediffuser.miniature.looks import ACTIONS, HATS, SCENES, STYLES, Outfit, Setting
from facediffuser.miniature.render import person, render
from facediffuser.picture_grid import picture_grid

FIRST_PERSON = 50_000_000
SIZE = 128
OVERLAY = np.array([[0, 0, 0], [235, 70, 60], [60, 110, 235]], np.float32)


def sheet(images: Sequence[np.ndarray], columns: int) -> Image.Image:
    """Pictures of one size side by side, row after row, on white."""
    pictures = list(map(Image.fromarray, images))
    return picture_grid([pictures[start : start + columns] for start in range(0, len(pictures), columns)])


def crowd() -> Image.Image:
    """Different people, every fifth picture of two, as a training set draws them."""
    drawn = []
    for number in range(32):
        count = 2 if number % 5 == 3 else 1
        drawn.append(render([person(FIRST_PERSON + 2 * number + k) for k in range(count)], number, SIZE).image)
    return sheet(drawn, 8)


def one_person() -> Image.Image:
    """One person through all places, hats, doings and styles."""
    who = person(FIRST_PERSON + 1)
    looks = [(Setting(scene), Outfit(shirt="blue")) for scene in SCENES]
    looks += [(Setting("beach"), Outfit(hat, "green", "white")) for hat in HATS]
    looks += [(Setting("city"), Outfit(shirt="yellow", action=action)) for action in ACTIONS if action != "none"]
    looks += [(Setting("forest", style), Outfit(shirt="red", expression="smiling")) for style in STYLES]
    images = [render([who], n, SIZE, setting, [outfit]).image for n, (setting, outfit) in enumerate(looks)]
    return sheet(images, 8)


def segmentations() -> Image.Image:
    """Pictures above, their segmentation over them below."""
    drawn = [render([person(FIRST_PERSON + 200 + 2 * n + k) for k in range(1 + n % 2)], n, SIZE) for n in range(8)]
    tinted = [(0.45 * one.image + 0.55 * OVERLAY[one.ids]).astype(np.uint8) for one in drawn]
    return sheet([one.image for one in drawn] + tinted, 8)


BASE_PROMPTS = (
    "a photo of a woman on the beach", "a man wearing a red cap in the city", "a painting of a girl in the forest",
    "a sketch of a man in a room", "a person holding a balloon in the snow", "a lady reading a book in the desert",
    "a man and a woman on the beach", "two people in the forest",
)  # fmt: skip


def base_samples(base: Path, device: str, steps: int, guidance: float, each: int = 4) -> Image.Image:
    """What a base draws from captions alone: a column of BASE_PROMPTS each, `each` rows."""
    pipe = StableDiffusionPipeline.from_pretrained(
        base, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    ).to(device, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for row in range(each):
        noise = [torch.Generator().manual_seed(1000 * row + place) for place in range(len(BASE_PROMPTS))]
        made = pipe(
            list(BASE_PROMPTS), height=64, width=64, num_inference_steps=steps, guidance_scale=guidance, generator=noise
        )
        rows.append([image.resize((128, 128), Image.Resampling.NEAREST) for image in made.images])
    return picture_grid(rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.miniature_weights.sheets", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (("crowd", crowd), ("one-person", one_person), ("segmentations", segmentations)):
        draw().quantize(256, dither=Image.Dither.NONE).save(folder / f"miniature-{name}.png", optimize=True)


if __name__ == "__main__":
    main()
