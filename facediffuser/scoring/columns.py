"""Other scorers: anything that looks at pictures and adds columns of numbers to their rows.

A scorer is named by a word (`sharpness`), by an entry point of the group `facediffuser.scorers`, or as `module:Class`.
"""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from facediffuser.errors import InputError
from facediffuser.extras import require_extra
from facediffuser.number_words import counted
from facediffuser.scoring.files import scorer_file
from facediffuser.scoring.sharpness import laplacian_variance

logger = logging.getLogger(__name__)

ENTRY_POINTS = "facediffuser.scorers"
BUILT_IN = {
    "aesthetic": "facediffuser.scoring.picture_scorers:AestheticScorer",
    "dlib": "facediffuser.scoring.recognisers:DlibScorer",
    "nsfw": "facediffuser.scoring.picture_scorers:NsfwScorer",
    "onnx-face": "facediffuser.scoring.recognisers:OnnxFaceScorer",
    "sharpness": "facediffuser.scoring.columns:Sharpness",
}
# Scorers of a user's own file, `name:PATH`, which may be followed by `#` and what the scorer needs to know besides.
OF_FILES = ("aesthetic", "onnx-face")
NEEDED_EXTRAS = {"dlib": "dlib", "nsfw": "nsfw", "onnx-face": "onnx"}


class ColumnScorer(Protocol):
    """The interface of a scorer. Its constructor takes the device (`cpu`, `cuda`) and loads the weights.

    The constructor raises InputError, naming the file, for whatever is missing: a run checks its scorers before its
    first image. `digest` says which weights and which method it is (a sha256); it is recorded with the scores, as is
    `licence`, the licence of the weights, where the scorer has that attribute.
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

        Args:
            images: n RGB pictures.
            references: for each image, for each of its subjects, the reference pictures.
            prompts: n prompts, without markers.
        """


class Sharpness:
    """The variance of the Laplacian of the brightness (0..255): low for a blurred picture, 0 for an even one."""

    licence = "Apache-2.0"
    columns = pa.schema([("sharpness", pa.float32())])

    def __init__(self, device: str = "cpu"):
        self.digest = hashlib.sha256(b"variance of the 4-neighbour Laplacian of ITU-R 601 luma, 1").hexdigest()

    def score(self, images, references, prompts) -> pa.Table:
        return pa.table([[laplacian_variance(image) for image in images]], schema=self.columns)


def load_columns(names: Sequence[str], device: str = "cpu") -> dict[str, ColumnScorer]:
    """Return scorers of further columns, loaded.

    Args:
        names: built-in ones (see `find_scorer`), entry points of the group `facediffuser.scorers`, or `module:Class`;
            repeats count once.
        device: where they run, `cpu` or `cuda`.

    Returns:
        The scorers by name, in the order of `names`.

    Raises:
        InputError: a scorer does not exist, cannot be loaded, or adds a column that another one adds.
    """
    found: dict[str, ColumnScorer] = {}
    owners: dict[str, str] = {}
    files: dict[str, str] = {}
    for name in dict.fromkeys(names):
        if (first := files.setdefault(short_name(name), name)) != name:
            raise InputError(f"scorers {first} and {name}: both write {short_name(name)}.parquet; use one of them")
        found[name] = _load_scorer(name, device)
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
    """Return the columns of all scorers.

    Args:
        scorers: the scorers by name.
        images: RGB pictures.
        references: for each image, for each of its subjects, the reference pictures.
        prompts: each image's prompt, without markers.

    Returns:
        A table with a row per image and the columns of every scorer, null where a scorer gave NaN or infinity.

    Raises:
        ValueError: a scorer returned other rows or columns than it declares.
    """
    columns: dict[str, pa.ChunkedArray] = {}
    for name, scorer in scorers.items():
        table = scorer.score(images, references, prompts)
        if table.num_rows != len(images) or table.schema.names != scorer.columns.names:
            raise ValueError(
                f"scorer {name}: returned {counted(table.num_rows, 'row')} of {table.schema.names} for {counted(len(images), 'image')} of "
                f"{scorer.columns.names}"
            )
        columns |= {column: _finite(table[column], name, column) for column in table.schema.names}
    return pa.table(columns)


def _finite(values: pa.ChunkedArray, scorer: str, column: str) -> pa.ChunkedArray:
    """Return a column with null in the place of NaN and infinity, of which one would spoil every mean."""
    if not pa.types.is_floating(values.type):
        return values
    finite = pc.fill_null(pc.is_finite(values), True)
    count = len(values) - (pc.sum(finite).as_py() or 0)
    if count:
        logger.warning(
            "scorer %s: %s of %s not finite, null is written instead", scorer, counted(count, "value"), column
        )
    return pc.if_else(finite, values, pa.scalar(None, values.type))


def short_name(name: str) -> str:
    """Return a scorer's name as a file may be called: `module:Class` becomes `Class`, `name:FILE` `name-file`."""
    own, argument = split_name(name)
    if argument:
        return f"{own}-{re.sub(r'[^A-Za-z0-9_-]+', '_', Path(argument.partition('#')[0]).stem)}"
    return name.rpartition(":")[2]


def split_name(name: str) -> tuple[str, str]:
    """Return `onnx-face:PATH` as (onnx-face, PATH), any other name as it is with an empty text."""
    own, _, argument = name.partition(":")
    return (own, argument) if own in OF_FILES else (name, "")


def find_scorer(name: str) -> str:
    """Return the `module:Class` of a scorer without importing it.

    Args:
        name: one of `BUILT_IN`, `aesthetic:HEAD`, `onnx-face:PATH`, an entry point of the group `facediffuser.scorers`,
            or `module:Class`.

    Raises:
        InputError: there is no scorer of that name, no such module or file, or it needs an extra that is not installed.
    """
    own, argument = split_name(name)
    if own in OF_FILES:
        if not argument:
            raise InputError(f"scorer {name!r}: names no file; give {own}:PATH")
        scorer_file(own, argument.partition("#")[0])
    if own in NEEDED_EXTRAS:
        require_extra(NEEDED_EXTRAS[own])
    reference = BUILT_IN.get(own, name)
    if ":" not in reference:
        points = importlib.metadata.entry_points(group=ENTRY_POINTS, name=name)
        if not points:
            named = sorted({*BUILT_IN, *(point.name for point in importlib.metadata.entry_points(group=ENTRY_POINTS))})
            raise InputError(f"scorer {name!r}: no such scorer; give one of {', '.join(named)}, or module:Class")
        reference = next(iter(points)).value
    module, _, attribute = reference.partition(":")
    if not attribute.isidentifier():
        raise InputError(f"scorer {name!r}: names no class; give module:Class")
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise InputError(f"scorer {name!r}: cannot be imported ({error}); check module:Class") from error
    if found is None:
        raise InputError(f"scorer {name!r}: cannot be imported (no module {module!r}); check module:Class")
    return reference


def _load_scorer(name: str, device: str) -> ColumnScorer:
    module, _, attribute = find_scorer(name).partition(":")
    argument = split_name(name)[1]
    try:
        scorer_class = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the module is anybody's code, and may raise as it comes
        raise InputError(f"scorer {name!r}: cannot be imported ({error}); check module:Class") from error
    try:
        scorer = scorer_class(device, argument) if argument else scorer_class(device)
    except (InputError, MemoryError):
        raise
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"
        raise InputError(f"scorer {name!r}: does not load ({detail}); fix it or leave it out") from error
    columns, digest = getattr(scorer, "columns", None), getattr(scorer, "digest", None)
    if not (isinstance(columns, pa.Schema) and isinstance(digest, str) and callable(getattr(scorer, "score", None))):
        raise InputError(f"scorer {name!r}: has no columns, digest and score as facediffuser.scoring.columns.ColumnScorer "
                         "says; check module:Class")  # fmt: skip
    for column in columns:
        if not (_is_number(column.type) and column.name):
            raise InputError(
                f"scorer {name!r}: column {column.name!r} of type {column.type}; give numbers, booleans or lists of them"
            )
    return scorer


def _is_number(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind):  # a number per subject
        return _is_number(kind.value_type)
    return pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)
