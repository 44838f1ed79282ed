"""A folder or a file that a library writes locally, put where a URL says: a local place as it is, a bucket at the end."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from facediffuser.errors import InputError
from facediffuser.storage.base import Store
from facediffuser.storage.local import LocalStore
from facediffuser.storage.opening import open_store


@contextmanager
def output_folder(url: str | Path, last: str) -> Iterator[Path]:
    """Give a local folder to write whose files are at `url` when the block ends well.

    Args:
        url: a local folder, which is given itself, or an `s3://` prefix, for which a temporary folder is given.
        last: the file that is put last, so that a folder that has it is whole.

    Raises:
        InputError: the prefix holds something already, or cannot be written to; nothing is written.
    """
    store = open_store(url)
    store.require_writable()
    if isinstance(store, LocalStore):
        yield store.root if "://" in str(url) else Path(url)  # as it was given: messages name it
        return
    if store.list():
        raise InputError(f"{store.url}: already holds something; give a new or an empty prefix")
    with tempfile.TemporaryDirectory(prefix="facediffuser-output-") as name:
        folder = Path(name) / "output"
        yield folder
        put_folder(store, folder, last)


def put_folder(store: Store, folder: Path, last: str) -> None:
    """Put all files of a local folder into a store.

    Args:
        store: where they go.
        folder: the local folder.
        last: the name of the file that is put at the end, as the mark of completion.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / last)
    for path in [*paths, folder / last]:
        store.put(path.relative_to(folder).as_posix(), path.read_bytes())


def store_and_key(url: str | Path) -> tuple[Store, str]:
    """Return the store and the key of a file that is to be written.

    Args:
        url: path or URL of the file.

    Raises:
        InputError: it names no file, is a folder, or cannot be written.
    """
    text = str(url).rstrip("/")
    parent, _, name = text.rpartition("/")
    if not name or parent.endswith(":/"):
        raise InputError(f"{url}: names no file; give one in a folder or below s3://bucket/")
    store = open_store(parent or ("/" if text.startswith("/") else "."))
    store.require_writable()
    store.require_replaceable(name)
    return store, name
