"""A worker's place in a training run: its rank, its device, and how it synchronises with the other workers."""

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
    """Processes that prepare batches in the background; 0: none."""
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    """Returns the module wrapped so that its gradients are averaged over the workers."""

    def wait_for_all(self) -> None:
        """Block until all workers have called this."""
        if self.count > 1:
            torch.distributed.barrier()
