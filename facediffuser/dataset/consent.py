"""What the people of a dataset agreed to: optional columns of subjects.csv, kept in subjects.parquet and shown on the card."""

import datetime
from collections import Counter
from collections.abc import Iterable, Sequence

import pyarrow as pa

from facediffuser.dataset.inputs import TERMS, Subject
from facediffuser.dataset.reading import open_parquet
from facediffuser.dataset.schema import SUBJECTS_KEY, SUBJECTS_SCHEMA
from facediffuser.errors import InputError, first_few
from facediffuser.number_words import counted
from facediffuser.storage import Store

SHOWN_VALUES = 4


def subjects_schema(subjects: Iterable[Subject]) -> pa.Schema:
    """Return the columns of a run's references: those of SUBJECTS_SCHEMA, and the terms where any subject has some."""
    if not any(subject.terms for subject in subjects):
        return SUBJECTS_SCHEMA
    return pa.schema([*SUBJECTS_SCHEMA, *(pa.field(name, pa.string()) for name in TERMS)])


def require_consent(subjects: Sequence[Subject], url: str, today: datetime.date | None = None) -> None:
    """Check that every subject's consent is given and has not expired.

    Args:
        subjects: of the run.
        url: where they are, for the message.
        today: the day to compare `expires` with; by default this day, UTC.

    Raises:
        InputError: `consent` in subjects.csv is empty or has expired; the error names the subjects.
    """
    day = (today or _today()).isoformat()
    without = [subject.subject_id for subject in subjects if not dict(subject.terms).get("consent")]
    expired = [subject.subject_id for subject in subjects if (dict(subject.terms).get("expires") or day) < day]
    for names, what in ((without, "no consent"), (expired, f"a consent that expired before {day}")):
        if names:
            raise InputError(f"{url}: {counted(len(names), 'subject')} with {what} in subjects.csv ({first_few(names)}); add "
                             "it, or take them out of the folder")  # fmt: skip


def recorded_terms(store: Store) -> dict[str, dict[str, str | None]]:
    """Return the terms of each subject of a dataset that has any; empty where subjects.parquet has no such columns."""
    if not store.exists(SUBJECTS_KEY):
        return {}
    with open_parquet(store, SUBJECTS_KEY) as file:
        names = [name for name in TERMS if name in file.schema_arrow.names]
        rows = file.read(columns=["subject_id", *names]).to_pylist() if names else []
    return {row["subject_id"]: {name: row[name] for name in names} for row in rows}


def expired_subjects(store: Store, today: datetime.date | None = None) -> list[str]:
    """Return a line for each subject of a dataset whose consent has expired.

    Args:
        store: the dataset.
        today: the day to compare with; None for the machine's, in UTC.
    """
    day = (today or _today()).isoformat()
    return [
        f"{SUBJECTS_KEY}: consent of {name} expired on {terms['expires']}; `facediffuser retract` takes them out"
        for name, terms in sorted(recorded_terms(store).items())
        if (terms.get("expires") or day) < day
    ]


def consent_facts(store: Store) -> list[tuple[str, str]]:
    """Return what the card says of consent, as (name, value) lines; none for a dataset without terms."""
    terms = recorded_terms(store)
    if not terms:
        return []
    given = [one for one in terms.values() if one.get("consent")]
    facts = [("consent", f"recorded for {len(given):,} of {counted(len(terms), 'subject')}")]
    for name, title in (("licence", "licences of the references"), ("source", "sources of the references")):
        counts = Counter(value for one in terms.values() if (value := one.get(name)))
        shown = ", ".join(f"{value} ({count:,})" for value, count in sorted(counts.items())[:SHOWN_VALUES])
        facts += [(title, shown + (", ..." if len(counts) > SHOWN_VALUES else ""))] if counts else []
    dates = sorted(value for one in terms.values() if (value := one.get("expires")))
    return facts + ([("first consent expires", dates[0])] if dates else [])


def _today() -> datetime.date:
    return datetime.datetime.now(datetime.UTC).date()
