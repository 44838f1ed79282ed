"""From a URL to a store, or to a local copy of what stands there."""

import hashlib
import os
import posixpath
import re
import tempfile
from collections.abc import Container
from pathlib import Path
from urllib.parse import unquote

from facediffuser.errors import InputError
from facediffuser.redaction import has_credentials
from facediffuser.storage.base import ObjectInfo, Store, safe_key
from facediffuser.storage.local import LocalStore


def open_store(url: str | Path) -> Store:
    """Return the store of a URL; nothing is contacted, read or created yet.

    Args:
        url: a local folder (path or file://), s3://, gs:// or az://bucket/prefix, or, to read, hf://datasets/ORG/NAME.

    Raises:
        InputError: it is none of these.
    """
    text = str(url)
    scheme = text.split("://", 1)[0].lower() if "://" in text else ""
    if scheme in ("s3", "gs", "az"):
        bucket, _, prefix = text[len(f"{scheme}://") :].partition("/")
        if "@" in bucket or has_credentials(text):
            fix = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" if scheme == "s3" else "the environment holds them"
            raise InputError(f"a URL of {scheme}:// cannot carry credentials; {fix}")
        if not bucket:
            raise InputError(f"{text}: no bucket named; give {scheme}://bucket/prefix")
        prefix = safe_key(prefix.strip("/")) if prefix.strip("/") else ""
        if scheme == "s3":
            from facediffuser.storage.s3 import S3Store

            return S3Store(bucket, prefix)
        from facediffuser.storage.cloud import CloudStore

        return CloudStore(scheme, bucket, prefix)
    if scheme == "hf":
        if has_credentials(text):
            raise InputError("an hf:// URL cannot carry credentials; log in with `hf auth login` or set HF_TOKEN")
        from facediffuser.storage.hub import open_hub

        return open_hub(text)
    if scheme == "file":
        # By hand: urlsplit raises at "file://[" and drops what stands behind # or ?, which a folder's name may hold.
        host, slash, path = text[len("file://") :].partition("/")
        if host not in ("", "localhost"):
            raise InputError(f"{text}: a file:// URL of another machine; give file:///path or a path")
        if not slash:
            raise InputError(f"{text}: names no folder; give file:///path or a path")
        path = unquote(slash + path)
        if "\0" in path:
            raise InputError(f"{text}: holds a NUL character; give another path")
        return LocalStore(Path(path))
    if scheme:
        raise InputError(f"{scheme}://: no such storage; give a local folder or s3://bucket/prefix")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise InputError(f"{text}: a URL with one slash, as a path makes of it; write {text.replace(':/', '://', 1)}")
    if not text.strip():
        raise InputError("empty URL; give a local folder or s3://bucket/prefix")
    return LocalStore(Path(text).expanduser())


def lasting_name(name: str, known: Container[str] = ()) -> str:
    """Return a name that means the same from every working folder: a local path is made absolute.

    Args:
        name: a path, a URL, or another name such as a hub id, which stays as it is.
        known: names that stay as they are.
    """
    if "://" in name or name in known:
        return name
    path = Path(name).expanduser()
    return os.path.abspath(path) if path.exists() else name


def local_copy(url: str | Path, cache_dir: str | Path | None = None) -> Path:
    """Return a local file or folder with the contents of a URL.

    Args:
        url: a local path, returned as it is, or another URL, downloaded once; a source that changed is downloaded again.
        cache_dir: where downloads go (default `$XDG_CACHE_HOME/facediffuser` or `~/.cache/facediffuser`).

    Raises:
        InputError: there is nothing at the URL.
    """
    store = open_store(url)
    if isinstance(store, LocalStore):
        if not store.root.exists():
            raise InputError(f"{url}: no such file or folder; check the path")
        return store.root
    from facediffuser.storage.cloud import CloudStore
    from facediffuser.storage.hub import HubStore
    from facediffuser.storage.s3 import S3Store

    assert isinstance(store, S3Store | CloudStore | HubStore)  # there is no fifth kind
    store.require_readable()
    bucket = store.whole()
    inside = [info for info in bucket.list(store.prefix) if _is_at(info.key, store.prefix)]
    if not inside:
        raise InputError(f"{url}: nothing there; check the bucket and the prefix")
    name = hashlib.sha256(repr((store.url, inside)).encode()).hexdigest()[:24]
    cache = Path(cache_dir) if cache_dir else default_cache()
    is_file = [info.key for info in inside] == [store.prefix]
    target = cache / name / (posixpath.basename(store.prefix) or store.bucket)
    if not target.exists():
        _download(bucket, inside, store.prefix, cache / name, target.name, is_file)
    return target


def _is_at(key: str, prefix: str) -> bool:
    return not prefix or key == prefix or key.startswith(f"{prefix}/")


def _download(bucket: Store, inside: list[ObjectInfo], prefix: str, home: Path, name: str, is_file: bool) -> None:
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=".download-") as temporary:
        root = Path(temporary, "home", name)
        root.parent.mkdir()
        for info in inside:
            below = info.key[len(prefix) :].lstrip("/")
            path = root if is_file else root / safe_key(below) if below else None
            if path is None:
                continue  # an object named like the folder itself
            path.parent.mkdir(parents=True, exist_ok=True)
            bucket.download(info.key, path)
        try:
            os.rename(root.parent, home)
        except OSError:
            if not home.exists():
                raise
            # Another process finished the same download first; both hold the same bytes.


def default_cache() -> Path:
    """Return the folder for what can be had again: `$XDG_CACHE_HOME/facediffuser`, or `~/.cache/facediffuser`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "facediffuser"
