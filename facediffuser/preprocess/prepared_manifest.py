"""The manifest of prepared data: what was made of what, and every file's rows, bytes and checksum."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from facediffuser import __version__
from facediffuser.number_words import counted
from facediffuser.preprocess.parts import REJECTED
from facediffuser.preprocess.sources import Listing
from facediffuser.preprocess.splits import TEST, TRAIN
from facediffuser.runs import Run, count_provenances, provenance_of


def build_manifest(run: Run, listing: Listing, summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the manifest of a run.

    Args:
        run: the run, with its document.
        listing: the pictures that went in.
        summaries: those of all parts.

    Raises:
        RuntimeError: fewer or more rows came out than pictures went in.
    """
    counts: Counter[str] = Counter({TRAIN: 0, TEST: 0, REJECTED: 0})
    rejected: Counter[str] = Counter()
    facts: dict[str, Counter[int]] = {}
    files: dict[str, Any] = {}
    for summary in summaries:
        counts.update(summary["counts"])
        rejected.update(summary["rejected"])
        files.update(summary["files"])
        for name, table in summary["facts"].items():
            facts.setdefault(name, Counter()).update({int(value): count for value, count in table.items()})
    pictures = len(listing.records)
    if pictures != counts.total():
        raise RuntimeError(f"{counted(pictures, 'picture')} went in, {counted(counts.total(), 'row')} came out")
    return {
        "fingerprint": run.fingerprint,
        **run.document,
        "source": {**run.document["source"], "url": listing.url, "ignored_files": listing.ignored},
        "counts": {"pictures": pictures, **counts},
        "rejected": dict(rejected),
        "facts": {name: {str(value): table[value] for value in sorted(table)} for name, table in facts.items()},
        "files": {key: files[key] for key in sorted(files)},
        "facediffuser": __version__,
        "provenances": count_provenances([recorded_provenance(run, summary) for summary in summaries], "parts"),
    }


def recorded_provenance(run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    """Return what a finished part was computed with; of an earlier version what its run document says, or nothing."""
    return summary.get("computed_with") or provenance_of(run.document)
