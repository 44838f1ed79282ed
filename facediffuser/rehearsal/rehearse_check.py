"""What can be said of a rehearsal before anything is loaded."""

from facediffuser.devices import pick_device
from facediffuser.errors import InputError
from facediffuser.rehearsal.rehearse_settings import RehearseSettings
from facediffuser.storage import open_store


def check_rehearse(settings: RehearseSettings) -> None:
    """Check that the output is empty and can be written to, and that the device is there; nothing is written.

    Raises:
        InputError: one of these is not so.
    """
    store = open_store(settings.output)
    store.require_writable()
    if found := store.list():
        raise InputError(f"{store.url}: holds {found[0].key!r}; give a new or an empty output")
    if settings.device.startswith("cuda"):
        pick_device(settings.device)
