"""The parts that prepared data is made of: which pictures are in which, their bytes, and whether one is finished.

<output>/run.json                     what is being made: the fingerprint and all that goes into it; written first
<output>/checks/part-00000.json       perceptual hashes (only for sources without splits)
<output>/stages/                      what each stage found (stages.py); may be elsewhere and serve several outputs
<output>/{train,test,rejected}/part-00000.parquet
<output>/parts/part-00000.json        written last of a part: its counts and its files with their checksums
<output>/manifest.json, README.md, card/    written last of all
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from facediffuser.dataset.encoding import column_paths, parquet_bytes
from facediffuser.errors import InputError
from facediffuser.number_words import counted
from facediffuser.preprocess.prepared_schema import FINGERPRINT_KEY, PREPARED_SCHEMA, REJECTED_SCHEMA, SCHEMA_VERSION
from facediffuser.preprocess.preprocess_settings import PreprocessSettings
from facediffuser.preprocess.source_files import Record
from facediffuser.preprocess.sources import Listing
from facediffuser.runs import Run, differences, fingerprint_of, identity_of, other_run_error
from facediffuser.storage import Store, open_store
from facediffuser.storage.reading import parse_json, reading

RUN, MANIFEST = "run.json", "manifest.json"
REJECTED = "rejected"
ROW_GROUP = 100
# A worker holds the files of a whole part until it is written.
MOST_PART_BYTES = 4 << 30


def run_identity(
    settings: PreprocessSettings, listing: Listing, models: dict[str, str], earlier: dict[str, str]
) -> dict[str, Any]:
    """Return what decides the prepared rows, as a run document.

    Args:
        settings: the settings.
        listing: the source's pictures.
        models: digests by option.
        earlier: the sides that are kept, by id.
    """
    return {
        "schema": SCHEMA_VERSION,
        "source": {"format": listing.format, "pictures": len(listing.records), "digest": listing.digest},
        "settings": settings.content(),
        "models": models,
        "earlier": hashlib.sha256(repr(sorted(earlier.items())).encode()).hexdigest() if earlier else None,
    }


def split_into_parts(records: Sequence[Record], part_size: int) -> list[list[Record]]:
    """Return the records of each part: `part_size` of them in the order of the source, fewer in the last."""
    return [list(records[start : start + part_size]) for start in range(0, len(records), part_size)]


def require_parts_fit(url: str, parts: Sequence[Sequence[Record]]) -> None:
    """Check that each part's files fit the memory of a worker, which holds all of them.

    Args:
        url: the source, for the error.
        parts: the records of each part.

    Raises:
        InputError: the files of a part have more than MOST_PART_BYTES.
    """
    for records in parts:
        size = sum(record.bytes for record in records)
        if size > MOST_PART_BYTES:
            raise InputError(
                f"{url}: {counted(len(records), 'picture')} from {records[0].image} on take {size:,} bytes, a part holds at most "
                f"{MOST_PART_BYTES:,}; lower --part-size"
            )


def part_name(folder: str, part: int, ending: str) -> str:
    """Return the key of one of a part's files, such as `train/part-00000.parquet`; `ending` is without its dot."""
    return f"{folder}/part-{part:05d}.{ending}"


def to_json(content: Any) -> bytes:
    """Return JSON for people: indented, the same bytes for the same content."""
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def encode_part(rows: Sequence[dict[str, Any]], schema: pa.Schema, fingerprint: str) -> bytes:
    """Return the rows as the bytes of a Parquet file: row groups of 100, images as they are, the rest zstd.

    Args:
        rows: a dictionary by column for each row.
        schema: PREPARED_SCHEMA or REJECTED_SCHEMA.
        fingerprint: the run's, for the footer.
    """
    schema = schema.with_metadata({**schema.metadata, FINGERPRINT_KEY: fingerprint.encode()})
    plain = ("image.bytes", "segmentation")
    others = [path for path in column_paths(schema) if path not in plain]
    return parquet_bytes(
        pa.Table.from_pylist(list(rows), schema),
        row_group_size=ROW_GROUP,
        compression=dict.fromkeys(plain, "none") | dict.fromkeys(others, "zstd"),
        use_dictionary=others,
        write_statistics=others,
    )


def put_part(store: Store, part: int, fingerprint: str, rows: dict[str, list[dict]], facts: dict[str, Any]) -> dict:
    """Write a part's files and, last, its `parts/part-*.json`.

    The same rows give the same bytes, so doing it twice changes nothing.

    Args:
        store: the output.
        part: the part's number, from 0.
        fingerprint: the run's.
        rows: the rows by folder: train, test, rejected. A folder without rows gets no file.
        facts: counts and provenance for the part's JSON.

    Returns:
        The content of the part's JSON.
    """
    files = {}
    for folder, content in rows.items():
        if content:
            schema = REJECTED_SCHEMA if folder == REJECTED else PREPARED_SCHEMA
            data = encode_part(content, schema, fingerprint)
            key = part_name(folder, part, "parquet")
            store.put(key, data)
            files[key] = {"rows": len(content), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    summary = {"part": part, "fingerprint": fingerprint, "files": files, **facts}
    store.put(part_name("parts", part, "json"), to_json(summary))
    return summary


def begin_or_resume_prepared(store: Store, identity: dict[str, Any], listing: Listing) -> tuple[Run, dict[str, int]]:
    """Return the run to go on with, and the sizes by key of what is in the store; `run.json` is written when it is empty.

    Args:
        store: the output.
        identity: this run's document.
        listing: this run's pictures: the error names those that differ.

    Raises:
        InputError: the store holds something else or another run; nothing is written.
    """
    there = require_startable(store, identity, listing)
    if there:
        document = parse_json(store.get(RUN))
        return Run({name: document[name] for name in document if name != "fingerprint"}, document["fingerprint"]), there
    run = Run(identity, fingerprint_of(identity))
    store.put(RUN, to_json({"fingerprint": run.fingerprint, **identity}))
    return run, there


def require_startable(store: Store, identity: dict[str, Any], listing: Listing | None = None) -> dict[str, int]:
    """Check that the store is empty or holds the same run.

    Args:
        store: the output.
        identity: what decides the rows; it may be a part of a run's document, then that part is compared.
        listing: the source's pictures, by which a difference is explained.

    Returns:
        The sizes in bytes, by key, of what is in the store.

    Raises:
        InputError: the store holds something else, a damaged `run.json`, or another run; the last says what differs.
    """
    there = {info.key: info.size for info in store.list()}
    if not there:
        return there
    if RUN not in there:
        example = next(iter(there))
        raise InputError(f"{store.url}: holds something else ({example}); give an empty or a new --output")
    try:
        document = parse_json(store.get(RUN))
        # A damaged document may lack what a later step needs.
        earlier = {name: identity_of(document)[name] for name in identity} if document["fingerprint"] else {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{store.url_of(RUN)}: damaged; give a new --output") from error
    # Through JSON, as the earlier one went.
    here = parse_json(json.dumps(identity))
    if earlier != here:
        found = explain_differences(store, earlier, here, listing)
        raise other_run_error(store.url, found, "give a new --output or the same settings")
    return there


def explain_differences(
    store: Store, earlier: dict[str, Any], now: dict[str, Any], listing: Listing | None = None
) -> list[str]:
    """Return a phrase for each thing that differs between two runs: pictures and models by name, settings by value.

    Args:
        store: the output, where the earlier run's parts name its pictures.
        earlier: the identity recorded there.
        now: the identity of this run.
        listing: this run's pictures; without it pictures are compared by number only.
    """
    lines = []
    if earlier.get("source") != now.get("source"):
        lines.append(_source_difference(store, earlier["source"], now["source"], listing))
    models, others = earlier.get("models") or {}, now.get("models") or {}
    for option in sorted(models.keys() | others.keys()):
        if models.get(option) != others.get(option):
            missing = " (none there)" if option not in models else " (none now)" if option not in others else ""
            lines.append(f"the {option} is another model or has other weights{missing}")
    if earlier.get("earlier") != now.get("earlier"):
        lines.append(
            "--earlier gives other pictures or other sides" if now.get("earlier") else "--earlier was given there"
        )
    named = ("source", "models", "earlier")
    theirs, ours = ({k: v for k, v in run.items() if k not in named} for run in (earlier, now))
    return lines + differences(theirs, ours)


def _source_difference(store: Store, earlier: dict[str, Any], now: dict[str, Any], listing: Listing | None) -> str:
    counts = f"source differs ({counted(earlier['pictures'], 'picture')} there, {now['pictures']:,} now)"
    if earlier["format"] != now["format"]:
        return f"{counts}: format {earlier['format']} there, {now['format']} now"
    if listing is None:
        return counts
    known, ids = prepared_ids(store), {record.image_id for record in listing.records}
    gone = next((name for name in known if name not in ids), None)
    # Only a finished run has all of its pictures in its parts.
    seen = set(known)
    new = next((name for name in sorted(ids) if name not in seen), None) if len(known) == earlier["pictures"] else None
    sides = [
        f"{name} is only {side}" for name, side in ((gone, "there"), (new, "in the source now")) if name is not None
    ]
    if not sides:
        same = earlier["pictures"] == now["pictures"] == len(known)
        sides = (
            ["the pictures have the same names, their files, sizes or splits differ"]
            if same
            else ["other pictures or files"]
        )
    return f"{counts}: {', '.join(sides)}"


def prepared_ids(store: Store) -> list[str]:
    """Return the ids of the pictures in the parts that are there, prepared or rejected."""
    ids: list[str] = []
    for info in store.list():
        if info.key.startswith(("train/", "test/", f"{REJECTED}/")) and info.key.endswith(".parquet"):
            ids += _read_columns(store, info.key, ["image_id"])["image_id"].to_pylist()
    return ids


def _read_columns(store: Store, key: str, names: Sequence[str]) -> pa.Table:
    with reading(store.url_of(key), "prepared Parquet", "put it back, or prepare the pictures again"):
        with store.open(key) as source, pq.ParquetFile(source) as file:
            absent = [name for name in names if name not in file.schema_arrow.names]
            if absent:
                raise InputError(
                    f"{store.url_of(key)}: no column {absent[0]!r}; give what `facediffuser preprocess` wrote"
                )
            return file.read(columns=list(names))


def earlier_splits(url: str) -> dict[str, str]:
    """Return the side, `train` or `test`, of each picture in prepared data, by its id.

    Raises:
        InputError: there is no finished prepared data at the URL.
    """
    store = open_store(url)
    try:
        keys = [key for key in parse_json(store.get(MANIFEST))["files"] if not key.startswith(REJECTED)]
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--earlier {url}: no finished output of `facediffuser preprocess` there") from error
    sides: dict[str, str] = {}
    for key in keys:
        if not store.exists(key):
            raise InputError(f"--earlier {store.url_of(key)}: missing; put it back, or prepare the pictures again")
        table = _read_columns(store, key, ["image_id", "split"])
        sides.update(zip(table["image_id"].to_pylist(), table["split"].to_pylist(), strict=True))
    return sides


def finished_parts(store: Store, there: dict[str, int], fingerprint: str, count: int) -> dict[int, dict[str, Any]]:
    """Return the summaries of the parts that are whole: their JSON is there, and every file it names at its size.

    Args:
        store: the output.
        there: sizes in bytes by key, as `require_startable` returns them.
        fingerprint: the run's; parts of another are not finished.
        count: how many parts the run has.

    Returns:
        Summaries by part, from 0.
    """
    finished = {}
    for part in range(count):
        key = part_name("parts", part, "json")
        if key not in there:
            continue
        try:
            summary = parse_json(store.get(key))
            whole = all(there.get(name) == file["bytes"] for name, file in summary["files"].items())
            whole = whole and summary["fingerprint"] == fingerprint
        except (ValueError, KeyError, TypeError):
            whole = False  # not as this program writes it: it is prepared once more
        if whole:
            finished[part] = summary
    return finished
