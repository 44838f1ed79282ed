"""Training of the two models from prepared Parquet: settings, data, losses, the loop. Nothing here knows Ray."""

from facediffuser.training.settings import TrainSettings

__all__ = ["TrainSettings"]
