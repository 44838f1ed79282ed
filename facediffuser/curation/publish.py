"""A finished dataset put on a hub of datasets: object by object as its manifest lists them, what is there already left out."""

import functools
import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from facediffuser.batch_stage import Counts, Results, Stage, Unit, WorkerPool
from facediffuser.curation.curation_settings import PublishSettings
from facediffuser.dataset.added_columns import ADDED_PREFIX
from facediffuser.dataset.certificate import CERTIFICATE_PREFIX
from facediffuser.dataset.manifest import MANIFEST_KEY, Manifest, ObjectEntry, ShardEntry, read_sound_manifest
from facediffuser.dataset.reading import DATA_PREFIX
from facediffuser.dataset.schema import SUBJECTS_KEY
from facediffuser.dataset.seal import CARD_PREFIX, README_KEY
from facediffuser.errors import InputError
from facediffuser.number_words import counted
from facediffuser.storage import open_store
from facediffuser.storage.hub import hub_client, hub_errors, require_repository_name

# Objects of one commit: few commits, and memory for about so many bytes.
COMMIT_BYTES, COMMIT_OBJECTS = 512 << 20, 100
_TARGET = re.compile(r"hf://datasets/([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/?", re.ASCII)

Listed = tuple[str, int, str]
"""Key, bytes and SHA-256 of an object."""


def repository_of(target: str) -> str:
    """Return the `ORG/NAME` of an `hf://datasets/ORG/NAME` URL.

    Raises:
        InputError: it is another URL.
    """
    match = _TARGET.fullmatch(target)
    if match is None:
        raise InputError(f"{target}: no place to publish to; give hf://datasets/ORG/NAME")
    require_repository_name(match[1])
    return match[1]


def listed_objects(settings: PublishSettings) -> tuple[Manifest, list[Listed]]:
    """Return a dataset's manifest and the objects it lists.

    Raises:
        InputError: the dataset is not finished, or its manifest has no digest.
    """
    store = open_store(settings.dataset)
    manifest = read_sound_manifest(store)
    if not manifest.digest:
        raise InputError(f"{store.url}: its manifest does not list everything; `facediffuser card` writes it anew")
    entries: list[ShardEntry | ObjectEntry] = [*manifest.all_shards, *manifest.objects]
    return manifest, [(entry.key, entry.bytes, entry.sha256) for entry in entries]


def publish_stage(settings: PublishSettings) -> Stage:
    """Return the stage that publishes a dataset; its result is the URL of its page.

    The units are commits of some objects each; the manifest and the card are committed last. Objects that the hub has
    with the same SHA-256 are left out, so the same command resumes. Objects of an earlier state that are no longer
    listed are removed.

    Raises:
        InputError: the dataset is not finished, or the target is no repository.
    """
    manifest, objects = listed_objects(settings)
    repository = repository_of(settings.target)
    there = _published_digests(settings, repository)
    missing = [one for one in objects if there.get(one[0]) != one[2] and one[0] != README_KEY]
    units = [Unit(f"commit {number}", len(some), some) for number, some in enumerate(_commits(missing))]
    gone = sorted(key for key in there if key not in {one[0] for one in objects} and key.startswith(_OURS))
    finished = len(objects) - sum(unit.rows for unit in units)
    return Stage(
        "Publish", "objects", {"publish": manifest.digest, "to": repository}, units,
        functools.partial(CommitWorker, settings, repository),
        functools.partial(_finish, settings, repository, gone), finished, WorkerPool(1),
    )  # fmt: skip


_OURS = (DATA_PREFIX, "plan/", ADDED_PREFIX, CARD_PREFIX, CERTIFICATE_PREFIX, SUBJECTS_KEY)


def _commits(objects: Sequence[Listed]) -> Iterator[list[Listed]]:
    some: list[Listed] = []
    for one in objects:
        if some and (len(some) == COMMIT_OBJECTS or sum(size for _, size, _ in some) + one[1] > COMMIT_BYTES):
            yield some
            some = []
        some.append(one)
    if some:
        yield some


def _published_digests(settings: PublishSettings, repository: str) -> dict[str, str]:
    """Make the repository unless it is there; return the SHA-256, or the Git digest, of each of its files."""
    api = hub_client()
    with hub_errors(settings.target):
        api.create_repo(repository, repo_type="dataset", private=settings.private, exist_ok=True)
        found = {}
        for entry in api.list_repo_tree(repository, repo_type="dataset", recursive=True):
            if hasattr(entry, "blob_id"):
                found[entry.path] = entry.lfs.sha256 if entry.lfs else f"git {entry.blob_id}"
    small = {key: value for key, value in found.items() if value.startswith("git ")}
    store = open_store(settings.dataset)
    for key, value in small.items():  # small files have no SHA-256 there: compared by Git's own digest
        try:
            data = store.get(key)
        except (FileNotFoundError, InputError):
            continue
        if value == "git " + hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest():
            found[key] = hashlib.sha256(data).hexdigest()
    return found


class CommitWorker:
    """Puts the objects of one commit after another on the hub."""

    def __init__(self, settings: PublishSettings, repository: str):
        self.settings, self.repository = settings, repository
        self.store = open_store(settings.dataset)

    def __call__(self, unit: Unit) -> Counts:
        files = {}
        for key, _, digest in unit.data:
            data = self.store.get(key)
            if hashlib.sha256(data).hexdigest() != digest:
                raise InputError(f"{self.store.url_of(key)}: is not as its manifest says; run `facediffuser repair`")
            files[key] = data
        commit(self.settings, self.repository, files, f"Add {counted(len(files), 'object')}")
        return {"objects": len(files), "bytes": sum(map(len, files.values()))}


def commit(
    settings: PublishSettings, repository: str, files: dict[str, bytes], message: str, gone: Sequence[str] = ()
) -> None:
    """Put files on the hub, and remove others, with one commit.

    Args:
        settings: name the target, for errors.
        repository: `ORG/NAME`.
        files: bytes by key.
        message: the commit's.
        gone: keys to remove.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[Any] = [CommitOperationAdd(key, data) for key, data in files.items()]
    operations += [CommitOperationDelete(key) for key in gone]
    with hub_errors(settings.target):
        hub_client().create_commit(repository, operations, commit_message=message, repo_type="dataset")


def _finish(settings: PublishSettings, repository: str, gone: Sequence[str], results: Results) -> str:
    store = open_store(settings.dataset)
    files = {README_KEY: store.get(README_KEY), MANIFEST_KEY: store.get(MANIFEST_KEY)}
    commit(settings, repository, files, "Card and manifest", gone)
    return f"{hub_client().endpoint}/datasets/{repository}"
