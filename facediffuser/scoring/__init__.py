"""Scores of pictures, identity preservation (IP) and prompt consistency (PC), and the tables made of them."""

from importlib import import_module

__all__ = ["EvaluateSettings", "ImageScore", "Scorers", "load_scorers", "subject_embedding"]

_HOMES = {
    "EvaluateSettings": "settings",
    "ImageScore": "scorers",
    "Scorers": "scorers",
    "load_scorers": "scorers",
    "subject_embedding": "identity",
}


def __getattr__(name: str):
    # Lazy, so that reading settings or making a table does not import torch.
    if name in _HOMES:
        return getattr(import_module(f"facediffuser.scoring.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'facediffuser.scoring' has no attribute {name!r}")
