"""The models that a source may need: where they are, and whether they can be had, asked before any work begins."""

import hashlib
import os
from pathlib import Path

from facediffuser.errors import InputError
from facediffuser.preprocess.preprocess_settings import NONE, PreprocessSettings
from facediffuser.preprocess.sources import FASTCOMPOSER, Listing
from facediffuser.storage import local_copy


def model_folder(name: str) -> str | Path:
    """Return what transformers loads for a name: a local folder, a copy of an s3:// one, or the hub id itself."""
    if name.startswith("s3://") or os.path.isdir(name):
        return local_copy(name)
    return name


def require_models(settings: PreprocessSettings, listing: Listing) -> dict[str, str]:
    """Return the digest of each model that this source needs, by option.

    InputError, one line with the option, when one cannot be had.
    """
    described = listing.format == FASTCOMPOSER
    captioned = described or all(record.annotation for record in listing.records)
    needed = {"captioner": not captioned, "segmenter": not described, "matcher": not described}
    names = {option: getattr(settings, option) for option, is_needed in needed.items() if is_needed}
    return {option: _require(option, name) for option, name in names.items() if name != NONE}


def _require(option: str, name: str) -> str:
    from transformers import AutoConfig

    try:
        folder = model_folder(name)
        config = AutoConfig.from_pretrained(folder)
    except InputError as error:
        raise InputError(f"--{option} {name}: {error}") from error
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"--{option} {name}: no such model ({first}); give a transformers folder, an s3:// URL, a hub id, or none"
        ) from error
    # A hub's model is known by its commit, a folder by what is in it: the name may come to hold something else.
    return _folder_digest(folder) if os.path.isdir(folder) else str(getattr(config, "_commit_hash", None))


def _folder_digest(folder: str | Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
