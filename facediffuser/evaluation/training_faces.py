"""The faces of a training set, for the question whether a generated face is one of them."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from facediffuser.dataset.reading import DATA_PREFIX, open_parquet, read_footer
from facediffuser.errors import InputError, first_few
from facediffuser.number_words import counted
from facediffuser.pictures import (
    batches_of_files,
    is_picture_name,
    left_out_line,
    open_picture,
    stored_picture,
)
from facediffuser.storage import Store, open_store

if TYPE_CHECKING:  # what lies in a training set can be looked up without torch
    from facediffuser.scoring.identity import IdentityScorer

logger = logging.getLogger(__name__)

BATCH = 64


@dataclass(frozen=True)
class TrainingFaces:
    """Unit vectors (n, d) of the faces in a training set, and the picture each was found in."""

    vectors: np.ndarray
    names: list[str]


def training_faces(
    url: str, identity: "IdentityScorer", advance: Callable[[int], None] = lambda count: None
) -> TrainingFaces:
    """Return the faces of a training set: prepared Parquet, whose boxes are known, or a folder of pictures.

    Args:
        url: the training set.
        identity: finds and embeds the faces.
        advance: called with the number of pictures done since the last call.

    Raises:
        InputError: there is neither, or no face in any picture.
    """
    store, prepared, pictures, others = training_keys(url)
    if others and not prepared:
        logger.warning("%s: %s", store.url, left_out_line(others))
    vectors, names = [], []
    batches = _prepared(store, prepared) if prepared else _photographs(store, pictures, identity)
    for batch in batches:
        crops = [identity.crop(picture, box, identity.crop_size) for _, picture, boxes in batch for box in boxes]
        names += [name for name, _, boxes in batch for _ in boxes]
        if crops:
            vectors.append(identity.embed_crops(crops))
        advance(len(batch))
    if not names:
        raise InputError(f"{url}: no face in any of its pictures; give the photographs the models were trained on")
    logger.info("%s: %s", url, counted(len(names), "training face"))
    return TrainingFaces(np.concatenate(vectors), names)


def count_training(url: str) -> int:
    """Return how many pictures a training set holds.

    Raises:
        InputError: it holds none.
    """
    store, prepared, pictures, _ = training_keys(url)
    if not prepared:
        return len(pictures)
    return sum(read_footer(store, key).num_rows for key in prepared)


def training_keys(url: str) -> tuple[Store, list[str], list[str], list[str]]:
    """Return a training set's store, the keys of its prepared Parquet, of its pictures, and of all other files.

    Raises:
        InputError: there is neither prepared Parquet nor a picture.
    """
    store = open_store(url)
    store.require_readable()
    keys = [info.key for info in store.list()]
    if any(key.startswith(DATA_PREFIX) and key.endswith(".parquet") for key in keys):
        raise InputError(f"{url}: a generated dataset; give preprocess's output or the photographs")
    prepared = [key for key in keys if key.startswith(("train/", "test/")) and key.endswith(".parquet")]
    pictures = [key for key in keys if is_picture_name(key)]
    if not prepared and not pictures:
        raise InputError(f"{url}: no train/*.parquet and no pictures; give preprocess's output or the photographs")
    return store, prepared, pictures, sorted({*keys} - {*prepared, *pictures})


def _prepared(store: Store, keys: list[str]) -> Iterator[list[tuple]]:
    for key in keys:
        with open_parquet(store, key) as file:
            for batch in file.iter_batches(BATCH, columns=["image_id", "image", "faces"]):
                yield [
                    (
                        row["image_id"],
                        stored_picture(row["image"]["bytes"], f"{store.url_of(key)}: {row['image_id']}"),
                        [face["box"] for face in row["faces"] or []],
                    )
                    for row in batch.to_pylist()
                ]


def _photographs(store: Store, keys: list[str], identity: "IdentityScorer") -> Iterator[list[tuple]]:
    unusable = []
    sizes = {info.key: info.size for info in store.list()}
    for batch in batches_of_files(keys, BATCH, lambda key: sizes[key]):
        pictures = {}
        for key in batch:
            try:
                pictures[key] = open_picture(store, key)[0]
            except InputError as error:
                # `preprocess` rejects such a picture too: no model was trained on it.
                unusable.append(str(error))
        found = identity.detector.detect(list(pictures.values())) if pictures else []
        yield [
            (key, picture, [face.box for face in faces])
            for (key, picture), faces in zip(pictures.items(), found, strict=True)
        ]
    if unusable:
        logger.warning("%s: %d of %s left out: %s", store.url, len(unusable), counted(len(keys), "picture"),
                       first_few(unusable, separator="; "))  # fmt: skip
