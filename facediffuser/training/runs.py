"""A training run as it lies in storage: checkpoints, each one object, and at last the trained parts."""

import io
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from facediffuser.errors import InputError
from facediffuser.storage import Store
from facediffuser.training.settings import TrainSettings

logger = logging.getLogger(__name__)

DONE = "final/training.json"


def checkpoint_key(step: int) -> str:
    """The name of the checkpoint after `step` steps."""
    return f"checkpoints/step-{step:08d}.pt"


def checkpoint_steps(store: Store) -> list[int]:
    """Return after which steps there are checkpoints, ascending."""
    keys = [one.key for one in store.list("checkpoints/")]
    return sorted(int(key.removesuffix(".pt")[-8:]) for key in keys if key.endswith(".pt"))


def require_startable(store: Store, settings: TrainSettings) -> None:
    """Raise InputError when the output holds a run that these settings may not go on with."""
    steps, done = checkpoint_steps(store), store.exists(DONE)
    if not steps and not done:
        if store.list(""):
            raise InputError(f"{settings.output}: holds something else than a training run; give another output")
        return
    if not settings.resume:
        raise InputError(
            f"{settings.output}: holds a training run; add --resume to go on with it, or give another output"
        )
    earlier = json.loads(store.get(DONE))["content"] if done else load_checkpoint(store, steps[-1])["content"]
    ours = settings.content()
    differing = sorted(key for key in ours.keys() | earlier.keys() if ours.get(key) != earlier.get(key))
    if differing:
        told = ", ".join(f"{key} was {earlier.get(key)!r}, now {ours.get(key)!r}" for key in differing)
        raise InputError(f"{settings.output}: holds a run with other settings ({told}); give those or another output")


def save_checkpoint(store: Store, step: int, state: dict[str, Any], keep_last: int, keep_every: int = 0) -> None:
    """Write a checkpoint with one request, then remove all but the last few and those of every `keep_every` steps."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    store.put(checkpoint_key(step), buffer.getvalue())
    for old in checkpoint_steps(store)[:-keep_last]:
        if not keep_every or old % keep_every:
            store.delete(checkpoint_key(old))
    logger.info("%s: kept", store.url_of(checkpoint_key(step)))


def load_checkpoint(store: Store, step: int) -> dict[str, Any]:
    """Read a checkpoint, tensors and plain values only."""
    return torch.load(io.BytesIO(store.get(checkpoint_key(step))), map_location="cpu", weights_only=True)


def save_final(store: Store, parts: dict[str, nn.Module], record: dict[str, Any]) -> None:
    """Write the trained parts as safetensors folders under `final/`, and `training.json` last of all."""
    with tempfile.TemporaryDirectory(prefix="facediffuser-final-") as folder:
        for name, part in parts.items():
            part.save_pretrained(Path(folder) / name)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            store.put(f"final/{path.relative_to(folder).as_posix()}", path.read_bytes())
    store.put(DONE, json.dumps(record, indent=1).encode())


def finished_step(store: Store) -> int | None:
    """Return the number of steps of the finished run, None when none has finished."""
    return json.loads(store.get(DONE))["step"] if store.exists(DONE) else None
