"""Which side a picture is on: train or test, the same one however the set grows, and near-identical ones together."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

TRAIN, TEST = "train", "test"
HASH_SIDE = 16


def split_of(image_id: str, test_share: float) -> str:
    """Return `train` or `test`, from a hash of the id alone: what else is in the set does not matter.

    Args:
        image_id: the picture's id.
        test_share: the share of test in a large set, 0 to 1.
    """
    number = int.from_bytes(hashlib.sha256(image_id.encode("utf-8", "surrogateescape")).digest()[:8], "big")
    return TEST if number < test_share * 2**64 else TRAIN


def perceptual_hash(image: Image.Image) -> bytes:
    """Return 256 bits that hardly change when a picture is resized, compressed or slightly recoloured.

    A difference hash: the picture in grey on a grid of 17 x 16, one bit for each cell that is darker than its right
    neighbour.
    """
    grid = image.convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX)
    cells = np.asarray(grid, np.int16)
    return np.packbits(cells[:, :-1] < cells[:, 1:]).tobytes()


def near_duplicates(hashes: Sequence[bytes], bits: int) -> np.ndarray:
    """Return for each hash the index of its group, the smallest index in it.

    Hashes that differ in at most `bits` bits are in one group, and so are those joined by a chain of such pairs. Found
    by bands: of bits + 1 pieces of two such hashes one at least is equal.

    Args:
        hashes: n hashes of `perceptual_hash`, of 32 bytes.
        bits: how many of the 256 bits may differ.

    Returns:
        (n,) int64.
    """
    if not len(hashes):
        return np.zeros(0, np.int64)
    table = np.frombuffer(b"".join(hashes), np.uint8).reshape(len(hashes), -1)
    # The first picture with each distinct hash stands for all of them, so that many flat pictures cost no pairs.
    unique, first, inverse = np.unique(table, axis=0, return_index=True, return_inverse=True)
    spread = np.unpackbits(unique, axis=1)
    pairs = [np.zeros((0, 2), np.int64)]
    for band in np.array_split(np.arange(spread.shape[1]), bits + 1):
        _, key = np.unique(np.packbits(spread[:, band], axis=1), axis=0, return_inverse=True)
        order = np.argsort(key.reshape(-1), kind="stable")
        bounds = np.flatnonzero(np.diff(key.reshape(-1)[order])) + 1
        for bucket in np.split(order, bounds):
            pairs += _close_pairs(bucket, unique, bits)
    near = np.concatenate(pairs)
    links = coo_array((np.ones(len(near), bool), (near[:, 0], near[:, 1])), shape=(len(unique), len(unique)))
    count, group = connected_components(links, directed=False)
    smallest = np.full(count, len(hashes), np.int64)
    np.minimum.at(smallest, group, first)
    return smallest[group[inverse.reshape(-1)]]


def _close_pairs(bucket: np.ndarray, table: np.ndarray, bits: int) -> Iterator[np.ndarray]:
    """Pairs (k, 2) that join the hashes of a bucket that differ in at most `bits` bits.

    Pairs of hashes that earlier ones join already are left out: a thousand alike take a thousand pairs, not a million.
    """
    joined = np.arange(len(bucket))
    for place, index in enumerate(bucket[:-1]):
        others = np.arange(place + 1, len(bucket))[joined[place + 1 :] != joined[place]]
        close = others[np.bitwise_count(table[bucket[others]] ^ table[index]).sum(axis=1) <= bits]
        if len(close):
            joined[close] = joined[place]
            yield np.stack([np.full(len(close), index), bucket[close]], axis=1)


def assign_splits(
    ids: Sequence[str], groups: np.ndarray, test_share: float, earlier: Mapping[str, str] | None = None
) -> list[str | None]:
    """Return each picture's side: its id's, but a whole group of near-identical pictures is in train if any of it is.

    So a picture that has once been in train is never in test of a larger set. More cannot be had from a set alone: a
    picture of train and one of test may become one group when the set grows, and then one of them has to move.

    Args:
        ids: n ids of pictures.
        groups: their groups, (n,), as `near_duplicates` returns them.
        test_share: the share of test in a large set, 0 to 1.
        earlier: the sides that pictures had in a smaller set, by id. They keep them, and a group takes the side of
            those in it.

    Returns:
        n sides; None for a new picture whose group has earlier ones on both sides.
    """
    earlier = earlier or {}
    decided = [earlier.get(image_id) for image_id in ids]
    known: dict[int, set[str]] = defaultdict(set)
    hashed: dict[int, set[str]] = defaultdict(set)
    for image_id, group, side in zip(ids, groups.tolist(), decided, strict=True):
        if side is not None:
            known[group].add(side)
        hashed[group].add(split_of(image_id, test_share))
    sides: list[str | None] = []
    for group, side in zip(groups.tolist(), decided, strict=True):
        votes = known[group] or {TRAIN if TRAIN in hashed[group] else TEST}
        sides.append(side or (None if len(votes) > 1 else next(iter(votes))))
    return sides
