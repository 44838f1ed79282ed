"""Model folders from the checkpoints of two trainings, as if each had ended there."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch

from facediffuser.errors import InputError
from facediffuser.modelfolder import BASE_PARTS, copy_component, save_component, write_model_index
from facediffuser.storage import open_store
from facediffuser.storage.reading import read_json_object
from facediffuser.training import training_run as runs
from facediffuser.training.denoisers import load_parts
from facediffuser.training.parameters import select_trained
from facediffuser.training.recipe import Role
from facediffuser.training.train_settings import TrainSettings

PARTS: dict[Role, dict[str, str]] = {
    "tdm": {"unet": "unet_text"},
    "sdm": {"unet": "unet", "image_encoder": "image_encoder", "subject_fuser": "subject_fuser"},
}
"""What a training of each role leaves, and what a model folder calls it."""


def run_settings(url: str, role: Role) -> TrainSettings:
    """Return the settings of the training at a URL; InputError when there is none of that role."""
    store = open_store(url)
    if not store.exists(runs.RUN):
        raise InputError(f"{url}: no {runs.RUN} there; give what `facediffuser train` wrote to")
    record = read_json_object(store, runs.RUN, "train again", {"content": dict, "settings": dict})
    if record["content"]["role"] != role:
        raise InputError(f"{url}: was trained as {record['content']['role']}; give a {role} run")
    return TrainSettings(**record["settings"])


def checkpoint_steps(url: str) -> list[int]:
    """Return after which steps the training at a URL kept its weights, ascending; 0 is where it began."""
    steps = runs.checkpoint_steps(open_store(url))
    if not steps:
        raise InputError(f"{url}: holds no checkpoint; train with --keep-every")
    return [0, *steps]


def paired_steps(tdm: Sequence[int], sdm: Sequence[int]) -> list[tuple[int, int]]:
    """Return for each step of the TDM the SDM's at the nearest share of its training, from (0, 0) to both ends.

    Raises:
        InputError: one of the two kept nothing that lies within a tenth of its training of the other's.
    """
    pairs = []
    for step in tdm:
        share = step / tdm[-1]
        other = min(sdm, key=lambda one: abs(one / sdm[-1] - share))
        if abs(other / sdm[-1] - share) > 0.1:
            raise InputError(
                f"after {share:.0%} of the TDM's training the SDM's has no checkpoint; train both with --keep-every so "
                "that their steps are in the same ratio"
            )
        pairs.append((step, other))
    return pairs


def write_models(base: Path, tdm: str, tdm_step: int, sdm: str, sdm_step: int, output: Path) -> Path:
    """Write the model folder of two trainings after these steps (averaged weights, where there are any); return it.

    A folder that is there already is left as it is.
    """
    if output.exists():
        return output
    temporary = output.with_name(f".{output.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for role, url, step in (("tdm", tdm, tdm_step), ("sdm", sdm, sdm_step)):
        _write_parts(url, cast(Role, role), step, temporary)
    for name in BASE_PARTS:
        copy_component(base / name, temporary / name)
    write_model_index(temporary, base)
    return temporary.rename(output)


@torch.no_grad()
def _write_parts(url: str, role: Role, step: int, folder: Path) -> None:
    settings = run_settings(url, role)
    parts = load_parts(settings)
    if step:
        state = runs.load_checkpoint(open_store(url), step)
        named = select_trained(role, parts.trained, settings.recipe().train_image_encoder_layers)
        for parameter, value in zip(named.values(), state["average"] or state["trained"], strict=True):
            parameter.copy_(value)
    for name, target in PARTS[role].items():
        save_component(parts.trained[name], folder / target)
