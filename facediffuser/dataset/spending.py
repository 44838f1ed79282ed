"""What a dataset took: hours of workers, energy and money, added up from its shards' stats.

The sums of each part stand in the manifest, those of all parts in `stats/spent.json`, and the card shows the latter. They are
of the runs that made the dataset, written when each is finished; shards that are made again later, by `repair`, do not change
them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from facediffuser.dataset.manifest import Part
from facediffuser.storage import Store
from facediffuser.storage.reading import parse_json

SPENT_KEY = "stats/spent.json"
JOULES_PER_KWH = 3.6e6


class Spent(BaseModel):
    """What the shards of a dataset took.

    images: rows of the shards whose stats are there; the other numbers are of these.
    workers: "gpu", "cpu", or "mixed" where parts had one and the other: what a worker is.
    worker_hours: hours of workers in shards; loading of models and waiting for work are not in it. Of GPU workers
        these are GPU-hours.
    images_per_hour: images of one worker in an hour.
    energy_kwh: what the GPUs' meters counted meanwhile; None where they have none.
    hour_price, cost: what an hour of a worker was said to cost, and the whole; None where it was not said of every part. The
        price is None, too, where it was not the same for all.
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


def total_spent(parts: Iterable[Mapping[str, Any] | None]) -> Spent | None:
    """Return what all parts of a dataset took, None where none of them says.

    Args:
        parts: `spent` of each part as the manifest has it, None for one that does not say.
    """
    found = [one for one in map(_spent, parts) if one]
    if len(found) < 2:
        return found[0] if found else None
    kinds, prices = {one.workers for one in found}, {one.hour_price for one in found}
    images, hours = sum(one.images for one in found), sum(one.worker_hours for one in found)
    return Spent(
        images=images,
        workers=kinds.pop() if len(kinds) == 1 else "mixed",
        worker_hours=round(hours, 6),
        images_per_hour=round(images / hours, 2) if hours else 0.0,
        energy_kwh=_sum(one.energy_kwh for one in found),
        hour_price=prices.pop() if len(prices) == 1 else None,
        cost=_sum(one.cost for one in found),
    )


def _spent(document: Any) -> Spent | None:
    try:
        return Spent.model_validate(document)
    except ValidationError:
        return None


def _sum(numbers: Iterable[float | None]) -> float | None:
    found = list(numbers)
    return None if None in found else round(sum(one for one in found if one is not None), 6)


def write_spent(store: Store, parts: Iterable[Part]) -> None:
    """Put the sums of all parts where the card reads them; nothing where none of them says, or they are there."""
    spent = total_spent(part.spent for part in parts)
    if spent and spent != read_spent(store):
        store.put(SPENT_KEY, (spent.model_dump_json(indent=1) + "\n").encode())


def read_spent(store: Store) -> Spent | None:
    """Return the sums of all parts of a dataset, None where there are none that can be read."""
    try:
        return _spent(parse_json(store.get(SPENT_KEY)))
    except (FileNotFoundError, ValueError):
        return None
