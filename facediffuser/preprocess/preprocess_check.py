"""What can be said of a run of preprocess before anything is loaded or an archive is read.

Neither Ray, Prefect nor torch is imported here, so that the command line refuses bad input before it starts them.
"""

import posixpath

from facediffuser.errors import InputError
from facediffuser.preprocess.archives import is_archive
from facediffuser.preprocess.parts import earlier_splits, require_parts_fit, require_startable, split_into_parts
from facediffuser.preprocess.prepared_schema import SCHEMA_VERSION
from facediffuser.preprocess.preprocess_settings import PreprocessSettings
from facediffuser.preprocess.required_models import Captions, captions_of, needed_models, require_model_exists
from facediffuser.preprocess.sources import FFHQ, list_source, recognise, scan_store
from facediffuser.storage import LocalStore, open_store


def check_preprocess(settings: PreprocessSettings) -> None:
    """Check the source, the models and the output of a run; nothing is written.

    Folders on this machine are listed. Archives, sources on S3 and FFHQ's metadata take long to list: of those only
    whether they are there is asked, and the task looks into them.

    Raises:
        InputError: one of them cannot be used.
    """
    require_apart(settings)
    known = _require_source(settings)
    if known is not None:
        for option, name in needed_models(settings, *known).items():
            require_model_exists(option, name)
    if settings.earlier:
        earlier_splits(settings.earlier)
    store = open_store(settings.output)
    store.require_writable()
    if settings.stages:
        open_store(settings.stages).require_writable()
    require_startable(store, {"schema": SCHEMA_VERSION, "settings": settings.content()})


def require_apart(settings: PreprocessSettings) -> None:
    """Check that output and kept stages are outside of the source.

    Raises:
        InputError: `--output` or `--stages` is inside of it.
    """
    source = open_store(settings.source).url.rstrip("/")
    for option in ("output", "stages"):
        url = getattr(settings, option)
        if url and f"{open_store(url).url.rstrip('/')}/".startswith(f"{source}/"):
            raise InputError(f"--{option} {url}: lies inside of the source; give one outside of it")


def _require_source(settings: PreprocessSettings) -> tuple[str, Captions] | None:
    """The format of a source and how many of its pictures have captions; None where finding out takes long."""
    if is_archive(settings.source):
        folder, name = posixpath.split(settings.source)
        if not open_store(folder or ".").exists(name):
            raise InputError(f"{settings.source}: no such file; give a .tgz or .tar file or a folder of pictures")
        return None
    store = open_store(settings.source)
    if not isinstance(store, LocalStore):
        store.require_readable()
        return None
    if settings.format == FFHQ or (settings.format == "auto" and recognise(scan_store(settings.source)) == FFHQ):
        return FFHQ, "none"
    listing = list_source(settings.source, settings.format, settings.ffhq_images)
    require_parts_fit(listing.url, split_into_parts(listing.records, settings.part_size))
    return listing.format, captions_of(listing)
