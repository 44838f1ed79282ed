"""What readers of a dataset see: rows, plan, shards, manifest, verification, card."""

from facediffuser.dataset.reading import open_dataset

__all__ = ["open_dataset"]
