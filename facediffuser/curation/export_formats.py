"""The files of an export: what a chunk of rows becomes in each format. The same rows give the same bytes."""

import io
import json
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facediffuser.curation.selection import Chunk

SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp"}
LEFT_OUT = ("image", "embedding")
LMDB_PAGE = 4096


@dataclass(frozen=True)
class Sample:
    """One image that is exported: its folder or label, its name, its file, and what is known of it."""

    label: str
    name: str
    data: bytes
    facts: dict[str, Any]

    @property
    def suffix(self) -> str:
        """The ending of its file, with its dot."""
        return next((suffix for start, suffix in SUFFIXES.items() if self.data.startswith(start)), ".png")


def sample_of_row(row: dict[str, Any]) -> Sample:
    """Return a row's whole image; its label are its subjects, joined by `+`."""
    name = row["sample_id"]
    return Sample(name.partition("~")[0], name, row["image"]["bytes"], facts_of_row(row))


def facts_of_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row's columns as JSON holds them: without the image and the embeddings of faces."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(one) for name, one in value.items() if name not in LEFT_OUT}
        return [plain(one) for one in value] if isinstance(value, list) else value

    return plain({name: value for name, value in row.items() if name not in LEFT_OUT})


def json_bytes(value: Any) -> bytes:
    """Return a value as one line of JSON."""
    return (json.dumps(value, ensure_ascii=False, sort_keys=True, default=str) + "\n").encode()


def write_tar(chunk: Chunk, samples: Iterable[Sample]) -> Iterator[tuple[str, bytes]]:
    """Yield a WebDataset tar: of each sample the image, its columns as .json and its prompt as .txt."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, sample in enumerate(samples, chunk.first):
            facts = {**sample.facts, "label": sample.label}
            prompt = str(sample.facts.get("prompt", "")).encode()
            # A name has no dot: readers take what follows the first one for the kind of file.
            for suffix, data in ((sample.suffix, sample.data), (".json", json_bytes(facts)), (".txt", prompt)):
                info = tarfile.TarInfo(f"{number:09d}{suffix}")
                info.size, info.mode = len(data), 0o644
                tar.addfile(info, io.BytesIO(data))
    yield f"{chunk.split}-{chunk.number:06d}.tar", sink.getvalue()


def write_folders(chunk: Chunk, samples: Iterable[Sample]) -> Iterator[tuple[str, bytes]]:
    """Yield an image file of each sample in the folder of its label."""
    for sample in samples:
        yield f"{chunk.split}/{sample.label}/{sample.name}{sample.suffix}", sample.data


def write_lmdb(chunk: Chunk, samples: Iterable[Sample]) -> Iterator[tuple[str, bytes]]:
    """Yield an LMDB: `num-samples`, and `image-%09d`, `label-%09d`, `meta-%09d` of each sample, counted from 0."""
    import lmdb

    with tempfile.TemporaryDirectory(prefix="facediffuser-lmdb-") as name:
        folder, packed = Path(name) / "made", Path(name) / "packed"
        packed.mkdir()
        count, size = 0, 1 << 24
        with lmdb.open(str(folder), map_size=size) as database:
            for number, sample in enumerate(samples):
                values = {"image": sample.data, "label": sample.label.encode(), "meta": json_bytes(sample.facts)}
                needed = sum(len(value) + LMDB_PAGE for value in values.values())
                while (database.info()["last_pgno"] + 64) * LMDB_PAGE + 2 * needed > size:
                    size *= 2
                    database.set_mapsize(size)
                with database.begin(write=True) as transaction:
                    for kind, value in values.items():
                        transaction.put(f"{kind}-{number:09d}".encode(), value)
                count = number + 1
            with database.begin(write=True) as transaction:
                transaction.put(b"num-samples", str(count).encode())
            database.copy(str(packed), compact=True)
        yield f"{chunk.split}-{chunk.number:06d}.lmdb/data.mdb", (packed / "data.mdb").read_bytes()


def metadata_lines(samples: Sequence[tuple[str, dict[str, Any]]], split: str) -> bytes:
    """Return the metadata.jsonl of a folder of images, which `datasets` reads: a line for each file."""
    return b"".join(json_bytes({"file_name": key.removeprefix(f"{split}/"), **facts}) for key, facts in samples)


WRITERS = {
    "webdataset": write_tar,
    "imagefolder": write_folders,
    "lmdb": write_lmdb,
    "faces": write_folders,
    "faces-lmdb": write_lmdb,
}
