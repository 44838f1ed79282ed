"""The certificate of a run in fast mode: a sample of its rows, each beside the same row made in exact mode.

It lies apart from the rows, in `certificate/`: parts of a few rows as Parquet, the unit of work and of resuming, and
`certificate.json` with what they say together. `dataset_certificate` reads the latter. Rows that were added to a dataset
have a certificate of their own, which carries the name of the dataset's part in its keys, as shards do.
"""

import hashlib
import heapq
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from facediffuser.dataset.encoding import column_paths, parquet_bytes
from facediffuser.dataset.plan import Layout
from facediffuser.dataset.reading import row_groups
from facediffuser.dataset.schema import IMAGE
from facediffuser.errors import InputError
from facediffuser.storage import Store
from facediffuser.storage.reading import parse_json

CERTIFICATE_PREFIX = "certificate/"
SHARE, FEWEST, MOST = 0.01, 64, 1000
FEWEST_PER_PART = 16
IMAGE_BYTES = "image.bytes"

# `image` and what starts with exact_ are of the image in exact mode, what starts with fast_ of the dataset's row. Null
# where one of the two failed.
CERTIFICATE_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("subject_ids", pa.list_(pa.string()), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("image", IMAGE),
        pa.field("image_sha256", pa.string()),
        pa.field("exact_ip", pa.float32()),
        pa.field("exact_pc", pa.float32()),
        pa.field("exact_faces", pa.int32()),
        pa.field("fast_ip", pa.float32()),
        pa.field("fast_pc", pa.float32()),
        pa.field("fast_faces", pa.int32()),
        # The share of the latent's cells that another model decided in most of the fused steps, 0..1.
        pa.field("mask_cells", pa.float32()),
        pa.field("ssim", pa.float32()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
    ]
)


def sample_size(rows: int) -> int:
    """Return how many rows of a run are made in exact mode, too: 1%, at least 64 and at most 1,000, never more than all."""
    return min(rows, max(FEWEST, min(MOST, -(-rows // round(1 / SHARE)))))


def choose_sample(store: Store, layout: Layout) -> list[tuple[int, int]]:
    """Return the rows of the sample, in the plan's order.

    They are those whose sample_id has the smallest hashes: the same rows for the same plan, whatever their prompts and
    subjects. Memory does not grow with the rows.

    Args:
        store: the dataset with its plan.
        layout: how the plan is cut into shards.

    Returns:
        (shard, place in it) of each row, both from 0.
    """

    def hashed() -> Iterator[tuple[bytes, int, int]]:
        for part in range(layout.parts):
            for _, group, rows in row_groups(store, [layout.part_key(part)], ["sample_id"]):
                for place, name in enumerate(rows["sample_id"].to_pylist()):
                    digest = hashlib.blake2b(f"certificate\0{name}".encode(), digest_size=16).digest()
                    yield digest, part * layout.shards_per_part + group, place

    chosen = heapq.nsmallest(sample_size(layout.rows), hashed())
    return sorted((shard, place) for _, shard, place in chosen)


def rows_per_part(batch_size: int) -> int:
    """Return how many rows of the sample a part has: at least as many as are denoised together."""
    return max(FEWEST_PER_PART, batch_size)


def part_keys(rows: int, per_part: int = FEWEST_PER_PART, name: str = "") -> list[str]:
    """Return the keys of the certificate's parts.

    Args:
        rows: the rows of the sample.
        per_part: the rows of a part; the last one has what remains.
        name: the part of the dataset that it is of, "" for the first one.
    """
    parts, infix = -(-rows // per_part), f"{name}-" if name else ""
    return [f"{CERTIFICATE_PREFIX}part-{infix}{part:04d}-of-{parts:04d}.parquet" for part in range(parts)]


def summary_key(name: str = "") -> str:
    """Return the key of what the certificate of a dataset's part says."""
    return f"{CERTIFICATE_PREFIX}certificate{f'-{name}' if name else ''}.json"


def certified_part(key: str) -> str | None:
    """Return the name of the dataset's part that an object of a certificate is of; None where it is of no certificate."""
    match = re.fullmatch(
        rf"{CERTIFICATE_PREFIX}(?:part-(?:(p\d+)-)?\d+-of-\d+\.parquet|certificate(?:-(p\d+))?\.json)", key
    )
    return (match[1] or match[2] or "") if match else None


def renamed_key(key: str, name: str) -> str:
    """Return the key that an object of a certificate has where the part of the dataset has another name."""
    _, _, rest = key.removeprefix(CERTIFICATE_PREFIX).partition("-")
    if key.endswith(".json"):
        return summary_key(name)
    rest = re.sub(r"^p\d+-", "", rest)
    return f"{CERTIFICATE_PREFIX}part-{name}-{rest}" if name else f"{CERTIFICATE_PREFIX}part-{rest}"


def summary_bytes(summary: Mapping[str, Any]) -> bytes:
    """Return what a certificate says as the object of `summary_key`."""
    return (json.dumps(summary, indent=1) + "\n").encode()


def stats_key(key: str) -> str:
    """Return the key of the timings of a part: beside those of the shards, for they are others at every run."""
    return f"stats/{key.removeprefix(CERTIFICATE_PREFIX).removesuffix('.parquet')}.json".replace("part", "certificate")


def encode_rows(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> bytes:
    """Return a part's Parquet; the same rows give the same bytes.

    Args:
        rows: a dictionary by column for each row.
        schema: CERTIFICATE_SCHEMA with the run's marks.
    """
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
    others = [path for path in column_paths(CERTIFICATE_SCHEMA) if path != IMAGE_BYTES]
    return parquet_bytes(
        table, compression={IMAGE_BYTES: "none"} | dict.fromkeys(others, "zstd"), write_statistics=others
    )


def dataset_certificates(store: Store) -> dict[str, dict[str, Any]]:
    """Return what the certificates of a dataset say, by the name of the part that each is of.

    Raises:
        InputError: one cannot be read.
    """
    names = [certified_part(info.key) for info in store.list(CERTIFICATE_PREFIX) if info.key.endswith(".json")]
    found = {name: dataset_certificate(store, name) for name in sorted(name for name in names if name is not None)}
    return {name: summary for name, summary in found.items() if summary is not None}


def dataset_certificate(store: Store, name: str = "") -> dict[str, Any] | None:
    """Return what the certificate of a dataset's part says, by default the first one; None where it has none.

    Raises:
        InputError: it cannot be read.
    """
    key = summary_key(name)
    if not store.exists(key):
        return None
    try:
        found = parse_json(store.get(key))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{store.url_of(key)}: not a certificate; remove it and let `generate`, with its options, "
                         "write it again")  # fmt: skip
    return found
