"""The models that a source may need: where they are, and whether they can be had, asked before any work begins."""

import os
from pathlib import Path
from typing import Literal

from facediffuser.digests import folder_digest
from facediffuser.errors import InputError, first_line
from facediffuser.preprocess.preprocess_settings import NONE, PreprocessSettings
from facediffuser.preprocess.sources import FASTCOMPOSER, Listing
from facediffuser.storage import local_copy, open_store

Captions = Literal["all", "some", "none"]


def model_folder(name: str) -> str | Path:
    """Return what transformers loads for a name: a local folder, a copy of an s3:// one, or the hub id itself."""
    if name.startswith("s3://") or os.path.isdir(name):
        return local_copy(name)
    return name


def require_models(settings: PreprocessSettings, listing: Listing) -> dict[str, str]:
    """Return the SHA-256 of each model that this source needs, by option (`captioner`, `segmenter`, `matcher`).

    Raises:
        InputError: one cannot be had; the error names its option.
    """
    names = needed_models(settings, listing.format, captions_of(listing))
    return {option: _digest(option, name) for option, name in names.items()}


def captions_of(listing: Listing) -> Captions:
    """Return how many of a source's pictures have captions of their own."""
    having = sum(bool(record.annotation) for record in listing.records)
    return "all" if having == len(listing.records) else "some" if having else "none"


def needed_models(settings: PreprocessSettings, format: str, captions: Captions) -> dict[str, str]:
    """Return the names of the models that a source needs, by option.

    Args:
        settings: which models are chosen; `none` is never needed.
        format: the source's format.
        captions: how many of its pictures have a caption of their own: all, some or none.
    """
    described = format == FASTCOMPOSER
    # CLIP compares the persons of captions with segments: without either it has nothing to do.
    compared = settings.segmenter != NONE and (settings.captioner != NONE or captions != "none")
    needed = {
        "captioner": not described and captions != "all",
        "segmenter": not described,
        "matcher": not described and compared,
    }
    names = {option: getattr(settings, option) for option, is_needed in needed.items() if is_needed}
    return {option: name for option, name in names.items() if name != NONE}


def require_model_exists(option: str, name: str) -> None:
    """Check that a model which should lie in a folder or on S3 is there; a hub is not asked.

    Args:
        option: the option that names it, for the error.
        name: a path, an s3:// URL or a hub id.

    Raises:
        InputError: there is no model.
    """
    path = Path(name).expanduser()
    if "://" in name:
        found = open_store(name).exists("config.json")
    else:
        found = (path / "config.json").is_file() if path.exists() else not (path.is_absolute() or name.startswith("."))
    if not found:
        raise _missing(option, name, "no config.json there")


def _missing(option: str, name: str, reason: str) -> InputError:
    return InputError(
        f"--{option} {name}: no such model ({reason}); give a transformers folder, an s3:// URL, a hub id, or none"
    )


def _folder_and_config(option: str, name: str):
    """The folder or hub id of a model, and its configuration; InputError, one line with the option, without."""
    from transformers import AutoConfig

    try:
        folder = model_folder(name)
        return folder, AutoConfig.from_pretrained(folder)
    except InputError as error:
        raise InputError(f"--{option} {name}: {error}") from error
    except (OSError, ValueError) as error:
        raise _missing(option, name, first_line(error)) from error


def _digest(option: str, name: str) -> str:
    folder, config = _folder_and_config(option, name)
    # A hub's model is known by its commit, a folder by what is in it: the name may come to hold something else.
    return folder_digest(Path(folder)) if os.path.isdir(folder) else str(getattr(config, "_commit_hash", None))
