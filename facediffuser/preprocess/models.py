"""The models that a source may need: where they are, and whether they can be had, asked before any work begins."""

import os
from pathlib import Path

from facediffuser.errors import InputError
from facediffuser.preprocess.settings import NONE, PreprocessSettings
from facediffuser.preprocess.sources import FASTCOMPOSER, Listing
from facediffuser.storage import local_copy


def model_folder(name: str) -> str | Path:
    """Return what transformers loads for a name: a local folder, a copy of an s3:// one, or the hub id itself."""
    if name.startswith("s3://") or os.path.isdir(name):
        return local_copy(name)
    return name


def require_models(settings: PreprocessSettings, listing: Listing) -> None:
    """Raise InputError, one line with the option, when a model that this source needs cannot be had."""
    described = listing.format == FASTCOMPOSER
    captioned = described or all(record.annotation for record in listing.records)
    needed = {"captioner": not captioned, "segmenter": not described, "matcher": not described}
    for option, is_needed in needed.items():
        name = getattr(settings, option)
        if is_needed and name != NONE:
            _require(option, name)


def _require(option: str, name: str) -> None:
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(model_folder(name))
    except InputError as error:
        raise InputError(f"--{option} {name}: {error}") from error
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"--{option} {name}: no such model ({first}); give a transformers folder, an s3:// URL, a hub id, or none"
        ) from error
