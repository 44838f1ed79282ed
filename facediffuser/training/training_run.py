"""A training run as it lies in storage: what it is, checkpoints, and at last the trained parts.

run.json                        what decides the weights, and all settings; written first
checkpoints/step-00001000/      a checkpoint's bytes, in parts
checkpoints/step-00001000.json  its mark, written after them: without it there is no checkpoint
cache/                          latents and embeddings, where they cannot lie beside the data
samples/, tensorboard/          what people watch
final/                          the trained parts; training.json last
"""

import json
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from facediffuser.errors import InputError
from facediffuser.modelfolder import save_component
from facediffuser.runs import check_provenance, differences, other_run_error, software
from facediffuser.storage import Store
from facediffuser.storage.output import put_folder
from facediffuser.storage.reading import read_json_object
from facediffuser.training.train_settings import TrainSettings

# What run lies in an output can be asked without torch, which takes seconds to import.
if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

FIX = "repeat that run's options or give another output"
RUN, DONE = "run.json", "final/training.json"
PART_BYTES = 512 * 2**20
"""Bytes of a checkpoint's part: what is held in memory beside the model, and well below the 5 GB that S3 takes at once."""


# --- what run this is -------------------------------------------------------------------------------------------------


def require_startable(store: Store, settings: TrainSettings) -> None:
    """Check that the output is empty or holds a run that these settings may resume.

    Raises:
        InputError: it holds something else, another run, or `resume` is not set.
    """
    if not store.exists(RUN):
        if store.list(""):
            raise InputError(f"{settings.output}: holds something else than a training run; give another output")
        return
    if not settings.resume:
        raise InputError(
            f"{settings.output}: holds a training run; add --resume to continue it, or give another output"
        )
    fix = "put it back, or give another output"
    earlier, ours = read_json_object(store, RUN, fix, {"content": dict})["content"], settings.content()
    if earlier != ours:
        # Another role differs in most of the recipe: it is named before what follows from it.
        found = sorted(differences(earlier, ours), key=lambda line: not line.startswith("role "))
        raise other_run_error(settings.output, found, FIX)
    if settings.exact:
        check_provenance(settings.output, recorded_provenances(store), software(), exact=True)


def begin_or_resume_training(store: Store, settings: TrainSettings, inputs: dict[str, Any] | None = None) -> None:
    """Write what run this is, or compare it with the run that is there.

    Args:
        store: the output.
        settings: settings of a single role.
        inputs: what identifies the inputs: the fingerprint of the prepared data, the digests of the base's parts. Runs
            of earlier versions do not say theirs; they are resumed with any.

    Raises:
        InputError: the run there was trained from other inputs.
    """
    inputs = inputs or {}
    if not store.exists(RUN):
        record = {"content": settings.content(), "inputs": inputs, "settings": settings.model_dump(mode="json")}
        store.put(RUN, json.dumps(record, indent=1).encode())
        return
    earlier = read_json_object(store, RUN, FIX, {}).get("inputs") or {}
    if found := differences(earlier, {name: inputs.get(name) for name in earlier}):
        raise other_run_error(settings.output, found, FIX)


def recorded_provenances(store: Store) -> list[dict[str, Any]]:
    """Return what the last checkpoint was computed with; none without a checkpoint, or with one of earlier versions."""
    steps = checkpoint_steps(store)
    found = read_json_object(store, f"{_name(steps[-1])}.json", FIX, {}).get("computed_with") if steps else None
    return [found] if found else []


# --- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoint_steps(store: Store) -> list[int]:
    """Return after which steps there are checkpoints, ascending."""
    keys = [one.key for one in store.list("checkpoints/")]
    return sorted(int(key.removesuffix(".json")[-8:]) for key in keys if key.endswith(".json"))


def save_checkpoint(
    store: Store,
    step: int,
    state: dict[str, Any],
    keep_last: int,
    keep_every: int = 0,
    computed_with: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint whole or not at all, then remove those that need not be kept.

    Args:
        store: the run's output.
        step: after which step it is.
        state: tensors and plain values.
        keep_last: how many of the last checkpoints are kept.
        keep_every: checkpoints of multiples of so many steps are kept, too; 0 keeps none of them.
        computed_with: the provenance, for the checkpoint's mark.
    """
    import torch

    parts = _Parts(store, _name(step))
    torch.save(state, parts)
    parts.close()
    store.put(
        f"{_name(step)}.json", json.dumps({"step": step, "parts": parts.count, "computed_with": computed_with}).encode()
    )
    logger.info("%s: kept", store.url_of(_name(step)))
    for old in checkpoint_steps(store)[:-keep_last]:
        if not keep_every or old % keep_every:
            store.delete(f"{_name(old)}.json")
    _delete_unmarked(store)


def load_checkpoint(store: Store, step: int) -> dict[str, Any]:
    """Read a checkpoint, tensors and plain values only.

    Args:
        store: the run's output.
        step: one of `checkpoint_steps`.

    Raises:
        InputError: a part of it is missing or damaged.
    """
    import torch

    mark = f"{_name(step)}.json"
    fix = f"remove it to go on from the checkpoint before, or put {_name(step)} back"
    count = read_json_object(store, mark, fix, {"parts": int})["parts"]
    with tempfile.TemporaryFile(prefix="facediffuser-checkpoint-") as file:
        for part in range(count):
            file.write(store.get(_part(step, part)))
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def _name(step: int) -> str:
    return f"checkpoints/step-{step:08d}"


def _part(step: int, part: int) -> str:
    return f"{_name(step)}/part-{part:05d}"


def _delete_unmarked(store: Store) -> None:
    """Remove the parts of checkpoints without a mark: given up, or never finished."""
    kept = {_name(step) for step in checkpoint_steps(store)}
    for one in store.list("checkpoints/"):
        folder, _, part = one.key.rpartition("/")
        if part.startswith("part-") and folder not in kept:
            store.delete(one.key)


class _Parts:
    """A file to write to that becomes objects of PART_BYTES each."""

    def __init__(self, store: Store, name: str):
        self.store, self.name, self.count = store, name, 0
        self._buffer = bytearray()

    def write(self, data) -> int:
        self._buffer += data
        while len(self._buffer) >= PART_BYTES:
            self._put(PART_BYTES)
        return len(data)

    def flush(self) -> None:
        """Nothing: the last part is written by `close`."""

    def close(self) -> None:
        if self._buffer:
            self._put(len(self._buffer))

    def _put(self, size: int) -> None:
        self.store.put(f"{self.name}/part-{self.count:05d}", bytes(memoryview(self._buffer)[:size]))
        self._buffer = self._buffer[size:]
        self.count += 1


# --- the result -------------------------------------------------------------------------------------------------------


def save_final(store: Store, parts: "dict[str, nn.Module]", record: dict[str, Any]) -> None:
    """Write the trained parts as safetensors folders under `final/`, and `training.json` last of all.

    Args:
        store: the run's output.
        parts: the modules by the name of their folder.
        record: the content of training.json.
    """
    with tempfile.TemporaryDirectory(prefix="facediffuser-final-") as folder:
        for name, part in parts.items():
            save_component(part, Path(folder) / name)
        (Path(folder) / "training.json").write_text(json.dumps(record, indent=1))
        put_folder(store.child("final"), Path(folder), "training.json")


def finished_step(store: Store) -> int | None:
    """Return the number of steps of the finished run, None when none has finished.

    Raises:
        InputError: `final/training.json` is damaged.
    """
    if not store.exists(DONE):
        return None
    return read_json_object(store, DONE, "put it back, or remove it and train again with --resume", {"step": int})[
        "step"
    ]
