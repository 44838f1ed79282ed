"""A training run as it lies in storage: what it is, checkpoints, and at last the trained parts.

run.json                        what decides the weights, workers, and all settings; written first
checkpoints/step-00001000/      a checkpoint's bytes, in parts
checkpoints/step-00001000.json  its mark, written after them, with their sha256: without it there is no checkpoint
cache/                          latents and embeddings, where they cannot lie beside the data
samples/, tensorboard/          what people watch
final/                          the trained parts; training.json last
"""

import hashlib
import json
import logging
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from facediffuser.errors import InputError
from facediffuser.modelfolder import save_component
from facediffuser.runs import check_provenance, differences, other_run_error, software
from facediffuser.storage import Store
from facediffuser.storage.output import put_folder
from facediffuser.storage.reading import DamagedError, read_json_object
from facediffuser.training.train_settings import TrainSettings

# What run lies in an output can be asked without torch, which takes seconds to import.
if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

FIX = "repeat that run's options or give another output"
RUN, DONE = "run.json", "final/training.json"
_MARK = re.compile(r"checkpoints/step-(\d{8,})\.json")
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
    record = read_json_object(store, RUN, "put it back, or give another output", {"content": dict})
    # Workers are compared by themselves: what was given, if anything, is not how many there were.
    earlier, ours = ({**content, "workers": None} for content in (record["content"], settings.content()))
    if earlier != ours:
        # Another role differs in most of the recipe: it is named before what follows from it.
        found = sorted(differences(earlier, ours), key=lambda line: not line.startswith("role "))
        raise other_run_error(settings.output, found, FIX)
    _require_workers(settings.output, _workers_of(record), settings.workers)
    if settings.exact:
        check_provenance(settings.output, recorded_provenances(store), software(), exact=True)


def begin_or_resume_training(
    store: Store, settings: TrainSettings, inputs: dict[str, Any] | None = None, workers: int | None = None
) -> None:
    """Write what run this is, or compare it with the run that is there.

    Args:
        store: the output.
        settings: settings of a single role.
        inputs: what identifies the inputs: the fingerprint of the prepared data, the digests of the base's parts and of
            the other models that are trained on from. Runs of earlier versions do not say theirs, or not all of them;
            they are resumed with any.
        workers: how many there are. Runs of earlier versions do not say it either; it is noted when they are resumed.

    Raises:
        InputError: the run there was trained from other inputs or by another number of workers.
    """
    inputs = inputs or {}
    if not store.exists(RUN):
        record = {"content": settings.content(), "inputs": inputs, "workers": workers}
        _write_record(store, record | {"settings": settings.model_dump(mode="json")})
        return
    record = read_json_object(store, RUN, FIX, {})
    earlier = _inputs_of(record)
    if found := differences(earlier, {name: inputs.get(name) for name in earlier}):
        raise other_run_error(settings.output, found, FIX)
    known = _workers_of(record)
    _require_workers(settings.output, known, workers)
    if known is None and workers is not None:
        _write_record(store, record | {"workers": workers})


def require_same_inputs(store: Store, settings: TrainSettings, inputs: dict[str, Any]) -> None:
    """Check some of the inputs of a training before it starts; a run that does not say them is of any.

    Args:
        store: the output.
        settings: settings of a single role.
        inputs: those that can be had at once, as for `begin_or_resume_training`.

    Raises:
        InputError: the run there was trained from others.
    """
    if not store.exists(RUN):
        return
    earlier = _inputs_of(read_json_object(store, RUN, FIX, {}))
    known = inputs.keys() & earlier.keys()
    if found := differences({name: earlier[name] for name in known}, {name: inputs[name] for name in known}):
        raise other_run_error(settings.output, found, FIX)


def recorded_workers(store: Store) -> int | None:
    """Return how many workers the run there is trained by; None without a run, or with one that does not say it."""
    return _workers_of(read_json_object(store, RUN, FIX, {})) if store.exists(RUN) else None


def _workers_of(record: dict[str, Any]) -> int | None:
    """How many workers a run has: the number noted, else, of a run of earlier versions, the one that was given."""
    content = record.get("content")
    found = record.get("workers") or (content.get("workers") if isinstance(content, dict) else None)
    return found if isinstance(found, int) else None


def _inputs_of(record: dict[str, Any]) -> dict[str, Any]:
    found = record.get("inputs")
    return found if isinstance(found, dict) else {}


def _require_workers(output: str, known: int | None, workers: int | None) -> None:
    """Raise InputError when both numbers are known and differ: the images of a step would."""
    if known is not None and workers is not None and known != workers:
        fix = f"give --workers {known}, or another output"
        raise other_run_error(output, differences({"workers": known}, {"workers": workers}), fix)


def _write_record(store: Store, record: dict[str, Any]) -> None:
    store.put(RUN, json.dumps(record, indent=1).encode())


def recorded_provenances(store: Store) -> list[dict[str, Any]]:
    """Return what the last checkpoint was computed with; none without a checkpoint, or with one of earlier versions."""
    steps = checkpoint_steps(store)
    found = read_json_object(store, f"{_name(steps[-1])}.json", FIX, {}).get("computed_with") if steps else None
    return [found] if found else []


# --- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoint_steps(store: Store) -> list[int]:
    """Return after which steps there are checkpoints, ascending; other files beside them do not count."""
    found = (_MARK.fullmatch(one.key) for one in store.list("checkpoints/"))
    return sorted(int(mark[1]) for mark in found if mark)


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
    mark = {"step": step, "parts": len(parts.written), "files": parts.written, "computed_with": computed_with}
    store.put(f"{_name(step)}.json", json.dumps(mark).encode())
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

    name, mark = _name(step), f"{_name(step)}.json"
    fix = f"put it back, or remove {mark} to go on from the checkpoint before"
    content = read_json_object(store, mark, fix, {"parts": int})
    count = content["parts"]
    # Marks of earlier versions do not say what the parts hold.
    files = content.get("files") or [{}] * count
    if not isinstance(files, list) or len(files) != count or not all(isinstance(one, dict) for one in files):
        raise DamagedError(f"{store.url_of(mark)}: has no usable 'files'; {fix}")
    with tempfile.TemporaryFile(prefix="facediffuser-checkpoint-") as file:
        for part, written in enumerate(files):
            file.write(_read_part(store, _part(step, part), written, fix))
        file.seek(0)
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:  # torch raises nearly anything at bytes that are no checkpoint
            raise DamagedError(f"{store.url_of(name)}: no checkpoint ({type(error).__name__}); {fix}") from error
    if not isinstance(state, dict):
        raise DamagedError(f"{store.url_of(name)}: holds no state of a training; {fix}")
    return state


def _read_part(store: Store, key: str, written: dict[str, Any], fix: str) -> bytes:
    """Return a checkpoint's part after comparing it with what its mark says of it, if anything."""
    try:
        data = store.get(key)
    except FileNotFoundError:
        raise DamagedError(f"{store.url_of(key)}: missing; {fix}") from None
    if len(data) != written.get("bytes", len(data)):
        raise DamagedError(f"{store.url_of(key)}: {len(data)} bytes, the mark says {written['bytes']}; {fix}")
    if written.get("sha256") not in (None, hashlib.sha256(data).hexdigest()):
        raise DamagedError(f"{store.url_of(key)}: damaged, its sha256 is not the one in the mark; {fix}")
    return data


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
        self.store, self.name = store, name
        self.written: list[dict[str, Any]] = []
        """Bytes and sha256 of each part written so far."""
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
        data = bytes(memoryview(self._buffer)[:size])
        self.store.put(f"{self.name}/part-{len(self.written):05d}", data)
        self.written.append({"bytes": size, "sha256": hashlib.sha256(data).hexdigest()})
        self._buffer = self._buffer[size:]


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
