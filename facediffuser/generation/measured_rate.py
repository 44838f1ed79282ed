"""The rate of a dataset that was made before: seconds and bytes of an image, as its shards' stats say."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from facediffuser.errors import InputError
from facediffuser.number_words import counted
from facediffuser.storage import Store, open_store
from facediffuser.storage.reading import read_json_object

MOST_STATS = 200
FIX = "remove it, or give another dataset"


@dataclass(frozen=True)
class Rate:
    """A measured rate: seconds of one worker and bytes an image, on what device, and where it was measured.

    certificate_seconds: of a row of the certificate, which is made in both modes; None where it is not known.
    """

    seconds_per_image: float
    bytes_per_image: float
    device: str
    source: str
    certificate_seconds: float | None = None


def rate_of_dataset(url: str) -> Rate:
    """Return the rate of a dataset that `generate` made, from the stats of its shards.

    Args:
        url: the dataset.

    Raises:
        InputError: it has none, or they are damaged.
    """
    store = open_store(url)
    store.require_readable()
    keys = [info.key for info in store.list("stats/shard-")]
    if not keys:
        raise InputError(f"{url}: no stats/ there; give a dataset that `generate` made")
    # Evenly over the run: its first shards are made while caches are cold.
    fields = {"rows": int, "bytes": int, "seconds": dict, "device": str}
    stats = [read_json_object(store, key, FIX, fields) for key in keys[:: -(-len(keys) // MOST_STATS)]]
    rows, size = sum(one["rows"] for one in stats), sum(one["bytes"] for one in stats)
    seconds = _sum(url, (one["seconds"].get("total") for one in stats))
    if rows < 1:
        raise InputError(f"{url}: its stats/ count {counted(rows, 'row')}; {FIX}")
    source = f"{url}, {counted(len(stats), 'shard')}"
    return Rate(seconds / rows, size / rows, stats[0]["device"], source, _seconds_of_certificate(store))


def _seconds_of_certificate(store: Store) -> float | None:
    """Return what a row of a dataset's certificate took by its stats, without scoring; None for a dataset that has none."""
    keys = [info.key for info in store.list("stats/certificate-")]
    stats = [read_json_object(store, key, FIX, {"rows": int, "seconds": dict}) for key in keys]
    rows = sum(one["rows"] for one in stats)
    return _sum(store.url, (value for one in stats for value in one["seconds"].values())) / rows if rows > 0 else None


def _sum(url: str, seconds: Iterable[Any]) -> float:
    found = list(seconds)
    if not all(isinstance(value, float | int) and 0 <= value < math.inf for value in found) or not sum(found) > 0:
        raise InputError(f"{url}: its stats/ do not say how long shards took; {FIX}")
    return sum(found)
