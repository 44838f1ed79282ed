"""Scorers as someone else might write them, for the tests of plug-ins: named `scoring.plugins:Class`."""

import os
from pathlib import Path

import pyarrow as pa

from facediffuser.errors import InputError


class Brightness:
    """Mean brightness of the picture, of its first reference, and the length of the prompt."""

    columns = pa.schema([("brightness", pa.float32()), ("reference_brightness", pa.float32()), ("words", pa.int32())])

    def __init__(self, device: str):
        self.digest = "b" * 64

    def score(self, images, references, prompts) -> pa.Table:
        shown = [groups[0][0] for groups in references]
        means = [[_mean(picture) for picture in pictures] for pictures in (images, shown)]
        return pa.table([*means, [len(prompt.split()) for prompt in prompts]], schema=self.columns)


class NeedsWeights:
    """Reads a file of weights when it is made."""

    columns = pa.schema([("taste", pa.float32())])

    def __init__(self, device: str):
        path = Path(os.environ["TASTE_WEIGHTS"])
        if not path.is_file():
            raise InputError(f"{path}: the taste's weights are missing; put them there")
        self.digest = "c" * 64


class Short:
    """Breaks its promise: a row too few."""

    columns = pa.schema([("short", pa.float32())])
    digest = "d" * 64

    def __init__(self, device: str):
        pass

    def score(self, images, references, prompts) -> pa.Table:
        return pa.table([[0.0] * (len(images) - 1)], schema=self.columns)


class Rival(Brightness):
    """Adds a column that another adds too."""


class Words:
    """Adds text, which has no mean."""

    columns = pa.schema([("words", pa.string())])
    digest = "e" * 64

    def __init__(self, device: str):
        pass

    def score(self, images, references, prompts) -> pa.Table:
        return pa.table([prompts], schema=self.columns)


class Taken(Short):
    """Adds a column that every dataset has."""

    columns = pa.schema([("ip", pa.float32())])


class Clumsy(Short):
    """Fails when it is made."""

    def __init__(self, device: str):
        self.digest = str(1 / 0)


class sharpness(Short):
    """Would write the built-in scorer's file."""

    columns = pa.schema([("other", pa.float32())])


class Wild(Short):
    """Gives a number, null, NaN and infinity."""

    columns = pa.schema([("wild", pa.float32())])

    def score(self, images, references, prompts) -> pa.Table:
        return pa.table([[1.0, None, float("nan"), float("inf")]], schema=self.columns)


def _mean(picture) -> float:
    pixels = list(picture.convert("L").tobytes())
    return sum(pixels) / len(pixels)
