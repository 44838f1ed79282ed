"""What can be said of a rehearsal before anything is loaded."""

from facediffuser.devices import pick_device
from facediffuser.errors import InputError
from facediffuser.rehearsal.rehearse_settings import RehearseSettings
from facediffuser.storage import open_store


def check_rehearse(settings: RehearseSettings) -> None:
    """Raise InputError unless the output is empty and can be written to, and the device is there; writes nothing."""
    store = open_store(settings.output)
    store.require_writable()
    if found := store.list():
        raise InputError(f"{store.url}: holds {found[0].key!r}; give a new or an empty output")
    if settings.device.startswith("cuda"):
        pick_device(settings.device)
