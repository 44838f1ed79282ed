"""What a dataset took: hours of workers, energy and money, added up from its shards' stats.

The sums stand in `stats/spent.json` and in the manifest, and the card shows them. They are of the run that made the
dataset, written when it is finished; shards that are made again later, by `repair`, do not change them.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from facediffuser.storage import Store

SPENT_KEY = "stats/spent.json"
JOULES_PER_KWH = 3.6e6


class Spent(BaseModel):
    """What the shards of a dataset took.

    images: rows of the shards whose stats are there; the other numbers are of these.
    workers: "gpu" or "cpu": what a worker is.
    worker_hours: hours of workers in shards; loading of models and waiting for work are not in it. Of GPU workers
        these are GPU-hours.
    images_per_hour: images of one worker in an hour.
    energy_kwh: what the GPUs' meters counted meanwhile; None where they have none.
    hour_price, cost: what an hour of a worker was said to cost, and the whole; None where it was not said.
    """

    model_config = ConfigDict(frozen=True)

    images: int
    workers: str
    worker_hours: float
    images_per_hour: float
    energy_kwh: float | None = None
    hour_price: float | None = None
    cost: float | None = None


def add_up(stats: Iterable[Mapping[str, Any]], workers: str, hour_price: float | None) -> Spent | None:
    """Return what shards took, None when none of them says.

    Args:
        stats: of each shard, as its worker wrote them.
        workers: "gpu" or "cpu".
        hour_price: what an hour of a worker costs.
    """
    images, seconds, joules, metered = 0, 0.0, 0.0, True
    for one in stats:
        images += one["rows"]
        seconds += one["seconds"]["total"]
        joules += one.get("joules") or 0.0
        metered &= one.get("joules") is not None
    if not images or not seconds:
        return None
    hours = seconds / 3600
    return Spent(
        images=images,
        workers=workers,
        worker_hours=round(hours, 6),
        images_per_hour=round(images / hours, 2),
        energy_kwh=round(joules / JOULES_PER_KWH, 6) if metered else None,
        hour_price=hour_price,
        cost=None if hour_price is None else round(hours * hour_price, 4),
    )


def write_spent(store: Store, spent: Spent) -> None:
    """Put the sums where the card reads them."""
    store.put(SPENT_KEY, (spent.model_dump_json(indent=1) + "\n").encode())


def read_spent(store: Store) -> Spent | None:
    """Return a dataset's sums, None where there are none that can be read."""
    try:
        return Spent.model_validate(json.loads(store.get(SPENT_KEY)))
    except (FileNotFoundError, ValueError, ValidationError):
        return None
