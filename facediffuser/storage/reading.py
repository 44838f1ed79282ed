"""Reading files that a user may have damaged: whatever their format's reader raises is one line that names the file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from facediffuser.errors import InputError
from facediffuser.storage.base import StorageError, Store


class DamagedError(InputError):
    """A file that was read is not what it should be: damaged, cut off, or something else under its name."""


def parse_json(data: bytes | str) -> Any:
    """Return what a JSON text holds; the one place where the package parses JSON.

    Args:
        data: the text, UTF-8.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
        JSONDecodeError: it is not JSON, nested too deep, or holds a number of thousands of digits. Both are ValueErrors.
    """
    try:
        return json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except (RecursionError, ValueError) as error:
        raise json.JSONDecodeError(str(error), "", 0) from None


@contextmanager
def reading(url: str, what: str, fix: str) -> Iterator[None]:
    """Turn what reading a damaged file raises in the block into InputError.

    A missing file stays FileNotFoundError, a store that fails StorageError: both say something else than damage.

    Args:
        url: the file, for the message.
        what: what it should be, e.g. `Parquet of a dataset`.
        fix: what the user can do.

    Raises:
        DamagedError: one line with all three and the kind of error.
    """
    try:
        yield
    except (StorageError, FileNotFoundError, InputError):
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DamagedError(f"{url}: not readable as {what} ({type(error).__name__}); {fix}") from None


def read_json_object(store: Store, key: str, fix: str, fields: dict[str, type]) -> dict[str, Any]:
    """Return the object of a JSON file.

    Args:
        store: where it lies.
        key: its key.
        fix: what the user can do about a damaged one.
        fields: what it must hold, name -> type.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it is not JSON, no object, or lacks one of the fields.
    """
    url = store.url_of(key)
    with reading(url, "JSON", fix):
        content = parse_json(store.get(key))
    if not isinstance(content, dict):
        raise InputError(f"{url}: holds no JSON object; {fix}")
    for name, kind in fields.items():
        if not isinstance(content.get(name), kind):
            raise InputError(f"{url}: has no usable {name!r}; {fix}")
    return content
