"""What is written beside the shards of a finished dataset goes into its manifest, which is written last."""

import logging
from collections.abc import Collection, Sequence

from facediffuser.dataset.added_columns import ADDED_PREFIX, read_added_columns
from facediffuser.dataset.certificate import CERTIFICATE_PREFIX, certified_part, dataset_certificates
from facediffuser.dataset.manifest import (
    MANIFEST_KEY,
    UNLISTED,
    Manifest,
    ObjectEntry,
    find_manifest,
    object_entries,
    object_entry,
    write_manifest,
)
from facediffuser.dataset.reading import read_columns, read_footer
from facediffuser.dataset.schema import SUBJECTS_KEY
from facediffuser.storage import Store

logger = logging.getLogger(__name__)

README_KEY, CARD_PREFIX = "README.md", "card/"
_PICTURES = ("contact_sheet", "score_histograms", "ip_pc_plane", "identity", "pose_and_size", "named_faces")
CARD_KEYS = (README_KEY, f"{CARD_PREFIX}index.html", *(f"{CARD_PREFIX}{name}.png" for name in _PICTURES))
"""What a card is made of; not every dataset has all of it."""
KEPT_ENTRIES = (ADDED_PREFIX, CERTIFICATE_PREFIX)
"""Objects that keep the digest they were first listed with when a manifest is written anew."""


def require_sealable(store: Store, written: Collection[str] = ()) -> Manifest | None:
    """Return a dataset's manifest, None where there is none, before something is added to the dataset.

    Args:
        store: the dataset.
        written: the keys of what is to be added.

    Raises:
        InputError: the manifest, the plan, the references, the certificate or columns that were added before are damaged,
            or something else stands where the card or what is to be added goes: found after hours of work, the card could
            not be written.
    """
    store.list()  # finds a link that leads nowhere, and a folder that may not be read
    for key in (*written, *CARD_KEYS, MANIFEST_KEY):
        store.require_replaceable(key)
    manifest = find_manifest(store)
    for key in [info.key for info in store.list("plan/") if info.key.endswith(".parquet")][:1]:
        read_footer(store, key)
    if store.exists(SUBJECTS_KEY):
        read_columns(store, SUBJECTS_KEY, ["subject_id"])
    read_added_columns(store)
    dataset_certificates(store)
    return manifest


def seal(store: Store, manifest: Manifest, written: Collection[str] = (), card: bool = True) -> Manifest:
    """Write a dataset's manifest anew, after its card was written, and return it.

    Args:
        store: the dataset.
        manifest: its manifest, sound (`read_sound_manifest`), perhaps with the entries of shards that changed.
        written: the keys below scores/ that were written since. Others keep the digest they are listed with, so that
            damage to them is still found.
        card: list the card. Without, the card is of the shards as they were: until it is written anew, `verify` names it.

    Raises:
        StorageError: another command wrote a manifest since this one was read.
    """
    planned = manifest.planned_keys()
    kept = [entry for entry in manifest.objects if entry.key in set(planned)] or object_entries(store, planned)
    names = {part.name for part in manifest.parts}
    objects = kept + [
        entry
        for entry in card_and_column_entries(store, manifest.objects, written)
        if (card or not is_of_card(entry.key))
        # Of rows that are still being added: the manifest that lists them lists their certificate.
        and (certified_part(entry.key) or "") in names
    ]
    sealed = manifest.model_copy(update={"objects": objects, "unlisted": list(UNLISTED)})
    return write_manifest(store, sealed)


def is_of_card(key: str) -> bool:
    """Return whether a key is one of a dataset's card."""
    return key == README_KEY or key.startswith(CARD_PREFIX)


def card_and_column_entries(
    store: Store, listed: Sequence[ObjectEntry] = (), written: Collection[str] = ()
) -> list[ObjectEntry]:
    """Return the entries of a dataset's card, just written, of its added columns and its certificate, by key.

    Args:
        store: the dataset.
        listed: the entries in the manifest. Those of added columns and of a certificate are kept unless they were
            written since or are gone.
        written: the keys that were written since.
    """
    before = {entry.key: entry for entry in listed if entry.key.startswith(KEPT_ENTRIES) and entry.key not in written}
    card = [README_KEY] if store.exists(README_KEY) else []
    card += [info.key for info in store.list(CARD_PREFIX)]
    added = [info.key for prefix in KEPT_ENTRIES for info in store.list(prefix)]
    for key in sorted(before.keys() - set(added)):
        logger.warning("%s: gone; no longer listed in the manifest", store.url_of(key))
    return [before.get(key) or object_entry(key, store.get(key)) for key in card + added]
