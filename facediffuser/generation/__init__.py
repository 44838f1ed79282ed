"""Generation: settings, the checked run they stand for, and the worker that makes its shards."""

from importlib import import_module

from facediffuser.generation.settings import GenerateSettings

__all__ = ["GenerateSettings", "GenerationJob", "ShardGenerator", "prepare"]

_HOMES = {"GenerationJob": "job", "prepare": "job", "ShardGenerator": "worker"}


def __getattr__(name: str):
    # Lazy, so that reading settings does not import torch and diffusers.
    if name in _HOMES:
        return getattr(import_module(f"facediffuser.generation.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'facediffuser.generation' has no attribute {name!r}")
