"""Which of how many workers this one is, where it computes, and how it works together with the others."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed
from torch import nn


@dataclass(frozen=True)
class Worker:
    """One of `count` processes that train one model together; alone by default."""

    rank: int = 0
    count: int = 1
    device: str = "cpu"
    loaders: int = 0
    """Processes that make batches ahead."""
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    """Makes a module average its gradients over the workers."""

    def wait_for_all(self) -> None:
        """Return when all workers have come to this place."""
        if self.count > 1:
            torch.distributed.barrier()
