"""What a run spends while it goes on: seconds by stage, retries, failures; summed as shards are finished, and told."""

import logging
from dataclasses import dataclass, field
from typing import Any

from facediffuser.tasks.pool import Work
from facediffuser.tasks.progress import Progress

logger = logging.getLogger(__name__)


@dataclass
class Spending:
    """Sums over the shards that came back."""

    images: int = 0
    failed: int = 0
    bytes: int = 0
    retries: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, stats: dict[str, Any]) -> None:
        """Add the stats of a shard."""
        self.images += stats["rows"]
        self.failed += stats["failed"]
        self.bytes += stats["bytes"]
        self.retries += stats["retries"]
        for stage, seconds in stats["seconds"].items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + (seconds or 0.0)

    @property
    def busy(self) -> float:
        """The share of the workers' time in shards that denoising took: what a GPU was busy with."""
        return self.seconds.get("denoise", 0.0) / self.seconds["total"] if self.seconds.get("total") else 0.0

    def stages(self) -> str:
        """Return the seconds of every stage in words."""
        return ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in sorted(self.seconds.items()))


def follow(work: Work, progress: Progress, kept: dict[int, dict[str, Any]] | None = None) -> Spending:
    """Drive the work to its end and tell, shard by shard, what an operator looks for; `kept` takes the stats."""
    spent = Spending()
    for stats in work:
        spent.add(stats)
        if kept is not None:
            kept[stats["shard"]] = stats
        progress.advance(
            stats["rows"],
            f"workers busy {100 * spent.busy:.0f}%, {work.queued} shards queued, {spent.retries} retries, "
            f"{work.begun_again} shards begun again, {spent.failed} failed",
        )
    return spent
