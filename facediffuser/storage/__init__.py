"""One small door to local folders and s3://; `open_store` opens it, s3.py stays closed until an s3:// URL comes."""

from facediffuser.storage.base import ObjectInfo, StorageError, Store, safe_key
from facediffuser.storage.local import TEMPORARY_SUFFIX, LocalStore
from facediffuser.storage.opening import lasting_name, local_copy, open_store

__all__ = [
    "TEMPORARY_SUFFIX",
    "LocalStore",
    "ObjectInfo",
    "StorageError",
    "Store",
    "lasting_name",
    "local_copy",
    "open_store",
    "safe_key",
]
