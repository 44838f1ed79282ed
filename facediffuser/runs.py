"""A resumable run: what decides its output (identity), how it was computed (provenance), and how two of them differ.

Every object that a run writes is marked with the run's fingerprint, the SHA-256 of its run document. The document holds
the identity: inputs, settings, digests of models and scorers, device kind. An output that holds a run of another
identity is refused. Provenance (versions of libraries and code, threads, hardware) is recorded with each shard and
compared when a run is resumed: another one is one line of warning, or refused with `exact`.

Documents written before provenance was kept apart have `libraries`, `code` and the number of threads among the rest.
Such a run is resumed under its own document and fingerprint, so that the shards it has finished count.
"""

import functools
import hashlib
import importlib.metadata
import json
import logging
import platform
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facediffuser import __version__
from facediffuser.errors import InputError, first_few
from facediffuser.storage.reading import parse_json

logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "diffusers", "transformers", "facenet-pytorch", "pillow", "numpy", "pyarrow")
SOFTWARE = ("libraries", "code")
HARDWARE = ("hardware", "driver")
# Settings that are provenance: the last digits of a model's output on a CPU depend on them, and nothing else.
THREAD_SETTINGS = ("threads", "cpus_per_worker")

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A run as its objects are marked: the document and its fingerprint."""

    document: Document
    fingerprint: str


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint_of(document: Document) -> str:
    """Return the SHA-256 of a run document, hexadecimal."""
    return hashlib.sha256(canonical_json(document).encode()).hexdigest()


def has_fingerprint(document: Any, fingerprint: str) -> bool:
    """Return whether a document is the one of a fingerprint; False for anything that no run's document can be."""
    try:
        return isinstance(document, Mapping) and fingerprint_of(document) == fingerprint
    except ValueError:  # NaN or infinity, which no run's document holds
        return False


# --- identity ---------------------------------------------------------------------------------------------------------


def identity_of(document: Document) -> dict[str, Any]:
    """Return the part of a run document, of any version, that decides the output."""
    identity = {name: value for name, value in document.items() if name not in (*SOFTWARE, "fingerprint", "provenance")}
    if isinstance(settings := identity.get("settings"), Mapping):
        identity["settings"] = {name: value for name, value in settings.items() if name not in THREAD_SETTINGS}
    return identity


def begin_or_resume(identity: Document, there: Run | None) -> Run | None:
    """Return the run to go on with, None when the output holds a run of another identity.

    Args:
        identity: this run's document.
        there: the run that the output holds, if any. One of the same identity is resumed under its own fingerprint.
    """
    new = Run(dict(identity), fingerprint_of(identity))
    if there is None or there.fingerprint == new.fingerprint:
        return new
    return there if identity_of(there.document) == identity_of(identity) else None


def differences(there: Document, here: Document, prefix: str = "") -> list[str]:
    """Return how two documents differ, as "settings.steps 30 there, 50 here"; long values are shortened.

    Args:
        there: one document, or a part of it.
        here: the other.
        prefix: the dotted name of that part, with a dot at its end.
    """
    found = []
    for name in sorted(there.keys() | here.keys()):
        one, two = there.get(name), here.get(name)
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            found += differences(one, two, f"{prefix}{name}.")
        elif one != two:
            found.append(f"{prefix}{name} {_short(one)} there, {_short(two)} here")
    return found


def shown(found: Sequence[str]) -> str:
    """Return differences in one phrase: the first four, and how many more there are."""
    return first_few(found, 4, "; ")


def other_run_error(url: str, found: Sequence[str], how: str) -> InputError:
    """Return the error for an output that holds another run.

    Args:
        url: the output.
        found: the differences, as `differences` returns them.
        how: how to fix it, for example "give another output".
    """
    return InputError(f"{url}: holds another run ({shown(found) or 'its fingerprint'}); {how}")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 40 else f"{text[:12]}..."


# --- provenance -------------------------------------------------------------------------------------------------------


def software() -> dict[str, Any]:
    """Return the versions of this code and of the libraries that pixels pass through."""
    return {"code": __version__, "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES}}


def current_provenance(threads: int | None, gpu: str | None = None) -> dict[str, Any]:
    """Return what this process computes with.

    Args:
        threads: CPU threads of a worker; they do not count on a GPU.
        gpu: the model of the GPU; None where it computes on the CPU.

    Returns:
        code: the version of this package; libraries: version by name; threads; hardware: the model of GPU or CPU;
        driver: the version of the GPU's driver, None on a CPU. Nothing in it names a machine.
    """
    return {
        **software(),
        "threads": None if gpu else threads,
        "hardware": gpu or _cpu_name(),
        "driver": _gpu_driver() if gpu else None,
    }


def provenance_of(document: Document) -> dict[str, Any]:
    """Return the provenance that a run document of an earlier version has among the rest; empty in a newer one."""
    found = {name: document[name] for name in SOFTWARE if name in document}
    settings = document.get("settings") or {}
    threads = [settings[name] for name in THREAD_SETTINGS if isinstance(settings, Mapping) and name in settings]
    return found | ({"threads": threads[0]} if found and threads else {})


def provenance_differences(there: Document, here: Document) -> list[str]:
    """Return how two provenances differ; what only one of them says is no difference."""
    both = there.keys() & here.keys()
    return differences({name: there[name] for name in both}, {name: here[name] for name in both})


def check_provenance(url: str, recorded: Sequence[Document], here: Document, exact: bool) -> None:
    """Compare what a run was computed with so far and what it would be computed with now.

    Args:
        url: the output, for the message.
        recorded: the provenances of what is finished; none when nothing is.
        here: the provenance now, or the known part of it.
        exact: refuse another provenance instead of warning of it.

    Raises:
        InputError: the provenance differs and `exact` is set.
    """
    found = next((found for one in recorded if (found := provenance_differences(one, here))), [])
    if not found:
        return
    line = f"{url}: was made so far with other software or hardware ({shown(found)})"
    if exact:
        raise InputError(f"{line}; use what it was made with, or leave --exact out")
    logger.warning("%s; the last bits of what is made now may differ", line)


def different_provenances(each: Iterable[Document]) -> list[Document]:
    """Return the different ones of some provenances, in the order in which they first come; empty ones are left out."""
    found: list[Document] = []
    for one in each:
        if one and one not in found:
            found.append(one)
    return found


def count_provenances(each: Sequence[Document | None], noun: str) -> list[dict[str, Any]]:
    """Return the different provenances among objects, most frequent first, with how many objects have each.

    Args:
        each: the provenance of every object; None where it is not known.
        noun: the name of the count in the result, for example "shards".
    """
    counts = Counter(canonical_json(one) for one in each if one)
    order = sorted(counts, key=lambda text: (-counts[text], text))
    return [{noun: counts[text], **parse_json(text)} for text in order]


@functools.cache
def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


@functools.cache
def _gpu_driver() -> str | None:
    try:
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return found[1] if found else None
