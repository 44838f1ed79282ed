"""Other scorers: anything that looks at pictures and adds columns of numbers to their rows.

A scorer is named by a word (`sharpness`), by an entry point of the group `facediffuser.scorers`, or as `module:Class`.
"""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa
from PIL import Image
from scipy import ndimage

from facediffuser.errors import InputError

logger = logging.getLogger(__name__)

ENTRY_POINTS = "facediffuser.scorers"
OURS = {"sharpness": "facediffuser.scoring.columns:Sharpness"}


class ColumnScorer(Protocol):
    """What a scorer has to be. It is made with one argument, the device (`cpu`, `cuda`), and loads its weights then.

    Whatever is missing is to be raised there, as an InputError that names the file: a run checks its scorers before
    its first image. `digest` says which weights and which method it is (a sha256); it is recorded with the scores.
    """

    columns: pa.Schema
    """The columns it adds: numbers or booleans, with names of their own."""
    digest: str

    def score(
        self,
        images: Sequence[Image.Image],
        references: Sequence[Sequence[Sequence[Image.Image]]],
        prompts: Sequence[str],
    ) -> pa.Table:
        """Return a table of `columns`, a row per image.

        `references`: for each image, for each of its subjects, the reference pictures; `prompts`: without markers.
        """


class Sharpness:
    """The variance of the Laplacian of the brightness (0..255): low for a blurred picture, 0 for an even one."""

    columns = pa.schema([("sharpness", pa.float32())])

    def __init__(self, device: str = "cpu"):
        self.digest = hashlib.sha256(b"variance of the 4-neighbour Laplacian of ITU-R 601 luma, 1").hexdigest()

    def score(self, images, references, prompts) -> pa.Table:
        luma = (np.asarray(image.convert("L"), np.float32) for image in images)
        return pa.table([[float(ndimage.laplace(pixels).var()) for pixels in luma]], schema=self.columns)


def load_columns(names: Sequence[str], device: str = "cpu") -> dict[str, ColumnScorer]:
    """Return the scorers by name, loaded; InputError for one that is not there, cannot load, or repeats a column."""
    found: dict[str, ColumnScorer] = {}
    owners: dict[str, str] = {}
    for name in dict.fromkeys(names):
        found[name] = _made(name, device)
        for column in found[name].columns.names:
            if column in owners:
                raise InputError(f"scorers {owners[column]} and {name} both add {column!r}; use one of them")
            owners[column] = name
    if found:
        logger.info("other scorers: %s", {name: scorer.digest[:12] for name, scorer in found.items()})
    return found


def column_scores(
    scorers: Mapping[str, ColumnScorer],
    images: Sequence[Image.Image],
    references: Sequence[Sequence[Sequence[Image.Image]]],
    prompts: Sequence[str],
) -> pa.Table:
    """Return the columns of all scorers, a row per image; ValueError for a scorer that does not keep its promise."""
    columns: dict[str, pa.ChunkedArray] = {}
    for name, scorer in scorers.items():
        table = scorer.score(images, references, prompts)
        if table.num_rows != len(images) or table.schema.names != scorer.columns.names:
            raise ValueError(
                f"scorer {name}: returned {table.num_rows} rows of {table.schema.names} for {len(images)} images of "
                f"{scorer.columns.names}"
            )
        columns |= {column: table[column] for column in table.schema.names}
    return pa.table(columns)


def short_name(name: str) -> str:
    """Return a scorer's name as a file may be called: `package.module:Class` becomes `Class`."""
    return name.rpartition(":")[2]


def find_column(name: str) -> str:
    """Return the `module:Class` of a scorer; InputError when there is none of that name, or no such module."""
    reference = OURS.get(name, name)
    if ":" not in reference:
        points = importlib.metadata.entry_points(group=ENTRY_POINTS, name=name)
        if not points:
            named = sorted({*OURS, *(point.name for point in importlib.metadata.entry_points(group=ENTRY_POINTS))})
            raise InputError(f"scorer {name!r}: no such scorer; give one of {', '.join(named)}, or module:Class")
        reference = next(iter(points)).value
    module = reference.partition(":")[0]
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise InputError(f"scorer {name!r}: cannot be imported ({error}); check module:Class") from error
    if found is None:
        raise InputError(f"scorer {name!r}: cannot be imported (no module {module!r}); check module:Class")
    return reference


def _made(name: str, device: str) -> ColumnScorer:
    module, _, attribute = find_column(name).partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"scorer {name!r}: cannot be imported ({error}); check module:Class") from error
    try:
        return kind(device)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"scorer {name!r}: does not load ({error}); fix it or leave it out") from error
